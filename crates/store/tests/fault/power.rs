//! Power cuts: what was flushed is there, what was not is old or new, sector by sector; and nothing possible is left out.

use crate::{over, range, settle, write};
use layout::HostOffset;
use proptest::prelude::*;
use ring::Iov;
use std::collections::{BTreeSet, HashSet};
use std::rc::Rc;
use store::fault::{Action, Failure, FaultStore, Match, PowerCut};
use store::memory::{MemoryStore, Snapshot};
use store::{Operation, Store, ZeroMode};

const SECTOR: usize = 512;

fn over_volatile(bytes: &[u8], test: impl AsyncFnOnce(Rc<FaultStore>)) {
    over(bytes, async |store, _| {
        store.make_volatile(SECTOR as u64).await.unwrap();
        test(store).await;
    });
}

/// All states' bytes.
fn images(cut: &PowerCut) -> BTreeSet<Vec<u8>> {
    assert!(cut.count() <= 10_000, "a small log: {cut:?}");
    let states: Vec<_> = cut.states(10_000, 0).collect();
    assert_eq!(states.len() as u128, cut.count());
    let names: HashSet<_> = states.iter().map(|state| state.choice.clone()).collect();
    assert_eq!(names.len(), states.len(), "none twice");
    states.iter().map(|state| state.image.to_vec()).collect()
}

/// One byte for each sector.
fn sketches(cut: &PowerCut) -> BTreeSet<Vec<u8>> {
    images(cut).iter().map(|image| image.chunks(SECTOR).map(|sector| sector[0]).collect()).collect()
}

fn set<const N: usize>(sketches: [&[u8]; N]) -> BTreeSet<Vec<u8>> {
    sketches.into_iter().map(<[u8]>::to_vec).collect()
}

#[test]
fn a_small_log_yields_every_state() {
    over_volatile(&[0; 2 * SECTOR], async |store| {
        let now = async || sketches(&store.power_cut().unwrap());
        assert_eq!(now().await, set([&[0, 0]]));
        write(&store, 0, &[1; 2 * SECTOR]).await.unwrap();
        assert_eq!(now().await, set([&[0, 0], &[0, 1], &[1, 0], &[1, 1]]), "torn between sectors");
        write(&store, 512, &[2; SECTOR]).await.unwrap();
        let all: [&[u8]; 6] = [&[0, 0], &[0, 1], &[1, 0], &[1, 1], &[0, 2], &[1, 2]];
        assert_eq!(now().await, set(all), "any version");
        store.flush().await.unwrap();
        assert_eq!(now().await, set([&[1, 2]]));
        // The length, and what lies past it.
        write(&store, 1024, &[3; SECTOR]).await.unwrap();
        assert_eq!(now().await, set([&[1, 2], &[1, 2, 0], &[1, 2, 3]]));
        store.zero(range(0, 512), ZeroMode::default()).await.unwrap();
        let all: [&[u8]; 6] = [&[1, 2], &[1, 2, 0], &[1, 2, 3], &[0, 2], &[0, 2, 0], &[0, 2, 3]];
        assert_eq!(now().await, set(all));
    });
}

#[test]
fn durable_writes_are_there_with_the_length_they_need_and_nothing_else() {
    over_volatile(&[0; SECTOR], async |store| {
        write(&store, 0, &[1; SECTOR]).await.unwrap();
        store.write(HostOffset(1024), Iov::from_slice(&[2; SECTOR]), true).await.unwrap();
        let cut = store.power_cut().unwrap();
        assert_eq!(sketches(&cut), set([&[0, 0, 2], &[1, 0, 2]]));
        write(&store, 1536, &[3; SECTOR]).await.unwrap();
        store.write(HostOffset(512), Iov::from_slice(&[4; SECTOR]), true).await.unwrap();
        let all: [&[u8]; 6] = [&[0, 4, 2], &[1, 4, 2], &[0, 4, 2, 0], &[1, 4, 2, 0], &[0, 4, 2, 3], &[1, 4, 2, 3]];
        assert_eq!(sketches(&store.power_cut().unwrap()), set(all), "a length it does not need stays open");
    });
}

#[test]
fn a_flush_covers_what_was_answered_when_it_was_called() {
    over_volatile(&[0; 3 * SECTOR], async |store| {
        let answer = store.rule(Match::on(Operation::Write).touching(range(512, 1)), Action::HoldAnswer);
        let flushes = store.rule(Match::on(Operation::Flush).once(), Action::Hold);
        write(&store, 0, &[1; SECTOR]).await.unwrap();
        let spawn = |at: u64, byte: u8| {
            let store = Rc::clone(&store);
            ring::spawn(async move { write(&store, at, &[byte; SECTOR]).await })
        };
        let unanswered = spawn(512, 2);
        answer.wait_for(1).await;
        let flush = ring::spawn({
            let store = Rc::clone(&store);
            async move { store.flush().await }
        });
        flushes.wait_for(1).await;
        write(&store, 1024, &[3; SECTOR]).await.unwrap();
        flushes.release();
        flush.await.unwrap();
        let all: [&[u8]; 4] = [&[1, 0, 0], &[1, 2, 0], &[1, 0, 3], &[1, 2, 3]];
        assert_eq!(sketches(&store.power_cut().unwrap()), set(all));
        answer.end();
        unanswered.await.unwrap();
        store.flush().await.unwrap();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[1, 2, 3]]));
    });
}

