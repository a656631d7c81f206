//! An export of an NBD server as a store: the client's side (specification: NetworkBlockDevice/nbd `doc/proto.md`).
//!
//! `address` connects, `link` is one connection; here is what outlives a connection.
//!
//! **Invariants.**
//! * When a connection breaks, the next request makes a new one; where that fails, the answer is [`ErrorKind::Unavailable`], which
//!   whoever asks may hold and ask again. A read that a break caught is asked once more.
//! * A server that went away may have lost what was written and not flushed, and a write it had received may still come late. So a break
//!   with anything written since the last flush, or under way, poisons the store: it is read, and written no more.
//! * Servers that want aligned requests get them: reads are widened, writes are read, changed and written back, one at a time.

mod address;
mod link;

pub use address::{Address, PORT};
pub use link::list;
pub use nbd::client::{ListedExport, Session};

use crate::abandoned::{Abandoned, Change};
use crate::error::kind_of_errno;
use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use link::{Broken, Link};
use nbd::client::{Answer, Failure};
use nbd::proto::{AllocationState, Command, CommandFlags, MAX_PAYLOAD, NbdError, TransmissionFlags};
use ring::Iov;
use ring::sync::Mutex;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};

/// The longest payload of one request: several share the connection.
const PIECE: u64 = 2 << 20;

/// The longest zeroing of one request: nothing is sent, but a server may take its time.
const ZERO_PIECE: u64 = 1 << 30;

/// Alignments beyond this are no block size.
const MAX_ALIGN: u32 = 64 << 10;

/// Which export, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where the server is.
    pub address: Address,
    /// The export's name; the empty one is the server's first.
    pub export: String,
    /// Nothing is written.
    pub read_only: bool,
}

/// An export.
pub struct NbdStore {
    me: Weak<Self>,
    name: String,
    target: Target,
    size: u64,
    read_only: bool,
    align: u32,
    piece: u64,
    /// The connection, and the right to make a new one.
    link: Mutex<Option<Rc<Link>>>,
    closed: Cell<bool>,
    /// Changes under way.
    changing: Cell<usize>,
    /// Changes that ended and are not durable yet, by number; and up to which of them they are.
    written: Cell<u64>,
    flushed: Cell<u64>,
    poison: RefCell<Option<Error>>,
    /// Whoever reads, changes and writes back holds this.
    unaligned: Mutex<()>,
    abandoned: Rc<Abandoned>,
}

/// Why there is no connection, in the words that scripts look for.
fn unreached(name: &str, target: &Target, error: &io::Error) -> Error {
    let said = error.to_string();
    let said = said.split(" (os error").next().unwrap_or(&said);
    let kind = error.raw_os_error().map_or(ErrorKind::Io, kind_of_errno);
    let why = match error.kind() {
        io::ErrorKind::InvalidData => said.to_owned(),
        _ => format!("Failed to connect to '{}': {said}", target.address),
    };
    Error::new(kind, Operation::Open, name, None, why)
}

