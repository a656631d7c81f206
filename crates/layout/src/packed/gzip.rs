//! gzip members whose header has an extra field that helps to find one's way in the file.

use crate::field::{Error, ErrorKind};
use crate::number::{le16, le32};

/// What a member begins with.
pub const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

/// The most bytes that a member's header is looked for in: an extra field and names.
pub const HEADER_MOST: usize = 72 << 10;

/// Bytes of the header in front of the extra field, with its length.
const FIXED: usize = 12;

/// Bytes of the header of a BGZF block, as every tool writes it.
pub const BGZF_HEADER: usize = 18;

/// Bytes behind a member's stream: its checksum, and its length.
pub const TRAILER: usize = 8;

/// The block without content that a BGZF file ends with.
pub const BGZF_END: [u8; 28] =
    [31, 139, 8, 4, 0, 0, 0, 0, 0, 255, 6, 0, 66, 67, 2, 0, 27, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const FLAG_CHECKSUM: u8 = 2;
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
const FLAG_COMMENT: u8 = 16;

/// What a member's extra field says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extra {
    /// BGZF: the whole member has so many bytes.
    Block(u32),
    /// dictzip: chunks of so many bytes each (the last may have fewer), and how many bytes each has packed.
    Chunks(u32, Vec<u16>),
    /// Nothing that is known.
    None,
}

/// A member's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its bytes: the stream follows.
    pub len: usize,
    /// What the extra field says.
    pub extra: Extra,
}

impl Header {
    /// From the first bytes of a member at `base`: [`HEADER_MOST`], or all there are.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        let fail = |field, at: usize, value: u64, why: &'static str| {
            Err(Error::new(ErrorKind::Invalid, field, base + at as u64, value, why))
        };
        if bytes.len() < FIXED || !bytes.starts_with(&MAGIC) {
            return fail("ID1", 0, le16(bytes, 0).into(), "no gzip member");
        }
        let flags = bytes[3];
        let mut at = 10;
        let mut extra = Extra::None;
        if flags & FLAG_EXTRA != 0 {
            let len = usize::from(le16(bytes, 10));
            let Some(field) = bytes.get(FIXED..FIXED + len) else {
                return fail("XLEN", 10, len as u64, "the header is cut off");
            };
            extra = subfields(field);
            at = FIXED + len;
        }
        for _ in 0..(flags & (FLAG_NAME | FLAG_COMMENT)).count_ones() {
            let end = bytes.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == 0));
            let Some(len) = end else { return fail("FNAME", at, 0, "the name or comment has no end") };
            at += len + 1;
        }
        if flags & FLAG_CHECKSUM != 0 {
            at += 2;
        }
        Ok(Self { len: at, extra })
    }
}

/// What an extra field says.
fn subfields(mut field: &[u8]) -> Extra {
    while let [a, b, _, _, ..] = *field {
        let len = usize::from(le16(field, 2));
        let Some(content) = field.get(4..4 + len) else { break };
        match [a, b] {
            [b'B', b'C'] if len == 2 => return Extra::Block(u32::from(le16(content, 0)) + 1),
            [b'R', b'A'] if len >= 6 && le16(content, 0) == 1 => {
                let (chunk, count) = (le16(content, 2), usize::from(le16(content, 4)));
                let sizes = content.get(6..).unwrap_or_default().as_chunks().0;
                if sizes.len() >= count && chunk > 0 {
                    let sizes = sizes[..count].iter().map(|size| u16::from_le_bytes(*size)).collect();
                    return Extra::Chunks(chunk.into(), sizes);
                }
            }
            _ => {}
        }
        field = &field[4 + len..];
    }
    Extra::None
}

/// What lies between two BGZF blocks' streams: how many bytes the first one unpacks to, from its [`TRAILER`].
pub fn unpacked_len(trailer: &[u8]) -> u32 {
    le32(trailer, 4)
}

/// The checksum in a [`TRAILER`].
pub fn checksum(trailer: &[u8]) -> u32 {
    le32(trailer, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(flags: u8, extra: &[u8], rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 3];
        if flags & FLAG_EXTRA != 0 {
            bytes.extend((extra.len() as u16).to_le_bytes());
            bytes.extend(extra);
        }
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn extra_fields_are_found_among_others() {
        let block = Header::decode(&BGZF_END, 0).unwrap();
        assert_eq!(block, Header { len: BGZF_HEADER, extra: Extra::Block(28) });
        let extra = b"XY\x03\0abcBC\x02\0\x1b\0";
        assert_eq!(Header::decode(&member(4, extra, b"..."), 0).unwrap().extra, Extra::Block(28));
        let extra = b"RA\x0a\0\x01\0\x00\x80\x02\0\x10\0\x20\0";
        let header = Header::decode(&member(4 | 8 | 2, extra, b"name\0..stream"), 0).unwrap();
        assert_eq!(header, Header { len: 12 + 14 + 5 + 2, extra: Extra::Chunks(0x8000, vec![16, 32]) });
        assert_eq!(Header::decode(&member(0, b"", b"stream"), 0).unwrap(), Header { len: 10, extra: Extra::None });
        for odd in
            [&b"RA\x0a\0\x01\0\x00\x80\x03\0\x10\0\x20\0"[..], b"RA\x06\0\x01\0\0\0\0\0", b"BC\x03\0abc", b"BC\xff\0a"]
        {
            assert_eq!(Header::decode(&member(4, odd, b"..."), 0).unwrap().extra, Extra::None);
        }
        assert_eq!(Header::decode(&member(8, b"", b"name"), 0).unwrap_err().field(), "FNAME");
        assert_eq!(Header::decode(b"PK..........", 0).unwrap_err().field(), "ID1");
    }

    proptest! {
        #[test]
        fn any_header_is_answered(flags in any::<u8>(), rest in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut bytes = vec![0x1f, 0x8b, 8, flags];
            bytes.extend(rest);
            let _ = Header::decode(&bytes, 0);
        }
    }
}
