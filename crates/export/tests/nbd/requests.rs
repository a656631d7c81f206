//! What each request does to the disk, and what comes back.

use crate::client::{Client, NONE, Style};
use crate::fixture::{Fixture, on_ring, pattern};
use nbd::client::Answer;
use nbd::proto::{AllocationState, Command, CommandFlags, MAX_PAYLOAD, NbdError};
use nbd::reply::Extent;
use std::rc::Rc;
use store::memory::MemoryStore;

const MIB: usize = 1 << 20;

#[test]
fn what_is_written_is_read() {
    on_ring(async {
        for style in [Style::Simple, Style::Structured] {
            let fixture = Fixture::new(64 * MIB as u64).await;
            let mut client = Client::new(fixture.address(), style).await;
            // Small and large, aligned and not, up to the longest payload.
            for (seed, (at, len)) in [
                (0, 512),
                (4096, 4096),
                (511, 1),
                (1000, 70_000),
                (5 * MIB as u64 + 3, 3 * MIB + 1),
                (8 << 20, 32 << 20),
            ]
            .into_iter()
            .enumerate()
            {
                let bytes = pattern(len, seed as u64);
                assert_eq!(client.write(NONE, at, &bytes).await, Ok(Answer::Done));
                assert!(client.read(at, len as u32).await == bytes, "{len} bytes at {at}");
                assert!(fixture.bytes()[at as usize..][..len] == bytes);
            }
            client.leave().await;
        }
    });
}

#[test]
fn many_requests_in_flight_agree_with_a_model() {
    on_ring(async {
        for style in [Style::Simple, Style::Structured] {
            let fixture = Fixture::new(4 * MIB as u64).await;
            let mut client = Client::new(fixture.address(), style).await;
            let mut model = vec![0; 4 * MIB];
            let dice = pattern(8 * 4000, 42);
            let mut dice = dice.chunks(8).map(|bytes| u64::from_le_bytes(*bytes.first_chunk().unwrap()));
            let mut roll = |below: u64| dice.next().unwrap() % below;
            for round in 0..30 {
                // Ranges of one round do not overlap: requests in flight have no order.
                let (mut cookies, mut reads) = (Vec::new(), Vec::new());
                for slot in 0..32_u64 {
                    let base = slot * (128 << 10);
                    let at = base + roll(64 << 10);
                    let len = roll(64 << 10) as usize;
                    let range = at as usize..at as usize + len;
                    match roll(4) {
                        0 => {
                            let bytes = pattern(len, round * 32 + slot);
                            model[range].copy_from_slice(&bytes);
                            cookies.push(client.submit(Command::Write, NONE, at, len as u32, &bytes).await);
                        }
                        1 => {
                            model[range].fill(0);
                            cookies.push(client.submit(Command::WriteZeroes, NONE, at, len as u32, &[]).await);
                        }
                        _ if len > 0 => {
                            let cookie = client.submit(Command::Read, NONE, at, len as u32, &[]).await;
                            reads.push((cookie, range));
                        }
                        _ => {}
                    }
                }
                for cookie in cookies {
                    assert_eq!(client.wait(cookie).await, Ok(Answer::Done));
                }
                for (cookie, range) in reads {
                    let Ok(Answer::Data { bytes, .. }) = client.wait(cookie).await else { panic!("a read failed") };
                    assert!(bytes == model[range.clone()], "round {round} {range:?}");
                }
            }
            assert!(fixture.bytes() == model);
        }
    });
}

#[test]
fn structured_reads_tell_zeros_as_holes() {
    on_ring(async {
        let mut bytes = vec![0; MIB];
        bytes[100 << 10] = 1;
        bytes[900 << 10..].fill(2);
        let fixture = Fixture::holding(&bytes).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        for (offset, length, flags, holes, chunks) in [
            (0, 4096, NONE, 1, 1),
            (100 << 10, 4096, NONE, 0, 1),
            // 64 KiB units: zero, data, zero up to 896 KiB, data.
            (0, MIB as u32, NONE, 2, 4),
            (0, MIB as u32, CommandFlags::DF, 0, 1),
            (200 << 10, 500 << 10, CommandFlags::DF, 1, 1),
            (200 << 10, 500 << 10, NONE, 1, 1),
        ] {
            let Ok(Answer::Data { bytes: read, holes: h, chunks: c }) =
                client.call(Command::Read, flags, offset, length).await
            else {
                panic!("a read failed")
            };
            assert!(read == bytes[offset as usize..][..length as usize]);
            assert_eq!((h, c), (holes, chunks), "{length} bytes at {offset}, {flags:?}");
        }
    });
}

