//! The back end without io_uring: files on helper threads, streams by readiness.
//!
//! The shard's thread sleeps in `epoll_wait`. Operations that may wait forever are tried without blocking when their
//! turn comes, and again whenever epoll says that the descriptor is ready; they never occupy a helper thread. Operations
//! on files go to the helpers, whose answers come through the inbox.
//!
//! **Invariants.** A slot that waits for readiness is listed in exactly one place: `fresh`, or its descriptor's watch.
//! epoll knows a descriptor exactly as long as it has a watch, and a watch's slots keep the descriptor open.

use super::uring::poll_mask;
use super::workers::{Call, Job, Workers, answer};
use super::{Finished, Kind, Op, Slots, Wait, Work};
use crate::file::{Events, File};
use crate::inbox::Inbox;
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Events taken from the kernel at once.
const EVENTS: usize = 256;

/// What a pipe that is ready to be written takes without blocking (`PIPE_BUF`).
const PIPE_ATOMIC: usize = 4096;

pub(crate) struct Threads {
    inner: RefCell<Inner>,
    files: RefCell<Option<Workers>>,
    /// Apart from `files`: a long `ioctl` must not hold up I/O.
    helpers: RefCell<Option<Workers>>,
    inbox: Arc<Inbox>,
}

struct Inner {
    epoll: OwnedFd,
    slots: Slots,
    /// Not tried yet.
    fresh: VecDeque<u32>,
    watches: HashMap<RawFd, Watch>,
    finished: Vec<Finished>,
    events: Vec<libc::epoll_event>,
}

/// Who waits for a descriptor.
#[derive(Default)]
struct Watch {
    readers: Vec<u32>,
    writers: Vec<u32>,
    /// What epoll was told; 0: nothing yet.
    told: u32,
}

impl Watch {
    fn wanted(&self) -> u32 {
        let readable = if self.readers.is_empty() { 0 } else { libc::EPOLLIN as u32 };
        let writable = if self.writers.is_empty() { 0 } else { libc::EPOLLOUT as u32 };
        readable | writable
    }
}

/// What became of a try.
enum Tried {
    Done(i32),
    NotReady,
    /// It can only be done by blocking (a regular file used as a stream).
    Blocks,
}

