//! Creating: options as the user wrote them, checked before a byte is written.

use crate::{BackingRef, Error, ErrorKind, Format, Result, qcow2};
use std::rc::Rc;
use std::time::Duration;
use store::Store;

/// What of a new image has its place before anything is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every cluster has its place; the space is taken when it is written to.
    Metadata,
    /// The space is taken too.
    Falloc,
    /// Zeros are written.
    Full,
}

impl Preallocation {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }

    /// The mode of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Off, Self::Metadata, Self::Falloc, Self::Full].into_iter().find(|mode| mode.name() == name)
    }
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Format of the new image.
    pub format: Format,
    /// Size the guest sees, in bytes.
    pub size: u64,
    /// What lies below.
    pub backing: Option<BackingRef>,
    /// Cluster size in bytes, a power of two; default 64 KiB. QED: 4 KiB to 64 MiB; QCOW2: 512 bytes to 2 MiB.
    pub cluster_size: Option<u64>,
    /// QED: clusters per L1 and L2 table (power of two, 1 to 16; default 4).
    pub table_size: Option<u32>,
    /// QCOW2: everything else.
    pub qcow2: qcow2::Options,
    /// What unlocks it, where it is encrypted.
    pub passphrase: Option<crate::Passphrase>,
    /// How long it shall take to try a passphrase on this machine; half a second by default.
    pub iteration_time: Option<Duration>,
}

impl CreateOptions {
    /// Of this size, and nothing below; as each format has it by default.
    pub fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size,
            backing: None,
            cluster_size: None,
            table_size: None,
            qcow2: qcow2::Options::default(),
            passphrase: None,
            iteration_time: None,
        }
    }
}

/// Checks `options` without touching anything; returns warnings for the user (QED table size 1: QEMU cannot open it).
pub fn validate(options: &CreateOptions) -> Result<Vec<String>> {
    match options.format {
        Format::Raw => crate::raw::validate(options),
        Format::Qcow2 => qcow2::validate(options),
        Format::Luks => Ok(Vec::new()),
        Format::Qed => crate::qed::validate(options),
        format => Err(unwritten(format)),
    }
}

/// Writes a new, empty image into `store` (which is empty), durably.
pub async fn create(store: Rc<dyn Store>, options: &CreateOptions) -> Result<()> {
    match options.format {
        Format::Raw => crate::raw::create(store, options).await,
        Format::Qcow2 => qcow2::create(store, options).await,
        Format::Luks => match &options.passphrase {
            Some(passphrase) => crate::luks::create(store, options, passphrase).await,
            None => Err(crate::luks::no_passphrase(&*store, "key-secret")),
        },
        Format::Qed => crate::qed::create(store, options).await,
        format => Err(unwritten(format)),
    }
}

fn unwritten(format: Format) -> Error {
    let what = format!("{format} images are read, not made; raw, qed and qcow2 are what can be made");
    Error::new(ErrorKind::Unsupported, "", None, what)
}
