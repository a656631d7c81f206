//! The oracle: which values each sector may show, at every moment and after every power cut.
//!
//! It knows every change (write, zeroing, discard) with the moments at which it began and ended. The rules:
//!
//! * **A read** may see any change that began before the read ended, unless a later one had surely taken its place before
//!   the read began: a change that began after the first had ended, and that had itself succeeded, or had been *seen* in
//!   that sector, before the read began.
//! * **After a power cut** a sector may hold any change that had begun, unless one that began after its end is durable:
//!   one that had succeeded before a flush began that then succeeded, or that was written with FUA.
//! * A failed change may have taken effect or not, sector by sector; it takes nobody's place until it is seen.
//!
//! Copying (copy-on-read, streams) is no change: it must never be seen at all.

use crate::content::{SECTOR, Value, ZEROS};
use smallvec::SmallVec;

/// A moment: how many things had happened.
type Moment = u64;

/// Never, or not yet.
const NEVER: Moment = Moment::MAX;

/// A run of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Run {
    pub(crate) fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    pub(crate) fn bytes(self) -> layout::GuestRange {
        layout::GuestRange::new(layout::GuestOffset(self.first * SECTOR), self.count * SECTOR)
    }

    fn sectors(self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }
}

/// A change, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change(usize);

struct Record {
    value: Value,
    run: Run,
    began: Moment,
    /// When it ended, well or not.
    ended: Moment,
    succeeded: bool,
    durable: bool,
}

/// A change in one sector, and when a reader had first seen it there.
#[derive(Clone, Copy)]
struct Trail {
    change: u32,
    seen: Moment,
}

/// A read or flush under way.
#[derive(Clone, Copy)]
pub(crate) struct Began(Moment);

/// See the module.
pub(crate) struct Oracle {
    clock: Moment,
    records: Vec<Record>,
    sectors: Vec<SmallVec<[Trail; 4]>>,
    /// Sizes in sectors: what guests may use, and after it what a growth that has not ended may make of it.
    sizes: Vec<u64>,
    next_value: u64,
    touched: Vec<bool>,
}

impl Oracle {
    /// A disk that holds these values, durably.
    pub(crate) fn new(content: &[Value]) -> Self {
        let mut oracle = Self {
            clock: 0,
            records: Vec::new(),
            sectors: Vec::new(),
            sizes: Vec::new(),
            next_value: 1,
            touched: Vec::new(),
        };
        oracle.collapse(content);
        oracle
    }

    /// From now on the disk holds these values, durably: somebody has looked, after a power cut.
    pub(crate) fn collapse(&mut self, content: &[Value]) {
        self.records.clear();
        self.sectors.clear();
        self.sizes = vec![content.len() as u64];
        self.touched = vec![false; content.len()];
        self.grow(content);
    }

    fn grow(&mut self, content: &[Value]) {
        for value in content {
            let at = self.sectors.len() as u64;
            match self.records.last_mut() {
                Some(last) if last.value == *value && last.run.first + last.run.count == at => last.run.count += 1,
                _ => self.records.push(Record {
                    value: *value,
                    run: Run::new(at, 1),
                    began: 0,
                    ended: 0,
                    succeeded: true,
                    durable: true,
                }),
            }
            let change = self.records.len() as u32 - 1;
            self.sectors.push(SmallVec::from_slice(&[Trail { change, seen: NEVER }]));
        }
    }

    fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    /// Sectors that guests may use.
    pub(crate) fn size(&self) -> u64 {
        self.sizes[0]
    }

    /// A value nobody has written.
    pub(crate) fn value(&mut self) -> Value {
        self.next_value += 1;
        Value(self.next_value)
    }

    /// A change begins.
    pub(crate) fn begin(&mut self, run: Run, value: Value) -> Change {
        let began = self.tick();
        let number = self.records.len();
        self.records.push(Record { value, run, began, ended: NEVER, succeeded: false, durable: false });
        for sector in run.sectors() {
            self.sectors[sector].push(Trail { change: number as u32, seen: NEVER });
            self.touched[sector] = true;
        }
        Change(number)
    }

    /// It has ended; with `durable` it was promised to be on the medium.
    pub(crate) fn end(&mut self, change: Change, succeeded: bool, durable: bool) {
        let now = self.tick();
        let record = &mut self.records[change.0];
        record.ended = now;
        record.succeeded = succeeded;
        record.durable = succeeded && durable;
    }

