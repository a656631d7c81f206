//! The volatile cache: what is surely on the medium, and what may be or not.
//!
//! The model. The medium writes sectors, each of them whole or not at all, in any order. Since the last flush that
//! covered it, a sector may have been given several *versions*, one by each change that touched it; until the next
//! flush the medium holds any one of them, or what was durable before, independently of all other sectors. So writes are
//! torn between sectors, reordered, lost. Lengths are different: file systems journal them, so they reach the medium
//! in order: the length is one of those the store had since the last flush, and what a change of length cut off is gone
//! if that change, or a later one, is there.
//!
//! **Invariants.** Versions of a sector stand in the order in which they took effect, each complete (what a smaller
//! write left alone is in it). A flush makes the last *answered* version of each sector durable and forgets it and those
//! before it; later ones, and changes not answered when the flush was called, stay open. A durable version is
//! reachable: a length that reaches over it is durable with it.

use super::cut::PowerCut;
use crate::memory::{SIZE_MAX, Snapshot};
use layout::HostRange;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What a change does.
#[derive(Clone)]
pub(super) enum Effect {
    Nothing,
    /// Bytes at an offset; grows.
    Write(u64, Rc<[u8]>),
    /// Grows.
    Zero(HostRange),
    /// At least this long.
    Extend(u64),
    SetSize(u64),
}

/// One content that a sector had.
#[derive(Clone)]
pub(super) struct Version {
    /// When it took effect.
    pub(super) moment: u64,
    /// By which change.
    pub(super) entry: u64,
    /// The whole sector; `None`: zeros.
    pub(super) bytes: Option<Rc<[u8]>>,
    /// Where its bytes end: it takes a length that reaches there to read them all.
    end: u64,
    answered: Answered,
}

/// One length that the store had.
#[derive(Clone)]
pub(super) struct Length {
    pub(super) moment: u64,
    pub(super) entry: u64,
    pub(super) size: u64,
    /// Whether it cut something off.
    pub(super) shrinks: bool,
    answered: Answered,
}

/// When a change was answered, if it was.
type Answered = Rc<Cell<Option<u64>>>;

/// What is durable and what is not.
pub(super) struct Volatile {
    sector: u64,
    state: RefCell<State>,
}

#[derive(Clone)]
struct State {
    /// Counts what happens.
    clock: u64,
    durable: Snapshot,
    /// What reads see.
    seen: Snapshot,
    lengths: Vec<Length>,
    sectors: BTreeMap<u64, Vec<Version>>,
    /// Changes that have not taken effect, or of which nobody knows.
    in_flight: BTreeMap<u64, Effect>,
    next: u64,
    /// Changes that have taken effect and are not answered.
    unanswered: BTreeMap<u64, Answered>,
}

impl Volatile {
    pub(super) fn new(content: Snapshot, sector: u64) -> Self {
        let state = State {
            clock: 0,
            durable: content.clone(),
            seen: content,
            lengths: Vec::new(),
            sectors: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            next: 0,
            unanswered: BTreeMap::new(),
        };
        Self { sector, state: RefCell::new(state) }
    }

    pub(super) fn sector(&self) -> u64 {
        self.sector
    }

    /// A change begins: from now on it may reach the medium.
    pub(super) fn started(&self, effect: Effect) -> u64 {
        let mut state = self.state.borrow_mut();
        let entry = state.next;
        state.next += 1;
        state.in_flight.insert(entry, effect);
        entry
    }

    /// Reads see it from now on.
    pub(super) fn took_effect(&self, entry: u64) {
        let mut state = self.state.borrow_mut();
        if let Some(effect) = state.in_flight.remove(&entry) {
            state.apply(self.sector, entry, &effect, true);
        }
    }

    /// It failed, and left this behind.
    pub(super) fn failed(&self, entry: u64, left: Effect) {
        let mut state = self.state.borrow_mut();
        state.in_flight.remove(&entry);
        state.apply(self.sector, entry, &left, false);
    }

    /// The caller knows that these are done; with `fua`, that they are durable.
    pub(super) fn answered(&self, entries: &[u64], fua: bool) {
        let mut state = self.state.borrow_mut();
        state.clock += 1;
        let now = state.clock;
        for entry in entries {
            if let Some(answered) = state.unanswered.remove(entry) {
                answered.set(Some(now));
            }
        }
        if fua {
            let own: BTreeSet<u64> = entries.iter().copied().collect();
            state.settle(self.sector, |entry, _| own.contains(&entry), false);
        }
    }

    /// The time, for [`Volatile::flushed`].
    pub(super) fn now(&self) -> u64 {
        self.state.borrow().clock
    }

