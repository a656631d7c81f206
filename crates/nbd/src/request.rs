//! Requests of the transmission phase: their form on the wire, and the rules by which a server takes or refuses one.
//!
//! **Invariant.** What [`Request::check`] lets through lies within the export, carries no flag its command does not know,
//! and has at most [`MAX_PAYLOAD`] bytes to move. Everything behind it relies on that.

use super::proto::{Command, CommandFlags, MAX_PAYLOAD, NBD_REQUEST_MAGIC, NbdError, REQUEST_LEN, TransmissionFlags};
use super::wire::Fields;
use std::fmt;

/// A request's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags, unknown ones included.
    pub flags: CommandFlags,
    /// The command as it came: a [`Command`] if it is known.
    pub command: u16,
    /// Comes back with the reply, unchanged.
    pub cookie: u64,
    /// Where in the export, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u32,
}

/// The stream does not hold a request where one must begin: nothing after this can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMagic(pub u32);

impl fmt::Display for BadMagic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a request begins with {:#010x}, not {NBD_REQUEST_MAGIC:#010x}", self.0)
    }
}

impl std::error::Error for BadMagic {}

/// What a connection agreed on, as far as it decides about requests.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Size of the export in bytes.
    pub size: u64,
    /// What was offered.
    pub flags: TransmissionFlags,
    /// Whether `base:allocation` was selected.
    pub allocation: bool,
}

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is answered with an error, and a reason in words for the client's user.
    Error(NbdError, &'static str),
    /// Its payload is longer than any we take in: the connection ends.
    Oversized,
}

impl Request {
    /// The head on the wire.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[0..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// From the wire.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, BadMagic> {
        let mut fields = Fields::new(bytes);
        let mut read = || {
            let magic = fields.u32()?;
            let flags = CommandFlags::from_bits_retain(fields.u16()?);
            let command = fields.u16()?;
            let (cookie, offset, length) = (fields.u64()?, fields.u64()?, fields.u32()?);
            Some((magic, Self { flags, command, cookie, offset, length }))
        };
        match read() {
            Some((NBD_REQUEST_MAGIC, request)) => Ok(request),
            Some((magic, _)) => Err(BadMagic(magic)),
            // The array holds every field.
            None => Err(BadMagic(0)),
        }
    }

    /// Bytes that follow the head on the wire.
    pub fn payload(&self) -> u32 {
        if self.command == Command::Write.to_wire() { self.length } else { 0 }
    }

    /// Whether the reply waits until what was written is durable.
    pub fn fua(&self) -> bool {
        self.flags.contains(CommandFlags::FUA)
    }

    /// Whether it may be carried out under `terms`.
    pub fn check(&self, terms: &Terms) -> Result<Command, Refusal> {
        if self.payload() > MAX_PAYLOAD {
            return Err(Refusal::Oversized);
        }
        let refuse = |error, why| Err(Refusal::Error(error, why));
        let Some(command) = Command::from_wire(self.command) else {
            return refuse(NbdError::Inval, "unknown command");
        };
        if !known_flags(command, terms).contains(self.flags) {
            return refuse(NbdError::Inval, "a flag that this command does not have");
        }
        let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && terms.flags.contains(TransmissionFlags::READ_ONLY) {
            return refuse(NbdError::Perm, "the export is read-only");
        }
        if command == Command::BlockStatus && !terms.allocation {
            return refuse(NbdError::Inval, "no metadata context was selected");
        }
        if matches!(command, Command::Disc | Command::Flush) {
            return Ok(command);
        }
        let inside = self.offset.checked_add(u64::from(self.length)).is_some_and(|end| end <= terms.size);
        match command {
            Command::Write | Command::WriteZeroes if !inside => refuse(NbdError::NoSpc, "past the end of the export"),
            _ if !inside => refuse(NbdError::Inval, "past the end of the export"),
            Command::Read if self.length > MAX_PAYLOAD => refuse(NbdError::Inval, "longer than the largest payload"),
            Command::BlockStatus if self.length == 0 => refuse(NbdError::Inval, "an empty range"),
            _ => Ok(command),
        }
    }
}

