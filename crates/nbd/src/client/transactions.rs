//! Requests under way and their replies, put together from whatever pieces the server sends.
//!
//! **Invariant.** A completion is handed out once for each request, and a read that succeeded has had every byte of its
//! range told exactly once.

use super::ClientError;
use super::handshake::Session;
use crate::proto::{
    ChunkFlags, ChunkKind, Command, CommandFlags, MAX_PAYLOAD, MAX_STRING, NBD_REPLY_TYPE_FLAG_ERROR, NbdError,
};
use crate::reply::{Extent, ReplyHead, decode_extents};
use crate::request::Request;
use crate::wire::Fields;
use std::collections::HashMap;

/// The longest payload of a chunk that is believed, in bytes: the data of the longest read, or as many block descriptors.
const MAX_CHUNK: u32 = MAX_PAYLOAD + MAX_STRING as u32;

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was carried out.
    Done,
    /// What a read found.
    Data {
        /// The bytes, holes filled with zeros.
        bytes: Vec<u8>,
        /// How many of the chunks were holes.
        holes: usize,
        /// Content chunks in all (1 for a simple reply).
        chunks: usize,
    },
    /// What block status found in `base:allocation`.
    Extents(Vec<Extent>),
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The error as it came: an [`NbdError`] from careful servers.
    pub error: u32,
    /// What the server says, often nothing.
    pub message: String,
}

impl Failure {
    /// The error, if it is one of the protocol's.
    pub fn kind(&self) -> Option<NbdError> {
        NbdError::from_wire(self.error)
    }
}

/// A request's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which request.
    pub cookie: u64,
    /// What came of it.
    pub outcome: Result<Answer, Failure>,
}

/// A request that waits for (more of) its reply.
#[derive(Debug)]
struct Pending {
    command: Command,
    offset: u64,
    length: u32,
    data: Vec<u8>,
    /// What content chunks have told so far: offsets within the request, not overlapping.
    told: Vec<(u32, u32)>,
    holes: usize,
    extents: Option<Vec<Extent>>,
    failure: Option<Failure>,
}

/// Requests and replies of one connection.
#[derive(Debug)]
pub struct Transactions {
    structured: bool,
    allocation: Option<u32>,
    next: u64,
    pending: HashMap<u64, Pending>,
    /// Received and not yet understood: less than one reply.
    input: Vec<u8>,
}

impl Transactions {
    /// Begins after the handshake.
    pub fn new(session: &Session) -> Self {
        Self {
            structured: session.structured,
            allocation: session.allocation,
            next: 1,
            pending: HashMap::new(),
            input: Vec::new(),
        }
    }

    /// Makes a request to send (its payload, if any, after it). Reads longer than [`MAX_PAYLOAD`] are the caller's to split.
    pub fn begin(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u32) -> Request {
        let cookie = self.next;
        self.next += 1;
        if command != Command::Disc {
            let (data, told) = (Vec::new(), Vec::new());
            let pending = Pending { command, offset, length, data, told, holes: 0, extents: None, failure: None };
            self.pending.insert(cookie, pending);
        }
        Request { flags, command: command.to_wire(), cookie, offset, length }
    }

    /// Requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Takes in what was received and appends the requests that have ended.
    pub fn receive(&mut self, bytes: &[u8], completions: &mut Vec<Completion>) -> Result<(), ClientError> {
        self.input.extend_from_slice(bytes);
        let mut input = std::mem::take(&mut self.input);
        let mut at = 0;
        while let Some((taken, completion)) = self.reply(&input[at..])? {
            at += taken;
            completions.extend(completion);
        }
        input.drain(..at);
        self.input = input;
        Ok(())
    }

    /// One reply or chunk off the front of `input`, if it is there whole.
    fn reply(&mut self, input: &[u8]) -> Result<Option<(usize, Option<Completion>)>, ClientError> {
        let head = ReplyHead::decode(input).map_err(|_| ClientError::Protocol("bad reply magic"))?;
        let Some((head, len)) = head else { return Ok(None) };
        match head {
            ReplyHead::Simple { cookie, error } => self.simple(cookie, error, &input[len..], len),
            ReplyHead::Chunk { cookie, flags, kind, length } => {
                if !self.structured {
                    return Err(ClientError::Protocol("a structured reply nobody asked for"));
                }
                if length > MAX_CHUNK {
                    return Err(ClientError::Protocol("an overlong chunk"));
                }
                let end = len + length as usize;
                let Some(payload) = input.get(len..end) else { return Ok(None) };
                Ok(Some((end, self.chunk(cookie, flags, kind, payload)?)))
            }
        }
    }