    /// What was answered by then is durable.
    pub(super) fn flushed(&self, called: u64) {
        let covered = |_, answered: &Answered| answered.get().is_some_and(|moment| moment <= called);
        self.state.borrow_mut().settle(self.sector, covered, true);
    }

    /// What a power cut could leave behind now.
    pub(super) fn cut(&self) -> PowerCut {
        let mut state = self.state.borrow().clone();
        state.land(self.sector);
        PowerCut::new(state.durable, self.sector, state.lengths, state.sectors)
    }
}

impl State {
    fn apply(&mut self, sector: u64, entry: u64, effect: &Effect, answerable: bool) {
        self.clock += 1;
        let answered = Answered::default();
        if answerable {
            self.unanswered.insert(entry, Rc::clone(&answered));
        }
        let mark = Mark { moment: self.clock, entry, answered };
        match effect {
            Effect::Nothing => {}
            Effect::Write(at, bytes) => {
                self.seen.write(*at, bytes);
                let end = at + bytes.len() as u64;
                for number in numbers(*at, end, sector) {
                    self.version(sector, number, &mark);
                }
                self.grow(end, &mark);
            }
            Effect::Zero(range) => {
                let (start, end) = (range.start().get(), range.end().get());
                // Where nothing is held, it is zeros anyway.
                let numbers = self.held(sector, *range);
                self.seen.zero(start, end - start);
                for number in numbers {
                    self.version(sector, number, &mark);
                }
                self.grow(end, &mark);
            }
            Effect::Extend(end) => self.grow(*end, &mark),
            Effect::SetSize(size) => {
                let shrinks = *size < self.seen.size();
                if *size != self.seen.size() {
                    self.seen.set_size(*size);
                    self.lengths.push(mark.length(*size, shrinks));
                }
            }
        }
    }

    /// The sectors of `range` that hold something, or may.
    fn held(&self, sector: u64, range: HostRange) -> BTreeSet<u64> {
        let (start, end) = (range.start().get(), range.end().get());
        if start >= end {
            return BTreeSet::new();
        }
        let mut numbers: BTreeSet<u64> =
            self.sectors.range(start / sector..=(end - 1) / sector).map(|(number, _)| *number).collect();
        let mut at = start;
        while at < end.min(self.durable.size()) {
            let (len, data) = self.durable.run(at, end.min(self.durable.size()) - at);
            if data {
                numbers.extend(self::numbers(at, at + len, sector));
            }
            at += len;
        }
        numbers
    }

    fn grow(&mut self, end: u64, mark: &Mark) {
        // `seen` may have grown by the write itself: compare with the last length noted.
        let known = self.lengths.last().map_or(self.durable.size(), |length| length.size);
        if end > known {
            self.seen.set_size(self.seen.size().max(end));
            self.lengths.push(mark.length(end, false));
        }
    }

    /// Notes what sector `number` holds now.
    fn version(&mut self, sector: u64, number: u64, mark: &Mark) {
        let mut bytes = vec![0; sector as usize];
        self.seen.read(number * sector, &mut bytes);
        let versions = self.sectors.entry(number).or_default();
        if versions.is_empty() {
            let mut durable = vec![0; sector as usize];
            self.durable.read(number * sector, &mut durable);
            // Nothing can be told apart here, as long as nothing is cut off in between.
            if durable == bytes && !self.lengths.iter().any(|length| length.shrinks) {
                self.sectors.remove(&number);
                return;
            }
        }
        let zero = bytes.iter().all(|byte| *byte == 0);
        versions.push(Version {
            moment: mark.moment,
            entry: mark.entry,
            bytes: (!zero).then(|| bytes.into()),
            end: self.seen.size().min((number + 1) * sector),
            answered: Rc::clone(&mark.answered),
        });
    }

    /// Makes durable what `covered` says of an entry and when it was answered: the last such version of each sector, and
    /// lengths: with `lengths` the last such, otherwise only as far as those versions need it.
    fn settle(&mut self, sector: u64, covered: impl Fn(u64, &Answered) -> bool, lengths: bool) {
        let chosen: BTreeMap<u64, usize> = self
            .sectors
            .iter()
            .filter_map(|(number, versions)| {
                let last = versions.iter().rposition(|version| covered(version.entry, &version.answered))?;
                Some((*number, last))
            })
            .collect();
        let mut applied = 0;
        if lengths {
            let last = self.lengths.iter().rposition(|length| covered(length.entry, &length.answered));
            applied = last.map_or(0, |last| last + 1);
        }
        for (number, index) in &chosen {
            let version = &self.sectors[number][*index];
            applied = applied.max(self.lengths_for(version));
        }
        let versions = chosen.iter().map(|(number, index)| (*number, &self.sectors[number][*index]));
        self.durable = build(&self.durable, sector, &self.lengths[..applied], versions);
        for (number, index) in chosen {
            if let Some(versions) = self.sectors.get_mut(&number) {
                versions.drain(..=index);
            }
        }
        let gone: Vec<Length> = self.lengths.drain(..applied).collect();
        for length in gone.iter().filter(|length| length.shrinks) {
            self.cut_off(sector, length);
        }
        self.sectors.retain(|_, versions| !versions.is_empty());
    }