/// The specification: FUA is accepted with every command, and means nothing where nothing is written.
fn known_flags(command: Command, terms: &Terms) -> CommandFlags {
    let own = match command {
        Command::Read if terms.flags.contains(TransmissionFlags::SEND_DF) => CommandFlags::DF,
        Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        Command::BlockStatus => CommandFlags::REQ_ONE,
        _ => CommandFlags::empty(),
    };
    own | CommandFlags::FUA
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn terms() -> Terms {
        let flags = TransmissionFlags::all() - TransmissionFlags::READ_ONLY;
        Terms { size: 1 << 30, flags, allocation: true }
    }

    fn request(command: Command, offset: u64, length: u32) -> Request {
        Request { flags: CommandFlags::empty(), command: command.to_wire(), cookie: 7, offset, length }
    }

    #[test]
    fn what_reaches_past_the_end_is_refused_by_the_specifications_errors() {
        for (command, error) in [
            (Command::Read, NbdError::Inval),
            (Command::Trim, NbdError::Inval),
            (Command::Cache, NbdError::Inval),
            (Command::BlockStatus, NbdError::Inval),
            (Command::Write, NbdError::NoSpc),
            (Command::WriteZeroes, NbdError::NoSpc),
        ] {
            for offset in [(1 << 30) - 511, 1 << 30, u64::MAX, u64::MAX - 511] {
                let refused = request(command, offset, 512).check(&terms());
                assert_eq!(refused, Err(Refusal::Error(error, "past the end of the export")), "{command:?} {offset}");
            }
            assert_eq!(request(command, (1 << 30) - 512, 512).check(&terms()), Ok(command));
        }
    }

    #[test]
    fn a_read_only_export_refuses_writes_and_nothing_else() {
        let read_only = Terms { flags: terms().flags | TransmissionFlags::READ_ONLY, ..terms() };
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            let refused = request(command, 0, 512).check(&read_only);
            assert!(matches!(refused, Err(Refusal::Error(NbdError::Perm, _))), "{command:?}");
        }
        for command in [Command::Read, Command::Flush, Command::Cache, Command::BlockStatus, Command::Disc] {
            assert_eq!(request(command, 0, 512).check(&read_only), Ok(command));
        }
    }

    #[test]
    fn flags_belong_to_their_commands() {
        let known = [
            (Command::Read, CommandFlags::FUA | CommandFlags::DF),
            (Command::Write, CommandFlags::FUA),
            (Command::Disc, CommandFlags::FUA),
            (Command::Flush, CommandFlags::FUA),
            (Command::Trim, CommandFlags::FUA),
            (Command::Cache, CommandFlags::FUA),
            (Command::WriteZeroes, CommandFlags::FUA | CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO),
            (Command::BlockStatus, CommandFlags::FUA | CommandFlags::REQ_ONE),
        ];
        for (command, allowed) in known {
            for bit in 0..16 {
                let flags = CommandFlags::from_bits_retain(1 << bit);
                let answer = Request { flags, ..request(command, 0, 512) }.check(&terms());
                assert_eq!(answer.is_ok(), allowed.contains(flags), "{command:?} bit {bit}");
            }
        }
        let simple = Terms { flags: terms().flags - TransmissionFlags::SEND_DF, ..terms() };
        assert!(Request { flags: CommandFlags::DF, ..request(Command::Read, 0, 512) }.check(&simple).is_err());
    }

    #[test]
    fn payloads_are_bounded() {
        assert_eq!(request(Command::Write, 0, MAX_PAYLOAD + 1).check(&terms()), Err(Refusal::Oversized));
        assert!(request(Command::Write, 0, MAX_PAYLOAD).check(&terms()).is_ok());
        let refused = request(Command::Read, 0, MAX_PAYLOAD + 1).check(&terms());
        assert!(matches!(refused, Err(Refusal::Error(NbdError::Inval, _))));
        assert!(request(Command::WriteZeroes, 0, 1 << 30).check(&terms()).is_ok());
        assert!(request(Command::Trim, 0, 1 << 30).check(&terms()).is_ok());
    }

    proptest! {
        #[test]
        fn heads_come_back_as_they_went(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let flags = CommandFlags::from_bits_retain(flags);
            let request = Request { flags, command, cookie, offset, length };
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }

        #[test]
        fn what_is_let_through_is_inside(flags in 0_u16..32, command in 0_u16..9, offset: u64, length: u32, size: u64) {
            let flags = CommandFlags::from_bits_retain(flags);
            let request = Request { flags, command, cookie: 0, offset, length };
            let answer = request.check(&Terms { size, ..terms() });
            if let Ok(Command::Read | Command::Write | Command::Trim | Command::WriteZeroes | Command::Cache) = answer {
                prop_assert!(u128::from(offset) + u128::from(length) <= u128::from(size));
            }
            if let Ok(Command::Read | Command::Write) = answer {
                prop_assert!(length <= MAX_PAYLOAD);
            }
        }

        #[test]
        fn anything_else_is_no_request(bytes: [u8; REQUEST_LEN]) {
            let begins = bytes[..4] == NBD_REQUEST_MAGIC.to_be_bytes();
            prop_assert_eq!(Request::decode(&bytes).is_ok(), begins);
        }
    }
}
