//! The io_uring back end.
//!
//! Operations only fill the submission queue; they are handed over [`SUBMIT_AT`] at a time, and the rest by the one
//! `io_uring_enter` a turn that brings completions in. What does not fit into the queue stands in `backlog`, in order.
//!
//! **Invariants.** An entry's user data is the number of the slot that owns what the entry points to, and there is
//! exactly one completion for it. Numbers from [`RESERVED`] up are the ring's own. If the ring ever goes while the
//! kernel has not answered, the slots are leaked, not freed.

use super::spin::Spin;
use super::workers::{Call, Job, Workers};
use super::{Events, Finished, Kind, Memory, Op, SEGMENTS_MAX, Slot, Slots, Wait, Work};
use crate::file::File;
use crate::inbox::Inbox;
use crate::lookout::Lookouts;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, Probe, opcode, types};
use std::cell::{RefCell, UnsafeCell};
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// User data from here on belongs to no slot.
const RESERVED: u64 = 1 << 32;
/// The standing read of the inbox's eventfd.
const BELL: u64 = RESERVED;
/// A request to cancel, whose own answer says nothing.
const CANCEL: u64 = RESERVED + 1;

/// Operations that are handed over together while a turn still makes more. A disk that gets a whole turn's requests at
/// once ends them all at once, and stands idle while their answers are worked off; a few at a time keep both at work.
const SUBMIT_AT: usize = 4;

/// Descriptors that can be registered: some images and sockets a shard; more work unregistered.
const TABLE: u32 = 1024;

/// The offset that means "no position": streams have none.
const NO_POSITION: u64 = u64::MAX;

/// The longest sleep without a look around.
const SLEEP_MAX: Duration = Duration::from_hours(1);

pub(crate) struct Uring {
    /// Tells this ring from every other one that a descriptor may be registered with.
    id: u64,
    inner: RefCell<Inner>,
    workers: RefCell<Option<Workers>>,
    inbox: Arc<Inbox>,
}

struct Inner {
    ring: IoUring,
    slots: Slots,
    backlog: VecDeque<Entry>,
    finished: Vec<Finished>,
    bell: Box<UnsafeCell<u64>>,
    bell_armed: bool,
    has_ftruncate: bool,
    table: Table,
    spin: Spin,
}

/// The kernel's table of registered descriptors.
enum Table {
    Unasked,
    Refused,
    /// Numbers not in use.
    Free(Vec<u32>),
}

