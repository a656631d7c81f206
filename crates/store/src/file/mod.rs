//! A local file or block device, through the page cache or past it.
//!
//! **Invariants.**
//! * The length is ours: it is read once, at opening (a writer's lock keeps others from changing it), and followed from
//!   then on. While anything that grows the file is in flight, nothing sets its length.
//! * A change that has begun runs to its end, and whatever comes later to its range waits for that (see `abandoned.rs`).
//! * After a flush that failed, or a durable write that failed in a way that may have swallowed the error of a flush,
//!   nothing is written any more: the kernel reports such an error once, and forgets which data it was about.
//! * Alignment is known in `align.rs` and nowhere else.

mod align;
mod extent;
mod lock;
mod open;
mod ranges;
mod transfer;
mod zero;

use crate::abandoned::{Abandoned, Change};
use crate::memory::SIZE_MAX;
use crate::{Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Shared, Store, ZeroMode};
use extent::Extents;
use layout::{HostOffset, HostRange};
use open::{Alignment, Opened};
use ranges::Ranges;
use ring::sync::Event;
use ring::{AllocateMode, File, Iov};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use zero::Zeroing;

/// How a file takes part in locking with QEMU's tools (and with other Headwaters): byte-range OFD locks, laid out as
/// QEMU lays them out, so that both refuse to write one image at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// As the access asks for: a writer shares with nobody, readers share with each other.
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
    me: Weak<Self>,
    name: String,
    options: OpenOptions,
    block_device: bool,
    alignment: Alignment,
    size: Cell<u64>,
    /// `None` once closed.
    open: RefCell<Option<Rc<Open>>>,
    running: Cell<usize>,
    idle: Event,
    /// Why nothing is written any more.
    poison: RefCell<Option<Error>>,
    ranges: Ranges,
    abandoned: Rc<Abandoned>,
    zeroing: Zeroing,
    extents: Extents,
}

/// The descriptors of an open file.
struct Open {
    file: File,
    /// Through the page cache, when `file` goes past it.
    twin: Option<File>,
    /// A duplicate of `file`'s, for calls on helper threads.
    fd: Arc<OwnedFd>,
}

/// Counts an operation that uses the descriptors.
struct Running<'a> {
    store: &'a FileStore,
    open: Rc<Open>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let left = self.store.running.get() - 1;
        self.store.running.set(left);
        if left == 0 {
            self.store.idle.notify_all();
        }
    }
}

impl FileStore {
    /// Opens an existing file.
    ///
    /// [`ErrorKind::Locked`] when another process (or another opening in this one) uses it in a way that excludes ours.
    pub async fn open(path: &Path, options: OpenOptions) -> Result<Rc<Self>> {
        Self::obtain(path, options, false).await
    }

    /// Makes a new file (an existing regular file is emptied, only after its locks were had) and opens it for writing.
    /// The new name is durable when this returns.
    pub async fn create(path: &Path, options: OpenOptions) -> Result<Rc<Self>> {
        if options.read_only {
            let why = "a file cannot be made and be read-only";
            let name = path.display().to_string();
            return Err(Error::new(ErrorKind::ReadOnly, Operation::Create, &name, None, why));
        }
        Self::obtain(path, options, true).await
    }

    async fn obtain(path: &Path, options: OpenOptions, create: bool) -> Result<Rc<Self>> {
        let name = path.display().to_string();
        let (owned, how) = (path.to_owned(), options.clone());
        let opened = ring::unblock(move || open::open(&owned, &how, create)).await?;
        Self::assemble(name, options, opened)
    }

