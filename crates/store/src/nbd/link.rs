//! One connection to an NBD server.
//!
//! **Invariants.**
//! * A request that was begun is sent whole, whoever waits for it: a task of its own sends, another one receives.
//! * Each request is answered once: by the server's reply, or, when the connection breaks, by [`Broken`].
//! * At most [`MAX_IN_FLIGHT`] requests are under way; a request whose waiter has left counts until its reply is there.

use super::address::{Address, connect};
use nbd::client::{
    Answer, ClientError, ClientHandshake, ClientProgress, Completion, Failure, Goal, ListedExport, Session,
    Transactions,
};
use nbd::proto::{Command, CommandFlags};
use ring::sync::{Event, Permit, Semaphore};
use ring::{File, Iov, spawn};
use rustix::net::Shutdown;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// Requests under way at once.
const MAX_IN_FLIGHT: usize = 64;

/// How long a server may be silent during the handshake.
const HANDSHAKE_PATIENCE: Duration = Duration::from_mins(1);

/// Received at once: of the order of a socket's buffer.
const RECEIVE_BYTES: usize = 256 << 10;

/// The connection broke before the request was answered: nobody knows whether it was carried out.
#[derive(Clone, Debug)]
pub(super) struct Broken(pub(super) String);

/// What became of a request.
pub(super) type Outcome = Result<Result<Answer, Failure>, Broken>;

/// Where a request's waiter finds its answer.
#[derive(Default)]
struct Slot {
    outcome: Cell<Option<Outcome>>,
    done: Event,
}

struct Waiting {
    slot: Rc<Slot>,
    _permit: Permit,
}

/// A connection in its transmission phase.
pub(super) struct Link {
    file: File,
    pub(super) session: Session,
    transactions: RefCell<Transactions>,
    waiting: RefCell<HashMap<u64, Waiting>>,
    outgoing: RefCell<VecDeque<Iov>>,
    more: Event,
    room: Semaphore,
    broken: RefCell<Option<Broken>>,
}

/// Goes through a handshake; what was received beyond it comes along.
async fn shake(file: &File, goal: Goal) -> io::Result<(ClientProgress, Vec<u8>)> {
    let refused = |error: ClientError| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut handshake = ClientHandshake::new(goal, true, true);
    let buffer = Iov::alloc(4096);
    let mut input = Vec::new();
    loop {
        let mut output = Vec::new();
        let (taken, progress) = handshake.advance(&input, &mut output).map_err(refused)?;
        input.drain(..taken);
        file.send_all(&Iov::from_slice(&output)).await?;
        if progress != ClientProgress::Continue {
            return Ok((progress, input));
        }
        if taken == 0 {
            match file.recv(&buffer).await? {
                0 => {
                    let what = "the server hung up during the handshake";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
                }
                received => input.extend(buffer.slice(0..received).to_vec()),
            }
        }
    }
}

/// Connects and goes through the handshake, within its time.
async fn greet(address: &Address, goal: Goal) -> io::Result<(File, ClientProgress, Vec<u8>)> {
    let work = async {
        let file = connect(address).await?;
        let (progress, rest) = shake(&file, goal).await?;
        Ok((file, progress, rest))
    };
    ring::timeout(HANDSHAKE_PATIENCE, work).await.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
}

/// What a server says of itself: each export with its session, where the server tells.
///
/// # Errors
/// Where it cannot be reached, or does not list.
pub async fn list(address: &Address) -> io::Result<Vec<(ListedExport, Option<Session>)>> {
    let (_, progress, _) = greet(address, Goal::List).await?;
    let ClientProgress::Listed(listed) = progress else { return Err(io::ErrorKind::InvalidData.into()) };
    let mut exports = Vec::new();
    for export in listed {
        let asked = greet(address, Goal::Inspect(export.name.clone())).await;
        let session = match asked {
            Ok((_, ClientProgress::Session(session), _)) => Some(session),
            _ => None,
        };
        exports.push((export, session));
    }
    Ok(exports)
}

