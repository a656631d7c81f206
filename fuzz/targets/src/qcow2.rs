//! QCOW2 images: any bytes, and damage to a sound image.
//!
//! An input that begins like an image is one. Any other is a list of changes to a sound image that is built here, seven bytes
//! each: where (three bytes), what (four).

use image::{ErrorKind, Format, Mapping, OpenOptions};
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
