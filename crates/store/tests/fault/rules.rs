//! Rules: which operations they hit, and what they do to them.

use crate::{over, range, settle, write};
use layout::HostOffset;
use ring::Iov;
use std::rc::Rc;
use std::time::Duration;
use store::fault::{Action, Failure, FaultStore, Match};
use store::{ErrorKind, Operation, Store, ZeroMode};

fn spawn_write(store: &Rc<FaultStore>, at: u64, byte: u8) -> ring::JoinHandle<store::Result<()>> {
    let store = Rc::clone(store);
    ring::spawn(async move { write(&store, at, &[byte]).await })
}

#[test]
fn without_rules_nothing_happens() {
    over(b"bytes", async |store, memory| {
        write(&store, 1, b"o").await.unwrap();
        assert_eq!(memory.to_vec(), b"botes");
        assert!(store.power_cut().is_none());
    });
}

#[test]
fn what_is_held_goes_on_when_it_is_released_in_order_of_arrival() {
    over(&[0; 10], async |store, memory| {
        let rule = store.rule(Match::on(Operation::Write), Action::Hold);
        let first = spawn_write(&store, 0, 1);
        rule.wait_for(1).await;
        let second = spawn_write(&store, 1, 2);
        let third = spawn_write(&store, 2, 3);
        rule.wait_for(3).await;
        assert_eq!((rule.held(), memory.to_vec()[..3].to_vec()), (3, vec![0, 0, 0]));
        assert!(rule.release());
        first.await.unwrap();
        settle().await;
        assert_eq!((rule.held(), memory.to_vec()[0]), (2, 1));
        assert!(rule.release_failing(Failure::EIO));
        rule.end();
        let results = [second.await, third.await];
        let failed: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
        assert_eq!((failed.len(), failed[0].errno()), (1, libc::EIO));
        write(&store, 5, &[9]).await.unwrap();
        assert!(!rule.release(), "an ended rule holds nothing");
    });
}

#[test]
fn a_held_answer_is_of_something_done() {
    over(&[0; 10], async |store, memory| {
        let rule = store.rule(Match::on(Operation::Write).once(), Action::HoldAnswer);
        let task = spawn_write(&store, 0, 7);
        rule.wait_for(1).await;
        assert_eq!(memory.to_vec()[0], 7);
        assert!(!task.is_finished());
        rule.release_failing(Failure::EIO);
        assert_eq!(task.await.unwrap_err().kind(), ErrorKind::Io);
        write(&store, 0, &[8]).await.unwrap();
    });
}

#[test]
fn who_is_dropped_while_held_leaves_the_line() {
    over(&[0; 10], async |store, memory| {
        let rule = store.rule(Match::on(Operation::Write), Action::Hold);
        let first = spawn_write(&store, 0, 1);
        rule.wait_for(1).await;
        first.cancel();
        settle().await;
        assert_eq!(rule.held(), 0);
        let second = spawn_write(&store, 1, 2);
        rule.wait_for(2).await;
        assert!(rule.release());
        second.await.unwrap();
        assert_eq!(memory.to_vec()[..2], [0, 2]);
    });
}

#[test]
fn with_callers_outlived_a_dropped_change_takes_effect_and_later_ones_wait() {
    over(&[0; 10], async |store, memory| {
        store.outlive_callers(true);
        let rule = store.rule(Match::on(Operation::Write).once(), Action::Hold);
        let first = spawn_write(&store, 0, 1);
        rule.wait_for(1).await;
        first.cancel();
        settle().await;
        assert_eq!(rule.held(), 1, "it goes on without its caller");
        let second = spawn_write(&store, 0, 2);
        let elsewhere = spawn_write(&store, 5, 3);
        elsewhere.await.unwrap();
        settle().await;
        assert!(!second.is_finished(), "the first one is not over");
        rule.release();
        second.await.unwrap();
        assert_eq!(memory.to_vec()[0], 2);
    });
}

#[test]
fn delays_take_their_time() {
    over(&[0; 10], async |store, memory| {
        let hour = Duration::from_hours(1);
        store.rule(Match::on(Operation::Read).nth(1), Action::Delay(hour));
        store.rule(Match::on(Operation::Write).nth(1), Action::DelayAnswer(hour));
        let start = ring::now();
        store.read(HostOffset(0), Iov::alloc(1)).await.unwrap();
        assert_eq!(ring::now().since(start), hour);
        let task = spawn_write(&store, 0, 1);
        settle().await;
        assert_eq!(memory.to_vec()[0], 1);
        task.await.unwrap();
        assert_eq!(ring::now().since(start), hour * 2);
        store.rule(Match::on(Operation::Flush), Action::Jitter(hour));
        store.flush().await.unwrap();
        let waited = ring::now().since(start).checked_sub(hour * 2).unwrap();
        assert!(waited > Duration::ZERO && waited <= hour * 2);
    });
}

