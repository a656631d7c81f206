//! The reactor: carries operations out and says when they have ended.
//!
//! **Invariant.** From the moment an operation is started until its back end has answered, its slot owns everything the
//! kernel may touch: the descriptor, the memory, the list of segments. Futures only point at slots; a future that is
//! dropped leaves the slot behind.

mod spin;
mod threads;
mod uring;
mod workers;

use crate::executor::Backend;
use crate::file::{Events, File};
use crate::inbox::Inbox;
use crate::iov::Iov;
use crate::lookout::Lookouts;
use crate::runtime::{self, Core, Driver};
use std::future::Future;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use threads::Threads;
use uring::Uring;

/// Segments the kernel takes at once (`IOV_MAX`). An operation on more does less than asked.
const SEGMENTS_MAX: usize = 1024;

/// Bytes the kernel moves at once (`MAX_RW_COUNT`).
const BYTES_MAX: usize = 0x7fff_f000;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Read at an offset.
    Read { at: u64 },
    /// Write at an offset.
    Write { at: u64, dsync: bool },
    /// `fdatasync` or `fsync`.
    Sync { data_only: bool },
    /// `fallocate` with the kernel's flags.
    Allocate { mode: i32, at: u64, len: u64 },
    /// `ftruncate`.
    SetLen { len: u64 },
    /// Wait until ready.
    Poll { events: Events },
    /// Read from a stream; `socket` tells sockets from everything else.
    Recv { socket: bool },
    /// Write to a stream.
    Send { socket: bool },
    /// Take a connection; the result is a descriptor.
    Accept,
}

impl Kind {
    /// Whether it may wait forever for somebody else.
    fn waits(self) -> bool {
        matches!(self, Self::Poll { .. } | Self::Recv { .. } | Self::Send { .. } | Self::Accept)
    }
}

/// An operation and all it touches.
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) kind: Kind,
    pub(crate) file: File,
    pub(crate) iov: Iov,
}

/// How long a visit to the reactor may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    AtMost(Duration),
    Forever,
}

/// What an ended operation leaves to be dropped and woken outside of any borrow.
struct Finished {
    op: Option<Op>,
    waker: Option<Waker>,
    /// A connection that nobody waits for any more.
    stray: Option<OwnedFd>,
}

impl Finished {
    fn settle(self) {
        if let Some(waker) = self.waker {
            waker.wake();
        }
        drop((self.op, self.stray));
    }
}

enum State {
    Free,
    /// In flight; somebody may wait.
    Waiting(Option<Waker>),
    /// In flight; nobody waits any more.
    Abandoned,
    /// Ended with this result (negative: an error number).
    Done(i32),
}

/// One operation in flight.
struct Slot {
    state: State,
    kind: Kind,
    /// Present while it is in flight.
    op: Option<Op>,
    /// The segments as the kernel reads them. On the heap, where it stays while the operation is in flight.
    segments: Vec<libc::iovec>,
    message: libc::msghdr,
}

/// Where the kernel finds the memory of an operation.
#[derive(Clone, Copy)]
enum Memory {
    One(*mut u8, usize),
    List(*const libc::iovec, usize),
}

impl Slot {
    fn new() -> Box<Self> {
        // SAFETY: a message header is plain data, for which zeros are valid.
        let message = unsafe { std::mem::zeroed() };
        let kind = Kind::Sync { data_only: false };
        Box::new(Self { state: State::Free, kind, op: None, segments: Vec::new(), message })
    }

    /// The memory of the operation, which stays valid while the slot is in flight.
    fn memory(&mut self) -> Memory {
        let Some(op) = &self.op else { return Memory::List(std::ptr::null(), 0) };
        if let Some((start, len)) = op.iov.single() {
            return Memory::One(start, len.min(BYTES_MAX));
        }
        op.iov.describe(&mut self.segments, SEGMENTS_MAX);
        Memory::List(self.segments.as_ptr(), self.segments.len())
    }

    /// The segments, cut off after `most` bytes.
    fn list(&mut self, most: usize) -> (*const libc::iovec, libc::c_int) {
        if let Some(op) = &self.op {
            op.iov.describe(&mut self.segments, SEGMENTS_MAX);
        }
        let mut left = most;
        for segment in &mut self.segments {
            segment.iov_len = segment.iov_len.min(left);
            left -= segment.iov_len;
        }
        (self.segments.as_ptr(), self.segments.len() as libc::c_int)
    }