    /// A read or a flush begins.
    pub(crate) fn began(&mut self) -> Began {
        Began(self.tick())
    }

    /// A flush that began then has succeeded.
    pub(crate) fn flushed(&mut self, began: Began) {
        for record in &mut self.records {
            record.durable |= record.succeeded && record.ended < began.0;
        }
        self.tick();
    }

    /// A read that began then has found `value` in a sector. What is wrong with that, if anything.
    pub(crate) fn saw(&mut self, began: Began, sector: u64, value: Option<Value>) -> Result<(), String> {
        let now = self.clock;
        let records = &self.records;
        let trails = &mut self.sectors[sector as usize];
        let Some(value) = value else {
            return Err(format!("sector {sector} holds a mixture; legal: {}", legal(records, trails, began.0)));
        };
        let floor = floor_of_read(records, trails, began.0);
        let mut found = false;
        for trail in trails.iter_mut() {
            let record = &records[trail.change as usize];
            if record.value == value && record.ended >= floor {
                found = true;
                // Of several that wrote the same (zeros), nobody can tell which one it was.
                if value != ZEROS {
                    trail.seen = trail.seen.min(now);
                }
            }
        }
        if found {
            Ok(())
        } else {
            Err(format!("sector {sector} shows {value}; legal: {}", legal(records, trails, began.0)))
        }
    }

    /// The disk is about to grow to so many sectors.
    pub(crate) fn begin_growth(&mut self, size: u64) {
        let old = self.sectors.len() as u64;
        self.sizes.push(size);
        if size > old {
            self.grow(&vec![ZEROS; (size - old) as usize]);
            self.touched.resize(size as usize, true);
        }
    }

    /// It has grown, durably, or it has not (and may have all the same, after a failure).
    pub(crate) fn end_growth(&mut self, grown: bool) {
        if grown {
            let size = self.sizes.last().copied().unwrap_or_default();
            self.sizes = vec![size];
        }
    }

    /// It was refused: nothing has happened.
    pub(crate) fn forget_growth(&mut self) {
        self.sizes.pop();
    }

    /// What a power cut at this moment may leave.
    pub(crate) fn after_cut(&self) -> AfterCut {
        let mut legal = Vec::with_capacity(self.sectors.len());
        for trails in &self.sectors {
            let of = |trail: &Trail| &self.records[trail.change as usize];
            let durable = trails.iter().map(of).filter(|record| record.durable).map(|record| record.began).max();
            let floor = durable.unwrap_or(0);
            let values = trails.iter().map(of).filter(|record| record.ended >= floor).map(|record| record.value);
            let mut values: SmallVec<[Value; 2]> = values.collect();
            values.sort_unstable();
            values.dedup();
            legal.push(values);
        }
        AfterCut { legal, sizes: self.sizes.clone(), touched: self.touched.clone() }
    }
}

/// Changes that had ended before this can't be seen by a read that began at `began`.
fn floor_of_read(records: &[Record], trails: &[Trail], began: Moment) -> Moment {
    let in_force = |trail: &&Trail| {
        let record = &records[trail.change as usize];
        record.succeeded && record.ended < began || trail.seen < began
    };
    trails.iter().filter(in_force).map(|trail| records[trail.change as usize].began).max().unwrap_or(0)
}

fn legal(records: &[Record], trails: &[Trail], began: Moment) -> String {
    let floor = floor_of_read(records, trails, began);
    let of = trails.iter().map(|trail| &records[trail.change as usize]);
    let values: Vec<String> =
        of.filter(|record| record.ended >= floor).map(|record| record.value.to_string()).collect();
    values.join(", ")
}

/// What a power cut at one moment may leave.
pub(crate) struct AfterCut {
    legal: Vec<SmallVec<[Value; 2]>>,
    sizes: Vec<u64>,
    touched: Vec<bool>,
}

impl AfterCut {
    /// Sizes (in sectors) that the disk may have.
    pub(crate) fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    /// Whether a sector may hold this.
    pub(crate) fn judge(&self, sector: u64, value: Option<Value>) -> Result<(), String> {
        let legal = &self.legal[sector as usize];
        match value {
            Some(value) if legal.contains(&value) => Ok(()),
            found => {
                let found = found.map_or("a mixture".to_owned(), |value| value.to_string());
                let legal: Vec<String> = legal.iter().map(Value::to_string).collect();
                Err(format!("sector {sector} holds {found}; legal: {}", legal.join(", ")))
            }
        }
    }