    fn simple(
        &mut self,
        cookie: u64,
        error: u32,
        rest: &[u8],
        head: usize,
    ) -> Result<Option<(usize, Option<Completion>)>, ClientError> {
        let pending = self.pending.get(&cookie).ok_or(ClientError::Protocol("a reply to nothing"))?;
        let reads = matches!(pending.command, Command::Read | Command::BlockStatus);
        if (self.structured && reads) || !pending.told.is_empty() {
            return Err(ClientError::Protocol("a simple reply where a structured one is due"));
        }
        let (outcome, len) = if error != 0 {
            (Err(Failure { error, message: String::new() }), 0)
        } else if pending.command == Command::Read {
            let Some(data) = rest.get(..pending.length as usize) else { return Ok(None) };
            (Ok(Answer::Data { bytes: data.to_vec(), holes: 0, chunks: 1 }), data.len())
        } else {
            (Ok(Answer::Done), 0)
        };
        self.pending.remove(&cookie);
        Ok(Some((head + len, Some(Completion { cookie, outcome }))))
    }

    fn chunk(
        &mut self,
        cookie: u64,
        flags: ChunkFlags,
        kind: u16,
        payload: &[u8],
    ) -> Result<Option<Completion>, ClientError> {
        let allocation = self.allocation;
        let pending = self.pending.get_mut(&cookie).ok_or(ClientError::Protocol("a reply to nothing"))?;
        let done = flags.contains(ChunkFlags::DONE);
        match ChunkKind::from_wire(kind) {
            Some(ChunkKind::None) if done && payload.is_empty() => {}
            Some(ChunkKind::OffsetData) if pending.command == Command::Read => pending.content(payload)?,
            Some(ChunkKind::OffsetHole) if pending.command == Command::Read => pending.hole(payload)?,
            Some(ChunkKind::BlockStatus) if pending.command == Command::BlockStatus => {
                pending.status(payload, allocation)?;
            }
            _ if kind & NBD_REPLY_TYPE_FLAG_ERROR != 0 => pending.error(payload)?,
            _ => return Err(ClientError::Protocol("a chunk that does not belong here")),
        }
        if !done {
            return Ok(None);
        }
        let Some(pending) = self.pending.remove(&cookie) else { return Ok(None) };
        Ok(Some(Completion { cookie, outcome: pending.end()? }))
    }
}

impl Pending {
    /// Notes that a content chunk tells `len` bytes at `offset`, and says where in the request that is.
    fn tell(&mut self, offset: u64, len: u32) -> Result<std::ops::Range<usize>, ClientError> {
        const OUTSIDE: ClientError = ClientError::Protocol("content outside of the request");
        let start = offset.checked_sub(self.offset).and_then(|at| u32::try_from(at).ok()).ok_or(OUTSIDE)?;
        let end = start.checked_add(len).filter(|&end| end <= self.length && len > 0).ok_or(OUTSIDE)?;
        if self.told.iter().any(|&(from, to)| start < to && from < end) {
            return Err(ClientError::Protocol("content that was told before"));
        }
        self.told.push((start, end));
        if self.data.is_empty() {
            self.data = vec![0; self.length as usize];
        }
        Ok(start as usize..end as usize)
    }

    fn content(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        let mut fields = Fields::new(payload);
        let offset = fields.u64().ok_or(ClientError::Protocol("a malformed NBD_REPLY_TYPE_OFFSET_DATA"))?;
        let range = self.tell(offset, fields.rest().len() as u32)?;
        self.data[range].copy_from_slice(fields.rest());
        Ok(())
    }

    fn hole(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        let mut fields = Fields::new(payload);
        let (Some(offset), Some(len), true) = (fields.u64(), fields.u32(), fields.is_empty()) else {
            return Err(ClientError::Protocol("a malformed NBD_REPLY_TYPE_OFFSET_HOLE"));
        };
        self.tell(offset, len)?;
        self.holes += 1;
        Ok(())
    }

