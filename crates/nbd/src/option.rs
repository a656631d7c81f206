//! Options of the handshake: what they and their replies carry, as both sides write and read it.
//!
//! **Invariant.** Reading never takes more than the option's own data, and what it yields is no larger than that.

use super::proto::{
    IHAVEOPT, InfoKind, MAX_STRING, NBD_REP_MAGIC, OPTION_LEN, OPTION_REPLY_LEN, OptionReplyKind, TransmissionFlags,
};
use super::wire::Fields;

/// The head of an option: the number as it came, and the length of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    /// The option, known or not.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHead {
    /// From the front of `bytes`; `Ok(None)` if more are needed. An error holds what is there in place of `IHAVEOPT`.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, u64> {
        let mut fields = Fields::new(bytes);
        let Some(magic) = fields.u64() else { return Ok(None) };
        if magic != IHAVEOPT {
            return Err(magic);
        }
        let mut read = || Some(Self { option: fields.u32()?, length: fields.u32()? });
        Ok(read())
    }
}

/// Appends an option with its data.
pub fn encode_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.reserve(OPTION_LEN + data.len());
    out.extend_from_slice(&IHAVEOPT.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// The head of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHead {
    /// The option it answers.
    pub option: u32,
    /// An [`OptionReplyKind`] if it is known.
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReplyHead {
    /// From the front of `bytes`; `Ok(None)` if more are needed. An error holds what is there in place of the magic.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, u64> {
        let mut fields = Fields::new(bytes);
        let Some(magic) = fields.u64() else { return Ok(None) };
        if magic != NBD_REP_MAGIC {
            return Err(magic);
        }
        let mut read = || Some(Self { option: fields.u32()?, kind: fields.u32()?, length: fields.u32()? });
        Ok(read())
    }
}

/// Appends a reply to an option.
pub fn encode_option_reply(out: &mut Vec<u8>, option: u32, kind: OptionReplyKind, data: &[u8]) {
    out.reserve(OPTION_REPLY_LEN + data.len());
    out.extend_from_slice(&NBD_REP_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_wire().to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// A string of the protocol: UTF-8, no NUL, at most [`MAX_STRING`] bytes.
pub fn decode_name(bytes: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(bytes).ok()?;
    (name.len() <= MAX_STRING && !name.contains('\0')).then_some(name)
}

fn encode_string(out: &mut Vec<u8>, string: &str) {
    out.extend_from_slice(&(string.len() as u32).to_be_bytes());
    out.extend_from_slice(string.as_bytes());
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    /// The export.
    pub name: &'a str,
    /// What the client wants to know, unknown kinds included.
    pub wants: Vec<u16>,
}

impl<'a> InfoQuery<'a> {
    /// From the option's data, all of it.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields::new(data);
        let name = decode_name(fields.string()?)?;
        let count = fields.u16()?;
        let wants = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
        fields.is_empty().then_some(Self { name, wants })
    }

    /// The option's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        encode_string(&mut data, self.name);
        data.extend_from_slice(&(self.wants.len() as u16).to_be_bytes());
        for want in &self.wants {
            data.extend_from_slice(&want.to_be_bytes());
        }
        data
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery<'a> {
    /// The export.
    pub name: &'a str,
    /// Names of contexts, or patterns.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaQuery<'a> {
    /// From the option's data, all of it.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields::new(data);
        let name = decode_name(fields.string()?)?;
        let count = fields.u32()?;
        // Each query takes four bytes at least: a count that claims more ends early, having allocated nothing for it.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(decode_name(fields.string()?)?);
        }
        fields.is_empty().then_some(Self { name, queries })
    }

    /// The option's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        encode_string(&mut data, self.name);
        data.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            encode_string(&mut data, query);
        }
        data
    }
}

/// What a client should know of request sizes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Offsets and lengths are a multiple of this.
    pub minimum: u32,
    /// Multiples of this are fast.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

/// Data of an `NBD_REP_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// `NBD_INFO_EXPORT`: size in bytes and transmission flags.
    Export(u64, TransmissionFlags),
    /// `NBD_INFO_NAME`: the name the server itself uses.
    Name(&'a str),
    /// `NBD_INFO_DESCRIPTION`
    Description(&'a str),
    /// `NBD_INFO_BLOCK_SIZE`
    BlockSize(BlockSize),
}

impl<'a> Info<'a> {
    /// The reply's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        let mut put = |kind: InfoKind, parts: &[&[u8]]| {
            data.extend_from_slice(&kind.to_wire().to_be_bytes());
            data.extend(parts.concat());
        };
        match self {
            Self::Export(size, flags) => put(InfoKind::Export, &[&size.to_be_bytes(), &flags.bits().to_be_bytes()]),
            Self::Name(name) => put(InfoKind::Name, &[name.as_bytes()]),
            Self::Description(text) => put(InfoKind::Description, &[text.as_bytes()]),
            Self::BlockSize(BlockSize { minimum, preferred, maximum }) => {
                put(InfoKind::BlockSize, &[&minimum.to_be_bytes(), &preferred.to_be_bytes(), &maximum.to_be_bytes()]);
            }
        }
        data
    }

    /// From the reply's data: `Ok(None)` for a kind that is not known here, `Err` for one that is malformed.
    pub fn decode(data: &'a [u8]) -> Result<Option<Self>, &'static str> {
        const MALFORMED: &str = "malformed NBD_REP_INFO";
        let mut fields = Fields::new(data);
        let kind = fields.u16().ok_or(MALFORMED)?;
        let Some(kind) = InfoKind::from_wire(kind) else { return Ok(None) };
        let mut read = || match kind {
            InfoKind::Export => {
                let (size, flags) = (fields.u64()?, fields.u16()?);
                Some(Self::Export(size, TransmissionFlags::from_bits_retain(flags)))
            }
            InfoKind::Name => Some(Self::Name(decode_name(fields.bytes(fields.rest().len())?)?)),
            InfoKind::Description => Some(Self::Description(decode_name(fields.bytes(fields.rest().len())?)?)),
            InfoKind::BlockSize => {
                let (minimum, preferred, maximum) = (fields.u32()?, fields.u32()?, fields.u32()?);
                Some(Self::BlockSize(BlockSize { minimum, preferred, maximum }))
            }
        };
        let info = read().ok_or(MALFORMED)?;
        if fields.is_empty() { Ok(Some(info)) } else { Err(MALFORMED) }
    }
}