#[test]
fn numbers_count_what_the_conditions_let_through() {
    over(&[0; 100], async |store, _| {
        let matches = Match::on(Operation::Write).touching(range(10, 10)).skip(1).every(2).times(2);
        let rule = store.rule(matches, Action::Fail(Failure::ENOSPC));
        let mut failed = Vec::new();
        for number in 0..10 {
            write(&store, 30, b"x").await.unwrap();
            store.read(HostOffset(12), Iov::alloc(1)).await.unwrap();
            if let Err(error) = write(&store, 15, b"x").await {
                assert_eq!((error.kind(), error.range()), (ErrorKind::NoSpace, Some(range(15, 1))));
                failed.push(number);
            }
        }
        assert_eq!(failed, [2, 4]);
        assert_eq!(rule.hits(), 2);
        let once = store.rule(Match::any().when(|request| request.fua), Action::Fail(ErrorKind::Unavailable.into()));
        write(&store, 0, b"x").await.unwrap();
        let error = store.write(HostOffset(0), Iov::zeroed(1), true).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(once.hits(), 1);
    });
}

#[test]
fn chance_follows_the_seed() {
    let run = || {
        let mut hit = Vec::new();
        over(&[0; 10], async |store, _| {
            store.rule(Match::any().chance(0.3), Action::Fail(Failure::EIO));
            for _ in 0..1000 {
                hit.push(store.read(HostOffset(0), Iov::alloc(1)).await.is_err());
            }
        });
        hit
    };
    let hit = run();
    assert_eq!(hit, run());
    let share = hit.iter().filter(|hit| **hit).count();
    assert!((200..400).contains(&share), "{share}");
}

#[test]
fn the_first_outcome_wins_and_all_waits_apply() {
    over(&[0; 10], async |store, memory| {
        let second = Duration::from_secs(1);
        store.rule(Match::any(), Action::Delay(second));
        store.rule(Match::on(Operation::Write), Action::Lie);
        store.rule(Match::any(), Action::Delay(second));
        store.rule(Match::any(), Action::Fail(Failure::EIO));
        let start = ring::now();
        write(&store, 0, b"x").await.unwrap();
        assert_eq!(memory.to_vec()[0], 0, "a lie");
        assert_eq!(ring::now().since(start), second * 2);
        store.end_rules();
        write(&store, 0, b"x").await.unwrap();
        assert_eq!(memory.to_vec()[0], b'x');
    });
}