#[test]
fn what_is_in_flight_may_have_arrived() {
    over_volatile(&[0; 2 * SECTOR], async |store| {
        store.rule(Match::on(Operation::Write), Action::Split(512));
        // The store below gives way before each piece.
        let mut write = store.write(HostOffset(0), Iov::from_slice(&[1; 2 * SECTOR]), false);
        assert!(futures_util::poll!(&mut write).is_pending());
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[0, 0], &[1, 0]]));
        assert_eq!(store.power_cut().unwrap().everything(), store.power_cut().unwrap().of_changes(|_| true));
        write.await.unwrap();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[0, 0], &[1, 0], &[0, 1], &[1, 1]]));
    });
}

#[test]
fn two_in_flight_on_one_sector_arrive_in_either_order_or_alone() {
    over_volatile(&[0; SECTOR], async |store| {
        let mut first = store.write(HostOffset(0), Iov::from_slice(&[1; 2]), false);
        let mut second = store.write(HostOffset(1), Iov::from_slice(&[2; 2]), false);
        assert!(futures_util::poll!(&mut first).is_pending());
        assert!(futures_util::poll!(&mut second).is_pending());
        let cut = store.power_cut().unwrap();
        let found: BTreeSet<Vec<u8>> = images(&cut).into_iter().map(|image| image[..4].to_vec()).collect();
        for expected in [[0, 0, 0, 0], [1, 1, 0, 0], [0, 2, 2, 0], [1, 2, 2, 0]] {
            assert!(found.contains(&expected[..]), "{expected:?} of {found:?}");
        }
    });
}

#[test]
fn liars_and_failures_make_nothing_durable() {
    over_volatile(&[0; SECTOR], async |store| {
        write(&store, 0, &[1; SECTOR]).await.unwrap();
        store.rule(Match::on(Operation::Flush).once(), Action::Lie);
        store.flush().await.unwrap();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[0], &[1]]));
        store.rule(Match::on(Operation::Write).once(), Action::Lie);
        write(&store, 0, &[2; SECTOR]).await.unwrap();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[0], &[1]]), "a lost write is in no state");
        store.rule(Match::on(Operation::Write).once(), Action::Partial(100, Failure::EIO));
        write(&store, 0, &[3; SECTOR]).await.unwrap_err();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[0], &[1], &[3]]));
        store.rule(Match::on(Operation::Flush).once(), Action::FailAnswer(Failure::EIO));
        store.flush().await.unwrap_err();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[0], &[1], &[3]]));
    });
}

#[test]
fn what_was_cut_off_comes_back_only_with_the_old_length() {
    over_volatile(&[1; 3 * SECTOR], async |store| {
        store.set_size(600).await.unwrap();
        write(&store, 1024, &[2; 100]).await.unwrap();
        let cut = store.power_cut().unwrap();
        for image in images(&cut) {
            match image.len() {
                1536 => assert!(image[512..1024] == [1; 512], "the old length, the old bytes"),
                600 => {}
                1124 => {
                    assert!(image[600..1024].iter().all(|byte| *byte == 0), "cut off, and grown again");
                    assert!(image[1024..] == [0; 100] || image[1024..] == [2; 100]);
                }
                other => panic!("no such length: {other}"),
            }
        }
        store.flush().await.unwrap();
        let mut expected = [[1; 600].as_slice(), &[0; 424], &[2; 100]].concat();
        assert_eq!(images(&store.power_cut().unwrap()), BTreeSet::from([expected.clone()]));
        store.set_size(4000).await.unwrap();
        store.flush().await.unwrap();
        expected.resize(4000, 0);
        assert_eq!(images(&store.power_cut().unwrap()), BTreeSet::from([expected]));
    });
}

#[test]
fn dropped_callers_still_reach_the_medium() {
    over_volatile(&[0; SECTOR], async |store| {
        let mut write = store.write(HostOffset(0), Iov::from_slice(&[1; SECTOR]), false);
        assert!(futures_util::poll!(&mut write).is_pending());
        drop(write);
        settle().await;
        store.flush().await.unwrap();
        assert_eq!(sketches(&store.power_cut().unwrap()), set([&[1]]));
    });
}