    fn status(&mut self, payload: &[u8], allocation: Option<u32>) -> Result<(), ClientError> {
        const MALFORMED: ClientError = ClientError::Protocol("a malformed NBD_REPLY_TYPE_BLOCK_STATUS");
        let mut fields = Fields::new(payload);
        let context = fields.u32().ok_or(MALFORMED)?;
        let mut extents = decode_extents(fields.rest()).ok_or(MALFORMED)?;
        let before: u64 = extents.iter().rev().skip(1).map(|extent| u64::from(extent.len)).sum();
        // Only the last may reach past what was asked for; it is cut there.
        let left = u64::from(self.length).checked_sub(before).filter(|left| *left > 0).ok_or(MALFORMED)?;
        if Some(context) != allocation || self.extents.is_some() {
            return Err(MALFORMED);
        }
        if let Some(last) = extents.last_mut() {
            last.len = last.len.min(left as u32);
        }
        self.extents = Some(extents);
        Ok(())
    }

    fn error(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        const MALFORMED: ClientError = ClientError::Protocol("a malformed error chunk");
        let mut fields = Fields::new(payload);
        let error = fields.u32().filter(|&error| error != 0).ok_or(MALFORMED)?;
        let len = fields.u16().ok_or(MALFORMED)?;
        let message = fields.bytes(usize::from(len)).ok_or(MALFORMED)?;
        let message = String::from_utf8_lossy(message).into_owned();
        self.failure.get_or_insert(Failure { error, message });
        Ok(())
    }