    fn assemble(name: String, options: OpenOptions, opened: Opened) -> Result<Rc<Self>> {
        let Opened { fd, twin, size, block_device, alignment } = opened;
        let again = fd.try_clone().map_err(|error| Error::from_io(Operation::Open, &name, None, error))?;
        let open = Open { file: File::new(fd), twin: twin.map(File::new), fd: Arc::new(again) };
        open.file.register();
        Ok(Rc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            name,
            options,
            block_device,
            alignment,
            size: Cell::new(size),
            open: RefCell::new(Some(Rc::new(open))),
            running: Cell::new(0),
            idle: Event::new(),
            poison: RefCell::default(),
            ranges: Ranges::default(),
            abandoned: Rc::default(),
            zeroing: Zeroing::default(),
            extents: Extents::default(),
        }))
    }

    /// Whether transfers go past the page cache.
    fn direct(&self) -> bool {
        self.options.direct
    }

    /// Lets an operation use the descriptors.
    fn begin(&self, operation: Operation, range: Option<HostRange>) -> Result<Running<'_>> {
        let Some(open) = self.open.borrow().clone() else {
            return Err(Error::new(ErrorKind::Io, operation, &self.name, range, "it was closed"));
        };
        self.running.set(self.running.get() + 1);
        Ok(Running { store: self, open })
    }

    /// Whether writing is possible at all.
    fn writable(&self, operation: Operation, range: Option<HostRange>) -> Result<()> {
        if self.options.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, operation, &self.name, range, "it was opened read-only"));
        }
        match &*self.poison.borrow() {
            Some(first) => Err(Error::poisoned(operation, &self.name, range, first)),
            None => Ok(()),
        }
    }

    /// Whether a change of `len` bytes from `at` is possible.
    fn changeable(&self, operation: Operation, at: HostOffset, len: u64) -> Result<()> {
        let range = at.range(len);
        self.writable(operation, Some(range))?;
        let why = match at.get().checked_add(len) {
            Some(end) if self.block_device && end > self.size.get() => "it reaches past the end of a block device",
            Some(end) if end <= SIZE_MAX => return Ok(()),
            _ => "no file can be that long",
        };
        Err(Error::new(ErrorKind::OutOfRange, operation, &self.name, Some(range), why))
    }

    /// A change to `range`, checked by `check`, that once begun runs to its end.
    fn change<C, W>(&self, operation: Operation, range: HostRange, check: C, work: W) -> IoFuture<'_, ()>
    where
        C: FnOnce(&Self) -> Result<()> + 'static,
        W: AsyncFnOnce(&Self, &Open) -> Result<()> + 'static,
    {
        let store = self.me.upgrade().expect("only an Rc of it is ever handed out");
        let work = Box::pin(async move {
            check(&store)?;
            let running = store.begin(operation, None)?;
            store.abandoned.clear_of(range).await;
            work(&store, &running.open).await
        });
        Box::pin(Change::new(&self.abandoned, range, work))
    }

    /// Writes `from` to `range`, and follows the length.
    async fn write_range(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        if self.direct() {
            return self.write_direct(open, range, from, dsync).await;
        }
        let grows = range.end().get() > self.size.get();
        let _held = if grows { Some(self.ranges.shared(range).await) } else { None };
        let result = transfer::write(&open.file, range.start().get(), from, dsync, 1).await;
        self.sized(open, range.end(), result).await
    }

    /// Notes how long the file is after a change that was to reach `end`.
    async fn sized(&self, open: &Open, end: HostOffset, result: io::Result<()>) -> io::Result<()> {
        if end.get() <= self.size.get() {
            return result;
        }
        let reached = match result {
            Ok(()) => end.get(),
            // A part may have been written.
            Err(_) => {
                let fd = Arc::clone(&open.fd);
                ring::unblock(move || open::length(fd.as_fd())).await.unwrap_or(0)
            }
        };
        self.size.set(self.size.get().max(reached));
        result
    }

    /// Refuses writes from now on, because of `cause` (or of what came before it).
    fn poison(&self, cause: &Error) {
        let mut poison = self.poison.borrow_mut();
        if poison.is_none() {
            tracing::error!("{cause}; '{}' is not written any more", self.name);
            *poison = Some(cause.clone());
        }
    }

    /// Whether a durable write that failed with `error` failed as a write, before anything was flushed. A flush of other
    /// data may have failed within it, of which the kernel would not tell again.
    async fn failed_as_write(&self, open: &Open, range: HostRange, from: &Iov, error: &Error) -> bool {
        matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::OutOfRange)
            && self.write_range(open, range, from, false).await.is_err()
    }
}