    /// The header for `sendmsg` and `recvmsg` over the operation's segments.
    fn message(&mut self) -> *mut libc::msghdr {
        if let Some(op) = &self.op {
            op.iov.describe(&mut self.segments, SEGMENTS_MAX);
        }
        self.message.msg_iov = self.segments.as_mut_ptr();
        // The field's type differs between C libraries.
        self.message.msg_iovlen = self.segments.len() as _;
        &raw mut self.message
    }
}

/// The slots of a reactor. A slot's address never changes; its number is used again once its future has the result (or
/// is gone) and the back end has answered.
#[derive(Default)]
struct Slots {
    // Boxed, since the kernel holds pointers into slots while the list grows.
    #[expect(clippy::vec_box, reason = "addresses must not change")]
    all: Vec<Box<Slot>>,
    free: Vec<u32>,
    in_flight: usize,
}

impl Slots {
    fn insert(&mut self, op: Op) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.all.push(Slot::new());
            (self.all.len() - 1) as u32
        });
        self.in_flight += 1;
        let place = self.get(slot);
        place.state = State::Waiting(None);
        place.kind = op.kind;
        place.op = Some(op);
        slot
    }

    fn get(&mut self, slot: u32) -> &mut Slot {
        &mut self.all[slot as usize]
    }

    /// The back end has answered.
    fn complete(&mut self, slot: u32, result: i32) -> Finished {
        self.in_flight -= 1;
        let place = &mut self.all[slot as usize];
        let op = place.op.take();
        match std::mem::replace(&mut place.state, State::Done(result)) {
            State::Waiting(waker) => Finished { op, waker, stray: None },
            _ => {
                let stray = stray(place.kind, result);
                place.state = State::Free;
                self.free.push(slot);
                Finished { op, waker: None, stray }
            }
        }
    }

    /// The result, if it is there; the slot is then free. Else leaves `cx`'s waker and hands back the one before.
    fn poll(&mut self, slot: u32, cx: &Context<'_>) -> Result<i32, Option<Waker>> {
        match &mut self.all[slot as usize].state {
            State::Done(result) => {
                let result = *result;
                self.release(slot);
                Ok(result)
            }
            State::Waiting(Some(waker)) if waker.will_wake(cx.waker()) => Err(None),
            State::Waiting(waker) => Err(waker.replace(cx.waker().clone())),
            State::Free | State::Abandoned => unreachable!("a future points at its own slot until it is done"),
        }
    }

    fn release(&mut self, slot: u32) {
        self.all[slot as usize].state = State::Free;
        self.free.push(slot);
    }

    /// The future is gone.
    fn abandon(&mut self, slot: u32) -> Abandoned {
        let place = &mut self.all[slot as usize];
        let kind = place.kind;
        match std::mem::replace(&mut place.state, State::Abandoned) {
            State::Waiting(waker) => Abandoned { waker, waits: kind.waits(), stray: None },
            State::Done(result) => {
                self.release(slot);
                Abandoned { waker: None, waits: false, stray: stray(kind, result) }
            }
            State::Free | State::Abandoned => unreachable!("a future points at its own slot until it is done"),
        }
    }

    /// The numbers of those in flight that may wait forever.
    fn waiting(&self) -> Vec<u32> {
        self.all
            .iter()
            .enumerate()
            .filter(|(_, slot)| matches!(slot.state, State::Waiting(_) | State::Abandoned) && slot.kind.waits())
            .map(|(at, _)| at as u32)
            .collect()
    }
}

struct Abandoned {
    /// To be dropped outside of any borrow.
    waker: Option<Waker>,
    /// In flight, maybe forever: the back end should be asked to let go.
    waits: bool,
    /// The connection that nobody took.
    stray: Option<OwnedFd>,
}

/// The descriptor that `result` is, if it is one.
fn stray(kind: Kind, result: i32) -> Option<OwnedFd> {
    (kind == Kind::Accept && result >= 0).then(|| {
        // SAFETY: `accept` has made this descriptor, and nobody else has taken its result.
        unsafe { OwnedFd::from_raw_fd(result) }
    })
}

/// A job for a helper thread.
pub(crate) type Work = Box<dyn FnOnce() + Send>;

/// One of the back ends.
pub(crate) enum Reactor {
    Uring(Box<Uring>),
    Threads(Box<Threads>),
}

