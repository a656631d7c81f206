//! Descriptors and the operations on them.
//!
//! Every operation may do less than asked, as the system call may; [`File::read_at`] and [`File::write_at`] report how much.
//! `EINTR` and `EAGAIN` are handled here. Positional I/O only: no operation depends on a shared cursor.

use crate::iov::Iov;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// A descriptor that operations may use. Clones share it; it is closed with the last clone, after its last operation.
#[derive(Clone, Debug)]
pub struct File {
    _todo: Rc<OwnedFd>,
}

/// What [`File::poll`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    /// Something can be read (or the peer has gone).
    Readable,
    /// Something can be written (or the peer has gone).
    Writable,
}

/// What [`File::allocate`] does with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocateMode {
    /// Backs the range with space; grows the file when it ends past its end.
    Extend,
    /// Backs the range with space; the file's length stays.
    KeepSize,
    /// Frees the space; the range then reads as zeros; the file's length stays.
    PunchHole,
    /// The range then reads as zeros and stays backed; the file's length stays.
    ZeroRange,
}

impl File {
    /// Takes a descriptor over.
    pub fn new(fd: OwnedFd) -> Self {
        Self { _todo: Rc::new(fd) }
    }

    /// Registers the descriptor with the running ring, which spares the kernel a look-up per operation. No effect where
    /// the back end has no such thing or its table is full.
    pub fn register(&self) {
        todo!()
    }

    /// The descriptor.
    pub fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&*self._todo)
    }

    /// Reads at `at` into `into`. Fewer bytes than asked may come; 0 is the end of the file.
    pub async fn read_at(&self, at: u64, into: &Iov) -> io::Result<usize> {
        let _ = (at, into);
        todo!()
    }

    /// Writes `from` at `at`; with `dsync` the bytes (and what is needed to find them) are durable when it returns.
    pub async fn write_at(&self, at: u64, from: &Iov, dsync: bool) -> io::Result<usize> {
        let _ = (at, from, dsync);
        todo!()
    }

    /// `fdatasync`.
    pub async fn sync_data(&self) -> io::Result<()> {
        todo!()
    }

    /// `fsync`.
    pub async fn sync_all(&self) -> io::Result<()> {
        todo!()
    }

    /// `fallocate`.
    pub async fn allocate(&self, mode: AllocateMode, at: u64, len: u64) -> io::Result<()> {
        let _ = (mode, at, len);
        todo!()
    }

    /// `ftruncate`.
    pub async fn set_len(&self, len: u64) -> io::Result<()> {
        let _ = len;
        todo!()
    }

    /// Waits until the descriptor is ready.
    pub async fn poll(&self, events: Events) -> io::Result<()> {
        let _ = events;
        todo!()
    }

    /// Reads from a stream, a pipe or an eventfd (no position). 0 is the end.
    pub async fn recv(&self, into: &Iov) -> io::Result<usize> {
        let _ = into;
        todo!()
    }

    /// Writes to a stream socket (`MSG_NOSIGNAL`); fewer bytes than asked may go.
    pub async fn send(&self, from: &Iov) -> io::Result<usize> {
        let _ = from;
        todo!()
    }

    /// [`File::recv`] until `into` is full; `UnexpectedEof` when the stream ends first.
    pub async fn recv_exact(&self, into: &Iov) -> io::Result<()> {
        let _ = into;
        todo!()
    }

    /// [`File::send`] until all of `from` is sent.
    pub async fn send_all(&self, from: &Iov) -> io::Result<()> {
        let _ = from;
        todo!()
    }

    /// Takes the next connection of a listening socket (`SOCK_CLOEXEC`).
    pub async fn accept(&self) -> io::Result<File> {
        todo!()
    }
}
