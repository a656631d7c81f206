//! Replies on their way out.
//!
//! **Invariant.** Pieces leave in the order in which they were queued, head then body, and nothing of them is copied but the
//! heads. Everything that is ready goes in one vectored send; while that is under way the next batch gathers.

use super::flight::Ticket;
use nbd::reply::{Head, MAX_HEAD};
use ring::sync::Event;
use ring::{File, Iov};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;

/// Pieces that one send takes at most: half of what the kernel takes, as each may have a head and a body.
const BATCH_PIECES: usize = 256;

/// A send is not made longer once it has this many bytes: what has been sent frees its memory.
const BATCH_BYTES: usize = 1 << 20;

/// A reply, or a chunk of one.
pub(super) struct Piece {
    pub(super) head: Head,
    /// Empty if the head is all.
    pub(super) body: Iov,
    /// With the last piece of a reply: the request's.
    pub(super) ticket: Option<Ticket>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Nothing more will be queued.
    Closing,
    /// Nothing more can be sent; what is queued is dropped.
    Dead,
}

/// The queue of one connection's replies.
pub(super) struct Outbox {
    queue: RefCell<VecDeque<Piece>>,
    state: Cell<State>,
    idle: Cell<bool>,
    changed: Event,
    sent: Cell<u64>,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            queue: RefCell::new(VecDeque::new()),
            state: Cell::new(State::Open),
            idle: Cell::new(false),
            changed: Event::new(),
            sent: Cell::new(0),
        }
    }

    /// Queues the next piece.
    pub(super) fn push(&self, mut piece: Piece) {
        if self.state.get() == State::Dead {
            return;
        }
        if let Some(ticket) = &mut piece.ticket {
            ticket.executed();
        }
        self.queue.borrow_mut().push_back(piece);
        self.wake();
    }

    /// Lets [`Outbox::run`] end when everything is sent.
    pub(super) fn close(&self) {
        if self.state.get() == State::Open {
            self.state.set(State::Closing);
        }
        self.wake();
    }

    /// Gives up everything that is queued or will be.
    pub(super) fn kill(&self) {
        self.state.set(State::Dead);
        let dropped = self.queue.take();
        drop(dropped);
        self.wake();
    }

    /// Bytes sent so far: whether the client reads.
    pub(super) fn sent(&self) -> u64 {
        self.sent.get()
    }

    fn wake(&self) {
        if self.idle.replace(false) {
            self.changed.notify_all();
        }
    }

    /// Sends what is queued until closed, killed, or the peer is gone.
    pub(super) async fn run(&self, file: &File) -> io::Result<()> {
        let heads = Iov::alloc(BATCH_PIECES * MAX_HEAD);
        let mut batch = Vec::with_capacity(BATCH_PIECES);
        let mut bytes = Vec::with_capacity(BATCH_PIECES * MAX_HEAD);
        loop {
            self.take(&mut batch);
            if batch.is_empty() {
                match self.state.get() {
                    State::Open => {
                        self.idle.set(true);
                        self.changed.wait().await;
                        continue;
                    }
                    State::Closing | State::Dead => return Ok(()),
                }
            }
            let mut left = gather(&batch, &heads, &mut bytes);
            while !left.is_empty() {
                let sent = match file.send(&left).await {
                    Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                    other => other,
                };
                match sent {
                    Ok(sent) => {
                        self.sent.set(self.sent.get() + sent as u64);
                        left = left.slice(sent..left.len());
                    }
                    Err(error) => {
                        self.kill();
                        return Err(error);
                    }
                }
            }
            batch.clear();
        }
    }

    fn take(&self, batch: &mut Vec<Piece>) {
        let mut queue = self.queue.borrow_mut();
        let mut bytes = 0;
        while batch.len() < BATCH_PIECES && bytes < BATCH_BYTES {
            let Some(piece) = queue.pop_front() else { break };
            bytes += piece.body.len();
            batch.push(piece);
        }
    }
}

/// One list of everything in `batch`. `heads` holds the heads from here until it has been sent.
fn gather(batch: &[Piece], heads: &Iov, bytes: &mut Vec<u8>) -> Iov {
    bytes.clear();
    for piece in batch {
        bytes.extend_from_slice(piece.head.as_bytes());
    }
    heads.write(0, bytes);
    let mut message = Iov::empty();
    let (mut from, mut to) = (0, 0);
    for piece in batch {
        to += piece.head.as_bytes().len();
        if !piece.body.is_empty() {
            message.append(&heads.slice(from..to));
            message.append(&piece.body);
            from = to;
        }
    }
    if from < to {
        message.append(&heads.slice(from..to));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_without_body_lie_together() {
        let piece = |head, body: &[u8]| Piece { head, body: Iov::from_slice(body), ticket: None };
        let batch = [
            piece(Head::simple(1, None), b""),
            piece(Head::simple(2, None), b""),
            piece(Head::simple(3, None), b"three"),
            piece(Head::simple(4, None), b"four"),
            piece(Head::simple(5, None), b""),
        ];
        let heads = Iov::alloc(BATCH_PIECES * MAX_HEAD);
        let message = gather(&batch, &heads, &mut Vec::new());
        let mut expected = Vec::new();
        for piece in &batch {
            expected.extend(piece.head.as_bytes());
            expected.extend(piece.body.to_vec());
        }
        assert_eq!(message.to_vec(), expected);
        assert_eq!(message.segments(), 5, "one run of three heads, and each body and head after it");
    }
}
