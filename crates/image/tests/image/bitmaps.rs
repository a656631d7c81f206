//! Persistent bitmaps: what is added, merged and resized says what it should, after a power cut at any moment, too.

use crate::crash::cut_everywhere;
use crate::subject::Subject;
use image::{Bitmap, BitmapAction, Bits, Format, Image, OpenOptions, Surroundings};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::fault::FaultStore;
use store::memory::{MemoryStore, Snapshot};

const SIZE: u64 = (3 << 20) + 512;

async fn open(store: Rc<dyn Store>) -> Rc<dyn Image> {
    let surroundings = Surroundings { no_guest: true, ..Surroundings::default() };
    image::open_in(store, Format::Qcow2, OpenOptions::default(), surroundings).await.unwrap()
}

fn bits(granularity: u8, ranges: &[(u64, u64)]) -> Bits {
    let mut bits = Bits::new(SIZE, granularity);
    for (start, len) in ranges {
        bits.set(GuestRange::new(GuestOffset(*start), *len));
    }
    bits
}

/// What all of them are and say.
async fn all(image: &Rc<dyn Image>) -> Vec<(Bitmap, Vec<(u64, u64)>)> {
    let mut all = Vec::new();
    for bitmap in image.bitmaps().await.unwrap() {
        let mut runs = Vec::new();
        let bits = image.bitmap_bits(&bitmap.name).await.unwrap();
        bits.for_each_run(|run| runs.push((run.start().get(), run.len())));
        all.push((bitmap, runs));
    }
    all
}

fn subjects() -> Vec<Subject> {
    let wide = image::qcow2::Options { refcount_bits: 64, ..image::qcow2::Options::default() };
    vec![Subject::qcow2("512", 512, wide), Subject::qcow2("64k", 65536, image::qcow2::Options::default())]
}

fn lines() -> Vec<BitmapAction> {
    let name = str::to_owned;
    vec![
        BitmapAction::Add(name("one"), 512),
        BitmapAction::Add(name("two"), 65536),
        BitmapAction::Merge(name("one"), bits(9, &[(0, 1), (70_000, 3000), (1 << 20, 1 << 20), (SIZE - 1, 1)])),
        BitmapAction::Merge(name("two"), bits(12, &[(70_000, 1)])),
        BitmapAction::Disable(name("one")),
        BitmapAction::Merge(name("one"), bits(9, &[(0, SIZE)])),
        BitmapAction::Clear(name("two")),
        BitmapAction::Enable(name("one")),
        BitmapAction::Remove(name("two")),
        BitmapAction::Remove(name("one")),
    ]
}

#[test]
fn every_change_may_be_cut_anywhere() {
    for subject in subjects() {
        Sim::new(7).block_on(async {
            let store = MemoryStore::new("marked.img", 0);
            subject.create(store.clone(), SIZE, None).await;
            for action in lines() {
                let before = all(&open(store.clone()).await).await;
                let after = MemoryStore::from_snapshot("after.img", store.snapshot());
                let image = open(after.clone()).await;
                image.bitmap(action.clone()).await.unwrap();
                let expected = all(&image).await;
                image.close().await.unwrap();
                subject.assert_clean(after.clone()).await;
                let act = async |fault: Rc<FaultStore>| {
                    let image = open(fault).await;
                    image.bitmap(action.clone()).await.unwrap();
                    image.close().await.unwrap();
                };
                let look = async |state: Snapshot, what: &str| {
                    let store = MemoryStore::from_snapshot("after-the-cut.img", state);
                    let image = open(store.clone()).await;
                    let found = all(&image).await;
                    assert!(found == before || found == expected, "{}: {action:?}: {what}", subject.name);
                    image.close().await.unwrap();
                    subject.assert_clean_after_a_cut(store).await;
                };
                cut_everywhere(store.snapshot(), 4, act, look).await;
                store.write(layout::HostOffset::ZERO, ring::Iov::from_slice(&after.to_vec()), false).await.unwrap();
            }
            assert!(all(&open(store.clone()).await).await.is_empty());
        });
    }
}

#[test]
fn they_say_what_was_merged_and_follow_the_size() {
    for subject in subjects() {
        Sim::new(7).block_on(async {
            let store = MemoryStore::new("marked.img", 0);
            subject.create(store.clone(), SIZE, None).await;
            let image = open(store.clone()).await;
            for action in &lines()[..4] {
                image.bitmap(action.clone()).await.unwrap();
            }
            let runs = |of: Vec<(Bitmap, Vec<(u64, u64)>)>| of.into_iter().map(|(_, runs)| runs).collect::<Vec<_>>();
            let one = vec![(0, 512), (69_632, 3584), (1 << 20, 1 << 20), (3 << 20, 512)];
            assert_eq!(runs(all(&image).await), [one.clone(), vec![(65536, 65536)]]);
            image.resize(400 << 20).await.unwrap();
            assert_eq!(runs(all(&image).await), [one, vec![(65536, 65536)]]);
            image.resize(70_144).await.unwrap();
            assert_eq!(runs(all(&image).await), [vec![(0, 512), (69_632, 512)], vec![(65536, 4608)]]);
            image.close().await.unwrap();
            subject.assert_clean(store.clone()).await;
            // An older state of another size takes them along, too.
            let image = open(store.clone()).await;
            image.snapshot(image::SnapshotAction::Create("small".to_owned(), (1, 0))).await.unwrap();
            image.resize(400 << 20).await.unwrap();
            image.snapshot(image::SnapshotAction::Apply("small".to_owned())).await.unwrap();
            assert_eq!(runs(all(&image).await), [vec![(0, 512), (69_632, 512)], vec![(65536, 4608)]]);
            image.close().await.unwrap();
            subject.assert_clean(store.clone()).await;
            // They are not what a guest's writes may be told from any more.
            let image = image::open(store, Format::Qcow2, OpenOptions::default()).await.unwrap();
            assert!(image.bitmaps().await.unwrap().iter().all(|bitmap| bitmap.in_use && bitmap.enabled));
            let refused = image.bitmap(BitmapAction::Clear("one".to_owned())).await.unwrap_err();
            assert!(refused.to_string().contains("inconsistent"), "{refused}");
            image.bitmap(BitmapAction::Remove("one".to_owned())).await.unwrap();
            image.close().await.unwrap();
        });
    }
}
