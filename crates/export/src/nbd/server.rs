//! The listening side: accepts clients, keeps count of them, and sees them off.
//!
//! **Invariant.** A connection is in the list from its accept until nothing of it is under way; the server has stopped when
//! nobody accepts any more and the list is empty.

use super::connection::{self, Link};
use super::listen::{Listener, SocketFile, listen};
use super::{Address, NbdExport};
use crate::ExportError;
use futures_util::future::{Either, select};
use nbd::handshake::Offer;
use nbd::option::BlockSize;
use nbd::proto::{MAX_PAYLOAD, MAX_STRING, TransmissionFlags};
use ring::sync::Event;
use ring::{File, spawn};
use rustix::net::Shutdown;
use rustix::net::sockopt;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// Clients at once, whatever is asked for. More wait to be accepted.
const MAX_CONNECTIONS: usize = 256;

/// How long accepting rests when the system is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What a preferred request is a multiple of, in bytes, if the disk does not ask for more.
const PREFERRED_BLOCK: u32 = 4096;

/// A running server: one listening socket on this shard with its connections.
///
/// Dropping it drops its clients; [`NbdServer::stop`] sees them off.
pub struct NbdServer {
    shared: Rc<Shared>,
    address: Address,
}

struct Shared {
    exports: RefCell<Vec<NbdExport>>,
    /// Closed by being taken.
    listener: RefCell<Option<File>>,
    /// Removes the socket's file when dropped.
    socket_file: RefCell<Option<SocketFile>>,
    /// Clients at once.
    most: Cell<usize>,
    /// Nobody is accepted for the time being.
    held: Cell<bool>,
    accepting: Cell<bool>,
    stopping: Cell<bool>,
    stopped: Event,
    connections: RefCell<HashMap<u64, Rc<Link>>>,
    /// A client has come.
    visited: Cell<bool>,
    changed: Event,
}

impl NbdServer {
    /// Binds and starts to accept on the running ring. The names of the exports are unique.
    pub async fn start(address: Address, exports: Vec<NbdExport>) -> Result<Self, ExportError> {
        validate(&exports)?;
        let Listener { file, address, socket_file } = listen(address).await?;
        let shared = Rc::new(Shared {
            exports: RefCell::new(exports),
            listener: RefCell::new(Some(file)),
            socket_file: RefCell::new(socket_file),
            most: Cell::new(MAX_CONNECTIONS),
            held: Cell::new(false),
            accepting: Cell::new(true),
            stopping: Cell::new(false),
            stopped: Event::new(),
            connections: RefCell::default(),
            visited: Cell::new(false),
            changed: Event::new(),
        });
        let accepting = Rc::clone(&shared);
        spawn(async move {
            accepting.accept().await;
            accepting.accepting.set(false);
            accepting.changed.notify_all();
        });
        Ok(Self { shared, address })
    }

    /// Serves at most so many clients at once from now on (0: as many as there can be); more wait until one has left.
    pub fn limit_clients(&self, most: u32) {
        let most = if most == 0 { MAX_CONNECTIONS } else { MAX_CONNECTIONS.min(most as usize) };
        self.shared.most.set(most);
        self.shared.changed.notify_all();
    }

    /// Lets clients wait to be accepted (called before anything is awaited: from the first one on), or no longer.
    pub fn hold(&self, held: bool) {
        self.shared.held.set(held);
        self.shared.changed.notify_all();
    }

    /// The address in use (with the port the system chose for port 0).
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Clients connected now.
    pub fn connections(&self) -> usize {
        self.shared.connections.borrow().len()
    }

    /// Offers one more, to clients that come from now on. Its name is not taken.
    pub fn add(&self, export: NbdExport) -> Result<(), ExportError> {
        let mut exports = self.shared.exports.borrow().clone();
        exports.push(export);
        validate(&exports)?;
        *self.shared.exports.borrow_mut() = exports;
        Ok(())
    }

    /// Clients that use the export of this name.
    pub fn clients_of(&self, name: &str) -> usize {
        self.shared.connections.borrow().values().filter(|link| link.is_about(name)).count()
    }

    /// Offers it no longer; clients that use it are seen off. Whoever negotiates right now is dropped, too: it may have been told of it.
    pub async fn remove(&self, name: &str) {
        let shared = &self.shared;
        shared.exports.borrow_mut().retain(|export| export.name != name);
        let concerned = |link: &Link| link.is_about(name) || !link.has_chosen();
        for link in shared.connections.borrow().values().filter(|link| concerned(link)) {
            link.stop();
        }
        while shared.connections.borrow().values().any(|link| concerned(link) && link.is_stopping()) {
            shared.changed.wait().await;
        }
    }

