//! Reservations: clusters and tables that nobody sees until they are linked.
//!
//! **Invariants.**
//! * A reservation lies within one slice, which it pins together with its table: linking needs nothing from the store. The table
//!   is one that may be changed: a fresh one, one that nobody else refers to, or the copy of one that is shared.
//! * Everything it takes is held by a guard that gives it back; only linking lets go of it.
//! * What it takes can be counted without further space: a commit does not fail for want of a refcount block.

use super::Core;
use super::resolve::{Table, disown};
use crate::reservation::{Busy, Reserved};
use crate::room::Held;
use crate::slices::SlicePin;
use crate::{Keep, Linked, Mapped, Mapping, Purpose, Reservation, Result};
use layout::qcow2::{L2Entry, Slice};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use store::ZeroMode;

/// Most bytes one reservation takes (it takes at least one cluster).
const MAX_RUN: u64 = 64 << 20;

impl Core {
    /// See [`crate::Image::reserve`].
    pub(super) async fn reserve(self: &Rc<Self>, range: GuestRange, purpose: Purpose) -> Result<Reservation> {
        self.health.check_writable()?;
        let cluster = self.cluster_size();
        let reach = self.size().max(self.reach.get());
        self.health.check_range(range, reach.next_multiple_of(cluster))?;
        let busy = self.active.begin();
        if self.cache.borrow().is_crowded() {
            self.commit().await?;
        }
        let start = range.start().align_down(cluster);
        let number = self.slice_of(start);
        let (table, slice) = self.pin_entry(start).await?;
        let slice_end = self.slice_start(number) + self.slice_reach();
        let want = range.end().align_up(cluster).min(slice_end) - start;
        // Version 2 has no way to say "zeros" but clusters that hold them.
        let needs_place = purpose == Purpose::Data || !self.has_zero_clusters();
        let mut space = Space::Nowhere;
        if needs_place && self.has_data_file() {
            // As far as the guest sees it: what a data file has for each cluster is where the guest sees it.
            let places = start.range(want.min(MAX_RUN));
            if purpose == Purpose::Zero {
                self.zero_places(places).await?;
            }
            space = Space::Fixed(HostOffset(start.get()).range(places.len()));
        } else if needs_place {
            let mut held = self.room.take(want.min(MAX_RUN)).await?;
            self.prepare_to_count(held.range()).await?;
            if purpose == Purpose::Zero {
                if self.blank {
                    held = zeroed(held).await?;
                } else {
                    self.payload.zero(held.range(), ZeroMode { unmap: true }).await?;
                }
            }
            space = Space::Held(held);
        }
        self.health.check_poison()?;
        let (host, len, zeroed) = match &space {
            Space::Nowhere => (None, want, false),
            Space::Fixed(places) => (Some(places.start()), places.len(), false),
            Space::Held(held) => (Some(held.range().start()), held.range().len(), held.zeroed() && self.blank),
        };
        let host = if purpose == Purpose::Data { host } else { None };
        let clusters = Clusters { space, slice, table, _busy: busy, core: self.clone() };
        Ok(Reservation::new(start.range(len), host, Box::new(clusters)).with_zeroed(zeroed))
    }

