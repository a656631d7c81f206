//! The client's side of the protocol. No I/O: bytes in, bytes out.
//!
//! [`ClientHandshake`] goes from the server's greeting to a [`Session`]; [`Transactions`] makes requests and puts their
//! replies together. Both treat the server's bytes as hostile: every length is bounded before it is believed, and a reply
//! that the specification does not allow is a [`ClientError`], after which the connection is of no more use.

mod handshake;
mod transactions;

pub use handshake::{ClientHandshake, ClientProgress, Goal, ListedExport, Session};
pub use transactions::{Answer, Completion, Failure, Transactions};

use super::proto::OptionReplyKind;
use std::fmt;

/// Why a client gives up on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// The peer does not greet as an NBD server.
    NotNbd,
    /// An oldstyle server, or a newstyle one without the fixed handshake.
    TooOld,
    /// The server refused an option.
    Refused {
        /// Which.
        option: u32,
        /// The error, if it is a known one.
        kind: Option<OptionReplyKind>,
        /// What the server says.
        message: String,
    },
    /// Something the specification does not allow, in a few words.
    Protocol(&'static str),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotNbd => write!(f, "this is no NBD server"),
            Self::TooOld => write!(f, "the NBD server does not speak fixed newstyle"),
            Self::Refused { option, kind: Some(kind), message } => {
                write!(f, "the NBD server refused option {option} ({kind:?}): {message}")
            }
            Self::Refused { option, kind: None, message } => {
                write!(f, "the NBD server refused option {option}: {message}")
            }
            Self::Protocol(what) => write!(f, "the NBD server broke the protocol: {what}"),
        }
    }
}

impl std::error::Error for ClientError {}
