//! The vhost-user-blk server (specifications: QEMU's `docs/interop/vhost-user.rst`, VIRTIO 1.3 section 5.2).

use crate::ExportError;
use disk::Disk;
use std::path::PathBuf;
use std::rc::Rc;

/// What to offer.
#[derive(Clone)]
pub struct VhostUserExport {
    /// The unix socket to listen on, made anew, removed at the end. One front end at a time; it may reconnect.
    pub socket: PathBuf,
    /// The disk.
    pub disk: Rc<Disk>,
    /// Refuse writes even if the disk allows them.
    pub read_only: bool,
    /// Virtqueues offered (a front end may use fewer).
    pub queues: u16,
    /// What the guest reads as the device's serial (at most 20 bytes).
    pub serial: String,
}

/// A running export.
pub struct VhostUserServer {
    _todo: (),
}

impl VhostUserServer {
    /// Binds and starts to accept on the running ring.
    pub async fn start(export: VhostUserExport) -> Result<Self, ExportError> {
        let _ = export;
        todo!()
    }

    /// Tells the guest that the disk's size has changed.
    pub fn resized(&self) {
        todo!()
    }

    /// Ends the connection after its requests in flight and removes the socket.
    pub async fn stop(&self) {
        todo!()
    }
}
