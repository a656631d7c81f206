//! The server's side of the handshake: fixed newstyle, from greeting to transmission. No I/O: bytes in, bytes out.
//!
//! **Invariant.** [`Handshake::advance`] takes at most one option off its input before it gives the output back to be sent,
//! so that a client that asks without reading makes us hold one answer, not many. Input that does not end an option is
//! never more than [`MAX_INPUT`] bytes.

use super::option::{
    BlockSize, Info, InfoQuery, MetaQuery, OptionHead, decode_name, encode_context, encode_option_reply, encode_server,
};
use super::proto::{
    BASE_ALLOCATION, ClientFlags, EXPORT_NAME_PADDING, GREETING_LEN, HandshakeFlags, IHAVEOPT, InfoKind, NBDMAGIC,
    OPTION_LEN, OptionKind, OptionReplyKind, TransmissionFlags,
};
use std::fmt;

/// The identifier under which replies carry `base:allocation`.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// The longest data of an option that is looked at, in bytes: a name and a dozen queries of the greatest length.
pub const MAX_OPTION_DATA: u32 = 64 << 10;

/// Longer options than this end the connection; what lies between is skipped and answered with `NBD_REP_ERR_TOO_BIG`.
const MAX_OPTION_SKIPPED: u32 = 1 << 20;

/// Options that one client may send. Listing and asking about every export of a large server stays far below.
const MAX_OPTIONS: u32 = 4096;

/// The most input [`Handshake::advance`] ever waits for, in bytes.
pub const MAX_INPUT: usize = OPTION_LEN + MAX_OPTION_DATA as usize;

/// An export as the handshake shows it.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The name clients ask for.
    pub name: String,
    /// For the client's user.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// What it can do (`SEND_DF` is added where structured replies were agreed on).
    pub flags: TransmissionFlags,
    /// Request sizes.
    pub block_size: BlockSize,
}

/// What both sides agreed on when transmission begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Index of the chosen offer.
    pub export: usize,
    /// The flags the client was told.
    pub flags: TransmissionFlags,
    /// Replies to reads are structured.
    pub structured: bool,
    /// `base:allocation` was selected.
    pub allocation: bool,
}

/// Where the handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More input is needed.
    NeedMore,
    /// An option was dealt with: send the output, then go on with the rest of the input.
    Continue,
    /// Send the output; what follows on the wire are requests.
    Transmission(Agreement),
    /// Send the output, then close.
    Over,
}

/// Why the connection is dropped during the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeError {
    /// Client flags we did not offer.
    ClientFlags(u32),
    /// No `IHAVEOPT` where an option must begin.
    OptionMagic(u64),
    /// An option's data are longer than anybody needs.
    TooLong(u32),
    /// More options than anybody needs.
    TooMany,
    /// An option other than `NBD_OPT_EXPORT_NAME` from a client that is not fixed newstyle.
    NotFixed(u32),
    /// `NBD_OPT_EXPORT_NAME`, which has no reply for errors, of an export that does not exist.
    UnknownExport(String),
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientFlags(flags) => write!(f, "unknown client flags {flags:#x}"),
            Self::OptionMagic(magic) => write!(f, "an option begins with {magic:#x}"),
            Self::TooLong(length) => write!(f, "an option has {length} bytes of data"),
            Self::TooMany => write!(f, "more than {MAX_OPTIONS} options"),
            Self::NotFixed(option) => write!(f, "option {option} without fixed newstyle"),
            Self::UnknownExport(name) => write!(f, "no export is called '{name}'"),
        }
    }
}

impl std::error::Error for HandshakeError {}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Options,
    /// Data of an overlong option pass by.
    Skipping {
        option: u32,
        left: u32,
    },
}

/// The server's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    offers: Vec<Offer>,
    state: State,
    client: ClientFlags,
    structured: bool,
    /// The export for which `base:allocation` is selected.
    allocation: Option<usize>,
    options: u32,
}

impl Handshake {
    /// Begins a handshake about `offers`; the first also answers to the empty name.
    pub fn new(offers: Vec<Offer>) -> Self {
        Self {
            offers,
            state: State::ClientFlags,
            client: ClientFlags::empty(),
            structured: false,
            allocation: None,
            options: 0,
        }
    }

