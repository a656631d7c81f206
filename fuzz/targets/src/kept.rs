//! What images keep besides the guest's data: internal snapshots, persistent bitmaps, headers of encryption. Damage to sound
//! images that have them.
//!
//! An input is which image (one byte), what is done with it (one byte), and changes of seven bytes each: a place (a page, and an
//! offset in it), and what stands there.

use crate::guest::Guest;
use image::create::CreateOptions;
use image::{
    BitmapAction, Format, Image, OpenOptions, Passphrase, Repair, SlotChange, SnapshotAction, Surroundings, qcow2,
};
use layout::luks::{HEADER_BYTES, Header, MAGIC};
use ring::sim::Sim;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use store::memory::MemoryStore;

const SECRET: &[u8] = b"open sesame";

const PAGE: usize = 4096;

/// Deriving takes as long as a header says; what would only take long is left out.
const ROUNDS: u32 = 2000;

const SIZE: u64 = 1 << 20;

async fn open(store: Rc<MemoryStore>, format: Format, for_check: bool) -> image::Result<Rc<dyn Image>> {
    let surroundings = Surroundings { passphrase: Some(SECRET), ..Surroundings::default() };
    image::open_in(store, format, OpenOptions { read_only: false, for_check }, surroundings).await
}

/// A sound image: with snapshots and bitmaps, encrypted within QCOW2, or encrypted by itself.
async fn sound(kind: u8) -> Vec<u8> {
    let format = if kind == 2 { Format::Luks } else { Format::Qcow2 };
    let store = MemoryStore::new("sound.img", 0);
    let options = CreateOptions {
        cluster_size: (kind != 2).then_some(PAGE as u64),
        passphrase: (kind > 0).then(|| Passphrase::new(SECRET)),
        iteration_time: Some(Duration::ZERO),
        qcow2: qcow2::Options { encrypted: kind == 1, ..qcow2::Options::default() },
        ..CreateOptions::new(format, SIZE)
    };
    let steps = async {
        image::create::create(store.clone(), &options).await?;
        let guest = Guest::new(open(store.clone(), format, false).await?, &[]);
        if kind == 0 {
            guest.image.bitmap(BitmapAction::Add("one".to_owned(), 4096)).await?;
            guest.image.bitmap(BitmapAction::Add("two".to_owned(), 65536)).await?;
        }
        guest.write(0, &vec![1; 3 * PAGE]).await?;
        if kind == 0 {
            guest.image.snapshot(SnapshotAction::Create("one".to_owned(), (1, 2))).await?;
            guest.write(300_000, &vec![2; PAGE]).await?;
            guest.image.snapshot(SnapshotAction::Create("two".to_owned(), (3, 4))).await?;
        }
        guest.image.close().await
    };
    steps.await.expect("a sound image");
    store.to_vec()
}

thread_local! {
    /// Made once: encrypting takes its time.
    static SOUND: RefCell<[Option<Vec<u8>>; 3]> = const { RefCell::new([None, None, None]) };
}

/// Whether deriving keys would take long, by what the header says.
fn slow(bytes: &[u8]) -> bool {
    let Some(at) = bytes.windows(MAGIC.len()).position(|part| part == MAGIC) else { return false };
    let header = bytes.get(at..at + HEADER_BYTES).and_then(|head| Header::decode(head).ok());
    header.is_some_and(|header| {
        let slots = header.slots.iter().filter(|slot| slot.active);
        slots.map(|slot| slot.iterations).chain([header.digest_iterations]).any(|rounds| rounds > ROUNDS)
    })
}

