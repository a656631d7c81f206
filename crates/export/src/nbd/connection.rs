//! One client's connection, from accept to close.
//!
//! **Invariant.** When [`serve`] returns, nothing of the connection is under way any more: no request on the disk, no
//! operation on the socket. The socket is shut down before its last operation is waited for, so that none outlives it.

use super::execute;
use super::flight::{Flight, Ticket};
use super::inbound::Inbound;
use super::outbox::{Outbox, Piece};
use disk::Disk;
use nbd::handshake::{Agreement, Handshake, Offer, Progress};
use nbd::proto::{Command, NbdError};
use nbd::reply::Head;
use nbd::request::{Refusal, Request, Terms};
use ring::{File, Iov, spawn};
use rustix::net::Shutdown;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// How long a client may be silent during the handshake. (Later it may be silent for ever.)
const HANDSHAKE_PATIENCE: Duration = Duration::from_mins(1);

/// How long replies that are left at the end may make no progress.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Received at once during the handshake.
const HANDSHAKE_BUFFER: usize = 4096;

/// A connection as the server knows it: enough to end it.
pub(super) struct Link {
    file: File,
    flight: Rc<Flight>,
    transmitting: Cell<bool>,
    /// The export it is about, once that is known.
    export: RefCell<Option<String>>,
}

impl Link {
    pub(super) fn new(file: File) -> Rc<Self> {
        Rc::new(Self { file, flight: Flight::new(), transmitting: Cell::new(false), export: RefCell::default() })
    }

    /// Whether it is about this export.
    pub(super) fn is_about(&self, export: &str) -> bool {
        self.export.borrow().as_deref() == Some(export)
    }

    /// Whether the handshake is over.
    pub(super) fn has_chosen(&self) -> bool {
        self.export.borrow().is_some()
    }

    /// Whether it was told to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.flight.is_closed()
    }

    /// Takes no more requests; those under way end, and their replies are sent. A handshake ends where it is.
    pub(super) fn stop(&self) {
        self.flight.close();
        self.shutdown(if self.transmitting.get() { Shutdown::Read } else { Shutdown::Both });
    }

    /// Drops the client.
    pub(super) fn kill(&self) {
        self.flight.close();
        self.shutdown(Shutdown::Both);
    }

    fn shutdown(&self, how: Shutdown) {
        // It fails where the peer is gone already: what we want.
        let _ = rustix::net::shutdown(self.file.as_fd(), how);
    }
}

/// A connection in its transmission phase.
pub(super) struct Transmission {
    pub(super) disk: Rc<Disk>,
    /// Whatever is written is durable before the client hears of it.
    pub(super) write_through: bool,
    pub(super) agreement: Agreement,
    pub(super) outbox: Outbox,
}

impl Transmission {
    /// Queues a piece of a reply; with the last one goes the request's ticket.
    pub(super) fn send(&self, head: Head, body: Iov, ticket: Option<Ticket>) {
        self.outbox.push(Piece { head, body, ticket });
    }

    /// The size is today's: a disk may grow.
    fn terms(&self) -> Terms {
        Terms { size: self.disk.size(), flags: self.agreement.flags, allocation: self.agreement.allocation }
    }
}