impl NbdStore {
    /// Connects. `name` is what messages call it.
    ///
    /// A server whose export is read-only refuses to be opened for writing: [`ErrorKind::ReadOnly`].
    pub async fn open(name: &str, target: Target) -> Result<Rc<Self>> {
        let link =
            Link::open(&target.address, &target.export).await.map_err(|error| unreached(name, &target, &error))?;
        let flags = link.session.transmission_flags();
        let refuse = |kind, why: String| Error::new(kind, Operation::Open, name, None, why);
        if flags.contains(TransmissionFlags::READ_ONLY) && !target.read_only {
            let why = "the server offers it for reading only; open it read-only";
            return Err(refuse(ErrorKind::ReadOnly, why.into()));
        }
        let size = link.session.size;
        if i64::try_from(size).is_err() {
            return Err(refuse(ErrorKind::OutOfRange, format!("the server claims {size} bytes")));
        }
        let (minimum, maximum) =
            link.session.block_size.map_or((1, MAX_PAYLOAD), |sizes| (sizes.minimum.max(1), sizes.maximum));
        if !minimum.is_power_of_two() || minimum > MAX_ALIGN || maximum < minimum {
            let why = format!("the server wants requests of {minimum} to {maximum} bytes, which makes no sense");
            return Err(refuse(ErrorKind::Unsupported, why));
        }
        let piece = PIECE.min(u64::from(maximum) / u64::from(minimum) * u64::from(minimum));
        Ok(Rc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            name: name.to_owned(),
            size,
            read_only: target.read_only,
            align: minimum,
            piece,
            target,
            link: Mutex::new(Some(link)),
            closed: Cell::new(false),
            changing: Cell::new(0),
            written: Cell::new(0),
            flushed: Cell::new(0),
            poison: RefCell::default(),
            unaligned: Mutex::new(()),
            abandoned: Rc::default(),
        }))
    }

    fn error(&self, kind: ErrorKind, operation: Operation, range: Option<HostRange>, why: impl Into<String>) -> Error {
        Error::new(kind, operation, &self.name, range, why)
    }

    /// The server's error.
    fn refused(&self, operation: Operation, range: Option<HostRange>, failure: &Failure) -> Error {
        let kind = match failure.kind() {
            Some(NbdError::Shutdown) => ErrorKind::Unavailable,
            Some(_) => kind_of_errno(failure.error as i32),
            None => ErrorKind::Io,
        };
        let said = failure.kind().map_or("an unknown error", NbdError::message);
        let why = match failure.message.as_str() {
            "" => format!("the server answers: {said}"),
            message => format!("the server answers: {said} ({message})"),
        };
        self.error(kind, operation, range, why)
    }

    /// A connection that works, as far as is known; a new one if need be.
    async fn link(&self, operation: Operation) -> Result<Rc<Link>> {
        if self.closed.get() {
            return Err(self.error(ErrorKind::Io, operation, None, "it was closed"));
        }
        let mut held = self.link.lock().await;
        if let Some(link) = &*held {
            match link.broken() {
                None => return Ok(Rc::clone(link)),
                Some(Broken(why)) => self.lost(&why),
            }
        }
        let unavailable = |why: String| self.error(ErrorKind::Unavailable, operation, None, why);
        let link = Link::open(&self.target.address, &self.target.export)
            .await
            .map_err(|error| unavailable(format!("the server cannot be reached: {error}")))?;
        if link.session.size != self.size {
            let why = format!("the server came back with {} bytes instead of {}", link.session.size, self.size);
            link.close().await;
            return Err(unavailable(why));
        }
        tracing::info!("'{}' is connected again", self.name);
        *held = Some(Rc::clone(&link));
        Ok(link)
    }

    /// Asks, of whatever connection there is; one that turns out to be broken is replaced once.
    async fn ask(
        &self,
        operation: Operation,
        command: Command,
        flags: CommandFlags,
        range: HostRange,
        payload: Iov,
    ) -> Result<Answer> {
        let clean = || self.written.get() == self.flushed.get() && self.changing.get() == 0;
        // What changes nothing, and a flush that has nothing to make durable, may be asked of another connection.
        let mut again = match command {
            Command::Read | Command::BlockStatus => true,
            Command::Flush => clean(),
            _ => false,
        };
        loop {
            let link = self.link(operation).await?;
            let (at, len) = (range.start().get(), range.len() as u32);
            match link.ask(command, flags, at, len, payload.clone()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => return Err(self.refused(operation, Some(range), &failure)),
                Err(Broken(why)) => {
                    self.lost(&why);
                    if !matches!(command, Command::Read | Command::BlockStatus) {
                        // Not even a flush that is asked again may call durable what is lost.
                        self.writable(operation, Some(range))?;
                    }
                    if !std::mem::take(&mut again) {
                        return Err(self.error(ErrorKind::Unavailable, operation, Some(range), why));
                    }
                }
            }
        }
    }

    /// A connection broke: what was written over it may be lost, or still to come.
    fn lost(&self, why: &str) {
        if self.written.get() != self.flushed.get() || self.changing.get() > 0 {
            let what = format!("the connection broke with writes that were not flushed ({why})");
            self.poison(&self.error(ErrorKind::Io, Operation::Flush, None, what));
        }
    }

    fn poison(&self, cause: &Error) {
        let mut poison = self.poison.borrow_mut();
        if poison.is_none() {
            tracing::error!("{cause}; '{}' is not written any more", self.name);
            *poison = Some(cause.clone());
        }
    }

    fn writable(&self, operation: Operation, range: Option<HostRange>) -> Result<()> {
        if self.read_only {
            return Err(self.error(ErrorKind::ReadOnly, operation, range, "it was opened read-only"));
        }
        match &*self.poison.borrow() {
            Some(first) => Err(Error::poisoned(operation, &self.name, range, first)),
            None => Ok(()),
        }
    }

    /// Whether the export offers this.
    async fn offers(&self, operation: Operation, flag: TransmissionFlags) -> Result<bool> {
        Ok(self.link(operation).await?.session.transmission_flags().contains(flag))
    }

    /// `range` in whole blocks, as far as the export goes.
    fn widened(&self, range: HostRange) -> HostRange {
        let align = u64::from(self.align);
        let end = range.end().get().next_multiple_of(align).min(self.size.max(range.end().get()));
        HostRange::between(HostOffset(range.start().get() / align * align), HostOffset(end))
    }

    /// Reads what lies within the export.
    async fn read_inside(&self, range: HostRange, into: &Iov) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let part = rest.first(self.piece - rest.start().get() % u64::from(self.align));
            let wide = self.widened(part);
            let answer = self.ask(Operation::Read, Command::Read, CommandFlags::empty(), wide, Iov::empty()).await?;
            let Answer::Data { bytes, .. } = answer else {
                let why = "the server answered a read with something else";
                return Err(self.error(ErrorKind::Io, Operation::Read, Some(part), why));
            };
            let skip = (part.start().get() - wide.start().get()) as usize;
            let at = (part.start().get() - range.start().get()) as usize;
            into.write(at, &bytes[skip..skip + part.len() as usize]);
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Writes whole blocks.
    async fn write_aligned(&self, at: HostOffset, from: &Iov, flags: CommandFlags) -> Result<()> {
        let mut rest = at.range(from.len() as u64);
        while !rest.is_empty() {
            let part = rest.first(self.piece);
            let start = (part.start().get() - at.get()) as usize;
            let payload = from.slice(start..start + part.len() as usize);
            self.ask(Operation::Write, Command::Write, flags, part, payload).await?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    async fn write_inside(&self, range: HostRange, from: &Iov, flags: CommandFlags) -> Result<()> {
        let wide = self.widened(range);
        if wide == range {
            return self.write_aligned(range.start(), from, flags).await;
        }
        let _alone = self.unaligned.lock().await;
        let (start, end) = (wide.start(), wide.end());
        let whole = Iov::alloc(wide.len() as usize);
        let align = u64::from(self.align);
        let head = HostRange::between(start, HostOffset((start.get() + align).min(end.get())));
        let tail = HostRange::between(HostOffset((end.get() - 1) / align * align).max(start), end);
        for part in [head, tail] {
            let at = (part.start().get() - start.get()) as usize;
            self.read_inside(part, &whole.slice(at..at + part.len() as usize)).await?;
        }
        let at = (range.start().get() - start.get()) as usize;
        whole.slice(at..at + from.len()).copy_from(from);
        self.write_aligned(start, &whole, flags).await
    }

    async fn zero_inside(&self, range: HostRange, mode: ZeroMode) -> Result<()> {
        if !self.offers(Operation::Zero, TransmissionFlags::SEND_WRITE_ZEROES).await? || self.widened(range) != range {
            let mut rest = range;
            while !rest.is_empty() {
                let part = rest.first(self.piece);
                let zeros = Iov::zeroed(part.len() as usize);
                self.write_inside(part, &zeros, CommandFlags::empty()).await?;
                rest = rest.skip(part.len());
            }
            return Ok(());
        }
        let flags = if mode.unmap { CommandFlags::empty() } else { CommandFlags::NO_HOLE };
        let mut rest = range;
        while !rest.is_empty() {
            let part = rest.first(ZERO_PIECE);
            self.ask(Operation::Zero, Command::WriteZeroes, flags, part, Iov::empty()).await?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// A change to `range` that, once begun, runs to its end.
    fn change(
        &self,
        operation: Operation,
        range: HostRange,
        work: impl AsyncFnOnce(&Self) -> Result<()> + 'static,
    ) -> IoFuture<'_, ()> {
        let store = self.me.upgrade().expect("only an Rc of it is ever handed out");
        let work = Box::pin(async move {
            store.writable(operation, Some(range))?;
            if range.end().get() > store.size {
                let why = "it reaches past the end of the export";
                return Err(store.error(ErrorKind::OutOfRange, operation, Some(range), why));
            }
            store.abandoned.clear_of(range).await;
            store.changing.set(store.changing.get() + 1);
            let outcome = if range.is_empty() { Ok(()) } else { work(&store).await };
            store.changing.set(store.changing.get() - 1);
            outcome
        });
        Box::pin(Change::new(&self.abandoned, range, work))
    }

    /// Notes a change that ended.
    fn wrote(&self) {
        self.written.set(self.written.get() + 1);
    }

    async fn flush_now(&self) -> Result<()> {
        let covered = self.written.get();
        // A server that offers no flush is durable at once, or has no notion of it.
        if self.offers(Operation::Flush, TransmissionFlags::SEND_FLUSH).await? {
            let all = HostOffset::ZERO.range(0);
            let flags = CommandFlags::empty();
            if let Err(error) = self.ask(Operation::Flush, Command::Flush, flags, all, Iov::empty()).await {
                if covered > self.flushed.get() {
                    self.poison(&error);
                }
                return Err(error);
            }
        }
        // The connection may have broken, and been replaced, on the way.
        self.writable(Operation::Flush, None)?;
        self.flushed.set(covered.max(self.flushed.get()));
        Ok(())
    }
}

impl Store for NbdStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn protocol(&self) -> &'static str {
        "nbd"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { offset_align: self.align, memory_align: 1, read_only: self.read_only, sparse: false, fixed_size: true }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let inside = self.size.saturating_sub(at.get()).min(into.len() as u64);
            into.slice(inside as usize..into.len()).fill(0);
            let range = at.range(inside);
            self.abandoned.clear_of(range).await;
            self.read_inside(range, &into).await
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        let range = at.range(from.len() as u64);
        self.change(Operation::Write, range, async move |store: &Self| {
            let has_fua = fua && store.offers(Operation::Write, TransmissionFlags::SEND_FUA).await?;
            let flags = if has_fua { CommandFlags::FUA } else { CommandFlags::empty() };
            store.write_inside(range, &from, flags).await?;
            if !has_fua {
                store.wrote();
            }
            if fua && !has_fua { store.flush_now().await } else { Ok(()) }
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            self.writable(Operation::Flush, None)?;
            self.flush_now().await
        })
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        self.change(Operation::Zero, range, async move |store: &Self| {
            store.zero_inside(range, mode).await?;
            store.wrote();
            Ok(())
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.writable(Operation::SetSize, None)?;
            if size == self.size {
                return Ok(());
            }
            let why = "the size of an NBD export cannot be changed from here";
            Err(self.error(ErrorKind::OutOfRange, Operation::SetSize, None, why))
        })
    }

    fn allocate(&self, _: HostRange) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            let inside = self.size.saturating_sub(range.start().get()).min(range.len());
            if inside == 0 {
                return Ok(HostExtent { len: range.len(), backing: Backing::Hole });
            }
            let data = HostExtent { len: inside, backing: Backing::Data };
            if self.link(Operation::Extent).await?.session.allocation.is_none() {
                return Ok(data);
            }
            let wide = self.widened(range.first(inside.min(ZERO_PIECE)));
            let flags = CommandFlags::REQ_ONE;
            let answer = self.ask(Operation::Extent, Command::BlockStatus, flags, wide, Iov::empty()).await?;
            let Answer::Extents(extents) = answer else { return Ok(data) };
            let skip = range.start().get() - wide.start().get();
            let first = extents.first().map(|extent| (u64::from(extent.len).saturating_sub(skip), extent.state));
            Ok(match first {
                Some((len, state)) if len > 0 => {
                    let zero = state.contains(AllocationState::ZERO);
                    let backing = if zero { Backing::Hole } else { Backing::Data };
                    HostExtent { len: len.min(inside), backing }
                }
                _ => data,
            })
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            // Changes that were given up end first.
            self.abandoned.clear_of(HostRange::between(HostOffset::ZERO, HostOffset(u64::MAX))).await;
            self.closed.set(true);
            if let Some(link) = self.link.lock().await.take() {
                link.close().await;
            }
            Ok(())
        })
    }
}