    /// See [`crate::Image::write_zeroes`].
    pub(super) async fn write_zeroes(self: &Rc<Self>, range: GuestRange, unmap: bool, masked: bool) -> Result<()> {
        self.health.check_writable()?;
        let (cluster, size) = (self.cluster_size(), self.size());
        self.health.check_range(range, size.next_multiple_of(cluster))?;
        if !range.start().is_aligned(cluster) || !(range.end().is_aligned(cluster) || range.end().get() == size) {
            let what = format!("the range {range} to be zeroed is not whole clusters");
            return Err(self.health.error(crate::ErrorKind::InvalidArgument, None, what));
        }
        let end = range.end().min(GuestOffset(size));
        let mut at = range.start();
        while at < end {
            let rest = GuestRange::between(at, end);
            let Some(mapped) = self.lookup(rest)? else {
                self.load(at).await?;
                continue;
            };
            let run = at.range(mapped.len);
            // Runs end inside of a cluster where subclusters differ, be it behind the disk's end: such a cluster is replaced as a whole.
            let whole =
                run.end().is_aligned(cluster) || run.end() == end && self.is_alike(run.end().align_down(cluster));
            let run = match run.end().align_down(cluster) {
                boundary if !whole && boundary > at => GuestRange::between(at, boundary),
                _ => run,
            };
            let whole = whole || run.end().is_aligned(cluster);
            let mapped = Mapped { len: run.len(), ..mapped };
            let keep = match mapped.mapping {
                Mapping::Data(host) if whole => {
                    let len = mapped.len.next_multiple_of(cluster);
                    self.payload.zero(host.range(len), ZeroMode { unmap }).await?;
                    at = run.end();
                    continue;
                }
                Mapping::Zero | Mapping::Unallocated if whole && (mapped.mapping == Mapping::Zero || !masked) => {
                    at = run.end();
                    continue;
                }
                Mapping::Unallocated if whole => Keep::Unallocated,
                _ => Keep::New,
            };
            let run = if whole { run } else { at.range(mapped.len.next_multiple_of(cluster)) };
            let reservation = self.reserve(run, Purpose::Zero).await?;
            let reserved = reservation.range();
            let linked = reservation.link(keep, |_| false);
            if linked.dropped == 0 {
                at = reserved.end();
            }
            // Otherwise somebody populated it meanwhile: look again and zero that.
        }
        Ok(())
    }
}

impl Core {
    /// Whether the cluster at `at`, whose entry is in memory, is mapped alike from its first byte to its last.
    pub(super) fn is_alike(&self, at: GuestOffset) -> bool {
        let cache = self.cache.borrow();
        let Some(slice) = cache.get(self.slice_of(at)) else { return true };
        let (first, words) = (self.word_of(at), self.words());
        let word = |n: usize| slice.raw().get(first + n).copied().unwrap_or(0);
        let entry = L2Entry::decode(word(0), if words == 2 { word(1) } else { 0 }, &self.header.get());
        match entry {
            Ok(L2Entry::Subclusters(_, map)) => map.stored == u32::MAX || map.zero == u32::MAX,
            _ => true,
        }
    }
}

/// Makes held clusters read as zeros, to the end even if the caller goes away.
async fn zeroed(mut held: Held) -> Result<Held> {
    ring::spawn(async move { held.zero().await.map(|()| held) }).await
}

/// Keeps an L2 table in being that may be changed.
pub(super) struct TablePin {
    core: Rc<Core>,
    index: u64,
}

impl TablePin {
    /// Of table `index`, made if there is none, copied if it is shared.
    async fn take(core: &Rc<Core>, index: u64) -> Result<Self> {
        if let Some(pin) = Self::existing(core, index)? {
            return Ok(pin);
        }
        let core = core.clone();
        ring::spawn(async move {
            let _making = core.making_table.lock().await;
            if let Some(pin) = Self::existing(&core, index)? {
                return Ok(pin);
            }
            let cluster = core.cluster_size();
            let held = match core.table(index)? {
                Table::Stored { at, .. } => {
                    let held = core.room.take_whole(cluster).await?;
                    core.prepare_to_count(held.range()).await?;
                    core.copy_table(at, held.range().start()).await?;
                    held
                }
                _ => {
                    let held = core.room.take_zeroed(cluster).await?;
                    core.prepare_to_count(held.range()).await?;
                    held
                }
            };
            let empty = core.table(index)? == Table::Nowhere;
            core.tables.borrow_mut().add_fresh(index, held.keep().start(), empty);
            Ok(Self { core: core.clone(), index })
        })
        .await
    }

    /// An entry was set in it.
    pub(super) fn link(&self) {
        self.core.tables.borrow_mut().link(self.index);
    }

    fn existing(core: &Rc<Core>, index: u64) -> Result<Option<Self>> {
        if matches!(core.table(index)?, Table::Nowhere | Table::Stored { own: false, .. }) {
            return Ok(None);
        }
        core.tables.borrow_mut().pin(index);
        Ok(Some(Self { core: core.clone(), index }))
    }
}

