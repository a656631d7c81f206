//! Showing an internal snapshot instead of the present state.
//!
//! **Invariant.** Such an image is read-only: its L1 table and its size are the snapshot's, in memory alone.

use super::{Core, l1_form};
use crate::tables::Tables;
use crate::{Error, ErrorKind, Result};
use layout::qcow2::Header;
use layout::qcow2::snapshot::Snapshot;

/// What users call a snapshot.
enum Wanted<'a> {
    /// By one of them, or both.
    By { id: Option<&'a str>, name: Option<&'a str> },
    /// An id, or else a name.
    Any(&'a str),
}

impl<'a> Wanted<'a> {
    /// From `snapshot.id=…,snapshot.name=…`, or an id or name alone.
    fn parse(text: &'a str) -> Option<Self> {
        if !text.starts_with("snapshot.") {
            return Some(Self::Any(text));
        }
        let (mut id, mut name) = (None, None);
        for word in text.split(',') {
            match word.split_once('=')? {
                ("snapshot.id", value) => id = Some(value),
                ("snapshot.name", value) => name = Some(value),
                _ => return None,
            }
        }
        Some(Self::By { id, name })
    }

    fn find(&self, all: Vec<Snapshot>) -> Option<Snapshot> {
        let fits = |snapshot: &Snapshot| match self {
            Self::By { id, name } => {
                id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
            }
            Self::Any(word) => snapshot.id == *word,
        };
        let named = |snapshot: &Snapshot| matches!(self, Self::Any(word) if snapshot.name == *word);
        let number = all.iter().position(fits).or_else(|| all.iter().position(named))?;
        all.into_iter().nth(number)
    }
}

impl Core {
    /// Shows the snapshot that `text` means from now on.
    pub(super) async fn show_snapshot(&self, text: &str) -> Result<()> {
        let refuse = |kind, what: String| Err(Error::new(kind, self.store.name(), None, what));
        if !self.health.read_only() {
            return refuse(ErrorKind::InvalidArgument, "a snapshot is read only".to_owned());
        }
        let Some(wanted) = Wanted::parse(text) else {
            let what = format!("Failed in parsing snapshot param '{text}': write snapshot.id=ID,snapshot.name=NAME");
            return refuse(ErrorKind::InvalidArgument, what);
        };
        let header = self.header.get();
        let (all, _) = self.read_snapshots(&header).await?;
        let Some(snapshot) = wanted.find(all) else {
            return refuse(
                ErrorKind::InvalidArgument,
                format!("Failed to load snapshot: Can't find snapshot '{text}'"),
            );
        };
        let mut entries = self.snapshot_l1(&snapshot).await?;
        let size = snapshot.disk_size.unwrap_or(header.size);
        if header.l1_entries_for(size) > entries.len() as u64 || size > header.max_size() {
            let what = format!("snapshot '{}' has too few tables for its size", snapshot.name);
            return Err(self.health.error(ErrorKind::Corrupt, Some(snapshot.l1_table), what));
        }
        let header = Header { size, l1_entries: snapshot.l1_entries, l1_table: snapshot.l1_table, ..header };
        let whole = (entries.len() * 8).next_multiple_of(header.cluster_size() as usize) / 8;
        entries.resize(whole, 0);
        *self.tables.borrow_mut() = Tables::new(l1_form(header.cluster_size()), entries);
        self.header.set(header);
        Ok(())
    }
}
