//! The numbers of the NBD protocol, and nothing else. Each item names the constant of the specification
//! (NetworkBlockDevice/nbd `doc/proto.md`) that it stands for; all of them are big-endian on the wire.

use bitflags::bitflags;

/// `NBDMAGIC`: the first eight bytes a server sends.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: follows [`NBDMAGIC`] in a newstyle greeting, and begins every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Begins every reply to an option.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins every request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Length of the greeting: both magics and the handshake flags.
pub const GREETING_LEN: usize = 18;
/// Length of an option's head: magic, option, length.
pub const OPTION_LEN: usize = 16;
/// Length of the head of an option's reply: magic, option, type, length.
pub const OPTION_REPLY_LEN: usize = 20;
/// Length of a request's head.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply's head.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a chunk's head.
pub const CHUNK_LEN: usize = 20;
/// Zeros that end the reply to `NBD_OPT_EXPORT_NAME` unless both sides agreed to leave them out.
pub const EXPORT_NAME_PADDING: usize = 124;

/// The longest string the specification allows (names, queries, messages), in bytes.
pub const MAX_STRING: usize = 4096;
/// The longest payload of a read or a write, in bytes: what the specification lets every client assume.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The only metadata context the specification defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

bitflags! {
    /// Handshake flags, which the server sends in its greeting.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// `NBD_FLAG_FIXED_NEWSTYLE`
        const FIXED_NEWSTYLE = 1 << 0;
        /// `NBD_FLAG_NO_ZEROES`
        const NO_ZEROES = 1 << 1;
    }

    /// Client flags, the client's answer to the greeting.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// `NBD_FLAG_C_FIXED_NEWSTYLE`
        const FIXED_NEWSTYLE = 1 << 0;
        /// `NBD_FLAG_C_NO_ZEROES`
        const NO_ZEROES = 1 << 1;
    }

    /// Transmission flags: what an export can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// `NBD_FLAG_HAS_FLAGS`
        const HAS_FLAGS = 1 << 0;
        /// `NBD_FLAG_READ_ONLY`
        const READ_ONLY = 1 << 1;
        /// `NBD_FLAG_SEND_FLUSH`
        const SEND_FLUSH = 1 << 2;
        /// `NBD_FLAG_SEND_FUA`
        const SEND_FUA = 1 << 3;
        /// `NBD_FLAG_ROTATIONAL`
        const ROTATIONAL = 1 << 4;
        /// `NBD_FLAG_SEND_TRIM`
        const SEND_TRIM = 1 << 5;
        /// `NBD_FLAG_SEND_WRITE_ZEROES`
        const SEND_WRITE_ZEROES = 1 << 6;
        /// `NBD_FLAG_SEND_DF`
        const SEND_DF = 1 << 7;
        /// `NBD_FLAG_CAN_MULTI_CONN`
        const CAN_MULTI_CONN = 1 << 8;
        /// `NBD_FLAG_SEND_RESIZE`
        const SEND_RESIZE = 1 << 9;
        /// `NBD_FLAG_SEND_CACHE`
        const SEND_CACHE = 1 << 10;
        /// `NBD_FLAG_SEND_FAST_ZERO`
        const SEND_FAST_ZERO = 1 << 11;
    }

    /// Command flags, which come with a request.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// `NBD_CMD_FLAG_FUA`: durable before the reply.
        const FUA = 1 << 0;
        /// `NBD_CMD_FLAG_NO_HOLE`: zeroing keeps the space.
        const NO_HOLE = 1 << 1;
        /// `NBD_CMD_FLAG_DF`: one content chunk at most.
        const DF = 1 << 2;
        /// `NBD_CMD_FLAG_REQ_ONE`: one extent is enough.
        const REQ_ONE = 1 << 3;
        /// `NBD_CMD_FLAG_FAST_ZERO`: rather fail than write zeros out.
        const FAST_ZERO = 1 << 4;
    }

    /// Flags of a structured reply's chunk.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// `NBD_REPLY_FLAG_DONE`: the last chunk of this reply.
        const DONE = 1 << 0;
    }

    /// What `base:allocation` says of an extent.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AllocationState: u32 {
        /// `NBD_STATE_HOLE`: no space backs it.
        const HOLE = 1 << 0;
        /// `NBD_STATE_ZERO`: it reads as zeros.
        const ZERO = 1 << 1;
    }
}

macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident: $repr:ty { $($(#[$vdoc:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name {
            $($(#[$vdoc])* $variant = $value,)*
        }

        impl $name {
            /// What the number on the wire stands for, if it is known here.
            pub const fn from_wire(value: $repr) -> Option<Self> {
                match value {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number on the wire.
            pub const fn to_wire(self) -> $repr {
                self as $repr
            }
        }
    };
}

wire_enum! {
    /// Options that this implementation answers with more than `NBD_REP_ERR_UNSUP`.
    OptionKind: u32 {
        /// `NBD_OPT_EXPORT_NAME`
        ExportName = 1,
        /// `NBD_OPT_ABORT`
        Abort = 2,
        /// `NBD_OPT_LIST`
        List = 3,
        /// `NBD_OPT_INFO`
        Info = 6,
        /// `NBD_OPT_GO`
        Go = 7,
        /// `NBD_OPT_STRUCTURED_REPLY`
        StructuredReply = 8,
        /// `NBD_OPT_LIST_META_CONTEXT`
        ListMetaContext = 9,
        /// `NBD_OPT_SET_META_CONTEXT`
        SetMetaContext = 10,
    }
}

wire_enum! {
    /// Types of a reply to an option. Those with bit 31 set are errors.
    OptionReplyKind: u32 {
        /// `NBD_REP_ACK`
        Ack = 1,
        /// `NBD_REP_SERVER`
        Server = 2,
        /// `NBD_REP_INFO`
        Info = 3,
        /// `NBD_REP_META_CONTEXT`
        MetaContext = 4,
        /// `NBD_REP_ERR_UNSUP`
        ErrUnsup = 0x8000_0001,
        /// `NBD_REP_ERR_POLICY`
        ErrPolicy = 0x8000_0002,
        /// `NBD_REP_ERR_INVALID`
        ErrInvalid = 0x8000_0003,
        /// `NBD_REP_ERR_PLATFORM`
        ErrPlatform = 0x8000_0004,
        /// `NBD_REP_ERR_TLS_REQD`
        ErrTlsReqd = 0x8000_0005,
        /// `NBD_REP_ERR_UNKNOWN`
        ErrUnknown = 0x8000_0006,
        /// `NBD_REP_ERR_SHUTDOWN`
        ErrShutdown = 0x8000_0007,
        /// `NBD_REP_ERR_BLOCK_SIZE_REQD`
        ErrBlockSizeReqd = 0x8000_0008,
        /// `NBD_REP_ERR_TOO_BIG`
        ErrTooBig = 0x8000_0009,
    }
}

/// The bit that marks an option's reply as an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;

wire_enum! {
    /// What `NBD_OPT_INFO` and `NBD_OPT_GO` ask for and are told.
    InfoKind: u16 {
        /// `NBD_INFO_EXPORT`
        Export = 0,
        /// `NBD_INFO_NAME`
        Name = 1,
        /// `NBD_INFO_DESCRIPTION`
        Description = 2,
        /// `NBD_INFO_BLOCK_SIZE`
        BlockSize = 3,
    }
}

wire_enum! {
    /// Requests.
    Command: u16 {
        /// `NBD_CMD_READ`
        Read = 0,
        /// `NBD_CMD_WRITE`
        Write = 1,
        /// `NBD_CMD_DISC`
        Disc = 2,
        /// `NBD_CMD_FLUSH`
        Flush = 3,
        /// `NBD_CMD_TRIM`
        Trim = 4,
        /// `NBD_CMD_CACHE`
        Cache = 5,
        /// `NBD_CMD_WRITE_ZEROES`
        WriteZeroes = 6,
        /// `NBD_CMD_BLOCK_STATUS`
        BlockStatus = 7,
    }
}

wire_enum! {
    /// Types of a structured reply's chunk. Those with bit 15 set are errors.
    ChunkKind: u16 {
        /// `NBD_REPLY_TYPE_NONE`
        None = 0,
        /// `NBD_REPLY_TYPE_OFFSET_DATA`
        OffsetData = 1,
        /// `NBD_REPLY_TYPE_OFFSET_HOLE`
        OffsetHole = 2,
        /// `NBD_REPLY_TYPE_BLOCK_STATUS`
        BlockStatus = 5,
        /// `NBD_REPLY_TYPE_ERROR`
        Error = 0x8001,
        /// `NBD_REPLY_TYPE_ERROR_OFFSET`
        ErrorOffset = 0x8002,
    }
}

/// The bit that marks a chunk as an error.
pub const NBD_REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;

wire_enum! {
    /// The errors a reply may carry; the specification allows no others.
    NbdError: u32 {
        /// `NBD_EPERM`: the export is read-only.
        Perm = 1,
        /// `NBD_EIO`
        Io = 5,
        /// `NBD_ENOMEM`
        NoMem = 12,
        /// `NBD_EINVAL`
        Inval = 22,
        /// `NBD_ENOSPC`: no space, or past the end of the export.
        NoSpc = 28,
        /// `NBD_EOVERFLOW`
        Overflow = 75,
        /// `NBD_ENOTSUP`: only in answer to [`CommandFlags::FAST_ZERO`].
        NotSup = 95,
        /// `NBD_ESHUTDOWN`
        Shutdown = 108,
    }
}

impl NbdError {
    /// The closest error the protocol has for a system's errno.
    pub fn from_errno(errno: i32) -> Self {
        use rustix::io::Errno;
        match Errno::from_raw_os_error(errno) {
            Errno::PERM | Errno::ACCESS | Errno::ROFS => Self::Perm,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::NoSpc,
            // ENOTSUP is kept for FAST_ZERO; whoever answers that knows.
            Errno::INVAL | Errno::OPNOTSUPP => Self::Inval,
            Errno::NOMEM => Self::NoMem,
            Errno::OVERFLOW => Self::Overflow,
            Errno::SHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// In words for a user.
    pub fn message(self) -> &'static str {
        match self {
            Self::Perm => "operation not permitted",
            Self::Io => "input/output error",
            Self::NoMem => "out of memory",
            Self::Inval => "invalid argument",
            Self::NoSpc => "no space left",
            Self::Overflow => "value too large",
            Self::NotSup => "operation not supported",
            Self::Shutdown => "the server is shutting down",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_map_into_the_protocols_set() {
        let cases = [
            (1, NbdError::Perm),
            (13, NbdError::Perm),
            (30, NbdError::Perm),
            (5, NbdError::Io),
            (16, NbdError::Io),
            (22, NbdError::Inval),
            (27, NbdError::NoSpc),
            (28, NbdError::NoSpc),
            (122, NbdError::NoSpc),
            (95, NbdError::Inval),
        ];
        for (errno, expected) in cases {
            assert_eq!(NbdError::from_errno(errno), expected, "errno {errno}");
        }
        for errno in 1..134 {
            let wire = NbdError::from_errno(errno).to_wire();
            assert_eq!(NbdError::from_wire(wire).map(NbdError::to_wire), Some(wire));
        }
    }

    #[test]
    fn magics_spell_what_the_specification_says() {
        assert_eq!(&NBDMAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&IHAVEOPT.to_be_bytes(), b"IHAVEOPT");
    }
}