impl Drop for TablePin {
    fn drop(&mut self) {
        let gone = self.core.tables.borrow_mut().unpin(self.index);
        if let Some(at) = gone {
            let table = at.range(self.core.cluster_size());
            self.core.room.space.borrow_mut().give_back(table);
        }
    }
}

impl Core {
    /// Copies a table that a snapshot refers to, too; so it refers to nothing that is the image's own.
    async fn copy_table(&self, from: HostOffset, to: HostOffset) -> Result<()> {
        let bytes = Iov::alloc(self.cluster_size() as usize);
        self.store.read(from, bytes.clone()).await?;
        let mut table = Slice::decode(&bytes.to_vec());
        disown(&mut table, self.words());
        Ok(self.store.write(to, Iov::from_slice(&table.encode()), false).await?)
    }
}

/// Where the clusters of a reservation are.
enum Space {
    /// They are marks.
    Nowhere,
    /// In the data file, where the guest sees them.
    Fixed(HostRange),
    /// In the image.
    Held(Held),
}

/// A reservation of this format. Fields are dropped in this order: space first, the count last.
struct Clusters {
    space: Space,
    slice: SlicePin<Slice>,
    table: TablePin,
    _busy: Busy,
    core: Rc<Core>,
}

impl Reserved for Clusters {
    fn link(&mut self, range: GuestRange, keep: Keep, veto: &dyn Fn(GuestOffset) -> bool) -> Linked {
        let core = &*self.core;
        let header = core.header.get();
        let (cluster, words) = (header.cluster_size(), core.words());
        let (host, counted) = match std::mem::replace(&mut self.space, Space::Nowhere) {
            Space::Nowhere => (None, false),
            Space::Fixed(places) => (Some(places.start()), false),
            Space::Held(held) => (Some(held.keep().start()), true),
        };
        let mut done = Linked::default();
        let mut at = range.start();
        while at < range.end() {
            let index = core.word_of(at);
            let mine = host.map(|host| host + (at - range.start()));
            let current = core.cache.borrow().get(self.slice.number()).map_or((0, 0), |slice| {
                let word = |index: usize| slice.raw().get(index).copied().unwrap_or(0);
                (word(index), if words == 2 { word(index + 1) } else { 0 })
            });
            let wanted = match keep {
                Keep::New => true,
                Keep::Unallocated => L2Entry::decode(current.0, current.1, &header) == Ok(L2Entry::Unallocated),
            };
            if wanted && !veto(at) {
                let entry = mine.map_or(L2Entry::Zero, L2Entry::Data).encode_whole(&header);
                core.cache.borrow_mut().change(self.slice.number(), |slice| {
                    slice.set(index, entry.0);
                    if words == 2 {
                        slice.set(index + 1, entry.1);
                    }
                });
                core.room.space.borrow_mut().unlink(L2Entry::referred(current.0, &header));
                if let Some(mine) = mine.filter(|_| counted) {
                    core.count_later(mine.range(cluster));
                }
                done.linked += cluster;
            } else {
                if let Some(mine) = mine.filter(|_| counted) {
                    core.room.space.borrow_mut().give_back(mine.range(cluster));
                }
                done.dropped += cluster;
            }
            at = at + cluster;
        }
        if done.linked > 0 {
            self.table.link();
        }
        done
    }

    fn release(&mut self, _: GuestRange) {
        self.space = Space::Nowhere;
    }
}

impl Core {
    /// Keeps the table and the slice in memory that an entry is in, so that it can be set.
    pub(super) async fn pin_entry(self: &Rc<Self>, at: GuestOffset) -> Result<(TablePin, SlicePin<Slice>)> {
        let table = TablePin::take(self, self.l1_index(at)).await?;
        let slice = self.pin_slice(self.slice_of(at)).await?;
        Ok((table, slice))
    }

    /// The next commit counts this.
    pub(super) fn count_later(&self, range: layout::HostRange) {
        let mut linked = self.linked.borrow_mut();
        match linked.last_mut() {
            Some(last) if last.end() == range.start() => *last = last.start().range(last.len() + range.len()),
            _ => linked.push(range),
        }
    }
}