impl Threads {
    pub(crate) fn new(inbox: &Arc<Inbox>) -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        if let Some(bell) = inbox.wake_fd() {
            control(&epoll, libc::EPOLL_CTL_ADD, bell, libc::EPOLLIN as u32)?;
        }
        let inner = Inner {
            epoll,
            slots: Slots::default(),
            fresh: VecDeque::new(),
            watches: HashMap::new(),
            finished: Vec::new(),
            events: Vec::with_capacity(EVENTS),
        };
        Ok(Self {
            inner: RefCell::new(inner),
            files: RefCell::new(None),
            helpers: RefCell::new(None),
            inbox: Arc::clone(inbox),
        })
    }

    pub(super) fn with_slots<R>(&self, look: impl FnOnce(&mut Slots) -> R) -> R {
        look(&mut self.inner.borrow_mut().slots)
    }

    pub(super) fn start(&self, op: Op) -> u32 {
        let mut inner = self.inner.borrow_mut();
        let waits = op.kind.waits();
        let slot = inner.slots.insert(op);
        if waits {
            inner.fresh.push_back(slot);
        } else {
            self.hand_over(&mut inner.slots, slot);
        }
        slot
    }

    /// Gives an operation to the helper threads.
    fn hand_over(&self, slots: &mut Slots, number: u32) {
        let slot = slots.get(number);
        let Some(op) = &slot.op else { return };
        let (fd, kind) = (op.file.raw_fd(), op.kind);
        let memory = slot.memory();
        let call = Call { inbox: Arc::clone(&self.inbox), slot: number, fd, kind, memory };
        self.files.borrow_mut().get_or_insert_with(|| Workers::new("ring-file")).submit(Job::Call(call));
    }

    /// Ends an operation that waits for readiness; one on a file goes on.
    pub(super) fn cancel(&self, slot: u32) {
        let mut inner = self.inner.borrow_mut();
        let finished = inner.forget(slot).then(|| inner.slots.complete(slot, -libc::ECANCELED));
        drop(inner);
        if let Some(finished) = finished {
            finished.settle();
        }
    }

    pub(super) fn blocking(&self, work: Work) {
        self.helpers.borrow_mut().get_or_insert_with(|| Workers::new("ring-helper")).submit(Job::Run(work));
    }

    pub(super) fn turn(&self, wait: Wait) {
        let mut finished = {
            let inner = &mut *self.inner.borrow_mut();
            for _ in 0..inner.fresh.len() {
                let Some(slot) = inner.fresh.pop_front() else { break };
                self.attempt(inner, slot);
            }
            let wait = if inner.finished.is_empty() { wait } else { Wait::No };
            self.look_at_events(inner, wait);
            mem::take(&mut inner.finished)
        };
        finished.drain(..).for_each(Finished::settle);
        // The allocation is used again, unless a waker's or a drop's doings have put something in already.
        let inner = &mut *self.inner.borrow_mut();
        if inner.finished.is_empty() {
            inner.finished = finished;
        }
    }

    pub(super) fn finish(&self) {
        drop(self.files.take());
        drop(self.helpers.take());
    }

    fn look_at_events(&self, inner: &mut Inner, wait: Wait) {
        // Without anybody to wait for, a look costs nothing but time.
        if wait == Wait::No && inner.watches.is_empty() {
            return;
        }
        inner.wait(wait);
        let events = mem::take(&mut inner.events);
        for event in &events {
            let fd = event.u64 as RawFd;
            if Some(fd) == self.inbox.wake_fd() {
                let mut count = [0_u8; 8];
                // SAFETY: `count` is 8 writable bytes; the inbox keeps the descriptor open. It is readable, and nobody
                // else reads it, so this does not block.
                unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
                continue;
            }
            let Some(watch) = inner.watches.get_mut(&fd) else { continue };
            let told = event.events;
            let broken = told & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0;
            let mut again = Vec::new();
            if broken || told & libc::EPOLLIN as u32 != 0 {
                again.append(&mut watch.readers);
            }
            if broken || told & libc::EPOLLOUT as u32 != 0 {
                again.append(&mut watch.writers);
            }
            for slot in again {
                self.attempt(inner, slot);
            }
            inner.tell(fd);
        }
        inner.events = events;
    }

    /// Tries an operation; lists it with its descriptor's watch if it must wait.
    fn attempt(&self, inner: &mut Inner, slot: u32) {
        let Some(op) = &inner.slots.get(slot).op else { return };
        let (kind, fd) = (op.kind, op.file.raw_fd());
        match attempt(&mut inner.slots, slot, kind) {
            Tried::Done(result) => {
                let finished = inner.slots.complete(slot, result);
                inner.finished.push(finished);
            }
            Tried::Blocks => self.hand_over(&mut inner.slots, slot),
            Tried::NotReady => {
                let watch = inner.watches.entry(fd).or_default();
                if reads(kind) {
                    watch.readers.push(slot);
                } else {
                    watch.writers.push(slot);
                }
                inner.tell(fd);
            }
        }
    }
}

impl Inner {
    /// Tells epoll what a descriptor is watched for now.
    fn tell(&mut self, fd: RawFd) {
        let Some(watch) = self.watches.get_mut(&fd) else { return };
        let wanted = watch.wanted();
        if wanted == watch.told {
            return;
        }
        let how = match (watch.told, wanted) {
            (0, _) => libc::EPOLL_CTL_ADD,
            (_, 0) => libc::EPOLL_CTL_DEL,
            _ => libc::EPOLL_CTL_MOD,
        };
        let told = control(&self.epoll, how, fd, wanted);
        watch.told = wanted;
        if wanted == 0 {
            self.watches.remove(&fd);
        } else if let Err(error) = told {
            // Nobody would ever wake them.
            let Some(watch) = self.watches.remove(&fd) else { return };
            let result = -error.raw_os_error().unwrap_or(libc::EIO);
            for slot in watch.readers.into_iter().chain(watch.writers) {
                let finished = self.slots.complete(slot, result);
                self.finished.push(finished);
            }
        }
    }

    /// Takes a slot off the list it is on, if it waits for readiness.
    fn forget(&mut self, slot: u32) -> bool {
        let fresh = self.fresh.len();
        self.fresh.retain(|one| *one != slot);
        if self.fresh.len() != fresh {
            return true;
        }
        let Some(op) = &self.slots.get(slot).op else { return false };
        let fd = op.file.raw_fd();
        let Some(watch) = self.watches.get_mut(&fd) else { return false };
        let waited = watch.readers.len() + watch.writers.len();
        watch.readers.retain(|one| *one != slot);
        watch.writers.retain(|one| *one != slot);
        let found = watch.readers.len() + watch.writers.len() != waited;
        self.tell(fd);
        found
    }

