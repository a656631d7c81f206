//! A local file or block device, through the page cache or past it.

use crate::{HostExtent, IoFuture, Limits, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::path::Path;
use std::rc::Rc;

/// How a file takes part in locking with QEMU's tools (and with other Headwaters): byte-range OFD locks, laid out as
/// QEMU lays them out, so that both refuse to write one image at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// As the access asks for: a writer shares with readers that allow it and excludes writers.
    #[default]
    On,
    /// No locks (`-U` / `--force-share` for readers; `locking=off`).
    Off,
}

/// How to open a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse writes; take only the locks of a reader.
    pub read_only: bool,
    /// Past the page cache (`O_DIRECT`): `cache=none`, `cache=directsync`.
    pub direct: bool,
    /// Flushes are not carried out: `cache=unsafe`.
    pub no_flush: bool,
    /// Locks.
    pub locking: Locking,
}

/// A file or block device.
pub struct FileStore {
    _todo: (),
}

impl FileStore {
    /// Opens an existing file.
    pub async fn open(path: &Path, options: OpenOptions) -> Result<Rc<Self>> {
        let _ = (path, options);
        todo!()
    }

    /// Makes a new file (an existing regular file is emptied, only after its locks were had) and opens it for writing.
    pub async fn create(path: &Path, options: OpenOptions) -> Result<Rc<Self>> {
        let _ = (path, options);
        todo!()
    }
}

impl Store for FileStore {
    fn name(&self) -> &str {
        todo!()
    }
    fn size(&self) -> u64 {
        todo!()
    }
    fn limits(&self) -> Limits {
        todo!()
    }
    fn read(&self, _at: HostOffset, _into: Iov) -> IoFuture<'_, ()> {
        todo!()
    }
    fn write(&self, _at: HostOffset, _from: Iov, _fua: bool) -> IoFuture<'_, ()> {
        todo!()
    }
    fn flush(&self) -> IoFuture<'_, ()> {
        todo!()
    }
    fn zero(&self, _range: HostRange, _mode: ZeroMode) -> IoFuture<'_, ()> {
        todo!()
    }
    fn set_size(&self, _size: u64) -> IoFuture<'_, ()> {
        todo!()
    }
    fn allocate(&self, _range: HostRange) -> IoFuture<'_, ()> {
        todo!()
    }
    fn extent(&self, _range: HostRange) -> IoFuture<'_, HostExtent> {
        todo!()
    }
    fn close(&self) -> IoFuture<'_, ()> {
        todo!()
    }
}