impl Uring {
    pub(crate) fn new(entries: u32, inbox: &Arc<Inbox>) -> io::Result<Self> {
        let ring = build(entries)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(unsupported("this kernel's io_uring lacks timed waits (it came with Linux 5.11)"));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::Recv::CODE,
            opcode::RecvMsg::CODE,
            opcode::Send::CODE,
            opcode::SendMsg::CODE,
            opcode::Accept::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(unsupported("this kernel's io_uring lacks operations that are needed"));
        }
        let inner = Inner {
            ring,
            slots: Slots::default(),
            backlog: VecDeque::new(),
            finished: Vec::new(),
            bell: Box::new(UnsafeCell::new(0)),
            bell_armed: false,
            has_ftruncate: probe.is_supported(opcode::Ftruncate::CODE),
            table: Table::Unasked,
            spin: Spin::new(),
        };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, inner: RefCell::new(inner), workers: RefCell::new(None), inbox: Arc::clone(inbox) })
    }

    pub(super) fn with_slots<R>(&self, look: impl FnOnce(&mut Slots) -> R) -> R {
        look(&mut self.inner.borrow_mut().slots)
    }

    pub(super) fn start(&self, op: Op) -> u32 {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let fd = op.file.raw_fd();
        let registered = op.file.registered_index(self.id);
        let kind = op.kind;
        let number = inner.slots.insert(op);
        let slot = inner.slots.get(number);
        if matches!(kind, Kind::SetLen { .. }) && !inner.has_ftruncate {
            let memory = slot.memory();
            let call = Call { inbox: Arc::clone(&self.inbox), slot: number, fd, kind, memory };
            self.submit(Job::Call(call));
            return number;
        }
        let entry = match registered {
            Some(index) => describe(slot, kind, index as RawFd).flags(Flags::FIXED_FILE),
            None => describe(slot, kind, fd),
        };
        inner.push(entry.user_data(u64::from(number)));
        number
    }

    /// Asks the kernel to end an operation early. Its completion comes either way.
    pub(super) fn cancel(&self, slot: u32) {
        let entry = opcode::AsyncCancel::new(u64::from(slot)).build().user_data(CANCEL);
        self.inner.borrow_mut().push(entry);
    }

    pub(super) fn blocking(&self, work: Work) {
        self.submit(Job::Run(work));
    }

    fn submit(&self, job: Job) {
        self.workers.borrow_mut().get_or_insert_with(|| Workers::new("ring-helper")).submit(job);
    }

    pub(super) fn turn(&self, wait: Wait, lookouts: &Lookouts) {
        let mut inner = self.inner.borrow_mut();
        if !inner.bell_armed {
            inner.arm_bell(&self.inbox);
        }
        inner.wait(wait, lookouts);
        inner.reap();
        let mut finished = mem::take(&mut inner.finished);
        drop(inner);
        // This calls out: into wakers, and into whatever the memory's and the descriptors' owners do when they go.
        finished.drain(..).for_each(Finished::settle);
        // The allocation is used again.
        self.inner.borrow_mut().finished = finished;
    }

    /// Puts a descriptor into the kernel's table: this ring's number and the descriptor's.
    pub(super) fn register(&self, file: &File) -> Option<(u64, u32)> {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        if matches!(inner.table, Table::Unasked) {
            inner.table = match inner.ring.submitter().register_files_sparse(TABLE) {
                Ok(()) => Table::Free((0..TABLE).rev().collect()),
                Err(error) => {
                    tracing::debug!(%error, "no table of registered descriptors");
                    Table::Refused
                }
            };
        }
        let Table::Free(free) = &mut inner.table else { return None };
        let index = free.pop()?;
        match inner.ring.submitter().register_files_update(index, &[file.raw_fd()]) {
            Ok(_) => Some((self.id, index)),
            Err(error) => {
                tracing::debug!(%error, "a descriptor could not be registered");
                free.push(index);
                None
            }
        }
    }

    pub(super) fn unregister(&self, index: u32) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let cleared = inner.ring.submitter().register_files_update(index, &[-1]);
        match (&mut inner.table, cleared) {
            (Table::Free(free), Ok(_)) => free.push(index),
            // The entry stays taken, and the kernel keeps the file open until the ring goes.
            (_, Err(error)) => tracing::warn!(%error, "a descriptor could not be unregistered"),
            _ => {}
        }
    }

    /// Ends the standing read and the helper threads.
    pub(super) fn finish(&self) {
        drop(self.workers.take());
        while self.inner.borrow().bell_armed {
            self.inbox.ring_the_bell();
            let mut inner = self.inner.borrow_mut();
            inner.enter(Wait::Forever);
            inner.reap();
        }
    }
}

impl Inner {
    fn push(&mut self, entry: Entry) {
        // SAFETY: what the entry points to belongs to the slot it names (or to the ring itself), which lives until the
        // entry's completion.
        if !self.backlog.is_empty() || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
        if self.ring.submission().len() >= SUBMIT_AT {
            self.enter(Wait::No);
        }
    }

