//! Preallocation: clusters that have their places before anything is written, of a new image or of what it has grown by.
//!
//! **Invariants.** Data lies in the file as it does on the disk, in one run for each L2 table. What has its place reads as zeros:
//! places come from behind the end of the file.

use super::Core;
use crate::Result;
use crate::create::Preallocation;
use layout::qcow2::L2Entry;
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::rc::Rc;

/// Zeros are written in parts of this.
const ZEROS: u64 = 1 << 20;

impl Core {
    /// See [`crate::Image::preallocate`].
    pub(super) async fn preallocate(self: &Rc<Self>, from: GuestOffset, how: Preallocation) -> Result<()> {
        if how == Preallocation::Off {
            return Ok(());
        }
        self.health.check_writable()?;
        let header = self.header.get();
        let (cluster, words) = (header.cluster_size(), self.words());
        let end = GuestOffset(header.size).align_up(cluster);
        let zeros = Iov::zeroed(ZEROS as usize);
        let mut at = from.align_up(cluster);
        while at < end {
            let (table, first) = self.pin_entry(at).await?;
            let stop = GuestOffset(at.get() + header.table_reach()).align_down(header.table_reach()).min(end);
            drop(first);
            let held = if self.has_data_file() {
                None
            } else {
                let mut held = self.room.take_whole(stop - at).await?;
                if self.blank {
                    held.zero().await?;
                } else {
                    self.payload.zero(held.range(), store::ZeroMode::default()).await?;
                }
                self.prepare_to_count(held.range()).await?;
                Some(held)
            };
            let range = held.as_ref().map_or(HostOffset(at.get()).range(stop - at), |held| held.range());
            if held.is_none() {
                self.zero_places(GuestRange::between(at, stop)).await?;
            }
            match how {
                Preallocation::Falloc if !self.blank => {}
                Preallocation::Falloc => self.payload.allocate(range).await?,
                Preallocation::Full => {
                    let mut rest = range;
                    while !rest.is_empty() {
                        let part = rest.first(ZEROS);
                        self.payload.write(part.start(), zeros.slice(0..part.len() as usize), false).await?;
                        rest = rest.skip(part.len());
                    }
                }
                Preallocation::Off | Preallocation::Metadata => {}
            }
            let mut place = range.start();
            if let Some(held) = held {
                self.count_later(held.keep());
            }
            while at < stop {
                let slice = self.pin_slice(self.slice_of(at)).await?;
                let slice_end = (self.slice_start(slice.number()) + self.slice_reach()).min(stop);
                let index = self.word_of(at);
                self.cache.borrow_mut().change(slice.number(), |slice| {
                    for n in 0..((slice_end - at) / cluster) as usize {
                        let entry = L2Entry::Data(place).encode_whole(&header);
                        slice.set(index + n * words, entry.0);
                        if words == 2 {
                            slice.set(index + n * words + 1, entry.1);
                        }
                        place = place + cluster;
                    }
                });
                at = slice_end;
            }
            table.link();
            drop(table);
            if self.cache.borrow().is_crowded() {
                self.commit().await?;
            }
        }
        self.settle().await
    }
}
