//! Carrying requests out, each in a task of its own: none waits for another.
//!
//! **Invariant.** Every request that comes here has passed [`nbd::request::Request::check`] and ends in exactly one
//! reply, whose last piece carries the request's ticket.

use super::connection::Transmission;
use super::flight::Ticket;
use super::outbox::Piece;
use disk::{Disk, ErrorKind};
use layout::{GuestOffset, GuestRange};
use nbd::handshake::ALLOCATION_CONTEXT;
use nbd::proto::{AllocationState, Command, CommandFlags, NbdError};
use nbd::reply::{Extent, Head, cut_message, encode_extents};
use nbd::request::Request;
use ring::Iov;
use std::rc::Rc;

/// Zeros within a structured read are looked for in units of this many bytes, larger in very long reads.
const ZERO_UNIT: usize = 64 << 10;

/// A read is cut into at most this many units.
const ZERO_UNITS: usize = 64;

/// Extents that one block status tells at most. The client asks again for the rest.
const MAX_EXTENTS: usize = 1024;

/// Runs that one block status looks at at most: neighbours that are alike count once only in the reply.
const MAX_RUNS: usize = 4096;

/// Other tasks get their turn after this many runs.
const RUNS_PER_TURN: usize = 256;

/// `NBD_CMD_READ`.
pub(super) async fn read(to: Rc<Transmission>, request: Request, ticket: Ticket) {
    let data = Iov::alloc(request.length as usize);
    match to.disk.read(GuestOffset(request.offset), data.clone()).await {
        Ok(()) if !to.agreement.structured => to.send(Head::simple(request.cookie, None), data, Some(ticket)),
        Ok(()) => content(&to, &request, &data, ticket),
        Err(error) => fail(&to, &request, ticket, &error),
    }
}

/// Queues what a structured read found: zeros as holes, which costs a look at memory and saves sending them.
fn content(to: &Transmission, request: &Request, data: &Iov, ticket: Ticket) {
    let (cookie, len) = (request.cookie, data.len());
    if len == 0 {
        return to.send(Head::none(cookie), Iov::empty(), Some(ticket));
    }
    if len <= ZERO_UNIT || request.flags.contains(CommandFlags::DF) {
        return if data.is_zero() {
            to.send(Head::hole(cookie, request.offset, request.length, true), Iov::empty(), Some(ticket));
        } else {
            to.send(Head::data(cookie, request.offset, request.length, true), data.clone(), Some(ticket));
        };
    }
    let unit = ZERO_UNIT.max(len.div_ceil(ZERO_UNITS).next_multiple_of(4096));
    let zero_at = |at: usize| data.slice(at..len.min(at + unit)).is_zero();
    let mut ticket = Some(ticket);
    let (mut from, mut zero) = (0, zero_at(0));
    while from < len {
        let mut end = from + unit;
        let mut next = zero;
        while end < len {
            next = zero_at(end);
            if next != zero {
                break;
            }
            end += unit;
        }
        let end = end.min(len);
        let done = end == len;
        let (offset, run) = (request.offset + from as u64, (end - from) as u32);
        let last = if done { ticket.take() } else { None };
        if zero {
            to.send(Head::hole(cookie, offset, run, done), Iov::empty(), last);
        } else {
            to.send(Head::data(cookie, offset, run, done), data.slice(from..end), last);
        }
        (from, zero) = (end, next);
    }
}

/// `NBD_CMD_WRITE`.
pub(super) async fn write(to: Rc<Transmission>, request: Request, data: Iov, ticket: Ticket) {
    let outcome = to.disk.write(GuestOffset(request.offset), data, request.fua() || to.write_through).await;
    finish(&to, &request, ticket, outcome);
}