    /// Ends when a client has come and none is left, or the server is stopped.
    pub async fn left(&self) {
        let shared = &self.shared;
        while !shared.stopping.get() && (!shared.visited.get() || !shared.connections.borrow().is_empty()) {
            shared.changed.wait().await;
        }
    }

    /// Stops accepting, closes every connection after its requests in flight, removes the socket. Requests that come
    /// meanwhile are answered with `NBD_ESHUTDOWN`; a client that does not read its replies is dropped after some seconds.
    /// May be called again, also when a first call was given up.
    pub async fn stop(&self) {
        let shared = &self.shared;
        shared.close();
        for link in shared.connections.borrow().values() {
            link.stop();
        }
        while shared.accepting.get() || !shared.connections.borrow().is_empty() {
            shared.changed.wait().await;
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.close();
        for link in self.shared.connections.borrow().values() {
            link.kill();
        }
    }
}

fn validate(exports: &[NbdExport]) -> Result<(), ExportError> {
    let refuse = |name: &str, why: &str| {
        let source = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(ExportError { what: format!("offer '{name}' over NBD"), source })
    };
    for (index, export) in exports.iter().enumerate() {
        let texts = [Some(&export.name), export.description.as_ref()];
        if texts.into_iter().flatten().any(|text| text.len() > MAX_STRING || text.contains('\0')) {
            return refuse(&export.name, "names and descriptions have at most 4096 bytes and no NUL");
        }
        if exports[..index].iter().any(|other| other.name == export.name) {
            return refuse(&export.name, "another export has the same name; give each a name of its own");
        }
    }
    Ok(())
}

impl Shared {
    /// Ends accepting and frees the address.
    fn close(&self) {
        if !self.stopping.replace(true) {
            // Removed before the socket closes: whoever comes finds nothing rather than somebody who hangs up.
            self.socket_file.take();
            if let Some(listener) = self.listener.take() {
                // Clients in its queue are refused now; the descriptor closes after the accept under way.
                let _ = rustix::net::shutdown(listener.as_fd(), Shutdown::Both);
            }
            self.stopped.notify_all();
            self.changed.notify_all();
        }
    }

    async fn accept(self: &Rc<Self>) {
        let mut next = 0_u64;
        while !self.stopping.get() {
            if self.held.get() || self.connections.borrow().len() >= self.most.get() {
                self.changed.wait().await;
                continue;
            }
            let Some(listener) = self.listener.borrow().clone() else { break };
            // Not every kernel and back end ends an accept when its socket is shut down: it is given up.
            let stopped = self.stopped.wait();
            let Either::Left((accepted, _)) = select(pin!(listener.accept()), pin!(stopped)).await else { break };
            match accepted {
                // It came while we were stopping: refused rather than served.
                Ok(_) if self.stopping.get() => break,
                Ok(file) => {
                    tune(&file);
                    self.connect(next, Link::new(file));
                    next += 1;
                }
                Err(_) if self.stopping.get() => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "could not accept an NBD client");
                    ring::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn connect(self: &Rc<Self>, id: u64, link: Rc<Link>) {
        self.connections.borrow_mut().insert(id, Rc::clone(&link));
        self.visited.set(true);
        let exports = self.exports.borrow();
        let offers = exports.iter().map(offer).collect();
        let disks = exports.iter().map(|export| (Rc::clone(&export.disk), export.write_through)).collect();
        drop(exports);
        let shared = Rc::clone(self);
        spawn(async move {
            tracing::debug!(id, "NBD client connected");
            match connection::serve(&link, offers, disks).await {
                Ok(()) => tracing::debug!(id, "NBD client left"),
                Err(error) => tracing::debug!(id, %error, "NBD client dropped"),
            }
            shared.connections.borrow_mut().remove(&id);
            shared.changed.notify_all();
        });
    }
}

/// Replies leave at once, and a peer that vanished is noticed. Neither matters on a unix socket, which refuses both.
fn tune(file: &File) {
    let fd = file.as_fd();
    if sockopt::set_tcp_nodelay(fd, true).is_ok() {
        let _ = sockopt::set_socket_keepalive(fd, true);
    }
}

/// What an export offers now.
fn offer(export: &NbdExport) -> Offer {
    let disk = &export.disk;
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        // All connections share one disk: a flush on any covers what was completed on all.
        | TransmissionFlags::CAN_MULTI_CONN;
    if export.read_only || disk.read_only() {
        flags |= TransmissionFlags::READ_ONLY;
    } else {
        flags |= TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
            | TransmissionFlags::SEND_CACHE;
    }
    let preferred = disk.request_alignment().max(PREFERRED_BLOCK);
    Offer {
        name: export.name.clone(),
        description: export.description.clone(),
        size: disk.size(),
        flags,
        block_size: BlockSize { minimum: 1, preferred, maximum: MAX_PAYLOAD },
    }
}
