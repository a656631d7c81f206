//! Opening: what kind of file it is, how long, how aligned; all of it blocking, run on a helper thread.
//!
//! **Invariant.** Nothing of an existing file changes before its locks are held.

use super::lock::{self, Claim};
use super::{Locking, OpenOptions};
use crate::{Error, ErrorKind, Operation, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// What offsets and memory have to be aligned to where nothing says so.
const ALIGN_ASSUMED: u32 = 4096;

/// Memory of ours is aligned to this; a file that wants more cannot be used past the page cache.
const MEMORY_ALIGN_MAX: u32 = 4096;

/// The largest block that is believed.
const OFFSET_ALIGN_MAX: u32 = 1 << 20;

/// What transfers have to be aligned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Offsets and lengths, in bytes (a power of two).
    pub(super) offset: u64,
    /// Addresses, in bytes (a power of two).
    pub(super) memory: usize,
    /// The unit in which the page cache writes to the file, in bytes (a power of two, at least `offset`).
    pub(super) cached: u64,
}

/// A file that was opened, and what was found out about it.
pub(super) struct Opened {
    pub(super) fd: OwnedFd,
    /// The same file through the page cache, when `fd` goes past it.
    pub(super) twin: Option<OwnedFd>,
    pub(super) size: u64,
    pub(super) block_device: bool,
    pub(super) alignment: Alignment,
}

/// Opens (or makes) and locks `path`.
pub(super) fn open(path: &Path, options: &OpenOptions, create: bool) -> Result<Opened> {
    let name = path.display().to_string();
    let operation = if create { Operation::Create } else { Operation::Open };
    let failed = |error: rustix::io::Errno| Error::from_io(operation, &name, None, error.into());
    let refused = |kind, why: &str| Error::new(kind, operation, &name, None, why);

    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // Non-blocking only until we know that it is no pipe.
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let direct = if options.direct { OFlags::DIRECT } else { OFlags::empty() };
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let (fd, new) = match rustix::fs::open(path, flags | direct, mode) {
        Ok(fd) => (fd, false),
        Err(rustix::io::Errno::NOENT) if create => {
            (rustix::fs::open(path, flags | direct | OFlags::CREATE, mode).map_err(failed)?, true)
        }
        Err(rustix::io::Errno::INVAL) if options.direct => return Err(no_direct(operation, &name)),
        Err(error) => return Err(failed(error)),
    };
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let block_device = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => false,
        FileType::BlockDevice => true,
        FileType::Directory => return Err(refused(ErrorKind::Unsupported, "it is a directory")),
        _ => return Err(refused(ErrorKind::Unsupported, "it is neither a regular file nor a block device")),
    };
    rustix::fs::fcntl_setfl(&fd, access | direct).map_err(failed)?;

    if options.locking == Locking::On {
        lock::acquire(fd.as_fd(), &name, Claim::of(options.read_only), options.read_only)?;
    }
    if create && !block_device {
        rustix::fs::ftruncate(&fd, 0).map_err(failed)?;
        if new && !options.no_flush {
            sync_folder(path).map_err(|error| Error::from_io(operation, &name, None, error))?;
        }
    }
    let size = if block_device {
        rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(failed)?
    } else {
        length(fd.as_fd()).map_err(|error| Error::from_io(operation, &name, None, error))?
    };
    let cached = u64::try_from(stat.st_blksize).unwrap_or(0).next_power_of_two();
    let cached = cached.clamp(ALIGN_ASSUMED.into(), OFFSET_ALIGN_MAX.into());
    let (alignment, twin) = if options.direct {
        let alignment =
            direct_alignment(fd.as_fd(), block_device, cached).ok_or_else(|| no_direct(operation, &name))?;
        let twin = if options.read_only || block_device { None } else { Some(open_twin(path, &name, &stat, flags)?) };
        (alignment, twin)
    } else {
        let block = if block_device { logical_block(fd.as_fd()) } else { 1 };
        // Through the page cache any transfer will do; only zeroing a block device wants whole blocks.
        (Alignment { offset: block.into(), memory: 1, cached }, None)
    };
    Ok(Opened { fd, twin, size, block_device, alignment })
}

/// The length of an open file, now.
pub(super) fn length(file: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Opens the very file of `stat` once more, through the page cache.
fn open_twin(path: &Path, name: &str, stat: &rustix::fs::Stat, flags: OFlags) -> Result<OwnedFd> {
    let failed = |error: rustix::io::Errno| Error::from_io(Operation::Open, name, None, error.into());
    let twin = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    let other = rustix::fs::fstat(&twin).map_err(failed)?;
    if (other.st_dev, other.st_ino) != (stat.st_dev, stat.st_ino) {
        let why = "it was replaced by another file while it was being opened: try again";
        return Err(Error::new(ErrorKind::Io, Operation::Open, name, None, why));
    }
    rustix::fs::fcntl_setfl(&twin, flags - OFlags::NONBLOCK).map_err(failed)?;
    Ok(twin)
}

/// Makes the new name of a file durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match std::fs::File::open(folder).and_then(|folder| folder.sync_all()) {
        // Not every file system knows this, nor is every folder readable to those who may write there.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBADF | libc::EACCES)) => Ok(()),
        result => result,
    }
}

fn no_direct(operation: Operation, name: &str) -> Error {
    let why = "it cannot be used past the page cache (O_DIRECT): use --cache=writeback or --cache=writethrough";
    Error::new(ErrorKind::Unsupported, operation, name, None, why)
}

/// What transfers past the page cache need; `None` where the file has none such.
fn direct_alignment(file: BorrowedFd<'_>, block_device: bool, cached: u64) -> Option<Alignment> {
    let (offset, memory) = match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (stat.stx_dio_offset_align, stat.stx_dio_mem_align)
        }
        _ if block_device => (logical_block(file), logical_block(file)),
        _ => (ALIGN_ASSUMED, ALIGN_ASSUMED),
    };
    // Zeros say that this file has no direct transfers (it is compressed, encrypted, ...).
    if offset == 0 || memory == 0 {
        return None;
    }
    let (offset, memory) = (offset.checked_next_power_of_two()?, memory.checked_next_power_of_two()?);
    if offset > OFFSET_ALIGN_MAX || memory > MEMORY_ALIGN_MAX {
        return None;
    }
    Some(Alignment { offset: offset.into(), memory: memory as usize, cached: cached.max(offset.into()) })
}

/// A block device's logical block, in bytes.
fn logical_block(file: BorrowedFd<'_>) -> u32 {
    rustix::fs::ioctl_blksszget(file)
        .ok()
        .filter(|size| size.is_power_of_two() && *size <= OFFSET_ALIGN_MAX)
        .unwrap_or(ALIGN_ASSUMED)
}