#[test]
fn empty_requests_are_no_error() {
    on_ring(async {
        let fixture = Fixture::new(MIB as u64).await;
        for style in [Style::Simple, Style::Structured] {
            let mut client = Client::new(fixture.address(), style).await;
            for command in [Command::Read, Command::Write, Command::Trim, Command::WriteZeroes, Command::Cache] {
                for offset in [0, 77, MIB as u64] {
                    assert!(client.call(command, NONE, offset, 0).await.is_ok(), "{command:?} at {offset}");
                }
            }
            client.leave().await;
        }
    });
}

#[test]
fn flush_and_fua_reach_the_store() {
    on_ring(async {
        let fixture = Fixture::new(MIB as u64).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        client.write(NONE, 0, &[1; 512]).await.unwrap();
        let before = (fixture.store.flushes.get(), fixture.store.durable_writes.get());
        client.call(Command::Flush, NONE, 0, 0).await.unwrap();
        assert!(fixture.store.flushes.get() > before.0);
        for (command, payload) in [(Command::Write, &[2; 512][..]), (Command::WriteZeroes, &[]), (Command::Trim, &[])] {
            let before = fixture.store.flushes.get() + fixture.store.durable_writes.get();
            let cookie = client.submit(command, CommandFlags::FUA, 4096, 512, payload).await;
            client.wait(cookie).await.unwrap();
            let after = fixture.store.flushes.get() + fixture.store.durable_writes.get();
            assert!(after > before, "{command:?} with FUA is durable");
        }
        // The specification: accepted with every command.
        for command in [Command::Read, Command::Flush, Command::Cache] {
            let length = if command == Command::Flush { 0 } else { 512 };
            client.call(command, CommandFlags::FUA, 0, length).await.unwrap();
        }
    });
}

#[test]
fn trim_and_zeroes_read_as_zeros_and_show_as_holes() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(MIB, 1)).await;
        let mut client = Client::new(fixture.address(), Style::Allocation).await;
        client.call(Command::Trim, NONE, 0, 128 << 10).await.unwrap();
        client.call(Command::WriteZeroes, NONE, 256 << 10, 128 << 10).await.unwrap();
        client.call(Command::WriteZeroes, CommandFlags::NO_HOLE, 512 << 10, 128 << 10).await.unwrap();
        client.call(Command::WriteZeroes, CommandFlags::FAST_ZERO, 768 << 10, 128 << 10).await.unwrap();
        for at in [256 << 10, 512 << 10, 768 << 10] {
            assert!(client.read(at, 128 << 10).await.iter().all(|&byte| byte == 0));
        }
        let extents = client.extents(NONE, 0, MIB as u32).await;
        let total: u32 = extents.iter().map(|extent| extent.len).sum();
        assert_eq!(total as usize, MIB);
        let at = |offset: u32| {
            let mut end = 0;
            let found = extents.iter().find(|extent| {
                end += extent.len;
                offset < end
            });
            found.unwrap().state
        };
        assert_eq!(at(0), AllocationState::HOLE | AllocationState::ZERO);
        assert_eq!(at(128 << 10), AllocationState::empty());
        assert_eq!(at(256 << 10), AllocationState::HOLE | AllocationState::ZERO);
        assert_eq!(at(768 << 10), AllocationState::HOLE | AllocationState::ZERO);
        // Space that has to stay may have to be written: not fast.
        let keep = CommandFlags::FAST_ZERO | CommandFlags::NO_HOLE;
        assert_eq!(client.error(Command::WriteZeroes, keep, 0, 4096).await, NbdError::NotSup);
    });
}

#[test]
fn block_status_coalesces_and_stops_where_told() {
    on_ring(async {
        let store = MemoryStore::new("memory", 8 * MIB as u64);
        let fixture = Fixture::with(Rc::clone(&store), false).await;
        let mut client = Client::new(fixture.address(), Style::Allocation).await;
        client.write(NONE, MIB as u64, &pattern(MIB, 1)).await.unwrap();
        client.write(NONE, 2 * MIB as u64, &pattern(MIB, 2)).await.unwrap();
        let hole = AllocationState::HOLE | AllocationState::ZERO;
        let expected = [
            Extent { len: MIB as u32, state: hole },
            Extent { len: 2 * MIB as u32, state: AllocationState::empty() },
            Extent { len: 5 * MIB as u32, state: hole },
        ];
        assert_eq!(client.extents(NONE, 0, 8 * MIB as u32).await, expected);
        assert_eq!(client.extents(CommandFlags::REQ_ONE, 0, 8 * MIB as u32).await, expected[..1]);
        // Not more than was asked for, wherever it starts.
        let part = client.extents(NONE, MIB as u64 + 4096, 8192).await;
        assert_eq!(part, [Extent { len: 8192, state: AllocationState::empty() }]);
        // Very many extents come in part; the client goes on from there.
        for at in (0..8 * MIB as u64).step_by(8192) {
            client.call(Command::WriteZeroes, NONE, at, 4096).await.unwrap();
            client.write(NONE, at + 4096, &[1; 4096]).await.unwrap();
        }
        let (mut at, mut count, mut answers) = (0, 0, 0);
        while at < 8 * MIB as u64 {
            let extents = client.extents(NONE, at, (8 * MIB as u64 - at) as u32).await;
            at += extents.iter().map(|extent| u64::from(extent.len)).sum::<u64>();
            count += extents.len();
            answers += 1;
        }
        assert_eq!(at, 8 * MIB as u64);
        assert_eq!(count, 2048);
        assert_eq!(answers, 2);
    });
}

