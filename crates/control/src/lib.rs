//! How operators reach a running Headwater. Floor 6: it knows disks, jobs and exports, and does no block I/O itself.
//!
//! [`Engine`] owns the shards and knows which device lives where; [`qmp`] and [`hmp`] speak to clients on the control thread
//! (tokio, current_thread) and reach disks and jobs only by [`Engine`].
#![forbid(unsafe_code)]

pub mod engine;
pub mod error;
pub mod exports;
pub mod hmp;
pub mod joined;
mod lent;
pub mod qmp;
pub mod shard;
mod socket;
pub mod spec;
pub mod trace;

pub use engine::{Ending, Engine, EngineConfig, Happening, Stamped};
pub use error::{ErrorClass, Failure};
pub use exports::{DoorSpec, ExportInfo, ExportSpec};
pub use shard::{Device, ShardState};
pub use spec::{CacheMode, DiskSpec};
