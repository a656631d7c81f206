//! The client's side of the handshake.
//!
//! **Invariant.** One option is under way at a time, and only its replies are accepted.

use super::ClientError;
use crate::option::{
    BlockSize, Info, InfoQuery, MetaQuery, OptionReplyHead, decode_context, decode_server, encode_option,
};
use crate::proto::{
    BASE_ALLOCATION, ClientFlags, EXPORT_NAME_PADDING, GREETING_LEN, HandshakeFlags, IHAVEOPT, InfoKind, MAX_STRING,
    NBD_REP_FLAG_ERROR, NBDMAGIC, OPTION_REPLY_LEN, OptionKind, OptionReplyKind, TransmissionFlags,
};
use crate::wire::Fields;

/// The longest reply to an option that is believed, in bytes: two strings and change.
const MAX_REPLY: u32 = 3 * MAX_STRING as u32;

/// Replies to one option (a list of exports) that are believed.
const MAX_REPLIES: u32 = 4096;

/// What the client is after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Use the export of this name.
    Export(String),
    /// Only ask about the export of this name.
    Inspect(String),
    /// List the exports.
    List,
}

/// What is known of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags, as bits: unknown ones are kept.
    pub flags: u16,
    /// Replies to reads are structured.
    pub structured: bool,
    /// The identifier of `base:allocation`, if the server granted it.
    pub allocation: Option<u32>,
    /// The server's own name for it, if it said.
    pub name: Option<String>,
    /// The description, if it said.
    pub description: Option<String>,
    /// Request sizes, if it said.
    pub block_size: Option<BlockSize>,
    /// Names of the metadata contexts it offers; asked for with [`Goal::Inspect`] only.
    pub contexts: Vec<String>,
}

impl Session {
    /// What the export can do, as far as it is known here.
    pub fn transmission_flags(&self) -> TransmissionFlags {
        TransmissionFlags::from_bits_truncate(self.flags)
    }
}

/// An entry of the list of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// Its description, often empty.
    pub description: String,
}

/// Where the handshake stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientProgress {
    /// Send the output; more input is needed when this input is used up.
    Continue,
    /// Send the output. For [`Goal::Export`] transmission begins; for [`Goal::Inspect`] the connection ends.
    Session(Session),
    /// Send the output; the connection ends.
    Listed(Vec<ListedExport>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    Option(OptionKind),
    /// The reply to `NBD_OPT_EXPORT_NAME`, which has a form of its own.
    ExportName,
}

/// The client's side of one handshake.
#[derive(Debug)]
pub struct ClientHandshake {
    goal: Goal,
    structured: bool,
    allocation: bool,
    state: State,
    no_zeroes: bool,
    replies: u32,
    session: Session,
    listed: Vec<ListedExport>,
}

impl ClientHandshake {
    /// Begins a handshake that asks for structured replies and, with those, for `base:allocation`, if told to.
    pub fn new(goal: Goal, structured: bool, allocation: bool) -> Self {
        Self {
            goal,
            structured: structured || allocation,
            allocation,
            state: State::Greeting,
            no_zeroes: false,
            replies: 0,
            session: Session::default(),
            listed: Vec::new(),
        }
    }

    /// Takes one message off the front of `input`, if it is there whole, and appends what is to be sent. Returns how many
    /// bytes it took; with 0 it needs more.
    pub fn advance(&mut self, input: &[u8], output: &mut Vec<u8>) -> Result<(usize, ClientProgress), ClientError> {
        match self.state {
            State::Greeting => self.greeting(input, output),
            State::ExportName => Ok(self.export_name(input)),
            State::Option(option) => {
                let head = OptionReplyHead::decode(input).map_err(|_| ClientError::Protocol("bad option reply"))?;
                let Some(head) = head else { return Ok((0, ClientProgress::Continue)) };
                if head.option != option.to_wire() {
                    return Err(ClientError::Protocol("a reply to an option that was not sent"));
                }
                if head.length > MAX_REPLY {
                    return Err(ClientError::Protocol("an overlong option reply"));
                }
                self.replies += 1;
                if self.replies > MAX_REPLIES {
                    return Err(ClientError::Protocol("endless replies to one option"));
                }
                let end = OPTION_REPLY_LEN + head.length as usize;
                let Some(data) = input.get(OPTION_REPLY_LEN..end) else {
                    self.replies -= 1;
                    return Ok((0, ClientProgress::Continue));
                };
                Ok((end, self.reply(option, head.kind, data, output)?))
            }
        }
    }

