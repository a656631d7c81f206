//! The NBD server: sockets and disks on either side of the protocol, which the crate [`nbd`] speaks.
//!
//! `listen` and `server` accept; `connection` moves bytes between a socket and the codec (`inbound`, `outbox`) within bounds
//! (`flight`); `execute` asks the disk.

mod connection;
mod execute;
mod flight;
mod inbound;
mod listen;
mod outbox;
mod server;

pub use server::NbdServer;

use disk::Disk;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::rc::Rc;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket, made anew (a stale one is replaced), removed at the end.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String, u16),
    /// A socket that listens already, which was handed over under this number ([`ring::hand_over`]).
    Inherited(RawFd),
}

/// What to offer.
#[derive(Clone)]
pub struct NbdExport {
    /// The name clients ask for; the first export also answers to the empty name.
    pub name: String,
    /// Free text for `NBD_OPT_LIST`/`INFO`.
    pub description: Option<String>,
    /// The disk.
    pub disk: Rc<Disk>,
    /// Refuse writes even if the disk allows them.
    pub read_only: bool,
    /// Whatever is written is durable before the client hears of it.
    pub write_through: bool,
}
