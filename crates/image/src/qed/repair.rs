//! Repairs of single entries.
//!
//! **Invariants.**
//! * Need-check is durable before the first change, so that a repair cut short is taken up again.
//! * Whatever an entry leads to and can be read, the guest still reads afterwards: a cluster with two owners is copied for the
//!   second one, durably, before that entry changes.

use super::Core;
use crate::Result;
use layout::HostOffset;
use layout::qed::Slice;
use ring::Iov;
use std::rc::Rc;

/// How much is copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// Copies that are always allowed; beyond that the file may at most double. A table of nothing but references to one
/// cluster would otherwise blow up by a factor of thousands.
const FEW_COPIES: u64 = 256;

/// Carries out repairs of entries.
pub(super) struct Fixer {
    core: Rc<Core>,
    /// Behind everything that is in use.
    end: u64,
    copies_left: u64,
    /// Copies were made that are not durable yet.
    copied: bool,
    changed: bool,
}

impl Fixer {
    /// For the image, whose store may grow.
    pub(super) fn new(core: &Rc<Core>) -> Self {
        let clusters = core.store.size() >> core.geometry.cluster_bits();
        Self {
            core: core.clone(),
            end: clusters << core.geometry.cluster_bits(),
            copies_left: if core.room.space.borrow().growable() { clusters.max(FEW_COPIES) } else { 0 },
            copied: false,
            changed: false,
        }
    }

    /// log2 of the bytes in a cluster.
    pub(super) fn cluster_bits(&self) -> u32 {
        self.core.geometry.cluster_bits()
    }

    /// Copies a cluster behind the end; `None` when there were too many.
    pub(super) async fn copy(&mut self, from: HostOffset) -> Result<Option<HostOffset>> {
        let Some(left) = self.copies_left.checked_sub(1) else { return Ok(None) };
        self.core.mark().await?;
        let cluster = self.core.geometry.cluster_size();
        let to = HostOffset(self.end);
        // What may lie behind the last whole cluster is cut off, so that the copy starts from zeros.
        self.core.store.set_size(self.end).await?;
        self.core.store.set_size(self.end + cluster).await?;
        copy_bytes(&self.core, from, to, cluster).await?;
        (self.copies_left, self.copied) = (left, true);
        self.end += cluster;
        Ok(Some(to))
    }

    /// Writes a changed slice, after what it newly refers to.
    pub(super) async fn write_slice(&mut self, at: HostOffset, slice: &Slice) -> Result<()> {
        self.core.mark().await?;
        if std::mem::take(&mut self.copied) {
            self.core.health.barrier().await?;
        }
        self.changed = true;
        let bytes = Iov::from_slice(&slice.encode());
        self.core.store.write(at, bytes, false).await.map_err(|e| self.core.health.fail(e.into()))
    }

    /// Makes everything durable.
    pub(super) async fn finish(&mut self) -> Result<()> {
        if std::mem::take(&mut self.changed) {
            self.core.health.barrier().await?;
        }
        Ok(())
    }
}

/// Copies `len` bytes to where there are zeros; zeros are not written.
pub(super) async fn copy_bytes(core: &Core, from: HostOffset, to: HostOffset, len: u64) -> Result<()> {
    let mut at = 0;
    while at < len {
        let bytes = Iov::alloc(COPY_BYTES.min(len - at) as usize);
        core.store.read(from + at, bytes.clone()).await?;
        if !bytes.is_zero() {
            core.store.write(to + at, bytes.clone(), false).await?;
        }
        at += bytes.len() as u64;
    }
    Ok(())
}
