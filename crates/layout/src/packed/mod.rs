//! Files that are packed as a whole, in pieces that can be unpacked one by one.
//!
//! * [`seekable`]: zstd frames with a seek table behind them (zstd's "Seekable Format", version 0.1.0);
//! * [`gzip`]: gzip members of which each says how long it is (BGZF, as SAM's specification has it), and one member whose header has
//!   an index (dictzip);
//! * [`xxh64`]: the checksum that a seek table may have.

pub mod gzip;
pub mod seekable;
mod xxhash;

pub use xxhash::xxh64;
