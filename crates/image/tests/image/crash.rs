//! Power cuts: at any moment, leaving any state the medium may then have, the image opens, is repaired without a word from
//! anybody, and shows for every sector what was flushed or something newer.

use crate::guest::Guest;
use crate::subject::{Subject, marking_subjects, subjects};
use image::{BackingRef, Repair};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use ring::sim::Sim;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use store::fault::{Action, FaultStore, Match, PowerCut};
use store::memory::{MemoryStore, Snapshot};
use store::{Operation, Store};

const SECTOR: u64 = 512;

/// Larger than one L2 table of the smallest geometry reaches, and no multiple of any cluster size.
const SIZE: u64 = (2 << 20) + 200 * 1024 + 512;

/// Random numbers by their published constants (SplitMix64).
#[derive(Clone)]
struct Random(Rc<Cell<u64>>);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Rc::new(Cell::new(seed)))
    }

    fn below(&self, limit: u64) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What may be where

/// Every sector holds one number, repeated: 0, or a number used once.
fn sector_of(id: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    bytes.as_chunks_mut::<8>().0.fill(id.to_le_bytes());
    bytes
}

fn id_of(sector: &[u8]) -> Option<u64> {
    let words = sector.as_chunks::<8>().0;
    words.iter().all(|word| *word == words[0]).then(|| u64::from_le_bytes(words[0]))
}

/// A write since the last flush that covered the sector.
#[derive(Clone, Debug)]
struct Newer {
    write: u64,
    done: bool,
    id: u64,
}

/// What each sector may hold.
#[derive(Clone, Debug)]
struct Ledger {
    flushed: Rc<Vec<u64>>,
    newer: BTreeMap<usize, Vec<Newer>>,
    writes: u64,
    /// The sizes the disk may have.
    sizes: Vec<u64>,
    /// The backing references the header may have.
    backings: Vec<Option<BackingRef>>,
}

impl Ledger {
    fn new(below: u64, backing: Option<BackingRef>) -> Self {
        let id = |sector| if sector * SECTOR < below { 1 << 40 | sector } else { 0 };
        Self {
            flushed: Rc::new((0..SIZE / SECTOR).map(id).collect()),
            newer: BTreeMap::new(),
            writes: 0,
            sizes: vec![SIZE],
            backings: vec![backing],
        }
    }

    fn begin(&mut self, range: GuestRange, id: impl Fn(u64) -> u64) -> u64 {
        self.writes += 1;
        for sector in range.start().get() / SECTOR..range.end().get() / SECTOR {
            let newer = Newer { write: self.writes, done: false, id: id(sector) };
            self.newer.entry(sector as usize).or_default().push(newer);
        }
        self.writes
    }

    fn done(&mut self, write: u64) {
        for newer in self.newer.values_mut().flatten().filter(|newer| newer.write == write) {
            newer.done = true;
        }
    }

    /// What a flush that begins now will cover: for each sector, the last write that is done.
    fn covered(&self) -> BTreeMap<usize, u64> {
        let last = |list: &Vec<Newer>| list.iter().rfind(|newer| newer.done).map(|newer| newer.write);
        self.newer.iter().filter_map(|(sector, list)| Some((*sector, last(list)?))).collect()
    }

    fn flushed(&mut self, covered: &BTreeMap<usize, u64>) {
        for (sector, write) in covered {
            let Some(list) = self.newer.get_mut(sector) else { continue };
            if let Some(at) = list.iter().position(|newer| newer.write == *write) {
                Rc::make_mut(&mut self.flushed)[*sector] = list[at].id;
                list.drain(..=at);
            }
        }
    }

    fn assert_holds(&self, bytes: &[u8], what: &str) {
        for (sector, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let Some(id) = id_of(found) else { panic!("{what}: sector {sector} is torn") };
            let flushed = self.flushed.get(sector).copied().unwrap_or(0);
            let newer = self.newer.get(&sector).map(Vec::as_slice).unwrap_or_default();
            let possible = id == flushed || newer.iter().any(|newer| newer.id == id);
            assert!(possible, "{what}: sector {sector} holds {id:#x}; {flushed:#x} was flushed, then {newer:?}");
        }
    }
}

fn below(len: u64) -> Vec<u8> {
    (0..len / SECTOR).flat_map(|sector| sector_of(1 << 40 | sector)).collect()
}

