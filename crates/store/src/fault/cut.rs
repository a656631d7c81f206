//! The states that a power cut could leave behind, one by one.
//!
//! **Invariants.** Every state this yields is possible, and is named by a [`Choice`] from which it can be built again. Where
//! all states fit the limit, each is yielded once; otherwise those come first that bugs like best (nothing, everything,
//! one change missing, one change alone, cut off after each change), then random ones, none twice.

use super::power::{Length, Version, build};
use crate::memory::Snapshot;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::rc::Rc;

/// Random states tried in a row without a new one, before we take it that there are no more.
const TRIES_MAX: u32 = 1000;

/// All that a power cut could leave behind. Clones are cheap.
#[derive(Clone)]
pub struct PowerCut {
    inner: Rc<Inner>,
}

struct Inner {
    durable: Snapshot,
    sector: u64,
    lengths: Vec<Length>,
    /// Sectors with versions that are not durable.
    sectors: Vec<(u64, Vec<Version>)>,
    /// The changes that are not wholly durable, in order of start.
    entries: Vec<u64>,
}

/// Which of the possible states: for each open sector which version (0: what was durable), and how many changes of length.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Choice {
    lengths: usize,
    versions: Vec<usize>,
}

impl fmt::Display for Choice {
    /// Numbers in the order of [`PowerCut`]'s open sectors: enough to compare by eye.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lengths; versions", self.lengths)?;
        self.versions.iter().try_for_each(|version| write!(f, " {version}"))
    }
}

/// One state.
#[derive(Clone, Debug)]
pub struct State {
    /// Its name.
    pub choice: Choice,
    /// What is on the medium.
    pub image: Snapshot,
}

impl PowerCut {
    pub(super) fn new(
        durable: Snapshot,
        sector: u64,
        lengths: Vec<Length>,
        sectors: BTreeMap<u64, Vec<Version>>,
    ) -> Self {
        let sectors: Vec<(u64, Vec<Version>)> =
            sectors.into_iter().filter(|(_, versions)| !versions.is_empty()).collect();
        let of_sectors = sectors.iter().flat_map(|(_, versions)| versions.iter().map(|version| version.entry));
        let entries: BTreeSet<u64> = of_sectors.chain(lengths.iter().map(|length| length.entry)).collect();
        let entries = entries.into_iter().collect();
        Self { inner: Rc::new(Inner { durable, sector, lengths, sectors, entries }) }
    }

    /// How many choices there are (some may look alike).
    pub fn count(&self) -> u128 {
        let lengths = self.inner.lengths.len() as u128 + 1;
        self.inner
            .sectors
            .iter()
            .fold(lengths, |product, (_, versions)| product.saturating_mul(versions.len() as u128 + 1))
    }

    /// How many changes are not wholly durable.
    pub fn changes(&self) -> usize {
        self.inner.entries.len()
    }

    /// Nothing but what was durable.
    pub fn nothing(&self) -> Choice {
        self.of_changes(|_| false)
    }

    /// Everything that had been started.
    pub fn everything(&self) -> Choice {
        self.of_changes(|_| true)
    }

    /// Those changes in full for which `kept` says so (numbered from 0 in order of start), as far as they do not cover one
    /// another.
    pub fn of_changes(&self, kept: impl Fn(usize) -> bool) -> Choice {
        let Inner { lengths, sectors, entries, .. } = &*self.inner;
        let keeps = |entry: u64| entries.binary_search(&entry).is_ok_and(&kept);
        let versions = sectors
            .iter()
            .map(|(_, versions)| versions.iter().rposition(|version| keeps(version.entry)).map_or(0, |last| last + 1))
            .collect();
        let lengths = lengths.iter().rposition(|length| keeps(length.entry)).map_or(0, |last| last + 1);
        Choice { lengths, versions }
    }