    /// What the server sends first.
    pub fn greeting() -> [u8; GREETING_LEN] {
        let mut bytes = [0; GREETING_LEN];
        bytes[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
        bytes[16..].copy_from_slice(&HandshakeFlags::all().bits().to_be_bytes());
        bytes
    }

    /// Takes what it can use off the front of `input` (the returned number of bytes), and appends what is to be sent.
    pub fn advance(&mut self, input: &[u8], output: &mut Vec<u8>) -> Result<(usize, Progress), HandshakeError> {
        match self.state {
            State::ClientFlags => {
                let Some(bytes) = input.first_chunk() else { return Ok((0, Progress::NeedMore)) };
                let bits = u32::from_be_bytes(*bytes);
                self.client = ClientFlags::from_bits(bits).ok_or(HandshakeError::ClientFlags(bits))?;
                self.state = State::Options;
                Ok((bytes.len(), Progress::Continue))
            }
            State::Skipping { option, left } => {
                let taken = left.min(u32::try_from(input.len()).unwrap_or(u32::MAX));
                let left = left - taken;
                if left > 0 {
                    self.state = State::Skipping { option, left };
                    return Ok((taken as usize, Progress::NeedMore));
                }
                self.state = State::Options;
                refuse(output, option, OptionReplyKind::ErrTooBig, "the option is too long");
                Ok((taken as usize, Progress::Continue))
            }
            State::Options => self.option(input, output),
        }
    }

    fn option(&mut self, input: &[u8], output: &mut Vec<u8>) -> Result<(usize, Progress), HandshakeError> {
        let Some(OptionHead { option, length }) = OptionHead::decode(input).map_err(HandshakeError::OptionMagic)?
        else {
            return Ok((0, Progress::NeedMore));
        };
        let kind = OptionKind::from_wire(option);
        if kind != Some(OptionKind::ExportName) && !self.client.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Err(HandshakeError::NotFixed(option));
        }
        if length > MAX_OPTION_DATA {
            if length > MAX_OPTION_SKIPPED || kind == Some(OptionKind::ExportName) {
                return Err(HandshakeError::TooLong(length));
            }
            self.count()?;
            self.state = State::Skipping { option, left: length };
            return Ok((OPTION_LEN, Progress::Continue));
        }
        let consumed = OPTION_LEN + length as usize;
        let Some(data) = input.get(OPTION_LEN..consumed) else { return Ok((0, Progress::NeedMore)) };
        self.count()?;
        let progress = match kind {
            Some(OptionKind::ExportName) => self.export_name(data, output)?,
            Some(OptionKind::Abort) => {
                encode_option_reply(output, option, OptionReplyKind::Ack, &[]);
                Progress::Over
            }
            Some(OptionKind::Info | OptionKind::Go) => self.info(option, data, output),
            Some(OptionKind::List) => self.list(option, data, output),
            Some(OptionKind::StructuredReply) => self.structured_reply(option, data, output),
            Some(OptionKind::ListMetaContext) => self.list_contexts(option, data, output),
            Some(OptionKind::SetMetaContext) => self.set_contexts(option, data, output),
            // NBD_OPT_STARTTLS among them: the specification's NOTLS mode.
            None => refuse(output, option, OptionReplyKind::ErrUnsup, "this server does not know the option"),
        };
        Ok((consumed, progress))
    }

    fn count(&mut self) -> Result<(), HandshakeError> {
        self.options += 1;
        if self.options > MAX_OPTIONS { Err(HandshakeError::TooMany) } else { Ok(()) }
    }

    fn find(&self, name: &str) -> Option<usize> {
        let named = self.offers.iter().position(|offer| offer.name == name);
        named.or_else(|| (name.is_empty() && !self.offers.is_empty()).then_some(0))
    }

    fn flags(&self, offer: &Offer) -> TransmissionFlags {
        let fragments = if self.structured { TransmissionFlags::SEND_DF } else { TransmissionFlags::empty() };
        offer.flags | TransmissionFlags::HAS_FLAGS | fragments
    }

    fn agree(&self, export: usize) -> Progress {
        Progress::Transmission(Agreement {
            export,
            flags: self.flags(&self.offers[export]),
            structured: self.structured,
            // A context selected for another export does not count.
            allocation: self.structured && self.allocation == Some(export),
        })
    }