impl Store for FileStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn protocol(&self) -> &'static str {
        if self.block_device { "host_device" } else { "file" }
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        let (offset_align, memory_align) =
            if self.direct() { (self.alignment.offset as u32, self.alignment.memory as u32) } else { (1, 1) };
        Limits {
            offset_align,
            memory_align,
            read_only: self.options.read_only,
            sparse: !self.block_device,
            fixed_size: self.block_device,
        }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = at.range(into.len() as u64);
            let running = self.begin(Operation::Read, Some(range))?;
            if at.get() >= self.size.get() {
                into.fill(0);
                return Ok(());
            }
            self.abandoned.clear_of(range).await;
            let open = &running.open;
            let result = if range.end().get() > SIZE_MAX {
                // Rather than by overflow, the system tells by an error.
                let inside = HostRange::between(at, HostOffset(SIZE_MAX));
                into.slice(inside.len() as usize..into.len()).fill(0);
                self.read_range(open, inside, &into.slice(0..inside.len() as usize)).await
            } else {
                self.read_range(open, range, &into).await
            };
            result.map_err(|error| Error::from_io(Operation::Read, &self.name, Some(range), error))
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        let len = from.len() as u64;
        let range = at.range(len);
        let check = move |store: &Self| store.changeable(Operation::Write, at, len);
        self.change(Operation::Write, range, check, async move |store: &Self, open: &Open| {
            if from.is_empty() {
                return Ok(());
            }
            let dsync = fua && !store.options.no_flush;
            let result = store.write_range(open, range, &from, dsync).await;
            store.extents.filled(range);
            let Err(error) = result else { return Ok(()) };
            let error = Error::from_io(Operation::Write, &store.name, Some(range), error);
            if dsync && !store.failed_as_write(open, range, &from, &error).await {
                store.poison(&error);
            }
            Err(error)
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let running = self.begin(Operation::Flush, None)?;
            if self.options.read_only {
                return Ok(());
            }
            self.writable(Operation::Flush, None)?;
            if self.options.no_flush {
                return Ok(());
            }
            running.open.file.sync_data().await.map_err(|error| {
                let error = Error::from_io(Operation::Flush, &self.name, None, error);
                self.poison(&error);
                error
            })
        })
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        let check = move |store: &Self| store.changeable(Operation::Zero, range.start(), range.len());
        self.change(Operation::Zero, range, check, async move |store: &Self, open: &Open| {
            if range.is_empty() {
                return Ok(());
            }
            let result = store.zero_range(open, range, mode).await;
            store.extents.emptied(range);
            store.extents.filled(range);
            result.map_err(|error| Error::from_io(Operation::Zero, &store.name, Some(range), error))
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        let old = self.size.get();
        let range = HostRange::between(HostOffset(size.min(old)), HostOffset(size.max(old)));
        let check = move |store: &Self| {
            store.writable(Operation::SetSize, Some(range))?;
            let why = match size {
                _ if store.block_device && size != store.size.get() => "a block device's size cannot change",
                _ if size > SIZE_MAX => "no file can be that long",
                _ => return Ok(()),
            };
            Err(Error::new(ErrorKind::OutOfRange, Operation::SetSize, &store.name, Some(range), why))
        };
        // It concerns all that is, or will be, past the new end.
        let touched = HostRange::between(range.start(), HostOffset(u64::MAX));
        self.change(Operation::SetSize, touched, check, async move |store: &Self, open: &Open| {
            let result = store.set_length(open, size, false).await;
            store.extents.emptied(HostRange::between(HostOffset(size), HostOffset(u64::MAX)));
            result.map_err(|error| Error::from_io(Operation::SetSize, &store.name, Some(range), error))
        })
    }

    fn sharable(&self) -> Option<Arc<OwnedFd>> {
        let open = self.open.borrow();
        open.as_ref().filter(|_| !self.block_device).map(|open| Arc::clone(&open.fd))
    }

    fn share(&self, source: Arc<OwnedFd>, from: HostRange, to: HostOffset) -> IoFuture<'_, Shared> {
        let range = to.range(from.len());
        let check = move |store: &Self| store.changeable(Operation::Write, to, from.len());
        let outcome = Rc::new(Cell::new(Shared::Never));
        let told = Rc::clone(&outcome);
        let change = self.change(Operation::Write, range, check, async move |store: &Self, open: &Open| {
            let fd = Arc::clone(&open.fd);
            let (at, len) = (from.start().get(), from.len());
            let shared = ring::unblock(move || ring::share::share(source.as_fd(), at, len, fd.as_fd(), to.get()));
            let refused = match shared.await {
                Ok(()) => Shared::Done,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINVAL) => Shared::NotThis,
                    Some(
                        libc::EOPNOTSUPP | libc::EXDEV | libc::ENOTTY | libc::EPERM | libc::ETXTBSY | libc::ENOSYS,
                    ) => Shared::Never,
                    _ => return Err(Error::from_io(Operation::Write, &store.name, Some(range), error)),
                },
            };
            told.set(refused);
            if refused == Shared::Done {
                store.extents.filled(range);
                store.size.set(store.size.get().max(range.end().get()));
            }
            Ok(())
        });
        Box::pin(async move { change.await.map(|()| outcome.get()) })
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        let check = move |store: &Self| store.changeable(Operation::Allocate, range.start(), range.len());
        self.change(Operation::Allocate, range, check, async move |store: &Self, open: &Open| {
            if range.is_empty() || store.block_device {
                return Ok(());
            }
            let failed = |error| Error::from_io(Operation::Allocate, &store.name, Some(range), error);
            let held = store.ranges.shared(range).await;
            let result = open.file.allocate(AllocateMode::Extend, range.start().get(), range.len()).await;
            let result = store.sized(open, range.end(), result).await.map_err(failed);
            drop(held);
            store.extents.filled(range);
            match result {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::NoSpace => return Err(error),
                Err(error) => tracing::debug!("{error}"),
            }
            // Space is a wish, the length is not.
            store.set_length(open, range.end().get(), true).await.map_err(failed)
        })
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            let running = self.begin(Operation::Extent, Some(range))?;
            if range.is_empty() {
                let why = "an empty range has no extent";
                return Err(Error::new(ErrorKind::OutOfRange, Operation::Extent, &self.name, Some(range), why));
            }
            self.abandoned.clear_of(range).await;
            let run = self.first_run(&running.open, range).await;
            run.map_err(|error| Error::from_io(Operation::Extent, &self.name, Some(range), error))
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let Some(open) = self.open.take() else { return Ok(()) };
            while self.running.get() > 0 {
                self.idle.wait().await;
            }
            if self.options.locking == Locking::On {
                let fd = Arc::clone(&open.fd);
                // Closing the descriptors does it too, but somebody may have inherited one.
                let _ = ring::unblock(move || lock::release(fd.as_fd())).await;
            }
            drop(open);
            Ok(())
        })
    }
}