    /// What the medium then holds. A choice of another cut is taken as far as it goes.
    pub fn image(&self, choice: &Choice) -> Snapshot {
        let Inner { durable, sector, lengths, sectors, .. } = &*self.inner;
        let chosen = sectors.iter().zip(&choice.versions).filter_map(|((number, versions), version)| {
            let version = versions.get(version.checked_sub(1)?)?;
            Some((*number, version))
        });
        build(durable, *sector, &lengths[..choice.lengths.min(lengths.len())], chosen)
    }

    /// At most `limit` states; which ones, where there are more, follows from `seed`.
    pub fn states(&self, limit: usize, seed: u64) -> States {
        let all = self.count() <= limit as u128;
        States {
            cut: self.clone(),
            left: limit,
            all,
            next: Some(self.nothing()),
            likely: 0,
            seen: HashSet::new(),
            random: seed,
        }
    }

    /// How many choices there are for the `place`th part (sectors, then the length).
    fn radix(&self, place: usize) -> usize {
        match self.inner.sectors.get(place) {
            Some((_, versions)) => versions.len() + 1,
            None => self.inner.lengths.len() + 1,
        }
    }

    /// The choice after `choice`, counting.
    fn after(&self, mut choice: Choice) -> Option<Choice> {
        for place in 0..=choice.versions.len() {
            let radix = self.radix(place);
            let digit = choice.versions.get_mut(place).unwrap_or(&mut choice.lengths);
            *digit += 1;
            if *digit < radix {
                return Some(choice);
            }
            *digit = 0;
        }
        None
    }

    /// The `number`th of the choices that bugs like best.
    fn likely(&self, number: usize) -> Option<Choice> {
        let entries = self.inner.entries.len();
        match number {
            0 => Some(self.nothing()),
            1 => Some(self.everything()),
            _ => {
                let (which, entry) = ((number - 2) % 3, (number - 2) / 3);
                (entry < entries).then(|| match which {
                    0 => self.of_changes(|other| other != entry),
                    1 => self.of_changes(|other| other == entry),
                    _ => self.of_changes(|other| other <= entry),
                })
            }
        }
    }
}

impl fmt::Debug for PowerCut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerCut")
            .field("sectors", &self.inner.sectors.len())
            .field("lengths", &self.inner.lengths.len())
            .field("changes", &self.changes())
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

/// The states of a [`PowerCut`], one by one.
pub struct States {
    cut: PowerCut,
    left: usize,
    /// All of them, by counting; otherwise a selection.
    all: bool,
    next: Option<Choice>,
    likely: usize,
    seen: HashSet<Choice>,
    random: u64,
}

impl Iterator for States {
    type Item = State;

    fn next(&mut self) -> Option<State> {
        self.left = self.left.checked_sub(1)?;
        let choice = if self.all {
            let choice = self.next.take()?;
            self.next = self.cut.after(choice.clone());
            choice
        } else {
            self.select()?
        };
        let image = self.cut.image(&choice);
        Some(State { choice, image })
    }
}

impl States {
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The next choice that was not made yet.
    fn select(&mut self) -> Option<Choice> {
        while let Some(choice) = self.cut.likely(self.likely) {
            self.likely += 1;
            if self.seen.insert(choice.clone()) {
                return Some(choice);
            }
        }
        for _ in 0..TRIES_MAX {
            let choice = self.draw();
            if self.seen.insert(choice.clone()) {
                return Some(choice);
            }
        }
        None
    }

    /// Whole changes there or not, at a random density; half of the time some sectors of it are then chosen at random.
    fn draw(&mut self) -> Choice {
        let cut = self.cut.clone();
        let density = self.random() % 9 + 1;
        let kept: Vec<bool> = (0..cut.changes()).map(|_| self.random() % 10 < density).collect();
        let mut choice = cut.of_changes(|entry| kept[entry]);
        let torn = [0, 0, 2, 10][(self.random() % 4) as usize];
        for place in 0..choice.versions.len() {
            if self.random() % 10 < torn {
                choice.versions[place] = (self.random() % cut.radix(place) as u64) as usize;
            }
        }
        if self.random() % 10 < torn {
            choice.lengths = (self.random() % (cut.inner.lengths.len() as u64 + 1)) as usize;
        }
        choice
    }
}
