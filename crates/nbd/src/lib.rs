//! The NBD protocol (specification: NetworkBlockDevice/nbd `doc/proto.md`). Floor 1: bytes in, bytes out; whoever has a socket moves them.
//!
//! From the wire inwards: [`proto`] has the numbers; [`option`], [`request`] and [`reply`] the messages; [`handshake`] and
//! [`client`] the two sides' state machines.
#![forbid(unsafe_code)]

pub mod client;
pub mod handshake;
pub mod option;
pub mod proto;
pub mod reply;
pub mod request;
mod wire;