    /// Runs of sectors that somebody has changed lately, below `size`, each a little wider than that.
    pub(crate) fn touched(&self, size: u64, margin: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for sector in (0..size).filter(|sector| self.touched[*sector as usize]) {
            let (first, end) = (sector.saturating_sub(margin), (sector + 1 + margin).min(size));
            match runs.last_mut() {
                Some(last) if last.first + last.count >= first => last.count = end - last.first,
                _ => runs.push(Run::new(first, end - first)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Run = Run { first: 0, count: 1 };

    fn oracle() -> Oracle {
        Oracle::new(&[Value::original(0)])
    }

    fn written(oracle: &mut Oracle, durable: bool) -> Value {
        let value = oracle.value();
        let change = oracle.begin(ALL, value);
        oracle.end(change, true, durable);
        value
    }

    #[test]
    fn a_read_sees_the_last_write_that_ended_and_those_under_way() {
        let mut oracle = oracle();
        let old = written(&mut oracle, false);
        let new = oracle.value();
        let change = oracle.begin(ALL, new);
        let began = oracle.began();
        assert!(oracle.saw(began, 0, Some(Value::original(0))).is_err());
        assert!(oracle.saw(began, 0, Some(old)).is_ok());
        assert!(oracle.saw(began, 0, Some(new)).is_ok());
        oracle.end(change, true, false);
        assert!(oracle.saw(began, 0, Some(old)).is_ok(), "the read was under way");
        let began = oracle.began();
        assert!(oracle.saw(began, 0, Some(old)).is_err());
        assert!(oracle.saw(began, 0, None).is_err());
    }

    #[test]
    fn what_was_seen_once_does_not_vanish_again() {
        let mut oracle = oracle();
        let new = oracle.value();
        oracle.begin(ALL, new);
        let began = oracle.began();
        assert!(oracle.saw(began, 0, Some(new)).is_ok());
        let began = oracle.began();
        assert!(oracle.saw(began, 0, Some(Value::original(0))).is_err());
    }

    #[test]
    fn a_failed_write_may_be_there_or_not() {
        let mut oracle = oracle();
        let lost = oracle.value();
        let change = oracle.begin(ALL, lost);
        oracle.end(change, false, true);
        let began = oracle.began();
        assert!(oracle.saw(began, 0, Some(Value::original(0))).is_ok());
        assert!(oracle.saw(began, 0, Some(lost)).is_ok());
        assert!(oracle.after_cut().judge(0, Some(Value::original(0))).is_ok());
    }

    #[test]
    fn a_cut_leaves_old_or_new_until_a_flush_or_fua_says_new() {
        let mut oracle = oracle();
        let old = written(&mut oracle, false);
        let cut = oracle.after_cut();
        assert!(cut.judge(0, Some(Value::original(0))).is_ok());
        assert!(cut.judge(0, Some(old)).is_ok());
        let flush = oracle.began();
        let late = written(&mut oracle, false);
        oracle.flushed(flush);
        let cut = oracle.after_cut();
        assert!(cut.judge(0, Some(Value::original(0))).is_err(), "flushed");
        assert!(cut.judge(0, Some(old)).is_ok(), "the flush began before the second write ended");
        assert!(cut.judge(0, Some(late)).is_ok());
        let fua = written(&mut oracle, true);
        let cut = oracle.after_cut();
        assert!(cut.judge(0, Some(late)).is_err());
        assert!(cut.judge(0, Some(fua)).is_ok());
        assert!(cut.judge(0, None).is_err());
    }

    #[test]
    fn a_disk_that_was_growing_has_one_of_two_sizes() {
        let mut oracle = oracle();
        oracle.begin_growth(3);
        assert_eq!(oracle.size(), 1);
        assert_eq!(oracle.after_cut().sizes(), [1, 3]);
        assert!(oracle.after_cut().judge(2, Some(ZEROS)).is_ok());
        oracle.end_growth(true);
        assert_eq!(oracle.after_cut().sizes(), [3]);
    }
}