impl Reactor {
    /// Makes the back end that was asked for; `Auto` falls back to threads where io_uring is refused.
    pub(crate) fn new(backend: Backend, entries: u32, inbox: &Arc<Inbox>) -> io::Result<Self> {
        if backend != Backend::Threads {
            match Uring::new(entries, inbox) {
                Ok(uring) => return Ok(Self::Uring(Box::new(uring))),
                Err(error) if backend == Backend::Auto && is_refusal(&error) => {
                    tracing::info!(%error, "io_uring is refused here: operations run on a thread pool");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self::Threads(Box::new(Threads::new(inbox)?)))
    }

    pub(crate) fn backend(&self) -> Backend {
        match self {
            Self::Uring(_) => Backend::Uring,
            Self::Threads(_) => Backend::Threads,
        }
    }

    /// Carries out what was started, takes in what has ended, and sleeps as long as `wait` allows if nothing has, nor any of
    /// `lookouts` has news.
    pub(crate) fn turn(&self, wait: Wait, lookouts: &Lookouts) {
        match self {
            Self::Uring(uring) => uring.turn(wait, lookouts),
            Self::Threads(threads) => threads.turn(if wait != Wait::No && lookouts.rest() { Wait::No } else { wait }),
        }
    }

    /// Takes in results that helper threads have left in the inbox.
    pub(crate) fn complete(&self, completions: &mut Vec<(u32, i32)>) {
        for (slot, result) in completions.drain(..) {
            self.with_slots(|slots| slots.complete(slot, result)).settle();
        }
    }

    /// Runs a blocking closure on a helper thread.
    pub(crate) fn blocking(&self, work: Work) {
        match self {
            Self::Uring(uring) => uring.blocking(work),
            Self::Threads(threads) => threads.blocking(work),
        }
    }

    /// Registers a descriptor; the number of the ring and the descriptor's in its table, if there is room.
    pub(crate) fn register(&self, file: &File) -> Option<(u64, u32)> {
        match self {
            Self::Uring(uring) => uring.register(file),
            Self::Threads(_) => None,
        }
    }

    /// Gives a number back. The descriptor must still be open.
    pub(crate) fn unregister(&self, index: u32) {
        if let Self::Uring(uring) = self {
            uring.unregister(index);
        }
    }

    /// Operations whose back end has not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.with_slots(|slots| slots.in_flight)
    }

    /// Asks every operation that may wait forever to end.
    pub(crate) fn cancel_waiting(&self) {
        for slot in self.with_slots(|slots| slots.waiting()) {
            self.cancel(slot);
        }
    }

    /// Ends what the reactor has running of its own. Called once, with nothing in flight.
    pub(crate) fn finish(&self) {
        match self {
            Self::Uring(uring) => uring.finish(),
            Self::Threads(threads) => threads.finish(),
        }
    }

    fn start(&self, op: Op) -> u32 {
        match self {
            Self::Uring(uring) => uring.start(op),
            Self::Threads(threads) => threads.start(op),
        }
    }

    fn cancel(&self, slot: u32) {
        match self {
            Self::Uring(uring) => uring.cancel(slot),
            Self::Threads(threads) => threads.cancel(slot),
        }
    }

    fn with_slots<R>(&self, look: impl FnOnce(&mut Slots) -> R) -> R {
        match self {
            Self::Uring(uring) => uring.with_slots(look),
            Self::Threads(threads) => threads.with_slots(look),
        }
    }
}

/// Whether the kernel (or whoever confines us) says "no io_uring here", rather than "something is wrong".
fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || matches!(
            error.raw_os_error(),
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::ENOMEM | libc::EINVAL | libc::EOPNOTSUPP)
        )
}

/// An operation in flight: gives the kernel's result (negative: an error number).
pub(crate) struct InFlight {
    core: Rc<Core>,
    slot: Option<u32>,
}

impl InFlight {
    /// Starts `op` on the running ring.
    pub(crate) fn start(op: Op) -> io::Result<Self> {
        let core = runtime::current();
        let Driver::Real(reactor) = &core.driver else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a simulation has no files"));
        };
        let slot = reactor.start(op);
        Ok(Self { core, slot: Some(slot) })
    }

    fn reactor(&self) -> &Reactor {
        match &self.core.driver {
            Driver::Real(reactor) => reactor,
            Driver::Sim(_) => unreachable!("`start` has refused"),
        }
    }
}

impl Future for InFlight {
    type Output = i32;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let slot = self.slot.expect("not polled after its result");
        match self.reactor().with_slots(|slots| slots.poll(slot, cx)) {
            Ok(result) => {
                self.slot = None;
                Poll::Ready(result)
            }
            Err(old) => {
                drop(old);
                Poll::Pending
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let left = self.reactor().with_slots(|slots| slots.abandon(slot));
        if left.waits {
            self.reactor().cancel(slot);
        }
        drop((left.waker, left.stray));
    }
}