    /// Waits for events and leaves them in `events`.
    fn wait(&mut self, wait: Wait) {
        let timeout = match wait {
            Wait::No => 0,
            Wait::Forever => -1,
            // Rounded up, so that a timer is due when this returns.
            Wait::AtMost(span) => {
                let span = span.saturating_add(Duration::from_nanos(999_999)).as_millis();
                libc::c_int::try_from(span).unwrap_or(libc::c_int::MAX)
            }
        };
        self.events.clear();
        // SAFETY: there is room for `EVENTS` events behind the pointer; the descriptor is open.
        let count = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), EVENTS as libc::c_int, timeout)
        };
        // An error is a signal: the caller looks around anyway.
        // SAFETY: the kernel has written `count` events, which is at most `EVENTS`, the capacity.
        unsafe { self.events.set_len(usize::try_from(count).unwrap_or(0)) };
    }
}

fn control(epoll: &OwnedFd, how: libc::c_int, fd: RawFd, events: u32) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: fd as u64 };
    // SAFETY: `event` is a valid event; the descriptors are open (a closed one is an error, no more).
    if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), how, fd, &raw mut event) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn reads(kind: Kind) -> bool {
    matches!(kind, Kind::Recv { .. } | Kind::Accept | Kind::Poll { events: Events::Readable })
}

/// Tries the operation in a slot without blocking.
fn attempt(slots: &mut Slots, number: u32, kind: Kind) -> Tried {
    loop {
        let result = attempt_once(slots, number, kind);
        match result {
            Tried::Done(error) if error == -libc::EINTR => {}
            Tried::Done(error) if error == -libc::EAGAIN => return Tried::NotReady,
            _ => return result,
        }
    }
}

fn attempt_once(slots: &mut Slots, number: u32, kind: Kind) -> Tried {
    let slot = slots.get(number);
    let Some(op) = &slot.op else { return Tried::Done(-libc::EINVAL) };
    let fd = op.file.raw_fd();
    match kind {
        Kind::Poll { events } => match ready(fd, events) {
            0 => Tried::NotReady,
            result => Tried::Done(result),
        },
        Kind::Accept => accept(&op.file),
        Kind::Recv { socket: true } => {
            let message = slot.message();
            // SAFETY: the header and all it points to belong to the slot; the descriptor is open.
            Tried::Done(answer(unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT) }))
        }
        Kind::Send { socket: true } => {
            let message = slot.message();
            // SAFETY: as above.
            Tried::Done(answer(unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }))
        }
        Kind::Recv { socket: false } => match ready(fd, Events::Readable) {
            0 => Tried::NotReady,
            _ if file_type(fd) == libc::S_IFREG => Tried::Blocks,
            _ => {
                let (list, count) = slot.list(usize::MAX);
                // SAFETY: the list and all it describes belong to the slot; the descriptor is open.
                Tried::Done(answer(unsafe { libc::readv(fd, list, count) }))
            }
        },
        Kind::Send { socket: false } => match ready(fd, Events::Writable) {
            0 => Tried::NotReady,
            _ if file_type(fd) == libc::S_IFREG => Tried::Blocks,
            _ => {
                // A pipe takes a part; a device (`/dev/fuse`) wants its message whole.
                let most = if file_type(fd) == libc::S_IFIFO { PIPE_ATOMIC } else { usize::MAX };
                let (list, count) = slot.list(most);
                // SAFETY: as above.
                Tried::Done(answer(unsafe { libc::writev(fd, list, count) }))
            }
        },
        _ => Tried::Blocks,
    }
}

/// What `poll` says right now: the events that are there, 0 for none, or a negative error number.
fn ready(fd: RawFd, events: Events) -> i32 {
    let mut ask = libc::pollfd { fd, events: poll_mask(events), revents: 0 };
    // SAFETY: `ask` is one valid entry.
    match answer(unsafe { libc::poll(&raw mut ask, 1, 0) } as isize) {
        count if count > 0 => i32::from(ask.revents),
        result => result,
    }
}

/// Takes a connection. The listening socket is made non-blocking: a connection that epoll has reported may be gone.
fn accept(file: &File) -> Tried {
    if let Err(error) = file.make_nonblocking() {
        return Tried::Done(-error.raw_os_error().unwrap_or(libc::EIO));
    }
    // SAFETY: no address is asked for, so no pointers are passed; the descriptor is open.
    let result =
        unsafe { libc::accept4(file.raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
    Tried::Done(answer(result as isize))
}

/// The kind of file behind a descriptor (0 when nobody knows).
fn file_type(fd: RawFd) -> libc::mode_t {
    // SAFETY: a `stat` is plain data, for which zeros are valid.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    // SAFETY: `stat` is writable and of the right type.
    let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
    if known { stat.st_mode & libc::S_IFMT } else { 0 }
}
