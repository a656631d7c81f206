//! The contract of `Store`, clause by clause.

use crate::beds::{on_every_store, on_every_store_with};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use store::{Backing, ErrorKind, Store, ZeroMode};

pub(crate) fn range(start: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(start), len)
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(tag: u8, len: usize) -> Vec<u8> {
    let cycle: Vec<u8> = (0..239).map(|at| tag.wrapping_add(at) | 1).collect();
    let mut bytes = cycle.repeat(len.div_ceil(cycle.len()));
    bytes.truncate(len);
    bytes
}

/// `bytes` in memory that is aligned to nothing.
pub(crate) fn askew(bytes: &[u8]) -> Iov {
    let room = Iov::alloc(bytes.len() + 3);
    let askew = room.slice(3..room.len());
    askew.write(0, bytes);
    askew
}

/// `bytes` in segments of odd lengths.
pub(crate) fn scattered(bytes: &[u8]) -> Iov {
    bytes.chunks(1000).fold(Iov::empty(), |list, chunk| list.join(&askew(chunk)))
}

pub(crate) async fn read(store: &Rc<dyn Store>, at: u64, len: usize) -> Vec<u8> {
    let into = askew(&vec![0xee; len]);
    store.read(HostOffset(at), into.clone()).await.unwrap();
    into.to_vec()
}

#[test]
fn writes_grow_and_gaps_and_what_lies_past_the_end_are_zeros() {
    on_every_store(async |store| {
        assert_eq!(store.size(), 0);
        assert_eq!(read(&store, 0, 100).await, vec![0; 100]);
        store.write(HostOffset(5000), askew(b"hello"), false).await.unwrap();
        assert_eq!(store.size(), 5005);
        let mut expected = vec![0; 6000];
        expected[5000..5005].copy_from_slice(b"hello");
        assert_eq!(read(&store, 0, 6000).await, expected);
        assert_eq!(read(&store, 5004, 3).await, b"o\0\0");
        assert_eq!(read(&store, 1 << 40, 3).await, [0; 3]);
        assert_eq!(read(&store, u64::MAX - 1, 10).await, [0; 10]);
        assert_eq!(store.size(), 5005, "reading does not grow");
        store.write(HostOffset(5005), Iov::alloc(4096), false).await.unwrap();
        assert_eq!(store.size(), 9101);
    });
}

#[test]
fn any_offset_any_length_any_memory() {
    let ends = [0, 1, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 12_300];
    on_every_store(async |store| {
        let mut model = pattern(1, 10_001);
        store.write(HostOffset(0), scattered(&model), false).await.unwrap();
        let mut tag = 2;
        for start in ends {
            for end in ends.into_iter().filter(|end| *end >= start) {
                tag += 1;
                let bytes = pattern(tag, end - start);
                model.resize(model.len().max(if end > start { end } else { 0 }), 0);
                model[start..end].copy_from_slice(&bytes);
                let from = if tag % 2 == 0 { askew(&bytes) } else { scattered(&bytes) };
                store.write(HostOffset(start as u64), from, tag % 5 == 0).await.unwrap();
                assert_eq!(read(&store, start as u64, end - start).await, bytes, "{start}..{end}");
            }
        }
        assert_eq!(store.size(), model.len() as u64);
        assert_eq!(read(&store, 0, model.len()).await, model);
    });
}

#[test]
fn large_transfers_keep_their_edges() {
    on_every_store_with(1, async |store| {
        let mut model = pattern(7, 3_000_001);
        store.write(HostOffset(0), Iov::from_slice(&model), false).await.unwrap();
        for (start, len) in [(1, 2_500_000), (700_001, 2_300_000), (4096, 1 << 20), (512 * 3, (1 << 20) + 5)] {
            let bytes = pattern(start as u8, len);
            model.resize(model.len().max(start + len), 0);
            model[start..start + len].copy_from_slice(&bytes);
            // Memory whose middle is aligned where the blocks are.
            let room = Iov::alloc(len + 4096);
            let from = room.slice(start % 4096..start % 4096 + len);
            from.write(0, &bytes);
            store.write(HostOffset(start as u64), from, false).await.unwrap();
            let into = Iov::alloc(len + 4096).slice(start % 4096..start % 4096 + len);
            store.read(HostOffset(start as u64), into.clone()).await.unwrap();
            assert!(into.to_vec() == bytes, "{start}+{len}");
        }
        assert!(read(&store, 0, model.len()).await == model);
    });
}