/// Opens what a cut left, and looks at everything.
async fn assert_survived(subject: &Subject, image: Snapshot, ledger: &Ledger, backing_len: u64, what: &str) {
    let store = MemoryStore::from_snapshot("after-the-cut.img", image);
    let looked_at = {
        let options = image::OpenOptions { read_only: true, for_check: true };
        let image = image::open(store.clone(), subject.format, options).await.unwrap();
        (image.info().dirty, image.check(Repair::None).await.unwrap())
    };
    let (dirty, report) = looked_at;
    let sound = report.is_clean() || subject.may_leak() && report.corruptions == 0 && report.check_errors == 0;
    assert!(dirty || sound, "{what}: said to be clean, and is not: {report:#?}");
    let image = subject.open(store.clone()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(ledger.sizes.contains(&image.size()), "{what}: size {}", image.size());
    assert!(ledger.backings.contains(&image.backing()), "{what}: backing file {:?}", image.backing());
    let bytes = if image.backing().is_some() { below(backing_len) } else { Vec::new() };
    let guest = Guest::new(image, &bytes);
    ledger.assert_holds(&guest.read_all().await.unwrap(), what);
    // It goes on from there.
    guest.write(SECTOR * 9, &sector_of(7)).await.unwrap();
    guest.image.close().await.unwrap();
    subject.assert_clean_after_a_cut(store).await;
}

// ---------------------------------------------------------------------------------------------------------------------
// A life, cut at many moments

struct Life {
    guest: Guest,
    ledger: Rc<RefCell<Ledger>>,
    random: Random,
}

impl Life {
    fn spawn_one(&self, taken: &mut Vec<GuestRange>) -> Option<ring::JoinHandle<()>> {
        let random = &self.random;
        let (guest, ledger) = (self.guest.clone(), self.ledger.clone());
        let size = guest.image.size();
        let cluster = guest.image.cluster_size();
        let at = random.below(size / SECTOR) * SECTOR;
        let len = (1 + random.below(if random.below(4) == 0 { 300 } else { 12 })) * SECTOR;
        let range = GuestRange::new(GuestOffset(at), len.min(size - at));
        let mut claim = |range: GuestRange| {
            let range = range.align_outward(cluster);
            let free = taken.iter().all(|other| !other.overlaps(range));
            if free {
                taken.push(range);
            }
            free
        };
        match random.below(10) {
            0..5 => claim(range).then(|| {
                ring::spawn(async move {
                    let mut ids = Vec::new();
                    let write = ledger.borrow().writes + 1;
                    let begun = ledger.borrow_mut().begin(range, |sector| 2 << 40 | write << 20 | sector);
                    for sector in range.start().get() / SECTOR..range.end().get() / SECTOR {
                        ids.extend(sector_of(2 << 40 | write << 20 | sector));
                    }
                    guest.write(range.start().get(), &ids).await.unwrap();
                    ledger.borrow_mut().done(begun);
                })
            }),
            5 | 6 => {
                let range = range.align_outward(cluster);
                let range = GuestRange::between(range.start(), range.end().min(GuestOffset(size)));
                let unmap = random.below(2) == 0;
                claim(range).then(|| {
                    ring::spawn(async move {
                        let begun = ledger.borrow_mut().begin(range, |_| 0);
                        let masked = !guest.below.is_empty();
                        guest.image.write_zeroes(range, unmap, masked).await.unwrap();
                        ledger.borrow_mut().done(begun);
                    })
                })
            }
            7 => Some(ring::spawn(async move { guest.populate(range).await.unwrap() })),
            8 => {
                let pause = random.below(30);
                Some(ring::spawn(async move {
                    let reservation = guest.image.reserve(range, image::Purpose::Data).await.unwrap();
                    for _ in 0..pause {
                        ring::yield_now().await;
                    }
                    drop(reservation);
                }))
            }
            _ => {
                let settle = random.below(2) == 0;
                Some(ring::spawn(async move {
                    let covered = ledger.borrow().covered();
                    let done = if settle { guest.image.settle().await } else { guest.image.commit().await };
                    done.unwrap();
                    ledger.borrow_mut().flushed(&covered);
                }))
            }
        }
    }

    async fn grow(&self) {
        let size = self.guest.image.size() + (1 + self.random.below(2000)) * SECTOR;
        {
            let mut ledger = self.ledger.borrow_mut();
            ledger.sizes.push(size);
            Rc::make_mut(&mut ledger.flushed).resize((size / SECTOR) as usize, 0);
        }
        self.guest.image.resize(size).await.unwrap();
        self.ledger.borrow_mut().sizes = vec![size];
    }

    /// Everything below is copied; then the reference goes.
    async fn stand_alone(&mut self) {
        self.guest.populate(GuestRange::new(GuestOffset(0), self.guest.image.size())).await.unwrap();
        let covered = self.ledger.borrow().covered();
        self.ledger.borrow_mut().backings.push(None);
        self.guest.image.set_backing(None).await.unwrap();
        self.ledger.borrow_mut().backings = vec![None];
        self.ledger.borrow_mut().flushed(&covered);
        self.guest.below = Rc::new(Vec::new());
    }
}

/// Notes what a cut could leave, whenever an operation begins that `share` picks.
fn note_cuts<T: Clone + 'static>(
    fault: &Rc<FaultStore>,
    known: Rc<RefCell<T>>,
    share: impl Fn(&store::fault::Request) -> bool + 'static,
) -> Rc<RefCell<Vec<(PowerCut, T)>>> {
    let cuts = Rc::new(RefCell::new(Vec::new()));
    let (noted, weak) = (cuts.clone(), Rc::downgrade(fault));
    let note = Match::any().when(move |request| {
        let changes = !matches!(request.operation, Operation::Read | Operation::Extent);
        if changes
            && share(request)
            && let Some(cut) = weak.upgrade().and_then(|fault| fault.power_cut())
        {
            noted.borrow_mut().push((cut, known.borrow().clone()));
        }
        false
    });
    fault.rule(note, Action::Hold);
    cuts
}

