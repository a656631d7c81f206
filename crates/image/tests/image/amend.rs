//! Amending an image: it shows the same before and after, also after a power cut at any moment, and is sound for its new kind.

use crate::crash::cut_everywhere;
use crate::guest::Guest;
use crate::subject::Subject;
use image::amend::Amendment;
use image::{BackingRef, Format, Purpose};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::rc::Rc;
use store::fault::FaultStore;
use store::memory::{MemoryStore, Snapshot};

const SIZE: u64 = (2 << 20) + 512;

fn version(version: u32) -> Amendment {
    Amendment { version: Some(version), ..Amendment::default() }
}

fn refcounts(bits: u32) -> Amendment {
    Amendment { refcount_bits: Some(bits), ..Amendment::default() }
}

/// What is done one after the other; each from the state that the one before left.
fn steps() -> Vec<Amendment> {
    vec![
        Amendment { lazy_refcounts: Some(true), ..Amendment::default() },
        refcounts(1),
        refcounts(64),
        refcounts(8),
        Amendment { refcount_bits: Some(16), lazy_refcounts: Some(false), ..Amendment::default() },
        version(2),
        version(3),
        Amendment { version: Some(3), refcount_bits: Some(32), ..Amendment::default() },
        Amendment { version: Some(2), refcount_bits: Some(16), ..Amendment::default() },
    ]
}

/// Data, clusters of zeros with and without a place, and clusters of what lies below.
async fn filled(subject: &Subject, below: &[u8]) -> Rc<MemoryStore> {
    let store = MemoryStore::new("amended.img", 0);
    let backing = BackingRef { name: "below.raw".to_owned(), format: Some(Format::Raw) };
    subject.create(store.clone(), SIZE, Some(backing)).await;
    let guest = Guest::new(subject.open(store.clone()).await.unwrap(), below);
    for n in 0..6_u64 {
        guest.write(n * 300_000, &vec![n as u8 + 1; 70_000 * n as usize / 2 + 700]).await.unwrap();
    }
    let cluster = guest.image.cluster_size();
    for at in [1_u64 << 20, SIZE - 512] {
        let range = GuestRange::new(GuestOffset(at / cluster * cluster), cluster);
        let marks = guest.image.reserve(range, Purpose::Zero).await.unwrap();
        let _ = marks.link(image::Keep::New, |_| false);
    }
    guest.image.close().await.unwrap();
    store
}

#[test]
fn every_change_may_be_cut_anywhere_and_shows_the_same() {
    let below: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8).collect();
    for (name, cluster) in [("512", 512), ("4k", 4096), ("64k", 65536)] {
        let subject = Subject::qcow2(name, cluster, image::qcow2::Options::default());
        Sim::new(3).block_on(async {
            let store = filled(&subject, &below).await;
            let shown = async |store: Rc<MemoryStore>| {
                let guest = Guest::new(subject.open(store).await.unwrap(), &below);
                let all = guest.read_all().await.unwrap();
                guest.image.close().await.unwrap();
                all
            };
            let expected = shown(store.clone()).await;
            for change in steps() {
                let after = MemoryStore::from_snapshot("after.img", store.snapshot());
                let image = subject.open(after.clone()).await.unwrap();
                image.amend(&change).await.unwrap();
                let own = image.info().qcow2.unwrap();
                assert!(change.version.is_none_or(|wanted| wanted == own.version), "{change:?}");
                assert!(change.refcount_bits.is_none_or(|wanted| wanted == own.refcount_bits), "{change:?}");
                assert!(change.lazy_refcounts.is_none_or(|wanted| wanted == own.lazy_refcounts), "{change:?}");
                assert_eq!(image.backing().map(|backing| backing.name).as_deref(), Some("below.raw"));
                // It goes on being written to.
                let guest = Guest::new(Rc::clone(&image), &below);
                let bytes = guest.read_all().await.unwrap();
                guest.write(0, &bytes[..100_000]).await.unwrap();
                image.close().await.unwrap();
                subject.assert_clean(after.clone()).await;
                assert!(shown(after.clone()).await == expected, "{name}: {change:?}");

                let act = async |fault: Rc<FaultStore>| {
                    let image = subject.open(fault).await.unwrap();
                    image.amend(&change).await.unwrap();
                    image.close().await.unwrap();
                };
                let look = async |state: Snapshot, what: &str| {
                    let store = MemoryStore::from_snapshot("after-the-cut.img", state);
                    assert!(shown(store.clone()).await == expected, "{name}: {change:?}: {what}");
                    subject.assert_clean_after_a_cut(store).await;
                };
                cut_everywhere(store.snapshot(), 3, act, look).await;
                let fresh = after.to_vec();
                store::Store::set_size(&*store, 0).await.unwrap();
                store::Store::write(&*store, layout::HostOffset::ZERO, ring::Iov::from_slice(&fresh), false)
                    .await
                    .unwrap();
            }
        });
    }
}

#[test]
fn what_cannot_be_is_told_and_changes_nothing() {
    let wide = image::qcow2::Options { refcount_bits: 32, ..image::qcow2::Options::default() };
    let subject = Subject::qcow2("64k", 65536, wide);
    Sim::new(5).block_on(async {
        let store = filled(&subject, &vec![0; SIZE as usize]).await;
        let image = subject.open(store.clone()).await.unwrap();
        for n in 0..3 {
            image.snapshot(image::SnapshotAction::Create(format!("s{n}"), (1, 0))).await.unwrap();
        }
        image.settle().await.unwrap();
        let before = store.to_vec();
        for (change, text) in [
            (refcounts(1), "Cannot decrease refcount entry width to 1 bits: Cluster at offset 0x"),
            (refcounts(2), "Cannot decrease refcount entry width to 2 bits"),
            (refcounts(3), "power of two"),
            (refcounts(128), "power of two"),
            (version(2), "Refcount widths other than 16 bits require compatibility level 1.1 or above"),
            (Amendment { refcount_bits: Some(16), ..version(2) }, "internal snapshots"),
            (Amendment { lazy_refcounts: Some(true), ..version(2) }, "Lazy refcounts only supported"),
            (Amendment { data_file: Some("x".to_owned()), ..Amendment::default() }, "data-file can only be set"),
            (Amendment { data_file_raw: Some(true), ..Amendment::default() }, "data-file-raw cannot be set"),
        ] {
            let error = image.amend(&change).await.unwrap_err();
            assert!(error.to_string().contains(text), "{change:?}: {error}");
            assert!(store.to_vec() == before, "{change:?}");
        }
        image.amend(&refcounts(4)).await.unwrap();
        image.close().await.unwrap();
        subject.assert_clean(store).await;
    });
}