impl Link {
    /// Connects to an export.
    pub(super) async fn open(address: &Address, export: &str) -> io::Result<Rc<Self>> {
        let (file, progress, early) = greet(address, Goal::Export(export.to_owned())).await?;
        let ClientProgress::Session(session) = progress else { return Err(io::ErrorKind::InvalidData.into()) };
        let link = Rc::new(Self {
            file,
            transactions: RefCell::new(Transactions::new(&session)),
            session,
            waiting: RefCell::default(),
            outgoing: RefCell::default(),
            more: Event::new(),
            room: Semaphore::new(MAX_IN_FLIGHT),
            broken: RefCell::default(),
        });
        drop(spawn(Rc::clone(&link).send()));
        drop(spawn(Rc::clone(&link).receive(early)));
        Ok(link)
    }

    /// Why it is of no use any more.
    pub(super) fn broken(&self) -> Option<Broken> {
        self.broken.borrow().clone()
    }

    /// Sends a request (with `payload`, if it has one) and waits for its answer. Dropping this gives up the answer only.
    pub(super) async fn ask(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
        payload: Iov,
    ) -> Outcome {
        let permit = self.room.acquire(1).await;
        if let Some(broken) = self.broken() {
            return Err(broken);
        }
        let slot = Rc::new(Slot::default());
        let request = self.transactions.borrow_mut().begin(command, flags, offset, length);
        let waiting = Waiting { slot: Rc::clone(&slot), _permit: permit };
        self.waiting.borrow_mut().insert(request.cookie, waiting);
        self.outgoing.borrow_mut().push_back(Iov::from_slice(&request.encode()).join(&payload));
        self.more.notify_all();
        loop {
            let done = slot.done.wait();
            if let Some(outcome) = slot.outcome.take() {
                return outcome;
            }
            done.await;
        }
    }

    /// Says goodbye; every request has been answered.
    pub(super) async fn close(&self) {
        let goodbye = self.transactions.borrow_mut().begin(Command::Disc, CommandFlags::empty(), 0, 0);
        if self.broken().is_none() && self.outgoing.borrow().is_empty() {
            // The server may be gone; then it needs no goodbye.
            let _ = self.file.send_all(&Iov::from_slice(&goodbye.encode())).await;
        }
        self.fail("the connection was closed");
    }

    /// Answers everything that waits, and everything that will be asked.
    fn fail(&self, why: &str) {
        self.broken.borrow_mut().get_or_insert_with(|| Broken(why.to_owned()));
        let _ = rustix::net::shutdown(self.file.as_fd(), Shutdown::Both);
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for one in waiting.into_values() {
            one.slot.outcome.set(Some(Err(Broken(why.to_owned()))));
            one.slot.done.notify_all();
        }
        self.outgoing.borrow_mut().clear();
        self.more.notify_all();
    }

    async fn send(self: Rc<Self>) {
        loop {
            let more = self.more.wait();
            let next = self.outgoing.borrow().front().cloned();
            match next {
                _ if self.broken().is_some() => return,
                None => more.await,
                Some(bytes) => {
                    if let Err(error) = self.file.send_all(&bytes).await {
                        return self.fail(&format!("sending failed: {error}"));
                    }
                    self.outgoing.borrow_mut().pop_front();
                }
            }
        }
    }

    async fn receive(self: Rc<Self>, early: Vec<u8>) {
        let buffer = Iov::alloc(RECEIVE_BYTES);
        let mut bytes = early;
        loop {
            let mut completions = Vec::new();
            let understood = self.transactions.borrow_mut().receive(&bytes, &mut completions);
            for Completion { cookie, outcome } in completions {
                if let Some(waiting) = self.waiting.borrow_mut().remove(&cookie) {
                    waiting.slot.outcome.set(Some(Ok(outcome)));
                    waiting.slot.done.notify_all();
                }
            }
            if let Err(error) = understood {
                return self.fail(&error.to_string());
            }
            match self.file.recv(&buffer).await {
                Ok(0) => return self.fail("the server hung up"),
                Err(error) => return self.fail(&format!("receiving failed: {error}")),
                Ok(received) => bytes = buffer.slice(0..received).to_vec(),
            }
        }
    }
}
