//! The only way between a server's protocol thread and its shard: one command at a time, each with its answer.
//!
//! # Invariants
//! * At most one command is on its way: the thread waits for the answer before it reads the next message. Nothing queues.
//! * Neither side waits for one that is gone: the shard's end closes the box when it is dropped, the thread's end says
//!   that it is finished when it is dropped.

use super::inflight::Region as InflightRegion;
use super::memory::GuestMap;
use rustix::event::EventfdFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A change of state that a message of the front end asks for.
pub(super) enum Command {
    /// What the driver has accepted.
    Features(u64),
    /// The guest's memory from now on.
    Memory(Option<GuestMap>),
    /// Something about one queue.
    Queue(u16, QueueCommand),
    /// Where requests in flight are remembered.
    Inflight(InflightRegion),
    /// The socket for messages to the front end.
    Channel(OwnedFd),
    /// Bytes of the configuration space: offset and length.
    Config(u32, u32),
    /// Stop every queue and forget what was negotiated.
    Reset,
    /// The front end has gone.
    Gone,
}

/// A change of one queue.
pub(super) enum QueueCommand {
    /// Entries.
    Size(u16),
    /// Where its parts are, in the front end's addresses.
    Addresses(Addresses),
    /// The next entry of the available ring.
    Base(u16),
    /// Stop: drain, then say the next entry of the available ring.
    Stop,
    /// What the driver rings when there is something to do.
    Kick(OwnedFd),
    /// What rings the driver when something is done.
    Call(Option<OwnedFd>),
    /// What tells the front end of a broken queue.
    Err(Option<OwnedFd>),
    /// Serve it or not.
    Enable(bool),
}

/// Where a queue's parts are, in the front end's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// What a command comes back with.
pub(super) enum Reply {
    /// Done.
    Done,
    /// The next entry of the available ring.
    Base(u16),
    /// Bytes of the configuration space.
    Config(Vec<u8>),
    /// Not done, and why; nothing has changed.
    Refused(String),
}

/// The shard is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Closed;

struct Letterbox {
    slot: Mutex<Slot>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Slot {
    command: Option<(Command, SyncSender<Reply>)>,
    closed: bool,
    finished: bool,
}

impl Letterbox {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        // Nothing panics while it holds the lock; and if so, the slot is still whole.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full: then the wake-up is already under way.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Makes a box with its two ends.
pub(super) fn pair() -> io::Result<(ThreadEnd, ShardEnd)> {
    let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let shared = Arc::new(Letterbox { slot: Mutex::default(), wake });
    Ok((ThreadEnd(Arc::clone(&shared)), ShardEnd(shared)))
}

/// The protocol thread's end.
pub(super) struct ThreadEnd(Arc<Letterbox>);

impl ThreadEnd {
    /// Hands a command over and waits for its reply.
    pub(super) fn call(&self, command: Command) -> Result<Reply, Closed> {
        let (reply, answer) = mpsc::sync_channel(1);
        {
            let mut slot = self.0.lock();
            if slot.closed {
                return Err(Closed);
            }
            debug_assert!(slot.command.is_none(), "one command at a time");
            slot.command = Some((command, reply));
        }
        self.0.wake();
        answer.recv().map_err(|_| Closed)
    }
}

impl Drop for ThreadEnd {
    fn drop(&mut self) {
        self.0.lock().finished = true;
        self.0.wake();
    }
}

/// The shard's end.
pub(super) struct ShardEnd(Arc<Letterbox>);

impl ShardEnd {
    /// Becomes readable whenever there may be something new. Never needs to be read (watch its edges).
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// The command that waits, if one does, and where its reply goes.
    pub(super) fn take(&self) -> Option<(Command, SyncSender<Reply>)> {
        self.0.lock().command.take()
    }

    /// Whether the thread has come to its end.
    pub(super) fn finished(&self) -> bool {
        self.0.lock().finished
    }
}

impl Drop for ShardEnd {
    fn drop(&mut self) {
        let waiting = {
            let mut slot = self.0.lock();
            slot.closed = true;
            slot.command.take()
        };
        // Dropped outside of the lock: its sender wakes the thread.
        drop(waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_ends_when_the_shard_goes_away() {
        let (thread, shard) = pair().unwrap();
        let waiting = std::thread::spawn(move || thread.call(Command::Gone).map(|_| ()));
        while shard.0.lock().command.is_none() {
            std::thread::yield_now();
        }
        drop(shard);
        assert_eq!(waiting.join().unwrap(), Err(Closed));
    }

    #[test]
    fn the_shard_hears_that_the_thread_has_ended() {
        let (thread, shard) = pair().unwrap();
        assert!(!shard.finished());
        drop(thread);
        assert!(shard.finished());
        let mut count = [0; 8];
        rustix::io::read(shard.bell(), &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}
