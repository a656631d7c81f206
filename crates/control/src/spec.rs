//! What an operator asks for, as plain data that can cross threads.

use image::Format;
use store::ailing::Ailments;

/// How a disk's top image meets the host's caches and the guest's flushes: qemu-img's and qemu's `cache=` names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Past the page cache, write cache on.
    None,
    /// Through the page cache, write cache on.
    #[default]
    Writeback,
    /// Through the page cache; every write is durable when it returns.
    Writethrough,
    /// Past the page cache; every write is durable when it returns.
    Directsync,
    /// Through the page cache; flushes are not carried out. For throw-away disks only.
    Unsafe,
}

impl CacheMode {
    /// Every mode, for messages and completion.
    pub const ALL: [Self; 5] = [Self::None, Self::Writeback, Self::Writethrough, Self::Directsync, Self::Unsafe];

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// From the name users write.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Past the page cache.
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Every write is durable when it returns.
    pub fn write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}

/// A disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// For clients' users, where an export can say it.
    pub description: Option<String>,
    /// Device name.
    pub name: String,
    /// The top image's file, as the user wrote it.
    pub file: String,
    /// Its format; `None` probes it.
    pub format: Option<Format>,
    /// Caches and flushes.
    pub cache: CacheMode,
    /// Guests may not write, and nothing is written.
    pub read_only: bool,
    /// What guests read from below is kept.
    pub copy_on_read: bool,
    /// The internal snapshot (its id, or its name) to show instead of the present state; then the disk is read-only.
    pub snapshot: Option<String>,
    /// What ails the files below the top: for demonstrations and tests.
    pub source: Ailments,
}
