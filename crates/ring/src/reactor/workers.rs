//! Helper threads: run what would block.
//!
//! **Invariants.** Threads start when work waits and none is idle, up to a limit. Everything that was taken is run, also
//! when the pool ends; ending waits for it. A panic of one piece of work does not take its thread down.

use super::{Kind, Memory, Work};
use crate::inbox::Inbox;
use crate::task::report_panic;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Threads of one pool, when all are busy.
pub(super) const THREADS_MAX: usize = 4;

/// Something to run.
pub(super) enum Job {
    Run(Work),
    Call(Call),
}

impl Job {
    fn run(self) {
        match self {
            Self::Run(work) => {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                    report_panic("a blocking closure", &*panic);
                }
            }
            Self::Call(call) => {
                let result = call.run();
                call.inbox.complete(call.slot, result);
            }
        }
    }
}

/// An operation as a plain system call, for a slot that owns the descriptor and the memory until it is told the result.
pub(super) struct Call {
    pub(super) inbox: Arc<Inbox>,
    pub(super) slot: u32,
    pub(super) fd: RawFd,
    pub(super) kind: Kind,
    pub(super) memory: Memory,
}

// SAFETY: the pointers in `memory` lead to memory and a list of segments that the slot keeps in place until the call's
// completion arrives; any thread may read and write through them, as the kernel does.
unsafe impl Send for Call {}

impl Call {
    /// The result as the kernel gives it to a ring.
    fn run(&self) -> i32 {
        loop {
            let result = self.once();
            if result != -libc::EINTR {
                return result;
            }
        }
    }

    fn once(&self) -> i32 {
        let one;
        let (list, count) = match self.memory {
            Memory::One(start, len) => {
                one = libc::iovec { iov_base: start.cast(), iov_len: len };
                (&raw const one, 1)
            }
            Memory::List(list, count) => (list, count as libc::c_int),
        };
        let fd = self.fd;
        // SAFETY: the slot keeps the descriptor open, and the list and all it describes mapped, until this call's result
        // has been handed over (see `Call`). Nobody looks at the bytes through Rust references.
        let result = unsafe {
            match self.kind {
                Kind::Read { at } => libc::preadv(fd, list, count, at as libc::off_t),
                Kind::Write { at, dsync: false } => libc::pwritev(fd, list, count, at as libc::off_t),
                Kind::Write { at, dsync: true } => libc::pwritev2(fd, list, count, at as libc::off_t, libc::RWF_DSYNC),
                Kind::Sync { data_only: true } => libc::fdatasync(fd) as isize,
                Kind::Sync { data_only: false } => libc::fsync(fd) as isize,
                Kind::Allocate { mode, at, len } => {
                    libc::fallocate(fd, mode, at as libc::off_t, len as libc::off_t) as isize
                }
                Kind::SetLen { len } => libc::ftruncate(fd, len as libc::off_t) as isize,
                Kind::Recv { .. } => libc::readv(fd, list, count),
                Kind::Send { .. } => libc::writev(fd, list, count),
                Kind::Poll { .. } | Kind::Accept => {
                    return -libc::EINVAL;
                }
            }
        };
        answer(result)
    }
}

/// A system call's return value as a ring would give it.
pub(super) fn answer(result: isize) -> i32 {
    if result < 0 { -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { result as i32 }
}

struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that can panic runs while the lock is held.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A helper thread's life.
    fn serve(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job.run();
                queue = self.lock();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

/// A pool of helper threads.
pub(super) struct Workers {
    name: &'static str,
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Workers {
    /// A pool without threads yet.
    pub(super) fn new(name: &'static str) -> Self {
        let queue = Mutex::new(Queue { jobs: VecDeque::new(), idle: 0, closed: false });
        Self { name, shared: Arc::new(Shared { queue, changed: Condvar::new() }), threads: Vec::new() }
    }

    /// Takes a job. Where no thread can be started at all it runs here.
    pub(super) fn submit(&mut self, job: Job) {
        let mut queue = self.shared.lock();
        queue.jobs.push_back(job);
        let short = queue.idle < queue.jobs.len() && self.threads.len() < THREADS_MAX;
        drop(queue);
        self.shared.changed.notify_one();
        if short {
            let shared = Arc::clone(&self.shared);
            match thread::Builder::new().name(self.name.to_owned()).spawn(move || shared.serve()) {
                Ok(thread) => self.threads.push(thread),
                Err(error) if self.threads.is_empty() => {
                    tracing::warn!(%error, "no helper thread can be started: blocking work runs in place");
                    let job = self.shared.lock().jobs.pop_back();
                    if let Some(job) = job {
                        job.run();
                    }
                }
                // Those that run will get to it.
                Err(_) => {}
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a helper thread has panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn threads_start_when_needed_and_everything_taken_is_run() {
        let mut workers = Workers::new("test-worker");
        assert!(workers.threads.is_empty());
        let together = Arc::new(Barrier::new(THREADS_MAX));
        for _ in 0..THREADS_MAX {
            let together = Arc::clone(&together);
            workers.submit(Job::Run(Box::new(move || {
                together.wait();
            })));
        }
        let done = Arc::new(AtomicUsize::new(0));
        for at in 0..100 {
            let done = Arc::clone(&done);
            workers.submit(Job::Run(Box::new(move || {
                done.fetch_add(1, Ordering::Relaxed);
                assert!(at % 10 != 0, "a panic takes no thread down");
            })));
        }
        assert_eq!(workers.threads.len(), THREADS_MAX);
        drop(workers);
        assert_eq!(done.load(Ordering::Relaxed), 100);
    }
}
