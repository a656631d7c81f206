//! Growing. What is new reads as zeros, even over a backing file that is longer than the disk was.
//!
//! **The order** (a kill between any two steps shows the guest nothing it should not see):
//! 1. the last cluster, if the old end cuts it, gets zeros behind that end: nobody sees them yet;
//! 2. where layers below reach past the old end, the new clusters are marked as zeros: nobody sees the marks yet;
//! 3. both become durable;
//! 4. the new size is published, durably.
//!
//! The other way round a kill after the size would let old bytes of a backing file appear in the new part.

use crate::disk::Inner;
use crate::view::mapped;
use crate::write::Fill;
use image::{ErrorKind, Mapped, Mapping, Result};
use layout::{GuestOffset, GuestRange};
use std::rc::Rc;
use store::ZeroMode;

impl Inner {
    /// Grows the disk to `size` bytes.
    pub(crate) async fn resize(self: &Rc<Self>, size: u64) -> Result<()> {
        self.check_writable()?;
        let _reshaping = self.reshaping.lock().await;
        if let Some(job) = &*self.kept.claim.borrow() {
            return Err(self.refuse(ErrorKind::Busy, format!("it cannot be resized while job '{job}' runs")));
        }
        let old = self.top.size();
        if size < old {
            let what = format!("it has {old} bytes and cannot shrink to {size}");
            return Err(self.refuse(ErrorKind::InvalidArgument, what));
        }
        if size == old {
            return Ok(());
        }
        let (old_end, new_end) = (GuestOffset(old), GuestOffset(size));
        let last_cluster = GuestRange::between(old_end.align_down(self.unit), old_end);
        let touched = GuestRange::between(last_cluster.start(), new_end.align_up(self.unit));
        let _held = self.locks.exclusive(touched).await;
        if !last_cluster.is_empty() {
            self.end_last_cluster_in_zeros(last_cluster).await?;
        }
        let below_ends = GuestOffset(self.view().below_ends()).min(new_end);
        let shows = GuestRange::between(old_end.align_up(self.unit), below_ends.align_up(self.unit));
        if !shows.is_empty() {
            self.top.mask_behind_end(shows.end()).await?;
            self.flusher.changed();
            self.tables_changed(shows.len());
        }
        self.commit().await?;
        self.top.resize(size).await
    }

    /// Makes what the disk's last cluster has behind the disk's end zeros. `used` is the part in front of the end.
    async fn end_last_cluster_in_zeros(self: &Rc<Self>, used: GuestRange) -> Result<()> {
        let cluster = used.align_outward(self.unit);
        let Mapped { len, mapping } = mapped(&*self.top, used).await?;
        let alike = len == used.len();
        match mapping {
            Mapping::Zero if alike => Ok(()),
            Mapping::Data(host) if alike => {
                let behind = (host + used.len()).range(cluster.len() - used.len());
                let result = self.top.store().zero(behind, ZeroMode::default()).await;
                self.flusher.changed();
                Ok(result?)
            }
            Mapping::Unallocated if alike && self.view().below_ends() <= used.end().get() => Ok(()),
            _ => match self.fill(cluster).await? {
                Fill::Bytes(data) => self.rewrite(cluster, data).await,
                Fill::Zeros => self.drop_held(used, false).await,
            },
        }
    }
}
