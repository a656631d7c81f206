//! The NBD server (specification: NetworkBlockDevice/nbd `doc/proto.md`).

use crate::ExportError;
use disk::Disk;
use std::path::PathBuf;
use std::rc::Rc;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket, made anew (a stale one is replaced), removed at the end.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String, u16),
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
}

/// A running server: one listening socket on this shard with its connections.
pub struct NbdServer {
    _todo: (),
}

impl NbdServer {
    /// Binds and starts to accept on the running ring.
    pub async fn start(address: Address, exports: Vec<NbdExport>) -> Result<Self, ExportError> {
        let _ = (address, exports);
        todo!()
    }

    /// The address in use (with the port the system chose for port 0).
    pub fn address(&self) -> &Address {
        todo!()
    }

    /// Stops accepting, closes every connection after its requests in flight, removes the socket.
    pub async fn stop(&self) {
        todo!()
    }
}