async fn live_and_be_cut(subject: Subject, seed: u64, backing_len: u64) -> usize {
    let backing = (backing_len > 0).then(|| BackingRef { name: "base.img".into(), format: Some(image::Format::Raw) });
    let memory = MemoryStore::new("life.img", 0);
    subject.create(memory.clone(), SIZE, backing.clone()).await;
    let fault = FaultStore::new(memory, seed);
    fault.make_volatile(SECTOR).await.unwrap();
    let ledger = Rc::new(RefCell::new(Ledger::new(backing_len, backing)));
    let random = Random::new(seed);
    let pick = random.clone();
    let cuts = note_cuts(&fault, ledger.clone(), move |request| {
        let tables = request.range.is_none_or(|range| range.start().get() < 64 << 10);
        pick.below(if tables { 2 } else { 12 }) == 0
    });
    let image = subject.open(fault.clone()).await.unwrap();
    let mut life = Life { guest: Guest::new(image, &below(backing_len)), ledger: ledger.clone(), random };
    for _ in 0..7 {
        let mut taken = Vec::new();
        let tasks: Vec<_> = (0..7).filter_map(|_| life.spawn_one(&mut taken)).collect();
        for task in tasks {
            task.await;
        }
        if life.random.below(6) == 0 {
            life.grow().await;
        }
    }
    if backing_len > 0 {
        life.stand_alone().await;
    }
    let covered = ledger.borrow().covered();
    life.guest.image.close().await.unwrap();
    ledger.borrow_mut().flushed(&covered);
    let last = (fault.power_cut().unwrap(), ledger.borrow().clone());
    cuts.borrow_mut().push(last);
    let cuts = std::mem::take(&mut *cuts.borrow_mut());
    let mut states = 0;
    for (moment, (cut, ledger)) in cuts.iter().enumerate() {
        for state in cut.states(5, seed + moment as u64) {
            let what = format!("{} seed {seed} moment {moment} state {}", subject.name, state.choice);
            assert_survived(&subject, state.image, ledger, backing_len, &what).await;
            states += 1;
        }
    }
    states
}