/// Talks to one client until either side has enough. `offers` and `disks` (and whether they are written through) go together.
pub(super) async fn serve(link: &Link, offers: Vec<Offer>, disks: Vec<(Rc<Disk>, bool)>) -> io::Result<()> {
    let names: Vec<String> = offers.iter().map(|offer| offer.name.clone()).collect();
    let outcome = match negotiate(link, offers).await {
        Ok(Some((agreement, early))) => {
            let (disk, export) = (disks[agreement.export].clone(), names[agreement.export].clone());
            *link.export.borrow_mut() = Some(export);
            drop(disks);
            link.transmitting.set(true);
            transmit(link, disk, agreement, &early).await
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    link.shutdown(Shutdown::Both);
    outcome
}

/// Goes through the handshake. What was received beyond it comes with the agreement.
async fn negotiate(link: &Link, offers: Vec<Offer>) -> io::Result<Option<(Agreement, Vec<u8>)>> {
    let broken = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut handshake = Handshake::new(offers);
    let buffer = Iov::alloc(HANDSHAKE_BUFFER);
    let (mut input, mut output) = (Vec::new(), Handshake::greeting().to_vec());
    let mut progress = Progress::Continue;
    loop {
        if !output.is_empty() {
            patient(link.file.send_all(&Iov::from_slice(&output))).await?;
            output.clear();
        }
        match progress {
            Progress::Continue => {}
            Progress::Transmission(agreement) => return Ok(Some((agreement, input))),
            Progress::Over => return Ok(None),
            Progress::NeedMore => match patient(link.file.recv(&buffer)).await? {
                0 => return Ok(None),
                received => {
                    let held = input.len();
                    input.resize(held + received, 0);
                    buffer.read(0, &mut input[held..]);
                }
            },
        }
        let taken;
        (taken, progress) = handshake.advance(&input, &mut output).map_err(broken)?;
        input.drain(..taken);
    }
}

async fn patient<T>(operation: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    ring::timeout(HANDSHAKE_PATIENCE, operation).await.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
}

async fn transmit(
    link: &Link,
    (disk, write_through): (Rc<Disk>, bool),
    agreement: Agreement,
    early: &[u8],
) -> io::Result<()> {
    let to = Rc::new(Transmission { disk, write_through, agreement, outbox: Outbox::new() });
    let sender = spawn({
        let (to, file) = (Rc::clone(&to), link.file.clone());
        async move {
            let outcome = to.outbox.run(&file).await;
            // Whatever ended it, no reply can leave any more: the receiver has nothing to wait for either.
            if outcome.is_err() {
                let _ = rustix::net::shutdown(file.as_fd(), Shutdown::Both);
            }
            outcome
        }
    });
    let received = match receive(link, &to, early).await {
        // We have closed that side ourselves, in the middle of a message.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && link.flight.is_closed() => Ok(()),
        received => received,
    };
    if received.is_err() {
        to.outbox.kill();
        link.shutdown(Shutdown::Both);
    }
    link.flight.executed().await;
    // All that is left are replies to send. A client that reads them, however slowly, gets them.
    let mut sent = to.outbox.sent();
    while ring::timeout(CLOSE_PATIENCE, link.flight.drained()).await.is_none() {
        if to.outbox.sent() == sent {
            link.shutdown(Shutdown::Both);
        }
        sent = to.outbox.sent();
    }
    to.outbox.close();
    let sent = sender.await;
    received.and(sent)
}

/// Takes requests off the wire and starts them, until the client or the server has enough.
async fn receive(link: &Link, to: &Rc<Transmission>, early: &[u8]) -> io::Result<()> {
    let broken = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let flight = &link.flight;
    let mut inbound = Inbound::new(link.file.clone(), early);
    while let Some(head) = inbound.head(|| flight.is_closed()).await? {
        let request = Request::decode(&head).map_err(|error| broken(error.to_string()))?;
        let payload = request.payload() as usize;
        let checked = match request.check(&to.terms()) {
            Ok(Command::Disc) => return Ok(()),
            Err(Refusal::Oversized) => return Err(broken(format!("a write of {payload} bytes"))),
            Ok(command) => Ok(command),
            Err(Refusal::Error(error, why)) => Err((error, why)),
        };
        let moves = match checked {
            Ok(Command::Read | Command::Write) => request.length as usize,
            _ => 0,
        };
        let Some(ticket) = flight.enter(moves).await else {
            // Nothing more is received: somebody who sends and sends would never be rid of.
            if !inbound.skip(payload) {
                break;
            }
            let error = NbdError::Shutdown;
            execute::refuse(to, &request, flight.enter_closed(), error, error.message());
            continue;
        };
        match checked {
            Ok(Command::Read) => drop(spawn(execute::read(Rc::clone(to), request, ticket))),
            Ok(Command::Write) => {
                let data = inbound.payload(payload).await?;
                spawn(execute::write(Rc::clone(to), request, data, ticket));
            }
            Ok(command) => drop(spawn(execute::other(Rc::clone(to), command, request, ticket))),
            Err((error, why)) => {
                inbound.discard(payload).await?;
                execute::refuse(to, &request, ticket, error, why);
            }
        }
    }
    Ok(())
}