#[test]
fn block_status_needs_its_context() {
    on_ring(async {
        let fixture = Fixture::new(MIB as u64).await;
        for style in [Style::Simple, Style::Structured] {
            let mut client = Client::new(fixture.address(), style).await;
            assert_eq!(client.error(Command::BlockStatus, NONE, 0, 4096).await, NbdError::Inval);
        }
    });
}

#[test]
fn what_lies_outside_is_refused_and_the_connection_goes_on() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(MIB, 3)).await;
        for style in [Style::Simple, Style::Allocation] {
            let mut client = Client::new(fixture.address(), style).await;
            for (offset, length) in [(MIB as u64 - 511, 512), (MIB as u64, 1), (u64::MAX - 100, 512), (1 << 63, 512)] {
                assert_eq!(client.error(Command::Read, NONE, offset, length).await, NbdError::Inval);
                assert_eq!(client.error(Command::Trim, NONE, offset, length).await, NbdError::Inval);
                assert_eq!(client.error(Command::Cache, NONE, offset, length).await, NbdError::Inval);
                assert_eq!(client.error(Command::WriteZeroes, NONE, offset, length).await, NbdError::NoSpc);
                let refused = client.write(NONE, offset, &vec![1; length as usize]).await;
                assert_eq!(refused.unwrap_err().kind(), Some(NbdError::NoSpc));
            }
            assert_eq!(client.error(Command::Read, NONE, 0, MAX_PAYLOAD + 1).await, NbdError::Inval);
            assert_eq!(client.error(Command::Read, CommandFlags::NO_HOLE, 0, 512).await, NbdError::Inval);
            assert!(
                client.read(0, MIB as u32).await == pattern(MIB, 3),
                "nothing was changed, and the stream is in step"
            );
        }
    });
}

#[test]
fn a_read_only_export_answers_eperm() {
    on_ring(async {
        let bytes = pattern(MIB, 4);
        let fixture = Fixture::with(MemoryStore::from_bytes("memory", &bytes), true).await;
        for style in [Style::Simple, Style::Structured] {
            let mut client = Client::new(fixture.address(), style).await;
            let refused = client.write(NONE, 0, &pattern(100_000, 9)).await;
            assert_eq!(refused.unwrap_err().kind(), Some(NbdError::Perm));
            assert_eq!(client.error(Command::Trim, NONE, 0, 4096).await, NbdError::Perm);
            assert_eq!(client.error(Command::WriteZeroes, NONE, 0, 4096).await, NbdError::Perm);
            assert_eq!(client.call(Command::Flush, NONE, 0, 0).await, Ok(Answer::Done));
            assert!(client.read(0, MIB as u32).await == bytes);
        }
        assert!(fixture.bytes() == bytes);
    });
}

#[test]
fn the_disks_errors_become_the_protocols() {
    on_ring(async {
        let fixture = Fixture::new(MIB as u64).await;
        for style in [Style::Simple, Style::Structured] {
            let mut client = Client::new(fixture.address(), style).await;
            for (errno, expected) in [(5, NbdError::Io), (28, NbdError::NoSpc), (122, NbdError::NoSpc)] {
                fixture.store.fail(Some(errno));
                assert_eq!(client.error(Command::Read, NONE, 0, 4096).await, expected, "errno {errno}");
                fixture.store.fail(None);
                assert_eq!(client.read(0, 4096).await.len(), 4096);
            }
        }
        // The message is for strangers: it holds no name of ours.
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        fixture.store.fail(Some(5));
        let failure = client.call(Command::Read, NONE, 0, 4096).await.unwrap_err();
        assert_eq!(failure.message, "input/output error");
    });
}