    /// Moves as much of the backlog as fits into the submission queue.
    fn refill(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    fn arm_bell(&mut self, inbox: &Inbox) {
        let Some(fd) = inbox.wake_fd() else { return };
        let entry = opcode::Read::new(types::Fd(fd), self.bell.get().cast(), 8).build().user_data(BELL);
        self.push(entry);
        self.bell_armed = true;
    }

    /// Hands over what waits to be submitted and waits for news: with a look first, where news is expected soon.
    fn wait(&mut self, wait: Wait, lookouts: &Lookouts) {
        if wait == Wait::No || self.slots.in_flight == 0 && lookouts.is_empty() {
            return self.enter(wait);
        }
        let start = Instant::now();
        let patience = match wait {
            Wait::AtMost(span) => self.spin.patience().min(span),
            _ => self.spin.patience(),
        };
        if !patience.is_zero() {
            self.enter(Wait::No);
            while !self.has_news() && !lookouts.have_news() {
                if start.elapsed() >= patience {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        // With news at hand this only collects it.
        let wait = if self.has_news() || lookouts.rest() { Wait::No } else { wait };
        self.enter(wait);
        self.spin.waited(start.elapsed());
    }

    /// Whether completions stand in the queue, or the kernel has some to put there.
    fn has_news(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// Hands over what waits to be submitted and waits for completions as told.
    fn enter(&mut self, wait: Wait) {
        loop {
            self.refill();
            let more = !self.backlog.is_empty();
            let ready = !self.ring.completion().is_empty();
            // With a full queue behind this one, or completions at hand, there is no reason to sleep.
            let wait = if more || ready { Wait::No } else { wait };
            let queue = self.ring.submission();
            let needed = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
            drop(queue);
            let entered = match wait {
                Wait::No if !needed => return,
                Wait::No => self.ring.submit(),
                Wait::Forever => self.ring.submit_and_wait(1),
                Wait::AtMost(span) => {
                    let span = types::Timespec::from(span.min(SLEEP_MAX));
                    self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&span))
                }
            };
            match entered {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    // A signal, or the time is over: the caller looks around anyway.
                    Some(libc::EINTR | libc::ETIME) => return,
                    // The kernel is short of something that completions give back.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {
                        if self.ring.completion().is_empty() {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        return;
                    }
                    // Nothing but a mistake of ours is left (a bad descriptor, a bad argument).
                    _ => panic!("io_uring_enter: {error}"),
                },
            }
            if !more {
                return;
            }
        }
    }

    /// Takes in every completion there is.
    fn reap(&mut self) {
        for entry in self.ring.completion() {
            match entry.user_data() {
                BELL => self.bell_armed = false,
                CANCEL => {}
                slot => self.finished.push(self.slots.complete(slot as u32, entry.result())),
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.slots.in_flight > 0 || self.bell_armed {
            // Only after a panic in the middle of shutting down. The kernel may still write to what they own.
            mem::forget(mem::take(&mut self.slots));
            mem::forget(mem::take(&mut self.bell));
        }
    }
}

/// Asks for the best set-up the kernel knows, then for less.
fn build(entries: u32) -> io::Result<IoUring> {
    let entries = entries.clamp(8, 4096).next_power_of_two();
    // Operations in flight are not bounded by the submission queue; what the completion queue cannot hold the kernel
    // keeps aside, at a cost.
    let completions = entries * 4;
    let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    let best = IoUring::builder()
        .setup_cqsize(completions)
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match best {
        Err(error) if refused(&error) => {}
        built => return built,
    }
    let good = IoUring::builder()
        .setup_cqsize(completions)
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match good {
        Err(error) if refused(&error) => IoUring::builder().setup_cqsize(completions).build(entries),
        built => built,
    }
}

fn unsupported(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

/// The submission entry for the operation in `slot`, on `fd` (or on the registered descriptor of that number).
fn describe(slot: &mut Slot, kind: Kind, fd: RawFd) -> Entry {
    let fd = types::Fd(fd);
    let read = |slot: &mut Slot, at: u64| match slot.memory() {
        Memory::One(start, len) => opcode::Read::new(fd, start, len as u32).offset(at).build(),
        Memory::List(list, count) => opcode::Readv::new(fd, list, count as u32).offset(at).build(),
    };
    let write = |slot: &mut Slot, at: u64, flags: i32| match slot.memory() {
        Memory::One(start, len) => opcode::Write::new(fd, start, len as u32).offset(at).rw_flags(flags).build(),
        Memory::List(list, count) => opcode::Writev::new(fd, list, count as u32).offset(at).rw_flags(flags).build(),
    };
    match kind {
        Kind::Read { at } => read(slot, at),
        Kind::Write { at, dsync } => write(slot, at, if dsync { libc::RWF_DSYNC } else { 0 }),
        Kind::Sync { data_only } => {
            let flags = if data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
            opcode::Fsync::new(fd).flags(flags).build()
        }
        Kind::Allocate { mode, at, len } => opcode::Fallocate::new(fd, len).offset(at).mode(mode).build(),
        Kind::SetLen { len } => opcode::Ftruncate::new(fd, len).build(),
        Kind::Poll { events } => opcode::PollAdd::new(fd, poll_mask(events) as u32).build(),
        Kind::Recv { socket: false } => read(slot, NO_POSITION),
        Kind::Send { socket: false } => write(slot, NO_POSITION, 0),
        Kind::Recv { socket: true } => match slot.memory() {
            Memory::One(start, len) => opcode::Recv::new(fd, start, len as u32).build(),
            Memory::List(..) => opcode::RecvMsg::new(fd, slot.message()).build(),
        },
        Kind::Send { socket: true } => match slot.memory() {
            Memory::One(start, len) => opcode::Send::new(fd, start, len as u32).flags(libc::MSG_NOSIGNAL).build(),
            Memory::List(..) => opcode::SendMsg::new(fd, slot.message()).flags(libc::MSG_NOSIGNAL as u32).build(),
        },
        Kind::Accept => {
            opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut()).flags(libc::SOCK_CLOEXEC).build()
        }
    }
}

/// What `poll` is asked for.
pub(super) fn poll_mask(events: Events) -> libc::c_short {
    match events {
        Events::Readable => libc::POLLIN,
        Events::Writable => libc::POLLOUT,
    }
}

const _: () = assert!(SEGMENTS_MAX <= u32::MAX as usize);