impl FileStore {
    /// Reads `range`, whose end is one that a file can have; zeros past the end.
    async fn read_range(&self, open: &Open, range: HostRange, into: &Iov) -> io::Result<()> {
        if self.direct() {
            return self.read_direct(open, range, into).await;
        }
        let size = self.size.get();
        let inside = range.intersect(HostRange::new(HostOffset::ZERO, size)).len() as usize;
        let got = if inside == into.len() {
            transfer::read(&open.file, range.start().get(), into, 1, size).await?
        } else {
            transfer::read(&open.file, range.start().get(), &into.slice(0..inside), 1, size).await?
        };
        if got < into.len() {
            into.slice(got..into.len()).fill(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::{Config, Ring};
    use std::fs::File as SystemFile;

    /// A store whose descriptor is `file`, which opening would have refused.
    async fn over(file: SystemFile, options: OpenOptions) -> Rc<FileStore> {
        let image = tempfile::NamedTempFile::new().unwrap();
        let store = FileStore::open(image.path(), options).await.unwrap();
        let fd = Arc::new(OwnedFd::from(file.try_clone().unwrap()));
        store.open.replace(Some(Rc::new(Open { file: File::new(file.into()), twin: None, fd })));
        store
    }

    fn on_ring(test: impl Future<Output = ()>) {
        Ring::new(Config::default()).unwrap().block_on(test);
    }

    #[test]
    fn a_failed_flush_is_the_last_thing_written() {
        on_ring(async {
            // What cannot be synchronised: a pipe.
            let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
            let store = over(pipe.into(), OpenOptions::default()).await;
            let first = store.flush().await.unwrap_err();
            assert_eq!(
                (first.kind(), first.operation(), first.errno()),
                (ErrorKind::Io, Operation::Flush, libc::EINVAL)
            );
            let range = HostRange::new(HostOffset(0), 1);
            for result in [
                store.flush().await,
                store.write(HostOffset(0), Iov::zeroed(1), false).await,
                store.zero(range, ZeroMode::default()).await,
                store.set_size(1).await,
                store.allocate(range).await,
            ] {
                let error = result.unwrap_err();
                assert_eq!((error.kind(), error.errno()), (ErrorKind::Poisoned, libc::EINVAL));
                assert!(error.to_string().contains(&first.to_string()), "{error}");
            }
            store.read(HostOffset(0), Iov::alloc(1)).await.unwrap();
        });
    }

    #[test]
    fn without_flushes_none_fails() {
        on_ring(async {
            let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
            let store = over(pipe.into(), OpenOptions { no_flush: true, ..OpenOptions::default() }).await;
            store.flush().await.unwrap();
        });
    }

    #[test]
    fn a_full_disk_fails_writes_and_poisons_nothing() {
        on_ring(async {
            let full = SystemFile::options().read(true).write(true).open("/dev/full").unwrap();
            let store = over(full, OpenOptions::default()).await;
            for fua in [false, true] {
                let error = store.write(HostOffset(0), Iov::zeroed(10), fua).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
            }
            assert!(store.poison.borrow().is_none());
            assert_eq!(store.size(), 0);
        });
    }

    #[test]
    fn a_durable_write_that_fails_otherwise_poisons() {
        on_ring(async {
            let unwritable = SystemFile::open("/dev/null").unwrap();
            let store = over(unwritable, OpenOptions::default()).await;
            store.write(HostOffset(0), Iov::zeroed(1), false).await.unwrap_err();
            assert!(store.poison.borrow().is_none(), "a write that fails is just a failed write");
            store.write(HostOffset(0), Iov::zeroed(1), true).await.unwrap_err();
            let error = store.write(HostOffset(0), Iov::zeroed(1), false).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Poisoned);
        });
    }
}
