//! One thread's executor and reactor. Floor 1: it knows files, sockets, timers and memory, not what a disk is.
//!
//! A [`Ring`] runs `!Send` futures on the thread that made it. Inside [`Ring::block_on`] the free functions of this crate
//! ([`spawn`], [`sleep`], [`now`], [`unblock`]) and the operations of [`File`] find the running ring by thread-local.
//!
//! Three back ends share this one interface: io_uring; a small thread pool where io_uring is refused; and [`sim::Sim`], a
//! deterministic executor with a seeded order and a virtual clock for tests (it has timers and tasks, no files).
//!
//! **Operations on files are never cancelled.** Dropping an operation's future gives up the result, not the operation:
//! the ring keeps the buffer and the descriptor alive until the kernel has answered. Shutting down drains. Operations
//! that wait for somebody else ([`File::poll`], [`File::accept`], [`File::recv`], [`File::send`]) would wait forever:
//! there the kernel is asked to let go, and the buffer and the descriptor are kept until it has. A `recv` or `send`
//! whose future was dropped may or may not have moved bytes: the stream is good for nothing but closing.

pub mod iov;
pub mod lock;
pub mod sim;
pub mod sync;

mod door;
mod executor;
mod file;
mod inbox;
mod inherit;
mod lookout;
mod memory;
mod oneshot;
mod reactor;
mod runtime;
mod shard;
pub mod share;
mod task;
mod time;

pub use executor::{Backend, Config, JoinHandle, Ring, spawn, unblock, yield_now};
pub use file::{AllocateMode, Events, File};
pub use inbox::{Closed, Handle, Reply};
pub use inherit::{hand_over, inherited};
pub use iov::Iov;
pub use lookout::{Lookout, look_out};
pub use runtime::is_running;
pub use shard::Shard;
pub use time::{Instant, now, sleep, sleep_until, timeout};
