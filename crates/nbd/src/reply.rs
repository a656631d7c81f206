//! Replies of the transmission phase: the heads that go before a payload, and their reading.
//!
//! **Invariant.** A [`Head`] states the length of exactly the payload it was made for; whoever queues it sends that payload
//! next. Heads are small and live on the stack: the fast path allocates nothing for them.

use super::proto::{
    AllocationState, CHUNK_LEN, ChunkFlags, ChunkKind, NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC, NbdError,
    SIMPLE_REPLY_LEN,
};
use super::wire::Fields;
use std::fmt;

/// The longest head: an `NBD_REPLY_TYPE_OFFSET_HOLE` chunk, which has no payload besides.
pub const MAX_HEAD: usize = CHUNK_LEN + 12;

/// Messages in error chunks are cut to this, in bytes.
pub const MAX_MESSAGE: usize = 256;

/// What goes before a reply's payload.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; MAX_HEAD],
    len: u8,
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?}", self.as_bytes())
    }
}

impl Head {
    fn empty() -> Self {
        Self { bytes: [0; MAX_HEAD], len: 0 }
    }

    /// Every caller puts at most [`MAX_HEAD`] bytes in.
    fn put(mut self, bytes: &[u8]) -> Self {
        let from = usize::from(self.len);
        self.bytes[from..from + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len() as u8;
        self
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// A simple reply; after a read that succeeded its data follow.
    pub fn simple(cookie: u64, error: Option<NbdError>) -> Self {
        Self::empty()
            .put(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(&error.map_or(0, NbdError::to_wire).to_be_bytes())
            .put(&cookie.to_be_bytes())
    }

    fn chunk(cookie: u64, kind: ChunkKind, done: bool, payload: u32) -> Self {
        let flags = if done { ChunkFlags::DONE } else { ChunkFlags::empty() };
        Self::empty()
            .put(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .put(&flags.bits().to_be_bytes())
            .put(&kind.to_wire().to_be_bytes())
            .put(&cookie.to_be_bytes())
            .put(&payload.to_be_bytes())
    }

    /// `NBD_REPLY_TYPE_NONE`: the end of a reply that succeeded.
    pub fn none(cookie: u64) -> Self {
        Self::chunk(cookie, ChunkKind::None, true, 0)
    }

    /// `NBD_REPLY_TYPE_OFFSET_DATA`; `len` bytes of data follow (at most [`super::proto::MAX_PAYLOAD`]).
    pub fn data(cookie: u64, offset: u64, len: u32, done: bool) -> Self {
        Self::chunk(cookie, ChunkKind::OffsetData, done, len + 8).put(&offset.to_be_bytes())
    }

    /// `NBD_REPLY_TYPE_OFFSET_HOLE`: `len` bytes of zeros, not sent.
    pub fn hole(cookie: u64, offset: u64, len: u32, done: bool) -> Self {
        Self::chunk(cookie, ChunkKind::OffsetHole, done, 12).put(&offset.to_be_bytes()).put(&len.to_be_bytes())
    }

    /// `NBD_REPLY_TYPE_BLOCK_STATUS`; [`encode_extents`] of as many `extents` follow.
    pub fn status(cookie: u64, context: u32, extents: usize, done: bool) -> Self {
        let payload = 4 + extents as u32 * 8;
        Self::chunk(cookie, ChunkKind::BlockStatus, done, payload).put(&context.to_be_bytes())
    }

    /// `NBD_REPLY_TYPE_ERROR`, the whole reply; the bytes of [`cut_message`] follow.
    pub fn error(cookie: u64, error: NbdError, message: &str) -> Self {
        let len = cut_message(message).len() as u16;
        Self::chunk(cookie, ChunkKind::Error, true, 6 + u32::from(len))
            .put(&error.to_wire().to_be_bytes())
            .put(&len.to_be_bytes())
    }
}

/// The part of a message that an error chunk carries.
pub fn cut_message(message: &str) -> &str {
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

/// A run of bytes, all in one state, as a metadata context tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u32,
    /// For `base:allocation`; unknown bits are kept.
    pub state: AllocationState,
}

/// Block descriptors on the wire.
pub fn encode_extents(extents: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(extents.len() * 8);
    for extent in extents {
        bytes.extend_from_slice(&extent.len.to_be_bytes());
        bytes.extend_from_slice(&extent.state.bits().to_be_bytes());
    }
    bytes
}

/// Block descriptors from the wire; `None` if there is not a whole number of them, none, or an empty one.
pub fn decode_extents(bytes: &[u8]) -> Option<Vec<Extent>> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(8) {
        return None;
    }
    let mut fields = Fields::new(bytes);
    let mut extents = Vec::with_capacity(bytes.len() / 8);
    while !fields.is_empty() {
        let len = fields.u32().filter(|&len| len > 0)?;
        extents.push(Extent { len, state: AllocationState::from_bits_retain(fields.u32()?) });
    }
    Some(extents)
}

/// A reply's head as a client reads it; the payload is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHead {
    /// A simple reply. Only the request it answers tells whether data follow.
    Simple {
        /// The request's.
        cookie: u64,
        /// 0, or an [`NbdError`] (others are possible from careless servers).
        error: u32,
    },
    /// A chunk of a structured reply.
    Chunk {
        /// The request's.
        cookie: u64,
        /// Unknown ones included.
        flags: ChunkFlags,
        /// A [`ChunkKind`] if it is known.
        kind: u16,
        /// Bytes of payload that follow.
        length: u32,
    },
}

impl ReplyHead {
    /// Reads a head off the front of `bytes` and says how long it was; `Ok(None)` if more bytes are needed. An error
    /// holds what is there in place of a magic.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, u32> {
        let mut fields = Fields::new(bytes);
        let Some(magic) = fields.u32() else { return Ok(None) };
        match magic {
            NBD_SIMPLE_REPLY_MAGIC => {
                let mut read = || Some(Self::Simple { error: fields.u32()?, cookie: fields.u64()? });
                Ok(read().map(|head| (head, SIMPLE_REPLY_LEN)))
            }
            NBD_STRUCTURED_REPLY_MAGIC => {
                let mut read = || {
                    let flags = ChunkFlags::from_bits_retain(fields.u16()?);
                    let kind = fields.u16()?;
                    Some(Self::Chunk { flags, kind, cookie: fields.u64()?, length: fields.u32()? })
                };
                Ok(read().map(|head| (head, CHUNK_LEN)))
            }
            other => Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(head: Head) -> (ReplyHead, Vec<u8>) {
        let (decoded, len) = ReplyHead::decode(head.as_bytes()).unwrap().unwrap();
        (decoded, head.as_bytes()[len..].to_vec())
    }

    #[test]
    fn simple_replies_carry_error_and_cookie() {
        let (head, rest) = decoded(Head::simple(0x1122_3344_5566_7788, Some(NbdError::NoSpc)));
        assert_eq!(head, ReplyHead::Simple { cookie: 0x1122_3344_5566_7788, error: 28 });
        assert!(rest.is_empty());
        assert_eq!(Head::simple(5, None).as_bytes(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
    }

    #[test]
    fn chunks_state_the_length_of_their_payload() {
        for (head, following, kind) in [
            (Head::none(9), 0, ChunkKind::None),
            (Head::data(9, 4096, 512, true), 512, ChunkKind::OffsetData),
            (Head::hole(9, 4096, 512, true), 0, ChunkKind::OffsetHole),
            (Head::status(9, 1, 3, true), 24, ChunkKind::BlockStatus),
            (Head::error(9, NbdError::Io, "so sad"), 6, ChunkKind::Error),
        ] {
            let (decoded, inline) = decoded(head);
            let ReplyHead::Chunk { cookie, flags, kind: k, length } = decoded else { panic!("not a chunk") };
            assert_eq!((cookie, flags, k), (9, ChunkFlags::DONE, kind.to_wire()));
            assert_eq!(length as usize, inline.len() + following, "{kind:?}");
        }
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let long = "ä".repeat(MAX_MESSAGE);
        assert_eq!(cut_message(&long).len(), MAX_MESSAGE);
        let odd = format!("x{long}");
        assert_eq!(cut_message(&odd).len(), MAX_MESSAGE - 1);
    }

    #[test]
    fn extents_are_whole_and_not_empty() {
        assert_eq!(decode_extents(&[]), None);
        assert_eq!(decode_extents(&[0; 8]), None);
        assert_eq!(decode_extents(&[1; 9]), None);
    }

    proptest! {
        #[test]
        fn extents_come_back_as_they_went(list in proptest::collection::vec((1_u32.., 0_u32..4), 1..20)) {
            let extents: Vec<Extent> = list
                .into_iter()
                .map(|(len, state)| Extent { len, state: AllocationState::from_bits_retain(state) })
                .collect();
            prop_assert_eq!(decode_extents(&encode_extents(&extents)), Some(extents));
        }

        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64), simple: bool) {
            let magic = if simple { NBD_SIMPLE_REPLY_MAGIC } else { NBD_STRUCTURED_REPLY_MAGIC };
            let _ = ReplyHead::decode(&bytes);
            let mut begun = magic.to_be_bytes().to_vec();
            begun.extend(&bytes);
            let head = ReplyHead::decode(&begun).unwrap();
            let needed = if simple { SIMPLE_REPLY_LEN } else { CHUNK_LEN };
            prop_assert_eq!(head.is_some(), begun.len() >= needed);
        }
    }
}
