//! Reservations: clusters and tables that nobody sees until they are linked.
//!
//! **Invariants.**
//! * A reservation lies within one slice, which it pins together with its table: linking needs nothing from the store.
//! * Everything it takes is held by a guard that gives it back; only linking lets go of it.
//! * Space is given back only when nothing is in flight there: what this module itself has in flight in new space (growing,
//!   zeroing a table) runs to its end even if the caller goes away.

use super::resolve::Table;
use super::{Core, detached};
use crate::reservation::{Busy, Reserved};
use crate::room::Held;
use crate::slices::SlicePin;
use crate::{ErrorKind, Keep, Linked, Mapping, Purpose, Reservation, Result};
use layout::qed::{L2Entry, SLICE_ENTRIES, Slice};
use layout::{GuestOffset, GuestRange};
use std::rc::Rc;
use store::ZeroMode;

/// Most bytes one reservation takes (it takes at least one cluster).
const MAX_RUN: u64 = 64 << 20;

impl Core {
    /// See [`crate::Image::reserve`].
    pub(super) async fn reserve(self: &Rc<Self>, range: GuestRange, purpose: Purpose) -> Result<Reservation> {
        self.health.check_writable()?;
        let geometry = self.geometry;
        let reach = self.size().max(self.reach.get());
        self.health.check_range(range, reach.next_multiple_of(geometry.cluster_size()))?;
        let busy = self.active.begin();
        self.mark().await?;
        if self.cache.borrow().is_crowded() {
            self.commit().await?;
        }
        let start = range.start().align_down(geometry.cluster_size());
        let number = geometry.slice_of(start);
        let table = TablePin::take(self, geometry.l1_index(start)).await?;
        let slice = self.pin_slice(number).await?;
        let slice_end = geometry.slice_start(number) + geometry.slice_reach();
        let want = range.end().align_up(geometry.cluster_size()).min(slice_end) - start;
        let space = match purpose {
            Purpose::Zero => None,
            Purpose::Data => {
                let most = MAX_RUN.max(geometry.cluster_size());
                Some(self.room.take(want.min(most)).await?)
            }
        };
        self.health.check_poison()?;
        let (host, len, zeroed) = match &space {
            None => (None, want, false),
            Some(held) => (Some(held.range().start()), held.range().len(), held.zeroed()),
        };
        let clusters = Clusters { space, slice, table, _busy: busy, core: self.clone() };
        Ok(Reservation::new(start.range(len), host, Box::new(clusters)).with_zeroed(zeroed))
    }

    /// See [`crate::Image::write_zeroes`].
    pub(super) async fn write_zeroes(self: &Rc<Self>, range: GuestRange, unmap: bool, masked: bool) -> Result<()> {
        self.health.check_writable()?;
        let (cluster, size) = (self.geometry.cluster_size(), self.size());
        self.health.check_range(range, size.next_multiple_of(cluster))?;
        if !range.start().is_aligned(cluster) || !(range.end().is_aligned(cluster) || range.end().get() == size) {
            let what = format!("the range {range} to be zeroed is not whole clusters");
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
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
            match mapped.mapping {
                Mapping::Data(host) => {
                    let whole = mapped.len.next_multiple_of(cluster);
                    self.store.zero(host.range(whole), ZeroMode { unmap }).await?;
                }
                Mapping::Unallocated if masked => {
                    let reservation = self.reserve(run, Purpose::Zero).await?;
                    let reserved = reservation.range();
                    let linked = reservation.link(Keep::Unallocated, |_| false);
                    if linked.dropped == 0 {
                        at = reserved.end();
                    }
                    // Otherwise somebody populated it meanwhile: look again and zero that.
                    continue;
                }
                // (QED packs and shares nothing.)
                Mapping::Zero | Mapping::Unallocated | Mapping::Packed | Mapping::Shared(_) => {}
            }
            at = run.end();
        }
        Ok(())
    }
}

/// Keeps an L2 table in being.
struct TablePin {
    core: Rc<Core>,
    index: u64,
}

impl TablePin {
    /// Of table `index`, made if there is none.
    async fn take(core: &Rc<Core>, index: u64) -> Result<Self> {
        if let Some(pin) = Self::existing(core, index)? {
            return Ok(pin);
        }
        let core = core.clone();
        detached(async move {
            let _making = core.making_table.lock().await;
            if let Some(pin) = Self::existing(&core, index)? {
                return Ok(pin);
            }
            let at = core.room.take_zeroed(core.geometry.table_bytes()).await?.keep().start();
            core.tables.borrow_mut().add_fresh(index, at, true);
            Ok(Self { core: core.clone(), index })
        })
        .await
    }

    fn existing(core: &Rc<Core>, index: u64) -> Result<Option<Self>> {
        if core.table(index)? == Table::Nowhere {
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
            let table = at.range(self.core.geometry.table_bytes());
            self.core.room.space.borrow_mut().give_back(table);
        }
    }
}

/// A reservation of this format. Fields are dropped in this order: space first, the count last.
struct Clusters {
    space: Option<Held>,
    slice: SlicePin<Slice>,
    table: TablePin,
    _busy: Busy,
    core: Rc<Core>,
}

impl Reserved for Clusters {
    fn link(&mut self, range: GuestRange, keep: Keep, veto: &dyn Fn(GuestOffset) -> bool) -> Linked {
        let core = &*self.core;
        let cluster = core.geometry.cluster_size();
        let (host, zeroed) = match self.space.take() {
            Some(held) => {
                let zeroed = held.zeroed();
                (Some(held.keep().start()), zeroed)
            }
            None => (None, true),
        };
        // With nothing below and space that reads as zeros, the worst a cut can show is what was there before: zeros.
        let harmless = zeroed && core.backing.borrow().is_none();
        let mut done = Linked::default();
        let mut at = range.start();
        while at < range.end() {
            let index = core.geometry.l2_index(at) as usize % SLICE_ENTRIES;
            let mine = host.map(|host| host + (at - range.start()));
            let current = core.cache.borrow().get(self.slice.number()).map_or(0, |slice| slice.raw()[index]);
            let wanted = match keep {
                Keep::New => true,
                Keep::Unallocated => current == 0,
            };
            if wanted && !veto(at) {
                let entry = mine.map_or(L2Entry::Zero, L2Entry::Data);
                core.cache.borrow_mut().change(self.slice.number(), |slice| slice.set(index, entry.encode()));
                if let Ok(L2Entry::Data(old)) = core.rules.l2(current, core.store.size()) {
                    core.room.space.borrow_mut().unlink(old.range(cluster));
                }
                if current != 0 || !harmless {
                    core.barrier_due.set(true);
                }
                done.linked += cluster;
            } else {
                if let Some(mine) = mine {
                    core.room.space.borrow_mut().give_back(mine.range(cluster));
                }
                done.dropped += cluster;
            }
            at = at + cluster;
        }
        if done.linked > 0 {
            core.tables.borrow_mut().link(self.table.index);
        }
        done
    }

    fn release(&mut self, _: GuestRange) {
        self.space = None;
    }
}