/// Everything that is kept is looked at, and changed as `what` says.
async fn use_it(image: &Rc<dyn Image>, what: u8) {
    let snapshots = image.snapshots().await.unwrap_or_default();
    let bitmaps = image.bitmaps().await.unwrap_or_default();
    for bitmap in &bitmaps {
        let _ = image.bitmap_bits(&bitmap.name).await;
    }
    let snapshot = snapshots.get(usize::from(what >> 4)).map(|snapshot| snapshot.id.clone()).unwrap_or_default();
    let bitmap = bitmaps.get(usize::from(what >> 4)).map(|bitmap| bitmap.name.clone()).unwrap_or_default();
    let added = SlotChange::Add { slot: None, passphrase: Passphrase::new(b"other"), deriving: Some(Duration::ZERO) };
    let slots = image.key_slots();
    let _ = match (what % 8, slots) {
        (0 | 1, Some(slots)) => slots.change(&added, false).await,
        (2, Some(slots)) => slots.change(&SlotChange::Erase(usize::from(what >> 4), None), false).await,
        (_, Some(slots)) => slots.change(&SlotChange::Forget(Passphrase::new(SECRET)), what & 8 > 0).await,
        (0, None) => image.snapshot(SnapshotAction::Create("three".to_owned(), (5, 6))).await,
        (1, None) => image.snapshot(SnapshotAction::Apply(snapshot)).await,
        (2, None) => image.snapshot(SnapshotAction::Delete(snapshot)).await,
        (3, None) => image.bitmap(BitmapAction::Add("three".to_owned(), 512)).await,
        (4, None) => image.bitmap(BitmapAction::Remove(bitmap)).await,
        (5, None) => image.bitmap(BitmapAction::Clear(bitmap)).await,
        (6, None) => image.bitmap(BitmapAction::Disable(bitmap)).await,
        (_, None) => Ok(()),
    };
}

/// It opens or says why not; whatever is then done ends, in what was asked or in an error, and takes no more room than it may; and
/// what a check called sound before is sound afterwards.
pub(crate) fn kept(input: &[u8]) {
    let [kind, what, changes @ ..] = input else { return };
    let kind = kind % 3;
    Sim::new(3).block_on(async {
        let mut bytes = match SOUND.with_borrow(|sound| sound[usize::from(kind)].clone()) {
            Some(bytes) => bytes,
            None => sound(kind).await,
        };
        SOUND.with_borrow_mut(|sound| sound[usize::from(kind)].get_or_insert_with(|| bytes.clone()).len());
        // Pages of what is kept: of key material most is noise, which is damaged in one way only.
        let pages = if kind == 0 { bytes.len() / PAGE } else { 8 };
        for change in changes.chunks_exact(7) {
            let at =
                usize::from(change[0]) % pages * PAGE + usize::from(change[1]) * 256 % PAGE + usize::from(change[2]);
            let at = at.min(bytes.len() - 4);
            bytes[at..at + 4].copy_from_slice(&change[3..]);
        }
        if slow(&bytes) {
            return;
        }
        let format = if kind == 2 { Format::Luks } else { Format::Qcow2 };
        let store = MemoryStore::from_bytes("damaged.img", &bytes);
        let check = async |store: Rc<MemoryStore>| {
            let image = open(store, format, true).await.ok()?;
            let report = image.check(Repair::None).await.ok();
            let _ = image.close().await;
            report
        };
        let before = check(store.clone()).await;
        let Ok(image) = open(store.clone(), format, false).await else { return };
        use_it(&image, *what).await;
        let guest = Guest::new(Rc::clone(&image), &[]);
        let room = image.size().min(SIZE);
        let _ = guest.read(0, room.min(20_000)).await;
        let _ = guest.write(room / 3, &vec![9; 5000.min(room - room / 3) as usize]).await;
        let closed = guest.image.close().await;
        let most = 3 * bytes.len() as u64 + (8 << 20);
        assert!(store.peek().held() <= most, "{} bytes from {}", store.peek().held(), bytes.len());
        let was_sound = before.is_some_and(|report| report.is_clean());
        if was_sound && closed.is_ok() && kind == 0 {
            let after = check(store).await.expect("it was sound");
            assert!(after.corruptions == 0, "{after:#?}");
        }
    });
}