    fn end(self) -> Result<Result<Answer, Failure>, ClientError> {
        if let Some(failure) = self.failure {
            return Ok(Err(failure));
        }
        Ok(Ok(match self.command {
            Command::Read => {
                let told: u64 = self.told.iter().map(|&(from, to)| u64::from(to - from)).sum();
                if told != u64::from(self.length) {
                    return Err(ClientError::Protocol("a read's reply ends early"));
                }
                Answer::Data { bytes: self.data, holes: self.holes, chunks: self.told.len() }
            }
            Command::BlockStatus => {
                Answer::Extents(self.extents.ok_or(ClientError::Protocol("a block status without extents"))?)
            }
            _ => Answer::Done,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::AllocationState;
    use crate::reply::{Head, encode_extents};
    use proptest::prelude::*;

    fn transactions(structured: bool) -> Transactions {
        Transactions::new(&Session { structured, allocation: Some(1), ..Session::default() })
    }

    fn receive(transactions: &mut Transactions, bytes: &[u8]) -> Result<Vec<Completion>, ClientError> {
        let mut completions = Vec::new();
        transactions.receive(bytes, &mut completions).map(|()| completions)
    }

    fn read(transactions: &mut Transactions) -> u64 {
        transactions.begin(Command::Read, CommandFlags::empty(), 1000, 8).cookie
    }

    #[test]
    fn simple_replies_bring_data() {
        let mut client = transactions(false);
        let (first, second) = (read(&mut client), read(&mut client));
        let mut bytes = Head::simple(second, None).as_bytes().to_vec();
        bytes.extend(*b"8 bytes!");
        bytes.extend(Head::simple(first, Some(NbdError::Io)).as_bytes());
        let completions = receive(&mut client, &bytes).unwrap();
        let data = Answer::Data { bytes: b"8 bytes!".to_vec(), holes: 0, chunks: 1 };
        assert_eq!(completions[0], Completion { cookie: second, outcome: Ok(data) });
        assert_eq!(completions[1].outcome.as_ref().unwrap_err().kind(), Some(NbdError::Io));
        assert_eq!(client.in_flight(), 0);
    }

    #[test]
    fn chunks_may_come_in_any_order_and_any_pieces() {
        for piece in 1..60 {
            let mut client = transactions(true);
            let cookie = read(&mut client);
            let mut bytes = Head::hole(cookie, 1004, 4, false).as_bytes().to_vec();
            bytes.extend(Head::data(cookie, 1000, 4, true).as_bytes());
            bytes.extend(*b"data");
            let completions: Vec<_> =
                bytes.chunks(piece).flat_map(|bytes| receive(&mut client, bytes).unwrap()).collect();
            let data = Answer::Data { bytes: b"data\0\0\0\0".to_vec(), holes: 1, chunks: 2 };
            assert_eq!(completions, [Completion { cookie, outcome: Ok(data) }]);
        }
    }

    #[test]
    fn what_the_specification_forbids_is_an_error() {
        type Lie = fn(u64) -> Vec<u8>;
        let lies: [Lie; 7] = [
            |cookie| Head::hole(cookie, 999, 8, true).as_bytes().to_vec(),
            |cookie| Head::hole(cookie, 1001, 8, true).as_bytes().to_vec(),
            |cookie| Head::hole(cookie, 1000, 7, true).as_bytes().to_vec(),
            |cookie| {
                [Head::hole(cookie, 1000, 5, false).as_bytes(), Head::hole(cookie, 1004, 4, true).as_bytes()].concat()
            },
            |cookie| Head::hole(cookie + 1, 1000, 8, true).as_bytes().to_vec(),
            |cookie| Head::none(cookie).as_bytes().to_vec(),
            |cookie| Head::simple(cookie, None).as_bytes().to_vec(),
        ];
        for (which, lie) in lies.into_iter().enumerate() {
            let mut client = transactions(true);
            let cookie = read(&mut client);
            assert!(receive(&mut client, &lie(cookie)).is_err(), "lie {which}");
        }
    }

    #[test]
    fn block_status_and_errors_arrive() {
        let mut client = transactions(true);
        let status = client.begin(Command::BlockStatus, CommandFlags::empty(), 0, 4096).cookie;
        let extents = vec![
            Extent { len: 1024, state: AllocationState::HOLE | AllocationState::ZERO },
            Extent { len: 3072, state: AllocationState::empty() },
        ];
        let mut bytes = Head::status(status, 1, 2, true).as_bytes().to_vec();
        bytes.extend(encode_extents(&extents));
        assert_eq!(receive(&mut client, &bytes).unwrap()[0].outcome, Ok(Answer::Extents(extents)));

        let flush = client.begin(Command::Flush, CommandFlags::empty(), 0, 0).cookie;
        let mut bytes = Head::error(flush, NbdError::NoSpc, "full").as_bytes().to_vec();
        bytes.extend(*b"full");
        let failure = Failure { error: 28, message: "full".into() };
        assert_eq!(receive(&mut client, &bytes).unwrap()[0].outcome, Err(failure));
    }

    #[test]
    fn the_last_extent_may_reach_further_and_is_cut() {
        let extent = |len| Extent { len, state: AllocationState::empty() };
        for (told, understood) in [
            (vec![extent(1024), extent(9000)], Some(vec![extent(1024), extent(3072)])),
            (vec![extent(1 << 30)], Some(vec![extent(4096)])),
            (vec![extent(4096), extent(1)], None),
        ] {
            let mut client = transactions(true);
            let status = client.begin(Command::BlockStatus, CommandFlags::empty(), 0, 4096).cookie;
            let mut bytes = Head::status(status, 1, told.len(), true).as_bytes().to_vec();
            bytes.extend(encode_extents(&told));
            let answer = receive(&mut client, &bytes).ok().map(|ended| ended[0].outcome.clone());
            assert_eq!(answer, understood.map(|extents| Ok(Answer::Extents(extents))));
        }
    }

    proptest! {
        #[test]
        fn hostile_servers_cause_no_panic(
            chunks in proptest::collection::vec((1_u64..4, 0_u16..8, any::<bool>(), any::<bool>(), 990_u64..1012, 0_u32..12, 0_usize..20), 0..8),
            tail in proptest::collection::vec(any::<u8>(), 0..30),
        ) {
            let mut client = transactions(true);
            read(&mut client);
            client.begin(Command::BlockStatus, CommandFlags::empty(), 1000, 8);
            client.begin(Command::Write, CommandFlags::empty(), 1000, 8);
            let mut bytes = Vec::new();
            for (cookie, kind, error, done, offset, len, extra) in chunks {
                let mut payload = offset.to_be_bytes().to_vec();
                payload.extend(len.to_be_bytes());
                payload.resize(extra, 1);
                bytes.extend(0x668e_33ef_u32.to_be_bytes());
                bytes.extend(u16::from(done).to_be_bytes());
                bytes.extend((kind | if error { NBD_REPLY_TYPE_FLAG_ERROR } else { 0 }).to_be_bytes());
                bytes.extend(cookie.to_be_bytes());
                bytes.extend((payload.len() as u32).to_be_bytes());
                bytes.extend(payload);
            }
            bytes.extend(tail);
            let _ = receive(&mut client, &bytes);
        }
    }
}
