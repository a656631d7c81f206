//! Descriptors and the operations on them.
//!
//! Every operation may do less than asked, as the system call may; [`File::read_at`] and [`File::write_at`] report how much.
//! `EINTR` and `EAGAIN` are handled here. Positional I/O only: no operation depends on a shared cursor.

use crate::iov::Iov;
use crate::reactor::{InFlight, Kind, Op};
use crate::runtime::{self, Core, Driver};
use crate::time::sleep;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::rc::{Rc, Weak};
use std::time::Duration;

/// How long to wait before asking again for an operation on a file that the kernel had no resources for.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// A descriptor that operations may use. Clones share it; it is closed with the last clone, after its last operation.
#[derive(Clone)]
pub struct File {
    shared: Rc<Shared>,
}

struct Shared {
    fd: OwnedFd,
    /// Found out at the first use as a stream.
    socket: Cell<Option<bool>>,
    nonblocking: Cell<bool>,
    registration: Cell<Option<Registration>>,
    /// The ring and the number of `registration`, to look at.
    registered: Cell<Option<(u64, u32)>>,
}

/// A place in a ring's table of descriptors.
struct Registration {
    core: Weak<Core>,
    index: u32,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Some(registration) = self.registration.take() else { return };
        if let Some(core) = registration.core.upgrade()
            && let Driver::Real(reactor) = &core.driver
        {
            // Before the descriptor is closed: the table would keep the file open.
            reactor.unregister(registration.index);
        }
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("File").field(&self.raw_fd()).finish()
    }
}

impl From<OwnedFd> for File {
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd)
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
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