#[test]
fn partial_and_torn_transfers_leave_old_and_new() {
    over(&[1; 8192], async |store, memory| {
        store.rule(Match::on(Operation::Write).once(), Action::Partial(1000, Failure::EIO));
        write(&store, 0, &[2; 4096]).await.unwrap_err();
        assert_eq!(memory.to_vec()[..1000], [2; 1000]);
        assert_eq!(memory.to_vec()[1000..], [1; 7192]);

        store.rule(Match::on(Operation::Read).once(), Action::Partial(10, Failure::EIO));
        let into = Iov::zeroed(20);
        store.read(HostOffset(995), into.clone()).await.unwrap_err();
        assert_eq!(into.to_vec(), [2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

        write(&store, 0, &[1; 8192]).await.unwrap();
        store.rule(Match::on(Operation::Zero).or(Operation::Write).once(), Action::Tear(Failure::ENOSPC));
        write(&store, 100, &[3; 8000]).await.unwrap_err();
        let bytes = memory.to_vec();
        let sectors: Vec<&[u8]> = bytes[512..7680].chunks(512).collect();
        assert!(sectors.iter().all(|sector| sector.iter().all(|byte| *byte == sector[0])), "whole sectors");
        assert!(sectors.iter().any(|sector| sector[0] == 3) && sectors.iter().any(|sector| sector[0] == 1));
    });
}

#[test]
fn what_is_split_is_not_at_one_moment() {
    over(&[1; 4096], async |store, memory| {
        store.rule(Match::on(Operation::Write).or(Operation::Zero).or(Operation::Read), Action::Split(512));
        let task = {
            let store = Rc::clone(&store);
            ring::spawn(async move { store.write(HostOffset(0), Iov::from_slice(&[2; 4096]), false).await })
        };
        let mut mixed = false;
        while !task.is_finished() {
            let bytes = memory.to_vec();
            mixed |= bytes[0] == 2 && bytes[4095] == 1;
            ring::yield_now().await;
        }
        assert!(mixed);
        task.await.unwrap();
        assert_eq!(memory.to_vec(), [2; 4096]);
        let into = Iov::zeroed(4000);
        store.read(HostOffset(96), into.clone()).await.unwrap();
        assert_eq!(into.to_vec(), [2; 4000]);
        store.zero(range(3, 4000), ZeroMode::default()).await.unwrap();
        assert_eq!(memory.to_vec(), [[2; 3].as_slice(), &[0; 4000], &[2; 93]].concat());
    });
}

#[test]
fn corruption_is_as_asked_and_no_more() {
    over(&[0; 100], async |store, memory| {
        store.rule(Match::any().nth(1), Action::Corrupt(3, 0x81));
        store.rule(Match::any().nth(2), Action::Corrupt(99, 0xff));
        let into = Iov::alloc(10);
        store.read(HostOffset(0), into.clone()).await.unwrap();
        assert_eq!(into.to_vec(), [0, 0, 0, 0x81, 0, 0, 0, 0, 0, 0]);
        write(&store, 0, &[5; 10]).await.unwrap();
        assert_eq!(memory.to_vec()[..11], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 0]);
        store.rule(Match::any().once(), Action::Corrupt(0, 1));
        let from = Iov::from_slice(&[8]);
        store.write(HostOffset(0), from.clone(), false).await.unwrap();
        assert_eq!((memory.to_vec()[0], from.to_vec()), (9, vec![8]), "the caller's memory stays as it is");
    });
}

#[test]
fn a_failed_flush_poisons_and_reads_go_on() {
    over(&[1; 10], async |store, _| {
        store.rule(Match::on(Operation::Flush).once(), Action::Fail(Failure::EIO));
        assert_eq!(store.flush().await.unwrap_err().kind(), ErrorKind::Io);
        for result in [
            write(&store, 0, b"x").await,
            store.flush().await,
            store.zero(range(0, 1), ZeroMode::default()).await,
            store.set_size(0).await,
        ] {
            let error = result.unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Poisoned, libc::EIO), "{error}");
        }
        store.read(HostOffset(0), Iov::alloc(1)).await.unwrap();
        assert_eq!(store.poisoned().unwrap().operation(), Operation::Flush);
    });
}

#[test]
fn a_durable_write_without_space_poisons_nothing() {
    over(&[1; 10], async |store, _| {
        store.rule(Match::on(Operation::Write).nth(1), Action::Fail(Failure::ENOSPC));
        store.rule(Match::on(Operation::Write).nth(3), Action::Fail(Failure::EIO));
        for (kind, number) in [(ErrorKind::NoSpace, 1), (ErrorKind::Io, 3), (ErrorKind::Poisoned, 4)] {
            if number == 3 {
                store.write(HostOffset(0), Iov::zeroed(1), true).await.unwrap();
            }
            let error = store.write(HostOffset(0), Iov::zeroed(1), true).await.unwrap_err();
            assert_eq!(error.kind(), kind, "write {number}");
        }
    });
}

#[test]
fn switched_off_it_does_nothing_and_answers_nobody_well() {
    over(&[1; 10], async |store, memory| {
        let rule = store.rule(Match::on(Operation::Write).once(), Action::Hold);
        let held = spawn_write(&store, 0, 2);
        rule.wait_for(1).await;
        store.switch_off();
        rule.end();
        assert!(held.await.is_err());
        assert!(write(&store, 1, b"x").await.is_err());
        assert!(store.read(HostOffset(0), Iov::alloc(1)).await.is_err());
        assert_eq!(memory.to_vec(), [1; 10]);
    });
}

#[test]
fn a_liar_says_data_for_holes_but_never_lies_about_ranges() {
    over(&[], async |store, _| {
        store.set_size(1 << 20).await.unwrap();
        store.rule(Match::on(Operation::Extent), Action::Lie);
        let extent = store.extent(range(0, 4096)).await.unwrap();
        assert_eq!((extent.len, extent.backing), (4096, store::Backing::Data));
        assert!(store.extent(range(0, 0)).await.is_err());
    });
}