#[test]
fn what_was_flushed_survives_any_cut() {
    let seeds = std::env::var("CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    for seed in 0..seeds {
        for subject in subjects() {
            let backing_len = if seed % 2 == 0 { 0 } else { SIZE - 100 * SECTOR };
            let states = Sim::new(seed).block_on(live_and_be_cut(subject, seed, backing_len));
            assert!(states > 20, "only {states} states were looked at");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Single acts, cut at every operation

/// Runs `act` on what `start` holds; looks at states of a cut before every operation of it, and after the last.
pub(crate) async fn cut_everywhere(
    start: Snapshot,
    states: usize,
    act: impl AsyncFn(Rc<FaultStore>),
    look: impl AsyncFn(Snapshot, &str),
) {
    let fault = FaultStore::new(MemoryStore::from_snapshot("act.img", start), 1);
    fault.make_volatile(SECTOR).await.unwrap();
    let cuts = note_cuts(&fault, Rc::new(RefCell::new(())), |_| true);
    act(fault.clone()).await;
    cuts.borrow_mut().push((fault.power_cut().unwrap(), ()));
    let cuts = std::mem::take(&mut *cuts.borrow_mut());
    assert!(cuts.len() > 1, "nothing happened");
    for (moment, (cut, ())) in cuts.iter().enumerate() {
        for state in cut.states(states, moment as u64) {
            look(state.image, &format!("before operation {moment} of {}, state {}", cuts.len(), state.choice)).await;
        }
    }
}

/// An image with tables and data strewn among holes, as kills and lost races leave it: flushed, and not closed.
async fn strewn(subject: &Subject) -> (Snapshot, Vec<u8>) {
    let store = MemoryStore::new("strewn.img", 0);
    let size = 6 * 512 * 4096;
    subject.create(store.clone(), size, None).await;
    let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
    let cluster = guest.image.cluster_size();
    let mut holes = Vec::new();
    for n in 0..6u64 {
        let at = n * (size / 6);
        let range = GuestRange::new(GuestOffset(at + 8 * cluster), 1 + n % 3 * cluster);
        if n > 0 {
            holes.push(
                guest.image.reserve(GuestRange::new(GuestOffset(n * cluster), 1), image::Purpose::Data).await.unwrap(),
            );
        }
        guest.write(at, &vec![n as u8 + 1; (1 + n as usize) * 3000]).await.unwrap();
        holes.push(guest.image.reserve(range, image::Purpose::Data).await.unwrap());
    }
    guest.image.commit().await.unwrap();
    let all = guest.read_all().await.unwrap();
    let snapshot = store.snapshot();
    // The reservations are not given back before the snapshot: in it they are leaks.
    drop(holes);
    (snapshot, all)
}

#[test]
fn recovery_and_filling_of_holes_may_be_cut_anywhere() {
    for subject in subjects() {
        Sim::new(4).block_on(async {
            let (start, all) = strewn(&subject).await;
            let look = async |image: Snapshot, what: &str| {
                let store = MemoryStore::from_snapshot("after-the-cut.img", image);
                let guest =
                    Guest::new(subject.open(store.clone()).await.unwrap_or_else(|e| panic!("{what}: {e}")), &[]);
                assert!(guest.read_all().await.unwrap() == all, "{}: {what}", subject.name);
                guest.image.close().await.unwrap();
                subject.assert_clean(store).await;
            };
            let open_and_close = async |fault: Rc<FaultStore>| {
                subject.open(fault).await.unwrap().close().await.unwrap();
            };
            cut_everywhere(start, 6, open_and_close, look).await;
        });
    }
}

#[test]
fn a_check_that_repairs_may_be_cut_anywhere() {
    for subject in marking_subjects() {
        Sim::new(4).block_on(async {
            let (start, all) = strewn(&subject).await;
            // The second cluster's entry leads to the first one's place: two owners, whose contents both must stay.
            let store = MemoryStore::from_snapshot("two-owners.img", start);
            let cluster = subject.cluster_size.unwrap();
            let read = async |at| {
                let bytes = Iov::alloc(8);
                store.read(HostOffset(at), bytes.clone()).await.unwrap();
                u64::from_le_bytes(bytes.to_vec().try_into().unwrap())
            };
            let table = read(cluster).await;
            let first = read(table).await;
            store.write(HostOffset(table + 8 * 7), Iov::from_slice(&first.to_le_bytes()), false).await.unwrap();
            let mut expected = all;
            expected.copy_within(0..cluster as usize, 7 * cluster as usize);
            let look = async |image: Snapshot, what: &str| {
                let store = MemoryStore::from_snapshot("after-the-cut.img", image);
                let guest =
                    Guest::new(subject.open(store.clone()).await.unwrap_or_else(|e| panic!("{what}: {e}")), &[]);
                assert!(guest.read_all().await.unwrap() == expected, "{}: {what}", subject.name);
                guest.image.close().await.unwrap();
                subject.assert_clean(store).await;
            };
            let repair = async |fault: Rc<FaultStore>| {
                let options = image::OpenOptions { read_only: false, for_check: true };
                let image = image::open(fault, subject.format, options).await.unwrap();
                let report = image.check(Repair::All).await.unwrap();
                assert!(report.is_clean() && report.corruptions_fixed == 1 && report.leaks_fixed > 0, "{report:#?}");
                image.close().await.unwrap();
            };
            cut_everywhere(store.snapshot(), 6, repair, look).await;
        });
    }
}

/// A refcount table of one small cluster is soon too short: it moves, again and again, and may be cut anywhere on the way.
#[test]
fn a_refcount_table_that_moves_may_be_cut_anywhere() {
    let qcow2 = image::qcow2::Options { refcount_bits: 64, ..image::qcow2::Options::default() };
    let subject = Subject::qcow2("qcow2 512, refcounts of 64 bits", 512, qcow2);
    Sim::new(4).block_on(async {
        let store = MemoryStore::new("growing.img", 0);
        subject.create(store.clone(), 16 << 20, None).await;
        // One block counts 64 clusters of 512 bytes, and a table of one cluster leads to 64 blocks: 2 MiB.
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        let kept = (2 << 20) - (120 << 10);
        guest.write(0, &vec![1; kept]).await.unwrap();
        guest.image.close().await.unwrap();
        let table = async |store: Rc<MemoryStore>| {
            let bytes = Iov::alloc(512);
            store.read(HostOffset::ZERO, bytes.clone()).await.unwrap();
            layout::qcow2::Header::decode(&bytes.to_vec()).unwrap().refcount_table
        };
        let before = table(store.clone()).await;
        let grow = async |fault: Rc<FaultStore>| {
            let guest = Guest::new(subject.open(fault).await.unwrap(), &[]);
            guest.write(4 << 20, &vec![2; 200 << 10]).await.unwrap();
            guest.image.commit().await.unwrap();
            guest.write(8 << 20, &vec![3; 200 << 10]).await.unwrap();
            guest.image.close().await.unwrap();
        };
        let look = async |image: Snapshot, what: &str| {
            let store = MemoryStore::from_snapshot("after-the-cut.img", image);
            let guest = Guest::new(subject.open(store.clone()).await.unwrap_or_else(|e| panic!("{what}: {e}")), &[]);
            assert!(guest.read(0, kept as u64).await.unwrap().iter().all(|b| *b == 1), "{what}");
            guest.write(12 << 20, &vec![4; 100 << 10]).await.unwrap();
            guest.image.close().await.unwrap();
            subject.assert_clean_after_a_cut(store).await;
        };
        cut_everywhere(store.snapshot(), 3, grow, look).await;
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        guest.write(4 << 20, &vec![2; 6 << 20]).await.unwrap();
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        assert_ne!(table(store.clone()).await, before, "it never had to move");
    });
}

#[test]
fn a_new_backing_reference_is_there_whole_or_not_at_all() {
    let long = |c: &str| Some(BackingRef { name: c.repeat(900), format: None });
    let short = |c: &str| Some(BackingRef { name: c.into(), format: Some(image::Format::Raw) });
    let steps =
        [short("a"), short("another"), long("b"), long("c"), short("d"), long("e"), None, long("f"), None, short("g")];
    for subject in subjects() {
        Sim::new(4).block_on(async {
            let store = MemoryStore::new("named.img", 0);
            subject.create(store.clone(), SIZE, steps[0].clone()).await;
            let fits = |step: &&Option<BackingRef>| {
                step.as_ref().is_none_or(|backing| backing.name.len() <= subject.longest_name())
            };
            let steps: Vec<_> = steps.iter().filter(fits).cloned().collect();
            for pair in steps.windows(2) {
                let set = async |fault: Rc<FaultStore>| {
                    let image = subject.open(fault).await.unwrap();
                    image.set_backing(pair[1].clone()).await.unwrap();
                };
                let look = async |image: Snapshot, what: &str| {
                    let store = MemoryStore::from_snapshot("after-the-cut.img", image);
                    let found = subject.open(store).await.unwrap_or_else(|e| panic!("{what}: {e}")).backing();
                    assert!(pair.contains(&found), "{what}: {found:?}");
                };
                cut_everywhere(store.snapshot(), 40, set, look).await;
                let image = subject.open(store.clone()).await.unwrap();
                image.set_backing(pair[1].clone()).await.unwrap();
                assert_eq!(image.backing(), pair[1]);
            }
        });
    }
}
