//! QCOW2 images: any bytes, and damage to a sound image.
//!
//! An input that begins like an image is one. Any other is a list of changes to a sound image that is built here, seven bytes
//! each: where (three bytes), what (four).

use crate::guest::Guest;
use image::create::CreateOptions;
use image::{CheckReport, ErrorKind, Format, Mapping, OpenOptions, Repair, qcow2};
use layout::qcow2::Header;
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use ring::sim::Sim;
use store::memory::MemoryStore;

const CLUSTER: usize = 4096;

/// Guest bytes that are looked at.
const LOOKED_AT: u64 = 4 << 20;

/// A small image with a cluster of each kind: nothing, data, zeros, zeros with a place, packed (garbage).
fn sound() -> Vec<u8> {
    let mut bytes = vec![0; 6 * CLUSTER];
    let mut put = |at: usize, value: u64, width: usize| {
        bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    };
    put(0, 0x5146_49fb, 4);
    put(4, 3, 4);
    put(20, 12, 4);
    put(24, 1 << 20, 8);
    put(36, 1, 4);
    put(40, CLUSTER as u64, 8);
    put(96, 4, 4);
    put(100, 112, 4);
    put(CLUSTER, (1 << 63) | (2 * CLUSTER as u64), 8);
    for (index, entry) in
        [0, (1 << 63) | (3 * CLUSTER as u64), 1, (4 * CLUSTER as u64) | 1, (1 << 62) | 0x5123].into_iter().enumerate()
    {
        put(2 * CLUSTER + index * 8, entry, 8);
    }
    bytes
}

fn damaged(input: &[u8]) -> Vec<u8> {
    if input.starts_with(&layout::qcow2::MAGIC) {
        return input.to_vec();
    }
    let mut bytes = sound();
    for change in input.chunks_exact(7) {
        let at = u32::from_be_bytes([0, change[0], change[1], change[2]]) as usize % (bytes.len() - 4);
        bytes[at..at + 4].copy_from_slice(&change[3..]);
    }
    bytes
}

/// It opens or says why not; every look-up is within what was asked, and every read ends in bytes or in an error of the image.
pub(crate) fn image(input: &[u8]) {
    let bytes = damaged(input);
    if let Ok(header) = Header::decode(&bytes) {
        assert!(header.size.div_ceil(header.table_reach()) <= u64::from(header.l1_entries));
        assert!(header.backing_name.is_none_or(|name| name.end().get() <= header.cluster_size()));
    }
    Sim::new(3).block_on(async {
        let store = MemoryStore::from_bytes("fuzzed.qcow2", &bytes).read_only();
        let options = OpenOptions { read_only: true, for_check: false };
        let Ok(image) = image::open(store, Format::Qcow2, options).await else { return };
        let mut rest = GuestRange::new(GuestOffset(0), image.size().min(LOOKED_AT));
        while !rest.is_empty() {
            let mapped = match image.lookup(rest) {
                Ok(Some(mapped)) => mapped,
                Ok(None) => match image.load(rest).await {
                    Ok(()) => continue,
                    Err(error) => panic!("memory is always read: {error}"),
                },
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    rest = rest.skip(512);
                    continue;
                }
            };
            assert!(mapped.len > 0 && mapped.len <= rest.len(), "{mapped:?} of {rest}");
            if mapped.mapping == Mapping::Packed {
                let part = rest.first(mapped.len.min(3000));
                let into = Iov::zeroed(part.len() as usize);
                if let Err(error) = image.unpack(part, into).await {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                }
            }
            rest = rest.skip(mapped.len);
        }
        image.close().await.expect("memory closes");
    });
}