/// One call of the kernel's moves at most 1024 segments, so this comes back short, and has to be continued.
#[test]
fn more_segments_than_the_kernel_takes_are_whole() {
    on_every_store_with(1, async |store| {
        let bytes = pattern(3, 3000 * 7);
        let in_pieces = || {
            let mut all = Iov::empty();
            bytes.chunks(7).for_each(|piece| all.append(&Iov::from_slice(piece)));
            all
        };
        let from = in_pieces();
        assert!(from.segments() > 2 * 1024);
        store.write(HostOffset(11), from, false).await.unwrap();
        let into = in_pieces();
        into.fill(0);
        store.read(HostOffset(11), into.clone()).await.unwrap();
        assert!(into.to_vec() == bytes);
        assert_eq!(store.size(), 11 + bytes.len() as u64);
    });
}

#[test]
fn zeroing_zeroes_what_it_was_asked_to_and_no_more() {
    for unmap in [false, true] {
        on_every_store(async |store| {
            let mut model = pattern(9, 100_001);
            store.write(HostOffset(0), Iov::from_slice(&model), false).await.unwrap();
            let ranges =
                [(0, 4096), (4096, 1), (8191, 2), (10_000, 50_000), (99_000, 1001), (99_000, 3000), (110_000, 7)];
            for (start, len) in ranges {
                store.zero(range(start as u64, len as u64), ZeroMode { unmap }).await.unwrap();
                model.resize(model.len().max(start + len), 0);
                model[start..start + len].fill(0);
                assert_eq!(store.size(), model.len() as u64);
                assert!(read(&store, 0, model.len()).await == model, "{start}+{len}");
            }
        });
    }
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    on_every_store(async |store| {
        let model = pattern(3, 20_000);
        store.write(HostOffset(0), Iov::from_slice(&model), false).await.unwrap();
        for size in [19_999, 16_384, 12_289, 700, 511, 1] {
            store.set_size(size).await.unwrap();
            assert_eq!(store.size(), size);
            store.set_size(20_000).await.unwrap();
            let mut expected = model[..size as usize].to_vec();
            expected.resize(20_000, 0);
            assert!(read(&store, 0, 20_000).await == expected, "{size}");
        }
    });
}

#[test]
fn extents_cover_and_holes_are_zeros() {
    on_every_store(async |store| {
        store.set_size(1 << 20).await.unwrap();
        store.write(HostOffset(300_000), Iov::from_slice(&pattern(1, 10)), false).await.unwrap();
        store.write(HostOffset(700_000), Iov::from_slice(&pattern(1, 100_000)), false).await.unwrap();
        store.zero(range(720_896, 65_536), ZeroMode { unmap: true }).await.unwrap();
        for first in [0, 1, 300_005, 750_000] {
            let (mut at, end) = (first, (1 << 20) + 5000);
            while at < end {
                let extent = store.extent(range(at, end - at)).await.unwrap();
                assert!((1..=end - at).contains(&extent.len), "{extent:?} at {at}");
                if extent.backing == Backing::Hole {
                    assert!(
                        read(&store, at, extent.len as usize).await.iter().all(|byte| *byte == 0),
                        "{at} {extent:?}"
                    );
                } else {
                    assert!(at < 1 << 20, "past the end is a hole");
                }
                at += extent.len;
            }
            assert_eq!(at, end);
        }
        let data = store.extent(range(300_003, 2)).await.unwrap();
        assert_eq!((data.len, data.backing), (2, Backing::Data));
        assert_eq!(store.extent(range(1 << 30, 77)).await.unwrap().len, 77);
        assert!(store.extent(range(0, 0)).await.is_err());
    });
}

#[test]
fn extents_follow_changes() {
    on_every_store(async |store| {
        store.set_size(1 << 20).await.unwrap();
        let data_at = async |at| store.extent(range(at, 10)).await.unwrap().backing == Backing::Data;
        data_at(65_536).await;
        store.write(HostOffset(65_540), Iov::from_slice(b"x"), false).await.unwrap();
        assert!(data_at(65_540).await, "a hole that was just looked at was written");
        store.set_size(65_541).await.unwrap();
        assert!(!data_at(65_541).await);
        store.set_size(1 << 20).await.unwrap();
        store.write(HostOffset((1 << 20) - 1), Iov::from_slice(b"xy"), false).await.unwrap();
        assert!(data_at((1 << 20) - 1).await, "past what was the end");
    });
}

