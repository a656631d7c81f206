//! Which format a store holds, and the only place that ever guesses.
//!
//! Probing is done once, when a user names an image without its format. What was recorded as raw is never probed.

use crate::Result;
use std::fmt;
use store::Store;

/// The formats Headwater knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Bytes as they are.
    Raw,
    /// QEMU Enhanced Disk.
    Qed,
}

impl Format {
    /// The name users write: `raw`, `qed`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qed => "qed",
        }
    }

    /// From the name users write.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qed" => Some(Self::Qed),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the first bytes look like; `Raw` when like nothing known. Formats that are recognised but not served (QCOW2, VMDK, …)
/// are an error that names them: serving their bytes as raw would be a guess.
pub async fn probe(store: &dyn Store) -> Result<Format> {
    let _ = store;
    todo!()
}