/// Sound images of some geometries, with a snapshot and every kind of cluster, made by what is tested.
async fn full(kind: u8) -> Vec<u8> {
    let plain = qcow2::Options::default();
    let (cluster, qcow2) = match kind % 4 {
        0 => (4096, plain),
        1 => (512, qcow2::Options { refcount_bits: 2, ..plain }),
        2 => (16384, qcow2::Options { extended_l2: true, refcount_bits: 64, ..plain }),
        _ => (4096, qcow2::Options { version: 2, ..plain }),
    };
    let store = MemoryStore::new("sound.qcow2", 0);
    let options = CreateOptions { cluster_size: Some(cluster), qcow2, ..CreateOptions::new(Format::Qcow2, 1 << 20) };
    image::create::create(store.clone(), &options).await.expect("a sound image");
    let image = image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await.expect("a sound image");
    let guest = Guest::new(image, &[]);
    let steps = async {
        for n in 0..6_u64 {
            guest.write(n * n * 3 * cluster % (1 << 19), &vec![n as u8 + 1; 2 * cluster as usize]).await?;
        }
        guest.image.write_zeroes(GuestRange::new(GuestOffset(32 * cluster), 2 * cluster), true, true).await?;
        guest.image.pack(GuestOffset(40 * cluster), Iov::from_slice(&vec![7; cluster as usize])).await?;
        guest.image.snapshot(image::SnapshotAction::Create("one".to_owned(), (1, 2))).await?;
        guest.write(0, &vec![9; cluster as usize]).await?;
        guest.image.close().await
    };
    steps.await.expect("a sound image");
    store.to_vec()
}

async fn check(store: std::rc::Rc<MemoryStore>, repair: Repair) -> image::Result<CheckReport> {
    let options = OpenOptions { read_only: repair == Repair::None, for_check: true };
    let image = image::open(store, Format::Qcow2, options).await?;
    let report = image.check(repair).await;
    let _ = image.close().await;
    report
}

/// A damaged image is checked and repaired: what is left is what the repair says is left; what is said to be sound takes writes and
/// stays sound; nothing takes more room than it may.
pub(crate) fn repair(input: &[u8]) {
    let Some((kind, changes)) = input.split_first() else { return };
    Sim::new(3).block_on(async {
        let mut bytes = full(*kind).await;
        for change in changes.chunks_exact(7) {
            let at = u32::from_be_bytes([0, change[0], change[1], change[2]]) as usize % (bytes.len() - 4);
            bytes[at..at + 4].copy_from_slice(&change[3..]);
        }
        let store = MemoryStore::from_bytes("damaged.qcow2", &bytes);
        let Ok(found) = check(store.clone(), Repair::None).await else { return };
        let Ok(report) = check(store.clone(), Repair::All).await else { return };
        let most = 3 * bytes.len() as u64 + (8 << 20);
        assert!(store.peek().held() <= most, "{} bytes from {}", store.peek().held(), bytes.len());
        let again = check(store.clone(), Repair::None).await.expect("it was opened before");
        assert_eq!(
            (again.corruptions, again.leaks, again.check_errors),
            (report.corruptions, report.leaks, report.check_errors),
            "found {found:#?}\nrepaired {report:#?}\nagain {again:#?}"
        );
        if !again.is_clean() {
            return;
        }
        let image = image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await;
        let Ok(image) = image else { return };
        let guest = Guest::new(image, &[]);
        let room = guest.image.size().min(1 << 20);
        for at in [0, room / 2, room.saturating_sub(5000)] {
            // What is packed badly cannot be filled around; everything else can be written.
            let _ = guest.write(at, &vec![0xfe; 5000.min(room - at) as usize]).await;
        }
        if guest.image.close().await.is_ok() {
            let end = check(store, Repair::None).await.expect("it was opened before");
            // Where two entries led to one cluster and one of them was written through, the other is the only one now and does
            // not say so: it is copied once more than it need be.
            let once = |message: &&String| message.contains("OFLAG_COPIED") && message.ends_with("refcount=1");
            let harmless = end.messages.iter().filter(once).count() as u64;
            assert!(end.corruptions == harmless && end.leaks == 0, "{end:#?}");
        }
    });
}
