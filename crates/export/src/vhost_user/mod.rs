//! The vhost-user-blk server (specifications: QEMU's `docs/interop/vhost-user.rst`, VIRTIO 1.3 section 5.2).
//!
//! A server is two halves. A small thread reads the front end's messages ([`session`]) and carries every change of state to
//! the shard ([`mailbox`]); the shard alone touches queues ([`device`], [`vring`]), requests ([`chain`], [`request`]) and
//! guest memory ([`memory`]). No request waits for a message, and no message is answered before it is in force.
//!
//! The guest is not trusted: whatever it writes into rings and requests costs it its own queue at most. The front end
//! (the virtual machine monitor) is checked for every mistake, but it can stop its own guest's disk, of course, and since
//! it shares its memory it could shrink that memory under the server (use sealed memory where it is not trusted).

mod chain;
mod config;
mod device;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod inflight;
mod ledger;
mod mailbox;
mod memory;
mod request;
mod session;
mod socket;
mod vring;

use crate::ExportError;
use device::Device;
use disk::Disk;
use session::{Control, Protocol};
use socket::Socket;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// What to offer.
#[derive(Clone)]
pub struct VhostUserExport {
    /// The unix socket to listen on, made anew, removed at the end. One front end at a time; it may reconnect.
    pub socket: PathBuf,
    /// The disk.
    pub disk: Rc<Disk>,
    /// Refuse writes even if the disk allows them.
    pub read_only: bool,
    /// Whatever is written is durable before the guest hears of it, whatever it says of its cache.
    pub write_through: bool,
    /// Virtqueues offered (a front end may use fewer), 1 to 256.
    pub queues: u16,
    /// What the guest reads as the device's serial (at most 20 bytes; what is longer is cut off).
    pub serial: String,
}

impl fmt::Debug for VhostUserExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserExport")
            .field("socket", &self.socket)
            .field("disk", &self.disk.name())
            .field("read_only", &self.read_only)
            .field("write_through", &self.write_through)
            .field("queues", &self.queues)
            .field("serial", &self.serial)
            .finish()
    }
}

/// A running export. Dropping it ends the connection without waiting; [`VhostUserServer::stop`] waits.
pub struct VhostUserServer {
    device: Rc<Device>,
    control: Arc<Control>,
}

impl VhostUserServer {
    /// Binds and starts to accept on the running ring. A socket that nobody listens on any more is replaced; one that is
    /// served is an error ([`io::ErrorKind::AddrInUse`]).
    pub async fn start(export: VhostUserExport) -> Result<Self, ExportError> {
        let path = export.socket.clone();
        let failed = |source| ExportError { what: format!("listen on {}", path.display()), source };
        if !(1..=config::MAX_QUEUES).contains(&export.queues) {
            let why = format!("{} queues asked for; 1 to {} are possible", export.queues, config::MAX_QUEUES);
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        let bind = export.socket.clone();
        // Finding out whether a socket is stale means to connect to it, which may block.
        let socket = ring::unblock(move || Socket::bind(&bind)).await.map_err(&failed)?;
        let (name, queues) = (export.disk.name().to_owned(), export.queues);
        let device = Device::new(export).map_err(&failed)?;
        let control = Control::new().map_err(&failed)?;
        let (mail, box_) = mailbox::pair().map_err(&failed)?;
        let features = device.features().0;
        let protocol = Protocol { socket, control: Arc::clone(&control), mail, features, queues, name };
        let thread = std::thread::Builder::new().name("vhost-user".into());
        // The thread ends by itself: it is stopped by `control`, and says so through `mail`.
        drop(thread.spawn(move || protocol.run()).map_err(&failed)?);
        drop(ring::spawn(Rc::clone(&device).serve(box_)));
        Ok(Self { device, control })
    }

    /// Tells the guest that the disk's size has changed.
    pub fn resized(&self) {
        self.device.announce();
    }

    /// Ends the connection after its requests in flight and removes the socket. Safe to call more than once.
    pub async fn stop(&self) {
        self.device.close().await;
        self.control.stop();
        self.device.ended().await;
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        self.control.stop();
    }
}