#[test]
fn allocating_sets_the_length_and_keeps_the_bytes() {
    on_every_store(async |store| {
        store.write(HostOffset(0), Iov::from_slice(b"abc"), false).await.unwrap();
        store.allocate(range(1, 100_000)).await.unwrap();
        assert_eq!(store.size(), 100_001);
        assert_eq!(read(&store, 0, 5).await, b"abc\0\0");
        store.allocate(range(0, 10)).await.unwrap();
        assert_eq!(store.size(), 100_001);
    });
}

#[test]
fn nothing_asked_nothing_done() {
    on_every_store(async |store| {
        let far = HostOffset(1 << 50);
        store.write(far, Iov::empty(), true).await.unwrap();
        store.read(far, Iov::empty()).await.unwrap();
        store.zero(HostRange::new(far, 0), ZeroMode::default()).await.unwrap();
        store.allocate(HostRange::new(far, 0)).await.unwrap();
        store.flush().await.unwrap();
        assert_eq!(store.size(), 0);
    });
}

#[test]
fn what_no_store_can_hold_is_refused() {
    on_every_store(async |store| {
        for at in [i64::MAX as u64, u64::MAX - 1, u64::MAX] {
            let error = store.write(HostOffset(at), Iov::zeroed(2), false).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        }
        assert!(store.set_size(u64::MAX).await.is_err());
        assert!(store.zero(range(u64::MAX - 5, 5), ZeroMode::default()).await.is_err());
        assert_eq!(store.size(), 0);
    });
}

#[test]
fn growing_at_the_same_time_ends_at_the_furthest() {
    on_every_store(async |store| {
        let mut model = vec![0; 40 * 3001 + 17];
        let mut tasks = Vec::new();
        for part in 0..40_usize {
            let (start, len) = (part * 3001, if part == 39 { 3018 } else { 3001 });
            let bytes = pattern(part as u8, len);
            model[start..start + len].copy_from_slice(&bytes);
            let store = Rc::clone(&store);
            tasks.push(ring::spawn(async move {
                match part % 4 {
                    0 => store.zero(range(start as u64, len as u64), ZeroMode::default()).await.unwrap(),
                    1 => store.allocate(range(start as u64, len as u64)).await.unwrap(),
                    _ => {}
                }
                store.write(HostOffset(start as u64), askew(&bytes), false).await.unwrap();
            }));
        }
        for task in tasks {
            task.await;
        }
        assert_eq!(store.size(), model.len() as u64);
        assert!(read(&store, 0, model.len()).await == model);
    });
}

#[test]
fn neighbours_in_one_block_do_not_lose_each_other() {
    on_every_store(async |store| {
        const LEN: usize = 20_000;
        store.write(HostOffset(0), Iov::from_slice(&vec![0xff; LEN]), false).await.unwrap();
        let mut tasks = Vec::new();
        let mut model = vec![0xff; LEN];
        let mut at = 0;
        for part in 0_usize.. {
            let len = [100, 412, 512, 1, 1024, 3000, 4096][part % 7].min(LEN - at);
            if len == 0 {
                break;
            }
            let (store, start) = (Rc::clone(&store), at as u64);
            let bytes = pattern(part as u8, len);
            let zeroed = part % 5 == 4;
            if zeroed {
                model[at..at + len].fill(0);
            } else {
                model[at..at + len].copy_from_slice(&bytes);
            }
            tasks.push(ring::spawn(async move {
                if zeroed {
                    store.zero(range(start, len as u64), ZeroMode { unmap: part % 2 == 0 }).await.unwrap();
                } else {
                    store.write(HostOffset(start), Iov::from_slice(&bytes), false).await.unwrap();
                }
            }));
            at += len;
        }
        for task in tasks {
            task.await;
        }
        assert!(read(&store, 0, LEN).await == model);
    });
}

#[test]
fn a_change_that_was_given_up_is_over_before_the_next_one_begins() {
    on_every_store(async |store| {
        store.write(HostOffset(0), Iov::from_slice(&[1; 9000]), false).await.unwrap();
        for round in 0..20_u8 {
            let mut given_up = store.write(HostOffset(100), Iov::from_slice(&[round; 8000]), false);
            assert!(futures_util::poll!(&mut given_up).is_pending());
            drop(given_up);
            store.write(HostOffset(50), Iov::from_slice(&[0xaa; 8100]), false).await.unwrap();
            for _ in 0..3 {
                assert!(read(&store, 50, 8100).await == vec![0xaa; 8100], "the past came back");
                ring::yield_now().await;
            }
        }
    });
}

#[test]
fn closing_twice_is_closing_once() {
    on_every_store(async |store| {
        store.write(HostOffset(0), Iov::from_slice(b"abc"), false).await.unwrap();
        store.close().await.unwrap();
        store.close().await.unwrap();
    });
}