/// Everything without data.
pub(super) async fn other(to: Rc<Transmission>, command: Command, request: Request, ticket: Ticket) {
    let (disk, fua) = (&to.disk, request.fua() || to.write_through);
    let range = GuestRange::new(GuestOffset(request.offset), u64::from(request.length));
    let outcome = match command {
        Command::Flush => disk.flush().await,
        _ if range.is_empty() => Ok(()),
        Command::Trim => trim(disk, range, fua).await,
        Command::WriteZeroes => {
            let keep = request.flags.contains(CommandFlags::NO_HOLE);
            let fast = request.flags.contains(CommandFlags::FAST_ZERO);
            // Giving space back is a change of tables or of a file's extents. Keeping it may mean writing zeros out.
            let outcome = if fast && keep { None } else { Some(disk.write_zeroes(range, !keep, fua).await) };
            match outcome {
                Some(Err(error)) if !fast || error.kind() != ErrorKind::Unsupported => Err(error),
                Some(Ok(())) => Ok(()),
                _ => return refuse(&to, &request, ticket, NbdError::NotSup, "not faster than writing zeros"),
            }
        }
        Command::Cache => disk.prefetch(range).await,
        Command::BlockStatus => return block_status(&to, &request, range, ticket).await,
        // These do not come here.
        Command::Read | Command::Write | Command::Disc => Ok(()),
    };
    finish(&to, &request, ticket, outcome);
}

async fn trim(disk: &Disk, range: GuestRange, fua: bool) -> disk::Result<()> {
    disk.discard(range).await?;
    if fua { disk.flush().await } else { Ok(()) }
}

async fn block_status(to: &Transmission, request: &Request, range: GuestRange, ticket: Ticket) {
    let limit = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { MAX_EXTENTS };
    match extents(&to.disk, range, limit).await {
        Ok(extents) => {
            let head = Head::status(request.cookie, ALLOCATION_CONTEXT, extents.len(), true);
            to.send(head, Iov::from_slice(&encode_extents(&extents)), Some(ticket));
        }
        Err(error) => fail(to, request, ticket, &error),
    }
}

/// The first runs of `range`, at most `limit`, neighbours that are alike in one.
async fn extents(disk: &Disk, range: GuestRange, limit: usize) -> disk::Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut left = range;
    for turn in 1..=MAX_RUNS {
        if left.is_empty() {
            break;
        }
        let status = disk.status(left).await?;
        // Never 0, which would not end, and never more than was asked for, which fits the wire's 32 bits.
        let len = status.len.clamp(1, left.len());
        let mut state = AllocationState::empty();
        state.set(AllocationState::ZERO, status.zero);
        // Bytes are stored where something is allocated and not known to be zeros.
        state.set(AllocationState::HOLE, !status.allocated || status.zero);
        let told = extents.len();
        match extents.last_mut() {
            Some(last) if last.state == state => last.len += len as u32,
            _ if told == limit => break,
            _ => extents.push(Extent { len: len as u32, state }),
        }
        left = left.skip(len);
        if turn % RUNS_PER_TURN == 0 {
            ring::yield_now().await;
        }
    }
    Ok(extents)
}

fn finish(to: &Transmission, request: &Request, ticket: Ticket, outcome: disk::Result<()>) {
    match outcome {
        Ok(()) => to.send(Head::simple(request.cookie, None), Iov::empty(), Some(ticket)),
        Err(error) => fail(to, request, ticket, &error),
    }
}

/// The disk's error goes to our log; the client, who may be a stranger, learns its kind, no paths.
fn fail(to: &Transmission, request: &Request, ticket: Ticket, error: &disk::Error) {
    let Request { command, offset, length, .. } = request;
    let command = Command::from_wire(*command);
    tracing::warn!(disk = to.disk.name(), ?command, offset, length, %error, "NBD request failed");
    let error = NbdError::from_errno(error.errno());
    refuse(to, request, ticket, error, error.message());
}

/// Queues an error as the reply.
pub(super) fn refuse(to: &Transmission, request: &Request, ticket: Ticket, error: NbdError, why: &str) {
    if to.agreement.structured {
        let body = Iov::from_slice(cut_message(why).as_bytes());
        to.outbox.push(Piece { head: Head::error(request.cookie, error, why), body, ticket: Some(ticket) });
    } else {
        to.send(Head::simple(request.cookie, Some(error)), Iov::empty(), Some(ticket));
    }
}
