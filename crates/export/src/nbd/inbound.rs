//! Requests on their way in.
//!
//! **Invariant.** Between calls the buffer holds only bytes that have not been handed out, in the order of the stream.
//!
//! One receive fetches as many small requests as have arrived. A payload's part that came along is copied once, to aligned
//! memory; the rest of it is received straight into place, together with whatever follows it.

use nbd::proto::REQUEST_LEN;
use ring::{File, Iov};
use std::io;

/// Room for a few dozen small writes with their payloads.
const BUFFER: usize = 160 << 10;

/// Payloads from this length on are worth not copying.
const LARGE: usize = 32 << 10;

/// What is received beyond a large payload: the next requests' heads, little of their payloads.
const LARGE_WINDOW: usize = 512;

/// Payload that is not wanted is received in pieces of this length.
const DISCARD: usize = 64 << 10;

/// The receiving half of a connection in its transmission phase.
pub(super) struct Inbound {
    file: File,
    buffer: Iov,
    start: usize,
    end: usize,
    /// How much to receive at once.
    window: usize,
}

impl Inbound {
    /// `early` is what came along with the handshake.
    pub(super) fn new(file: File, early: &[u8]) -> Self {
        let buffer = Iov::alloc(BUFFER.max(early.len()));
        buffer.write(0, early);
        Self { file, buffer, start: 0, end: early.len(), window: BUFFER }
    }

    /// The next request's head. `None` where the stream ends between requests; while `draining` also where nothing more
    /// has been received already.
    pub(super) async fn head(&mut self, draining: impl Fn() -> bool) -> io::Result<Option<[u8; REQUEST_LEN]>> {
        while self.end - self.start < REQUEST_LEN {
            if draining() {
                return Ok(None);
            }
            // Fewer bytes than a head are left over: they move to the front, so that all of the buffer is free.
            let mut partial = [0; REQUEST_LEN];
            let held = self.end - self.start;
            self.buffer.read(self.start, &mut partial[..held]);
            self.buffer.write(0, &partial[..held]);
            (self.start, self.end) = (0, held);
            let room = self.buffer.len().min(held + self.window);
            match self.file.recv(&self.buffer.slice(held..room)).await? {
                0 if held == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => self.end += received,
            }
        }
        let mut head = [0; REQUEST_LEN];
        self.buffer.read(self.start, &mut head);
        self.start += REQUEST_LEN;
        Ok(Some(head))
    }

    /// The next `len` bytes, in aligned memory of their own. The caller bounds `len`.
    pub(super) async fn payload(&mut self, len: usize) -> io::Result<Iov> {
        self.window = if len >= LARGE { LARGE_WINDOW } else { self.buffer.len() };
        let payload = Iov::alloc(len);
        let mut have = len.min(self.end - self.start);
        if have > 0 {
            payload.slice(0..have).copy_from(&self.buffer.slice(self.start..self.start + have));
            self.start += have;
        }
        while have < len {
            // The buffer is empty now. What comes after the payload lands there.
            (self.start, self.end) = (0, 0);
            let mut into = payload.slice(have..len);
            into.append(&self.buffer.slice(0..self.window));
            match self.file.recv(&into).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => {
                    self.end = received.saturating_sub(len - have);
                    have = len.min(have + received);
                }
            }
        }
        Ok(payload)
    }

    /// Lets the next `len` bytes pass by if they have been received already.
    pub(super) fn skip(&mut self, len: usize) -> bool {
        let there = len <= self.end - self.start;
        if there {
            self.start += len;
        }
        there
    }

    /// Lets the next `len` bytes pass by.
    pub(super) async fn discard(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let piece = len.min(DISCARD);
            self.payload(piece).await?;
            len -= piece;
        }
        Ok(())
    }
}