    fn export_name(&self, data: &[u8], output: &mut Vec<u8>) -> Result<Progress, HandshakeError> {
        let unknown = || HandshakeError::UnknownExport(String::from_utf8_lossy(data).chars().take(256).collect());
        let export = decode_name(data).and_then(|name| self.find(name)).ok_or_else(unknown)?;
        let offer = &self.offers[export];
        output.extend_from_slice(&offer.size.to_be_bytes());
        output.extend_from_slice(&self.flags(offer).bits().to_be_bytes());
        if !self.client.contains(ClientFlags::NO_ZEROES) {
            output.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
        }
        Ok(self.agree(export))
    }

    fn info(&self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        let Some(query) = InfoQuery::decode(data) else {
            return refuse(output, option, OptionReplyKind::ErrInvalid, "malformed option");
        };
        let Some(export) = self.find(query.name) else {
            return refuse(output, option, OptionReplyKind::ErrUnknown, "no export has this name");
        };
        let offer = &self.offers[export];
        let mut tell = |info: Info<'_>| encode_option_reply(output, option, OptionReplyKind::Info, &info.encode());
        tell(Info::Export(offer.size, self.flags(offer)));
        let wants = |kind: InfoKind| query.wants.contains(&kind.to_wire());
        if wants(InfoKind::Name) {
            tell(Info::Name(&offer.name));
        }
        if let Some(description) = offer.description.as_deref().filter(|_| wants(InfoKind::Description)) {
            tell(Info::Description(description));
        }
        if wants(InfoKind::BlockSize) {
            tell(Info::BlockSize(offer.block_size));
        }
        encode_option_reply(output, option, OptionReplyKind::Ack, &[]);
        if option == OptionKind::Go.to_wire() { self.agree(export) } else { Progress::Continue }
    }

    fn list(&self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        if !data.is_empty() {
            return refuse(output, option, OptionReplyKind::ErrInvalid, "the option has no data");
        }
        for offer in &self.offers {
            let entry = encode_server(&offer.name, offer.description.as_deref().unwrap_or_default());
            encode_option_reply(output, option, OptionReplyKind::Server, &entry);
        }
        encode_option_reply(output, option, OptionReplyKind::Ack, &[]);
        Progress::Continue
    }

    fn structured_reply(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        if !data.is_empty() {
            return refuse(output, option, OptionReplyKind::ErrInvalid, "the option has no data");
        }
        self.structured = true;
        encode_option_reply(output, option, OptionReplyKind::Ack, &[]);
        Progress::Continue
    }

    /// The export and the queries, or the answer already given.
    fn contexts<'a>(
        &self,
        option: u32,
        data: &'a [u8],
        output: &mut Vec<u8>,
    ) -> Result<(usize, Vec<&'a str>), Progress> {
        if !self.structured {
            let why = "structured replies must be agreed on first";
            return Err(refuse(output, option, OptionReplyKind::ErrInvalid, why));
        }
        let Some(query) = MetaQuery::decode(data) else {
            return Err(refuse(output, option, OptionReplyKind::ErrInvalid, "malformed option"));
        };
        let Some(export) = self.find(query.name) else {
            return Err(refuse(output, option, OptionReplyKind::ErrUnknown, "no export has this name"));
        };
        Ok((export, query.queries))
    }

    fn list_contexts(&self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        let queries = match self.contexts(option, data, output) {
            Ok((_, queries)) => queries,
            Err(answered) => return answered,
        };
        // No query asks for everything, a namespace alone for everything in it.
        if queries.is_empty() || queries.iter().any(|query| matches!(*query, "base:" | BASE_ALLOCATION)) {
            let context = encode_context(0, BASE_ALLOCATION);
            encode_option_reply(output, option, OptionReplyKind::MetaContext, &context);
        }
        encode_option_reply(output, option, OptionReplyKind::Ack, &[]);
        Progress::Continue
    }

    fn set_contexts(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        self.allocation = None;
        let (export, queries) = match self.contexts(option, data, output) {
            Ok(asked) => asked,
            Err(answered) => return answered,
        };
        if queries.contains(&BASE_ALLOCATION) {
            self.allocation = Some(export);
            let context = encode_context(ALLOCATION_CONTEXT, BASE_ALLOCATION);
            encode_option_reply(output, option, OptionReplyKind::MetaContext, &context);
        }
        encode_option_reply(output, option, OptionReplyKind::Ack, &[]);
        Progress::Continue
    }
}

fn refuse(output: &mut Vec<u8>, option: u32, kind: OptionReplyKind, why: &str) -> Progress {
    encode_option_reply(output, option, kind, why.as_bytes());
    Progress::Continue
}

#[cfg(test)]
mod tests;
