//! Taking mappings away: shrinking, and emptying.
//!
//! **The order.** The new size first, durably; then what lies behind it is unlinked and given back. A cut between the two leaves
//! entries behind the end, which keep their clusters and which a growth refuses to bring to light.

use super::Core;
use super::resolve::Table;
use crate::{ErrorKind, Result};
use layout::qcow2::{Header, L2Entry};
use layout::{GuestOffset, HostRange};
use std::rc::Rc;

impl Core {
    /// Cuts the disk off at `size`.
    pub(super) async fn shrink(self: &Rc<Self>, size: u64) -> Result<()> {
        self.check_idle()?;
        self.commit().await?;
        let mut zone = self.zone.lock().await;
        let header = self.header.get();
        let smaller = Header { size, ..header };
        if !self.resize_bitmaps(&mut zone, smaller).await? {
            self.publish_header(&mut zone, smaller).await?;
        }
        drop(zone);
        self.unlink_from(GuestOffset(size).align_up(header.cluster_size())).await?;
        self.settle().await?;
        self.shorten_data_file(size).await
    }

    /// See [`crate::Image::empty`].
    pub(super) async fn empty(self: &Rc<Self>) -> Result<()> {
        self.health.check_writable()?;
        self.check_idle()?;
        self.commit().await?;
        self.unlink_from(GuestOffset::ZERO).await?;
        self.settle().await
    }

    pub(super) fn check_idle(&self) -> Result<()> {
        if self.active.get() > 0 {
            let what = "the image is being written to; try again when it is idle";
            return Err(self.health.error(ErrorKind::Busy, None, what));
        }
        Ok(())
    }

    /// Makes everything from `from` (a cluster's start) on unallocated.
    async fn unlink_from(self: &Rc<Self>, from: GuestOffset) -> Result<()> {
        let header = self.header.get();
        let reach = header.table_reach();
        for index in from.get() / reach..u64::from(header.l1_entries) {
            if self.table(index)? == Table::Nowhere {
                continue;
            }
            let mut at = GuestOffset(index * reach).max(from);
            while at.get() < (index + 1) * reach {
                let (table, slice) = self.pin_entry(at).await?;
                let (first, words) = (self.word_of(at), self.words());
                let held: Vec<HostRange> = {
                    let cache = self.cache.borrow();
                    let raw = cache.get(slice.number()).map(layout::qcow2::Slice::raw).unwrap_or_default();
                    let entries = raw.get(first..).unwrap_or_default().iter().step_by(words);
                    entries.map(|raw| L2Entry::referred(*raw, &header)).filter(|range| !range.is_empty()).collect()
                };
                self.cache.borrow_mut().change(slice.number(), |slice| {
                    for word in first..slice.raw().len() {
                        slice.set(word, 0);
                    }
                });
                for range in held {
                    self.room.space.borrow_mut().unlink(range);
                }
                table.link();
                at = self.slice_start(slice.number()) + self.slice_reach();
            }
            // Now and then, so that not all of it waits in memory.
            if self.cache.borrow().is_crowded() {
                self.commit().await?;
            }
        }
        Ok(())
    }
}