    /// How many lengths have to be durable for `version` to be readable.
    fn lengths_for(&self, version: &Version) -> usize {
        let before = self.lengths.iter().take_while(|length| length.moment <= version.moment);
        let least = before.clone().map(|length| length.size).min();
        let least = least.unwrap_or(u64::MAX).min(self.durable.size());
        if version.end > least { before.count() } else { 0 }
    }

    /// A durable `length` has cut off what older versions hold past it.
    fn cut_off(&mut self, sector: u64, length: &Length) {
        for (number, versions) in self.sectors.range_mut(length.size / sector..) {
            let start = number * sector;
            if start >= length.size {
                versions.retain(|version| version.moment > length.moment);
                continue;
            }
            for version in versions.iter_mut().filter(|version| version.moment < length.moment) {
                if let Some(bytes) = &mut version.bytes {
                    let mut kept = bytes.to_vec();
                    kept[(length.size - start) as usize..].fill(0);
                    *bytes = kept.into();
                }
            }
        }
    }

    /// Takes the changes in flight for such that may have reached the medium: each by itself, and on top of those before.
    fn land(&mut self, sector: u64) {
        let alone = self.clone();
        let mut in_flight: Vec<(u64, Effect)> = std::mem::take(&mut self.in_flight).into_iter().collect();
        // Any of the lengths they lead to may be there: in this order each is one of the list.
        in_flight.sort_by_key(|(_, effect)| match effect {
            Effect::Nothing => 0,
            Effect::Write(at, bytes) => at + bytes.len() as u64,
            Effect::Zero(range) => range.end().get(),
            Effect::Extend(end) => *end,
            Effect::SetSize(_) => u64::MAX,
        });
        for (entry, effect) in in_flight {
            let mut single = State { in_flight: BTreeMap::new(), ..alone.clone() };
            single.apply(sector, entry, &effect, false);
            self.apply(sector, entry, &effect, false);
            for (number, versions) in single.sectors {
                let Some(own) = versions.into_iter().next_back().filter(|version| version.entry == entry) else {
                    continue;
                };
                let all = self.sectors.entry(number).or_default();
                if !all.iter().any(|other| other.entry == entry && other.bytes == own.bytes) {
                    all.insert(all.len().saturating_sub(1), Version { moment: self.clock, ..own });
                }
            }
        }
    }
}

/// Whose change it is.
struct Mark {
    moment: u64,
    entry: u64,
    answered: Answered,
}

impl Mark {
    fn length(&self, size: u64, shrinks: bool) -> Length {
        Length { moment: self.moment, entry: self.entry, size, shrinks, answered: Rc::clone(&self.answered) }
    }
}

/// The numbers of the sectors that `start..end` touches.
fn numbers(start: u64, end: u64, sector: u64) -> impl Iterator<Item = u64> {
    start / sector..end.div_ceil(sector).max(start / sector)
}

/// What the medium holds when, of all that is not durable, `lengths` and `versions` have reached it.
pub(super) fn build<'a>(
    durable: &Snapshot,
    sector: u64,
    lengths: &[Length],
    versions: impl Iterator<Item = (u64, &'a Version)>,
) -> Snapshot {
    let mut image = durable.clone();
    let size = lengths.last().map_or(durable.size(), |length| length.size);
    // Room for what lies past the end until we know the end.
    image.set_size(SIZE_MAX);
    let mut versions: Vec<(u64, &Version)> = versions.collect();
    versions.sort_by_key(|(_, version)| version.moment);
    let mut cuts = lengths.iter().filter(|length| length.shrinks).peekable();
    for (number, version) in versions {
        while let Some(length) = cuts.next_if(|length| length.moment < version.moment) {
            image.zero(length.size, u64::MAX);
        }
        match &version.bytes {
            Some(bytes) => image.write(number * sector, bytes),
            None => image.zero(number * sector, sector),
        }
    }
    for length in cuts {
        image.zero(length.size, u64::MAX);
    }
    image.set_size(size);
    image
}
