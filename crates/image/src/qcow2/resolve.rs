//! Where a guest's bytes are.
//!
//! **Invariants.**
//! * `lookup` changes nothing and waits for nothing: it sees exactly what was linked when it was called.
//! * What a table that is shared with a snapshot says of its clusters counts as shared, too: such a table's slices come into
//!   memory without "copied" flags.

use super::{Core, SLICE_BYTES};
use crate::slices::{Room, SlicePin};
use crate::tables::Place;
use crate::{Mapped, Mapping, Result};
use layout::qcow2::{COPIED, L1Entry, L2Entry, OFFSET, Packed, Slice, SubclusterMap, is_own};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::rc::Rc;

/// How far one lookup looks: this many tables that do not exist, or a 64th of it pieces of slices. Bounds the time it holds
/// the shard; whoever wants more asks again.
const LOOKUP_STEPS: u32 = 4096;
const PIECE_STEPS: u32 = 64;

/// An L2 table to look into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// Nothing in its reach is allocated.
    Nowhere,
    /// On disk.
    Stored {
        /// Where.
        at: HostOffset,
        /// Nobody else refers to it.
        own: bool,
    },
    /// Only in memory so far.
    Fresh {
        /// Where.
        at: HostOffset,
        /// What is not in the cache is zeros; otherwise it is on disk.
        empty: bool,
    },
}

/// What a run of the guest's bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Is(Mapping),
    /// A packed cluster, whose entry it is.
    Packed(Packed),
}

impl Piece {
    fn mapping(self) -> Mapping {
        match self {
            Self::Is(mapping) => mapping,
            Self::Packed(_) => Mapping::Packed,
        }
    }

    /// Whether `next`, which begins `len` bytes behind the start of this, is alike.
    fn goes_on_with(self, len: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Is(Mapping::Data(at)), Self::Is(Mapping::Data(next)))
            | (Self::Is(Mapping::Shared(at)), Self::Is(Mapping::Shared(next))) => at.checked_add(len) == Some(next),
            _ => self.mapping() == next.mapping() && !matches!(self.mapping(), Mapping::Data(_) | Mapping::Shared(_)),
        }
    }
}

impl Core {
    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> u64 {
        SLICE_BYTES.min(self.cluster_size())
    }

    /// Words of an L2 entry.
    pub(super) fn words(&self) -> usize {
        self.header.get().l2_entry_bytes() as usize / 8
    }

    /// Guest bytes that one slice maps.
    pub(super) fn slice_reach(&self) -> u64 {
        self.slice_bytes() / self.header.get().l2_entry_bytes() * self.cluster_size()
    }

    /// The slice that holds a guest offset's entry.
    pub(super) fn slice_of(&self, at: GuestOffset) -> u64 {
        at.get() / self.slice_reach()
    }

    /// The first guest byte that a slice maps.
    pub(super) fn slice_start(&self, number: u64) -> GuestOffset {
        GuestOffset(number * self.slice_reach())
    }

    /// Where slice `number` of the table at `table` lies.
    pub(super) fn slice_at(&self, table: HostOffset, number: u64) -> HostOffset {
        table + number % (self.cluster_size() / self.slice_bytes()) * self.slice_bytes()
    }

    /// The index, within its slice, of a guest offset's first word.
    pub(super) fn word_of(&self, at: GuestOffset) -> usize {
        (at.get() % self.slice_reach() / self.cluster_size()) as usize * self.words()
    }

    /// Which L2 table maps a guest offset.
    pub(super) fn l1_index(&self, at: GuestOffset) -> u64 {
        at.get() / self.header.get().table_reach()
    }

    /// L2 table `index`, as the L1 table says.
    pub(super) fn table(&self, index: u64) -> Result<Table> {
        let place = self.tables.borrow().place(index);
        let raw = match place {
            Place::Nowhere => return Ok(Table::Nowhere),
            Place::Fresh { at, empty } => return Ok(Table::Fresh { at, empty }),
            Place::Stored(raw) => raw,
        };
        let header = self.header.get();
        let place = header.l1_table + index * 8;
        match L1Entry::decode(raw, &header) {
            Ok(L1Entry::Unallocated) => Ok(Table::Nowhere),
            Ok(L1Entry::Table(at)) if at.get() + header.cluster_size() > self.store.size() => {
                let what =
                    format!("L1 entry {index} leads to a table past the end of the file; check and repair the image");
                Err(self.health.corrupt(place, what))
            }
            Ok(L1Entry::Table(at)) => Ok(Table::Stored { at, own: is_own(raw) }),
            Err(why) => {
                let what = format!("L1 entry {index}: {why}; check and repair the image");
                Err(self.health.corrupt(place, what))
            }
        }
    }

