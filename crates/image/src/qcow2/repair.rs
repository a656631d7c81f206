//! Repairs.
//!
//! **The order** (a cut between any two steps leaves nothing worse than before):
//! 1. entries that cannot be followed are cleared; data that lies on metadata is copied behind the end of the file, durably,
//!    before its entry leads there;
//! 2. refcounts that are too low go up, and become durable;
//! 3. "copied" flags are set right, durably;
//! 4. refcounts that are too high go down.

use super::Core;
use super::check::{Scan, Stop};
use super::refcount::Refcounts;
use crate::kept::Kept;
use crate::space::Space;
use crate::tables::Tables;
use crate::{CheckReport, Repair, Result};
use layout::HostOffset;
use layout::qcow2::Header;
use ring::Iov;
use std::rc::Rc;

/// Carries out repairs of entries.
#[derive(Default)]
pub(super) struct Fixer {
    changed: bool,
}

impl Fixer {
    /// Copies a cluster behind the end of the file, durably; where.
    pub(super) async fn copy(&mut self, core: &Rc<Core>, from: HostOffset) -> Result<HostOffset> {
        let cluster = core.cluster_size();
        let held = core.room.take_whole(cluster).await?;
        let bytes = core.read_bytes(from.range(cluster)).await?;
        core.store.write(held.range().start(), Iov::from_slice(&bytes), false).await?;
        core.health.barrier().await?;
        Ok(held.keep().start())
    }

    /// Clears `words` of an entry.
    pub(super) async fn clear(&mut self, core: &Rc<Core>, at: HostOffset, words: usize) -> Result<()> {
        self.changed = true;
        core.health.write(at, Iov::zeroed(words * 8)).await
    }

    /// Sets the first word of an entry.
    pub(super) async fn set(&mut self, core: &Rc<Core>, at: HostOffset, raw: u64) -> Result<()> {
        self.changed = true;
        core.health.write(at, Iov::from_slice(&raw.to_be_bytes())).await
    }

    /// Makes everything durable.
    pub(super) async fn finish(&mut self, core: &Core) -> Result<()> {
        if std::mem::take(&mut self.changed) {
            core.health.barrier().await?;
        }
        Ok(())
    }
}

impl Core {
    /// Repairs what `repair` allows, and looks again. Everything could be read just now.
    pub(super) async fn repair(self: &Rc<Self>, repair: Repair) -> Result<CheckReport> {
        self.start_at_the_end();
        if repair == Repair::All {
            let mut fixer = Fixer::default();
            Scan::run(self, Some(&mut fixer)).await?;
            fixer.finish(self).await?;
            self.reload().await?;
            self.raise().await?;
        }
        let scan = Scan::run(self, None).await?;
        if scan.is_complete() && !scan.high.is_empty() && (repair == Repair::All || scan.low.is_empty()) {
            let mut zone = self.zone.lock().await;
            for (range, value) in &scan.high {
                self.set_refcounts(vec![*range], *value).await?;
            }
            self.write_refcounts(&mut zone).await?;
            drop(zone);
            self.health.barrier().await?;
        }
        let report = Scan::run(self, None).await?.report;
        self.reload().await?;
        if !self.for_check {
            self.find_free().await?;
        }
        Ok(report)
    }

    /// Refcounts go up to what is referred to, "copied" flags say it.
    async fn raise(self: &Rc<Self>) -> Result<()> {
        let mut scan = Scan::run(self, None).await?;
        if scan.bad_table {
            // Nothing of it is to be given back: it is somewhere else, or nowhere.
            *self.refcounts.borrow_mut() = Refcounts::new(Vec::new());
            self.header.set(Header { refcount_table_clusters: 0, ..self.header.get() });
        }
        self.refcounts.borrow_mut().forget_blocks(&scan.bad_blocks);
        let mut zone = self.zone.lock().await;
        for (range, value) in std::mem::take(&mut scan.low) {
            self.set_refcounts(vec![range], value).await?;
        }
        self.write_refcounts(&mut zone).await?;
        drop(zone);
        self.health.barrier().await?;
        let flags = scan.flags;
        if flags > 0 {
            match scan.check_flags(self, &self.header.get(), true).await {
                Ok(()) | Err(Stop::Scattered) => {}
                Err(Stop::Failed(error)) => return Err(error),
            }
            self.health.barrier().await?;
            self.reload().await?;
        }
        Ok(())
    }

    /// What is free is not known: whatever is needed comes from behind the end of the file.
    fn start_at_the_end(&self) {
        let cluster = self.cluster_size();
        let length = self.store.size().next_multiple_of(cluster);
        *self.room.space.borrow_mut() = Space::full(cluster, length, self.room.growable());
    }

    /// The tables on disk were changed behind the back of what is in memory.
    pub(super) async fn reload(&self) -> Result<()> {
        let header = self.header.get();
        let l1 = super::open::read_l1(&*self.store, &header).await?;
        self.cache.borrow_mut().clear();
        *self.kept.borrow_mut() = Kept::default();
        *self.tables.borrow_mut() = Tables::new(super::l1_form(header.cluster_size()), l1);
        let table = self.read_refcount_table(&header).await?;
        *self.refcounts.borrow_mut() = Refcounts::new(table);
        Ok(())
    }
}