/// Data of an `NBD_REP_SERVER`: an export's name and whatever text follows it.
pub fn encode_server(name: &str, description: &str) -> Vec<u8> {
    let mut data = Vec::with_capacity(4 + name.len() + description.len());
    encode_string(&mut data, name);
    data.extend_from_slice(description.as_bytes());
    data
}

/// The reverse of [`encode_server`].
pub fn decode_server(data: &[u8]) -> Option<(&str, &str)> {
    let mut fields = Fields::new(data);
    let name = decode_name(fields.string()?)?;
    Some((name, decode_name(fields.rest())?))
}

/// Data of an `NBD_REP_META_CONTEXT`.
pub fn encode_context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), name.as_bytes()].concat()
}

/// The reverse of [`encode_context`].
pub fn decode_context(data: &[u8]) -> Option<(u32, &str)> {
    let mut fields = Fields::new(data);
    let id = fields.u32()?;
    Some((id, decode_name(fields.rest())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_utf8_without_nul_and_bounded() {
        assert_eq!(decode_name(b"disk\0"), None);
        assert_eq!(decode_name(&[0xff]), None);
        assert_eq!(decode_name(&vec![b'x'; MAX_STRING + 1]), None);
        assert!(decode_name(&vec![b'x'; MAX_STRING]).is_some());
        assert_eq!(decode_name(b""), Some(""));
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let mut long_name = InfoQuery { name: "disk", wants: vec![3] }.encode();
        long_name[3] = 200;
        assert_eq!(InfoQuery::decode(&long_name), None);
        let mut many = InfoQuery { name: "disk", wants: vec![3] }.encode();
        many[8] = 0xff;
        assert_eq!(InfoQuery::decode(&many), None);
        let mut trailing = InfoQuery { name: "disk", wants: vec![3] }.encode();
        trailing.push(0);
        assert_eq!(InfoQuery::decode(&trailing), None);
        let mut queries = MetaQuery { name: "", queries: vec!["base:"] }.encode();
        queries[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(MetaQuery::decode(&queries), None);
    }

    #[test]
    fn unknown_infos_are_skipped_malformed_ones_are_not() {
        assert_eq!(Info::decode(&[0x12, 0x34, 1, 2, 3]), Ok(None));
        assert!(Info::decode(&[0, 0, 1]).is_err());
        assert!(Info::decode(&[]).is_err());
    }

    proptest! {
        #[test]
        fn queries_come_back_as_they_went(
            name in "[a-zä/]{0,40}",
            wants in proptest::collection::vec(any::<u16>(), 0..10),
            queries in proptest::collection::vec("[a-z:]{0,20}", 0..10),
        ) {
            let info = InfoQuery { name: &name, wants };
            let encoded = info.encode();
            prop_assert_eq!(InfoQuery::decode(&encoded), Some(info));
            let meta = MetaQuery { name: &name, queries: queries.iter().map(String::as_str).collect() };
            let encoded = meta.encode();
            prop_assert_eq!(MetaQuery::decode(&encoded), Some(meta));
        }

        #[test]
        fn infos_come_back_as_they_went(size: u64, flags: u16, text in "[a-zä]{0,40}", sizes: (u32, u32, u32)) {
            for info in [
                Info::Export(size, TransmissionFlags::from_bits_retain(flags)),
                Info::Name(&text),
                Info::Description(&text),
                Info::BlockSize(BlockSize { minimum: sizes.0, preferred: sizes.1, maximum: sizes.2 }),
            ] {
                let encoded = info.encode();
                prop_assert_eq!(Info::decode(&encoded), Ok(Some(info)));
            }
        }

        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = OptionHead::decode(&bytes);
            let _ = OptionReplyHead::decode(&bytes);
            let _ = InfoQuery::decode(&bytes);
            let _ = MetaQuery::decode(&bytes);
            let _ = Info::decode(&bytes);
            let _ = decode_server(&bytes);
            let _ = decode_context(&bytes);
        }
    }
}