    /// See [`crate::Image::lookup`].
    pub(super) fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        self.health.check_range(range, self.size())?;
        let Some((first, mut len, mut cost)) = self.piece(range)? else { return Ok(None) };
        while len < range.len() && cost < LOOKUP_STEPS {
            // What cannot be told now, or is damaged, is for a later look-up.
            match self.piece(range.skip(len)) {
                Ok(Some((next, more, steps))) if first.goes_on_with(len, next) => {
                    len += more;
                    cost += steps;
                }
                _ => break,
            }
        }
        debug_assert!(len > 0 && len <= range.len(), "{len} of {range}");
        Ok(Some(Mapped { len, mapping: first.mapping() }))
    }

    /// What the start of `range` is, how far that goes (within its slice or, where there is no table, within the table's
    /// reach), and what it cost to find out; `None` when it is not in memory.
    pub(super) fn piece(&self, range: GuestRange) -> Result<Option<(Piece, u64, u32)>> {
        let at = range.start();
        let reach = self.header.get().table_reach();
        let unallocated =
            |until: u64, cost| Ok(Some((Piece::Is(Mapping::Unallocated), range.len().min(until - at.get()), cost)));
        let table = self.table(self.l1_index(at))?;
        let number = self.slice_of(at);
        let slice_end = (self.slice_start(number) + self.slice_reach()).get();
        let start = match table {
            Table::Nowhere => return unallocated(at.align_down(reach).get() + reach, 1),
            Table::Stored { at, .. } | Table::Fresh { at, .. } => at,
        };
        match self.cache.borrow().get(number) {
            Some(slice) => {
                let within = range.first(slice_end - at.get());
                let (piece, len) = self.piece_of(slice, within, self.slice_at(start, number))?;
                Ok(Some((piece, len, PIECE_STEPS)))
            }
            None if matches!(table, Table::Fresh { empty: true, .. }) => unallocated(slice_end, PIECE_STEPS),
            None => Ok(None),
        }
    }

    /// The run at the start of `range`, which lies within the slice (which lies at `slice_at`).
    fn piece_of(&self, slice: &Slice, range: GuestRange, slice_at: HostOffset) -> Result<(Piece, u64)> {
        let header = self.header.get();
        let (cluster, words) = (header.cluster_size(), self.words());
        let first = self.word_of(range.start());
        let entries = slice.raw().get(first..).unwrap_or_default();
        let raw = entries.first().copied().unwrap_or(0);
        let extended = if words == 2 { entries.get(1).copied().unwrap_or(0) } else { 0 };
        let entry = L2Entry::decode(raw, extended, &header).map_err(|why| {
            let what = format!("L2 entry for guest offset {}: {why}; check and repair the image", range.start().get());
            self.health.corrupt(slice_at + first as u64 * 8, what)
        })?;
        let inside = range.start().get() % cluster;
        // Data that is said to lie where a table is would be written over it.
        let first_cluster = (raw & OFFSET) >> header.cluster_bits;
        let on_metadata = |len: u64| -> Result<()> {
            let clusters = first_cluster..first_cluster + (inside + len).div_ceil(cluster);
            if header.has_data_file()
                || self.health.read_only()
                || self.metadata.borrow().range(clusters).next().is_none()
            {
                return Ok(());
            }
            let what = format!(
                "L2 entry for guest offset {}: its cluster is one of the image's tables; check and repair the image",
                range.start().get()
            );
            Err(self.health.corrupt(slice_at + first as u64 * 8, what))
        };
        if header.has_data_file()
            && let L2Entry::Data(host) | L2Entry::ZeroAllocated(host) | L2Entry::Subclusters(host, _) = entry
            && (is_own(raw) || host.get() != 0)
            && host.get() != range.start().align_down(cluster).get()
        {
            let what = format!(
                "L2 entry for guest offset {}: its cluster is elsewhere in the data file ({host}); check and repair the image",
                range.start().get()
            );
            return Err(self.health.corrupt(slice_at + first as u64 * 8, what));
        }
        // Nobody else refers to what lies in a data file.
        let own = is_own(raw) || header.has_data_file();
        let stored = |host: HostOffset| if own { Mapping::Data(host) } else { Mapping::Shared(host) };
        // How many entries in a row, this one included, are as `alike` says of their distance.
        let run = |alike: &dyn Fn(u64, u64) -> bool| {
            let most = (inside + range.len()).div_ceil(cluster) as usize;
            let entries = entries.chunks(words).take(most).enumerate();
            let same = |entry: &[u64]| words == 1 || entry.get(1) == Some(&extended);
            let count = entries.take_while(|(n, entry)| *n == 0 || alike(*n as u64, entry[0]) && same(entry)).count();
            range.len().min(count as u64 * cluster - inside)
        };
        let goes_on = |n: u64, entry: u64| Some(entry) == raw.checked_add(n * cluster);
        Ok(match entry {
            L2Entry::Unallocated => (Piece::Is(Mapping::Unallocated), run(&|_, entry| entry == 0)),
            L2Entry::Zero | L2Entry::ZeroAllocated(_) => (Piece::Is(Mapping::Zero), run(&|_, entry| entry == 1)),
            L2Entry::Data(host) => {
                let len = run(&goes_on);
                on_metadata(len)?;
                (Piece::Is(stored(host + inside)), len)
            }
            L2Entry::Packed(packed) => (Piece::Packed(packed), range.len().min(cluster - inside)),
            L2Entry::Subclusters(host, map) => {
                if host.get() != 0 {
                    on_metadata(1)?;
                }
                match map {
                    SubclusterMap { stored: u32::MAX, .. } => {
                        return Ok((Piece::Is(stored(host + inside)), run(&goes_on)));
                    }
                    SubclusterMap { zero: u32::MAX, .. } => {
                        return Ok((Piece::Is(Mapping::Zero), run(&|_, entry| entry == raw)));
                    }
                    _ => {}
                }
                let size = cluster / 32;
                let bit = 1_u32 << (inside / size);
                let mapping = if map.stored & bit != 0 {
                    stored(host + inside)
                } else if map.zero & bit != 0 {
                    Mapping::Zero
                } else {
                    Mapping::Unallocated
                };
                (Piece::Is(mapping), range.len().min(size - inside % size))
            }
        })
    }

    /// Brings the slice for `at` into memory where there is one to bring.
    pub(super) async fn load(self: &Rc<Self>, at: GuestOffset) -> Result<()> {
        let number = self.slice_of(at);
        while !self.cache.borrow().contains(number) {
            match self.table(self.l1_index(at))? {
                Table::Nowhere | Table::Fresh { empty: true, .. } => break,
                Table::Stored { at, own } => self.fetch(number, at, own).await?,
                Table::Fresh { at, .. } => self.fetch(number, at, true).await?,
            }
        }
        Ok(())
    }

    /// Brings slice `number` into memory and keeps it there. Its table exists.
    pub(super) async fn pin_slice(self: &Rc<Self>, number: u64) -> Result<SlicePin<Slice>> {
        let index = self.l1_index(self.slice_start(number));
        loop {
            if let Some(pin) = self.cache.pin(number) {
                return Ok(pin);
            }
            match self.table(index)? {
                Table::Stored { at, own } => self.fetch(number, at, own).await?,
                Table::Fresh { at, empty: false } => self.fetch(number, at, true).await?,
                Table::Fresh { .. } | Table::Nowhere => {
                    self.make_room().await;
                    // Meanwhile somebody else may have filled the slice, and a commit may have published the table. As
                    // long as it is not published, whatever was linked in it is still in the cache.
                    let empty = matches!(self.table(index)?, Table::Fresh { empty: true, .. } | Table::Nowhere);
                    let mut cache = self.cache.borrow_mut();
                    if empty && !cache.contains(number) {
                        cache.insert(number, Slice::zeroed(self.slice_bytes() as usize / 8));
                    }
                }
            }
        }
    }

    /// Reads slice `number` of the table at `table`, or waits for whoever does. The caller looks again afterwards.
    async fn fetch(self: &Rc<Self>, number: u64, table: HostOffset, own: bool) -> Result<()> {
        let other = self.cache.borrow().loading(number).map(ring::sync::Event::wait);
        if let Some(other) = other {
            other.await;
            return Ok(());
        }
        let _loading = self.cache.begin_load(number);
        let bytes = Iov::alloc(self.slice_bytes() as usize);
        self.store.read(self.slice_at(table, number), bytes.clone()).await?;
        let mut slice = Slice::decode(&bytes.to_vec());
        if !own {
            disown(&mut slice, self.words());
        }
        self.make_room().await;
        let mut cache = self.cache.borrow_mut();
        if !cache.contains(number) {
            cache.insert(number, slice);
        }
        Ok(())
    }

    /// Waits until there is room for one more slice. In a poisoned image what is dirty stays for good: there the cache may
    /// grow beyond its budget by what is being looked at, so that reads go on.
    async fn make_room(self: &Rc<Self>) {
        loop {
            let room = self.cache.borrow_mut().make_room();
            if self.health.is_poisoned() {
                return;
            }
            match room {
                Room::Free => return,
                // A failure poisons the image, which ends this loop.
                Room::Commit => drop(self.commit().await),
                Room::Wait => self.unpinned.wait().await,
            }
        }
    }
}

/// Takes the "copied" flags out of a slice whose table somebody else refers to, too.
pub(super) fn disown(slice: &mut Slice, words: usize) {
    for index in (0..slice.raw().len()).step_by(words) {
        let raw = slice.raw()[index];
        slice.set(index, raw & !COPIED);
    }
}