    fn greeting(&mut self, input: &[u8], output: &mut Vec<u8>) -> Result<(usize, ClientProgress), ClientError> {
        let mut fields = Fields::new(input);
        let (Some(init), Some(magic), Some(flags)) = (fields.u64(), fields.u64(), fields.u16()) else {
            let expected = NBDMAGIC.to_be_bytes();
            let known = input.len().min(expected.len());
            let fits = input[..known] == expected[..known];
            return if fits { Ok((0, ClientProgress::Continue)) } else { Err(ClientError::NotNbd) };
        };
        if init != NBDMAGIC {
            return Err(ClientError::NotNbd);
        }
        let flags = HandshakeFlags::from_bits_truncate(flags);
        if magic != IHAVEOPT || !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(ClientError::TooOld);
        }
        let mut answer = ClientFlags::FIXED_NEWSTYLE;
        self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        answer.set(ClientFlags::NO_ZEROES, self.no_zeroes);
        output.extend_from_slice(&answer.bits().to_be_bytes());
        if self.structured && self.goal != Goal::List {
            self.send(OptionKind::StructuredReply, &[], output);
        } else {
            self.pursue(output);
        }
        Ok((GREETING_LEN, ClientProgress::Continue))
    }

    fn send(&mut self, option: OptionKind, data: &[u8], output: &mut Vec<u8>) {
        self.state = if option == OptionKind::ExportName { State::ExportName } else { State::Option(option) };
        self.replies = 0;
        encode_option(output, option.to_wire(), data);
    }

    /// Sends the option that reaches the goal.
    fn pursue(&mut self, output: &mut Vec<u8>) {
        let wants = [InfoKind::Name, InfoKind::Description, InfoKind::BlockSize].map(InfoKind::to_wire).to_vec();
        match self.goal.clone() {
            Goal::Export(name) => self.send(OptionKind::Go, &InfoQuery { name: &name, wants }.encode(), output),
            Goal::Inspect(name) => self.send(OptionKind::Info, &InfoQuery { name: &name, wants }.encode(), output),
            Goal::List => self.send(OptionKind::List, &[], output),
        }
    }

    fn reply(
        &mut self,
        option: OptionKind,
        kind: u32,
        data: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<ClientProgress, ClientError> {
        if kind & NBD_REP_FLAG_ERROR != 0 {
            return self.refused(option, kind, data, output);
        }
        match (option, OptionReplyKind::from_wire(kind)) {
            (_, Some(OptionReplyKind::Ack)) => return self.acknowledged(option, output),
            (OptionKind::Go | OptionKind::Info, Some(OptionReplyKind::Info)) => {
                match Info::decode(data).map_err(ClientError::Protocol)? {
                    Some(Info::Export(size, flags)) => {
                        (self.session.size, self.session.flags) = (size, flags.bits());
                    }
                    Some(Info::Name(name)) => self.session.name = Some(name.to_owned()),
                    Some(Info::Description(text)) => self.session.description = Some(text.to_owned()),
                    Some(Info::BlockSize(sizes)) => self.session.block_size = Some(sizes),
                    None => {}
                }
            }
            (OptionKind::SetMetaContext, Some(OptionReplyKind::MetaContext)) => {
                let context = decode_context(data).ok_or(ClientError::Protocol("malformed NBD_REP_META_CONTEXT"))?;
                if context.1 == BASE_ALLOCATION {
                    self.session.allocation = Some(context.0);
                }
            }
            (OptionKind::ListMetaContext, Some(OptionReplyKind::MetaContext)) => {
                let context = decode_context(data).ok_or(ClientError::Protocol("malformed NBD_REP_META_CONTEXT"))?;
                self.session.contexts.push(context.1.to_owned());
            }
            (OptionKind::List, Some(OptionReplyKind::Server)) => {
                let entry = decode_server(data).ok_or(ClientError::Protocol("malformed NBD_REP_SERVER"))?;
                self.listed.push(ListedExport { name: entry.0.to_owned(), description: entry.1.to_owned() });
            }
            _ => return Err(ClientError::Protocol("an option reply of the wrong type")),
        }
        Ok(ClientProgress::Continue)
    }

    fn acknowledged(&mut self, option: OptionKind, output: &mut Vec<u8>) -> Result<ClientProgress, ClientError> {
        match option {
            OptionKind::StructuredReply => {
                self.session.structured = true;
                match self.goal.clone() {
                    Goal::Export(name) | Goal::Inspect(name) if self.allocation => {
                        let query = MetaQuery { name: &name, queries: vec![BASE_ALLOCATION] }.encode();
                        self.send(OptionKind::SetMetaContext, &query, output);
                    }
                    _ => self.pursue(output),
                }
            }
            OptionKind::SetMetaContext => self.pursue(output),
            OptionKind::Go | OptionKind::Info => {
                if self.session.flags & TransmissionFlags::HAS_FLAGS.bits() == 0 {
                    return Err(ClientError::Protocol("no NBD_INFO_EXPORT"));
                }
                match self.goal.clone() {
                    Goal::Inspect(name) if self.session.structured => {
                        let query = MetaQuery { name: &name, queries: Vec::new() }.encode();
                        self.send(OptionKind::ListMetaContext, &query, output);
                    }
                    Goal::Inspect(_) => return Ok(self.inspected(output)),
                    _ => return Ok(ClientProgress::Session(self.session.clone())),
                }
            }
            OptionKind::ListMetaContext => return Ok(self.inspected(output)),
            OptionKind::List => {
                encode_option(output, OptionKind::Abort.to_wire(), &[]);
                return Ok(ClientProgress::Listed(std::mem::take(&mut self.listed)));
            }
            OptionKind::Abort | OptionKind::ExportName => {
                return Err(ClientError::Protocol("a reply to an option that was not sent"));
            }
        }
        Ok(ClientProgress::Continue)
    }

    /// All is known that can be asked.
    fn inspected(&self, output: &mut Vec<u8>) -> ClientProgress {
        encode_option(output, OptionKind::Abort.to_wire(), &[]);
        ClientProgress::Session(self.session.clone())
    }

    /// Goes on without what is not needed; gives up where the goal itself is refused.
    fn refused(
        &mut self,
        option: OptionKind,
        kind: u32,
        data: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<ClientProgress, ClientError> {
        let known = OptionReplyKind::from_wire(kind);
        match (option, known, self.goal.clone()) {
            (OptionKind::StructuredReply, ..) => self.pursue(output),
            (OptionKind::ListMetaContext, ..) => return Ok(self.inspected(output)),
            (OptionKind::SetMetaContext, ..) => {
                self.session.allocation = None;
                self.pursue(output);
            }
            (OptionKind::Go, Some(OptionReplyKind::ErrUnsup), Goal::Export(name)) => {
                self.send(OptionKind::ExportName, name.as_bytes(), output);
            }
            _ => {
                let message = String::from_utf8_lossy(data).into_owned();
                return Err(ClientError::Refused { option: option.to_wire(), kind: known, message });
            }
        }
        Ok(ClientProgress::Continue)
    }

    fn export_name(&mut self, input: &[u8]) -> (usize, ClientProgress) {
        let mut fields = Fields::new(input);
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        let (Some(size), Some(flags), Some(_)) = (fields.u64(), fields.u16(), fields.bytes(padding)) else {
            return (0, ClientProgress::Continue);
        };
        (self.session.size, self.session.flags) = (size, flags);
        (input.len() - fields.rest().len(), ClientProgress::Session(self.session.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::{ALLOCATION_CONTEXT, Agreement, Handshake, Offer, Progress};
    use crate::option::encode_option_reply;
    use proptest::prelude::*;

    fn offers() -> Vec<Offer> {
        vec![Offer {
            name: "disk".into(),
            description: Some("a disk".into()),
            size: 1 << 20,
            flags: TransmissionFlags::SEND_FLUSH,
            block_size: BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 },
        }]
    }

    /// Lets client and server talk until both have an end.
    fn talk(mut client: ClientHandshake) -> (Result<ClientProgress, ClientError>, Option<Agreement>) {
        let mut server = Handshake::new(offers());
        let (mut to_client, mut to_server) = (Handshake::greeting().to_vec(), Vec::new());
        let mut agreed = None;
        loop {
            let (taken, end) = match client.advance(&to_client, &mut to_server) {
                Ok(answer) => answer,
                Err(error) => return (Err(error), agreed),
            };
            assert!(taken > 0, "the client waits for what will not come");
            to_client.drain(..taken);
            loop {
                let (taken, progress) = server.advance(&to_server, &mut to_client).unwrap();
                to_server.drain(..taken);
                match progress {
                    Progress::Continue => {}
                    Progress::Transmission(agreement) => agreed = Some(agreement),
                    Progress::NeedMore | Progress::Over => break,
                }
            }
            if end != ClientProgress::Continue {
                return (Ok(end), agreed);
            }
        }
    }

    #[test]
    fn both_sides_agree() {
        for (structured, allocation) in [(false, false), (true, false), (true, true)] {
            let (end, agreed) = talk(ClientHandshake::new(Goal::Export("disk".into()), structured, allocation));
            let Ok(ClientProgress::Session(session)) = end else { panic!("{end:?}") };
            let agreed = agreed.unwrap();
            assert_eq!((session.size, session.flags), (1 << 20, agreed.flags.bits()));
            assert_eq!((session.structured, agreed.structured), (structured, structured));
            assert_eq!(session.allocation, allocation.then_some(ALLOCATION_CONTEXT));
            assert_eq!(agreed.allocation, allocation);
            assert_eq!(session.description.as_deref(), Some("a disk"));
            assert_eq!(session.block_size, Some(offers()[0].block_size));
        }
    }

    #[test]
    fn unknown_exports_are_refused_with_the_servers_words() {
        let (end, agreed) = talk(ClientHandshake::new(Goal::Export("none".into()), true, true));
        let Err(ClientError::Refused { kind, message, .. }) = end else { panic!("{end:?}") };
        assert_eq!(kind, Some(OptionReplyKind::ErrUnknown));
        assert!(message.contains("no export"));
        assert_eq!(agreed, None);
    }

    #[test]
    fn old_servers_get_export_name() {
        let mut client = ClientHandshake::new(Goal::Export("disk".into()), false, false);
        let mut output = Vec::new();
        client.advance(b"NBDMAGICIHAVEOPT\0\x01", &mut output).unwrap();
        let mut refusal = Vec::new();
        encode_option_reply(&mut refusal, OptionKind::Go.to_wire(), OptionReplyKind::ErrUnsup, &[]);
        output.clear();
        client.advance(&refusal, &mut output).unwrap();
        assert!(output.ends_with(b"\0\0\0\x01\0\0\0\x04disk"));
        let mut reply = (77_u64).to_be_bytes().to_vec();
        reply.extend([0, 1]);
        reply.extend([0; 124]);
        assert_eq!(client.advance(&reply[..100], &mut output), Ok((0, ClientProgress::Continue)));
        let (taken, end) = client.advance(&reply, &mut output).unwrap();
        assert_eq!(taken, 134);
        assert_eq!(end, ClientProgress::Session(Session { size: 77, flags: 1, ..Session::default() }));
    }

    #[test]
    fn other_servers_are_told_apart() {
        let greet = |bytes: &[u8]| ClientHandshake::new(Goal::List, false, false).advance(bytes, &mut Vec::new());
        assert_eq!(greet(b"SSH-2.0"), Err(ClientError::NotNbd));
        assert_eq!(greet(b"NBDMAG"), Ok((0, ClientProgress::Continue)));
        assert_eq!(greet(b"NBDMAGICIHAVEOPT\0\x02"), Err(ClientError::TooOld));
        assert_eq!(greet(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"), Err(ClientError::TooOld));
    }

    #[test]
    fn the_list_arrives() {
        let (end, _) = talk(ClientHandshake::new(Goal::List, true, true));
        let listed = ListedExport { name: "disk".into(), description: "a disk".into() };
        assert_eq!(end, Ok(ClientProgress::Listed(vec![listed])));
    }

    proptest! {
        #[test]
        fn hostile_servers_cause_no_panic(
            replies in proptest::collection::vec((0_u32..12, 0_u32..12, proptest::bool::ANY, proptest::collection::vec(any::<u8>(), 0..40)), 0..6),
            tail in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut client = ClientHandshake::new(Goal::Export("disk".into()), true, true);
            let mut input = Handshake::greeting().to_vec();
            for (option, kind, error, data) in replies {
                input.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
                input.extend(option.to_be_bytes());
                input.extend((kind | if error { NBD_REP_FLAG_ERROR } else { 0 }).to_be_bytes());
                input.extend((data.len() as u32).to_be_bytes());
                input.extend(data);
            }
            input.extend(tail);
            let mut rest = input.as_slice();
            while let Ok((taken, ClientProgress::Continue)) = client.advance(rest, &mut Vec::new()) {
                if taken == 0 {
                    break;
                }
                rest = &rest[taken..];
            }
        }
    }
}