#[test]
fn a_large_log_is_sampled_within_the_limit_likely_states_first() {
    over_volatile(&vec![0; 64 * SECTOR], async |store| {
        for number in 0..20_u8 {
            write(&store, u64::from(number) * 3 * 512, &[number + 1; 4 * SECTOR]).await.unwrap();
        }
        let cut = store.power_cut().unwrap();
        assert_eq!(cut.changes(), 20);
        assert!(cut.count() > 1 << 60);
        let run = |seed| cut.states(500, seed).map(|state| state.choice).collect::<Vec<_>>();
        let choices = run(1);
        assert_eq!(choices.len(), 500);
        assert_eq!(choices.iter().collect::<HashSet<_>>().len(), 500, "none twice");
        assert_eq!(choices[..2], [cut.nothing(), cut.everything()]);
        for entry in 0..20 {
            assert!(choices.contains(&cut.of_changes(|other| other != entry)), "one missing");
            assert!(choices.contains(&cut.of_changes(|other| other == entry)), "one alone");
        }
        assert_eq!(choices, run(1), "the seed decides");
        assert_ne!(choices, run(2));
        assert!(cut.image(&cut.nothing()) == Snapshot::zeros(64 * SECTOR as u64));
    });
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: usize, len: usize, byte: u8, fua: bool },
    Zero { at: usize, len: usize },
    SetSize(usize),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    const SPAN: usize = 12 * SECTOR;
    prop_oneof![
        6 => (0..SPAN, 1..3 * SECTOR, 1_u8.., proptest::bool::weighted(0.2))
            .prop_map(|(at, len, byte, fua)| Step::Write { at, len, byte, fua }),
        2 => (0..SPAN, 1..3 * SECTOR).prop_map(|(at, len)| Step::Zero { at, len }),
        1 => (0..SPAN).prop_map(Step::SetSize),
        2 => Just(Step::Flush),
    ]
}

/// Content of sector `number`, zeros past the end.
fn sector(bytes: &[u8], number: usize) -> Vec<u8> {
    let start = (number * SECTOR).min(bytes.len());
    let mut sector = bytes[start..(start + SECTOR).min(bytes.len())].to_vec();
    sector.resize(SECTOR, 0);
    sector
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever survives is, in each sector, something that sector held at some time since the last flush (its tail
    /// perhaps cut off by the length that survived); durable writes survive until something later covers them.
    #[test]
    fn every_state_is_made_of_what_there_was(steps in prop::collection::vec(step(), 1..25), seed in any::<u64>()) {
        over(&[9; 2000], async |store, memory| {
            store.make_volatile(SECTOR as u64).await.unwrap();
            // Everything the store looked like since the last flush.
            let mut past = vec![memory.to_vec()];
            for step in steps {
                let before = memory.to_vec();
                match step {
                    Step::Write { at, len, byte, fua } => {
                        let bytes = vec![byte; len];
                        store.write(HostOffset(at as u64), Iov::from_slice(&bytes), fua).await.unwrap();
                        if fua {
                            for state in store.power_cut().unwrap().states(30, seed) {
                                let image = state.image.to_vec();
                                prop_assert!(image.len() >= at + len);
                                prop_assert!(image[at..at + len] == bytes[..]);
                            }
                        }
                    }
                    Step::Zero { at, len } => {
                        store.zero(range(at as u64, len as u64), ZeroMode::default()).await.unwrap();
                    }
                    Step::SetSize(size) => store.set_size(size as u64).await.unwrap(),
                    Step::Flush => {
                        store.flush().await.unwrap();
                        past.clear();
                        let cut = store.power_cut().unwrap();
                        prop_assert_eq!(cut.count(), 1);
                        prop_assert!(cut.image(&cut.everything()).to_vec() == before);
                    }
                }
                past.push(memory.to_vec());
                let cut = store.power_cut().unwrap();
                prop_assert!(cut.image(&cut.everything()).to_vec() == memory.to_vec());
                for state in cut.states(60, seed) {
                    let image = state.image.to_vec();
                    prop_assert!(past.iter().any(|then| then.len() == image.len()), "a length it had");
                    for number in 0..image.len().div_ceil(SECTOR) {
                        let found = sector(&image, number);
                        let held = past.iter().any(|then| {
                            let then = sector(then, number);
                            // Any shorter length since may have cut it, and the one that survived does.
                            past.iter().map(Vec::len).chain([usize::MAX]).any(|cut| {
                                let mut then = then.clone();
                                for end in [cut, image.len()] {
                                    then[end.saturating_sub(number * SECTOR).min(SECTOR)..].fill(0);
                                }
                                found == then
                            })
                        });
                        prop_assert!(held, "sector {number} of {:?}", state.choice);
                    }
                }
            }
            Ok(())
        })?;
    }
}

#[test]
fn a_surviving_image_is_a_store_again() {
    over_volatile(&[0; SECTOR], async |store| {
        write(&store, 0, b"kept").await.unwrap();
        store.flush().await.unwrap();
        write(&store, 0, b"lost").await.unwrap();
        let cut = store.power_cut().unwrap();
        store.switch_off();
        let again = MemoryStore::from_snapshot("disk", cut.image(&cut.nothing()));
        let into = Iov::alloc(4);
        again.read(HostOffset(0), into.clone()).await.unwrap();
        assert_eq!(into.to_vec(), b"kept");
    });
}