impl AllocateMode {
    fn flags(self) -> i32 {
        match self {
            Self::Extend => 0,
            Self::KeepSize => libc::FALLOC_FL_KEEP_SIZE,
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

impl File {
    /// Takes a descriptor over.
    pub fn new(fd: OwnedFd) -> Self {
        let shared = Shared {
            fd,
            socket: Cell::new(None),
            nonblocking: Cell::new(false),
            registration: Cell::new(None),
            registered: Cell::new(None),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Registers the descriptor with the running ring, which spares the kernel a look-up per operation. No effect where
    /// the back end has no such thing or its table is full, nor on a descriptor that is registered already.
    pub fn register(&self) {
        if self.shared.registered.get().is_some() {
            return;
        }
        let core = runtime::current();
        if let Driver::Real(reactor) = &core.driver
            && let Some((ring, index)) = reactor.register(self)
        {
            self.shared.registered.set(Some((ring, index)));
            self.shared.registration.set(Some(Registration { core: Rc::downgrade(&core), index }));
        }
    }

    /// Its number in the table of the ring `ring`.
    pub(crate) fn registered_index(&self, ring: u64) -> Option<u32> {
        self.shared.registered.get().and_then(|(with, index)| (with == ring).then_some(index))
    }

    /// The descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.shared.fd.as_raw_fd()
    }

    /// Makes the open file description non-blocking, once.
    pub(crate) fn make_nonblocking(&self) -> io::Result<()> {
        if self.shared.nonblocking.replace(true) {
            return Ok(());
        }
        // SAFETY: no pointers are passed; the descriptor is open.
        let flags = unsafe { libc::fcntl(self.raw_fd(), libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(self.raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Whether it is a socket, which wants other operations than a pipe does.
    fn is_socket(&self) -> io::Result<bool> {
        if let Some(socket) = self.shared.socket.get() {
            return Ok(socket);
        }
        // SAFETY: a `stat` is plain data, for which zeros are valid.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is writable and of the right type; the descriptor is open.
        if unsafe { libc::fstat(self.raw_fd(), &raw mut stat) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        self.shared.socket.set(Some(socket));
        Ok(socket)
    }

    /// Carries out one operation; what the kernel answers, once it means something.
    async fn run(&self, kind: Kind, iov: &Iov) -> io::Result<u32> {
        loop {
            let result = InFlight::start(Op { kind, file: self.clone(), iov: iov.clone() })?.await;
            if result >= 0 {
                return Ok(result as u32);
            }
            let wait_for = match kind {
                Kind::Recv { .. } | Kind::Accept => Some(Events::Readable),
                Kind::Send { .. } => Some(Events::Writable),
                _ => None,
            };
            match (-result, wait_for) {
                (libc::EINTR, _) => {}
                // The descriptor is non-blocking, and the kernel takes that at its word.
                (libc::EAGAIN, Some(events)) => Box::pin(self.poll(events)).await?,
                (libc::EAGAIN, None) => sleep(BUSY_PAUSE).await,
                (error, _) => return Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Reads at `at` into `into`. Fewer bytes than asked may come (never none, unless at the end of the file); 0 is the
    /// end of the file, or of an empty `into`.
    pub async fn read_at(&self, at: u64, into: &Iov) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        Ok(self.run(Kind::Read { at: position(at)? }, into).await? as usize)
    }

    /// Writes `from` at `at`; with `dsync` the bytes (and what is needed to find them) are durable when it returns.
    pub async fn write_at(&self, at: u64, from: &Iov, dsync: bool) -> io::Result<usize> {
        if from.is_empty() {
            return Ok(0);
        }
        Ok(self.run(Kind::Write { at: position(at)?, dsync }, from).await? as usize)
    }

    /// `fdatasync`.
    pub async fn sync_data(&self) -> io::Result<()> {
        self.run(Kind::Sync { data_only: true }, &Iov::empty()).await.map(drop)
    }

    /// `fsync`.
    pub async fn sync_all(&self) -> io::Result<()> {
        self.run(Kind::Sync { data_only: false }, &Iov::empty()).await.map(drop)
    }

    /// `fallocate`. An empty range is no error and has no effect.
    pub async fn allocate(&self, mode: AllocateMode, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let kind = Kind::Allocate { mode: mode.flags(), at: position(at)?, len: position(len)? };
        self.run(kind, &Iov::empty()).await.map(drop)
    }

    /// `ftruncate`.
    pub async fn set_len(&self, len: u64) -> io::Result<()> {
        self.run(Kind::SetLen { len: position(len)? }, &Iov::empty()).await.map(drop)
    }

    /// Waits until the descriptor is ready. What is always ready (a regular file) is so at once.
    pub async fn poll(&self, events: Events) -> io::Result<()> {
        match self.run(Kind::Poll { events }, &Iov::empty()).await {
            // What the kernel cannot poll never blocks.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => Ok(()),
            polled => polled.map(drop),
        }
    }

    /// Reads from a stream, a pipe or an eventfd (no position). 0 is the end, or of an empty `into`.
    pub async fn recv(&self, into: &Iov) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        Ok(self.run(Kind::Recv { socket: self.is_socket()? }, into).await? as usize)
    }

    /// Writes to a stream socket (`MSG_NOSIGNAL`), a pipe or an eventfd; fewer bytes than asked may go.
    pub async fn send(&self, from: &Iov) -> io::Result<usize> {
        if from.is_empty() {
            return Ok(0);
        }
        Ok(self.run(Kind::Send { socket: self.is_socket()? }, from).await? as usize)
    }

    /// [`File::recv`] until `into` is full; `UnexpectedEof` when the stream ends first.
    pub async fn recv_exact(&self, into: &Iov) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.recv(&into.slice(done..into.len())).await? {
                0 => {
                    let text = format!("the stream ended after {done} of {} bytes", into.len());
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                count => done += count,
            }
        }
        Ok(())
    }

    /// [`File::send`] until all of `from` is sent.
    pub async fn send_all(&self, from: &Iov) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            match self.send(&from.slice(done..from.len())).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Takes the next connection of a listening socket (`SOCK_CLOEXEC`).
    pub async fn accept(&self) -> io::Result<File> {
        let fd = self.run(Kind::Accept, &Iov::empty()).await?;
        // SAFETY: the kernel has just made this descriptor, and only this future got its number.
        Ok(File::new(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }
}

/// An offset or a length as the kernel takes it.
fn position(at: u64) -> io::Result<u64> {
    if at > i64::MAX as u64 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{at} lies beyond what a file can hold")));
    }
    Ok(at)
}
