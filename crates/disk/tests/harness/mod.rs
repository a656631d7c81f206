//! What the disk's tests stand on: an image that is as awkward as its contract allows, and a world of named files, traced
//! and breakable, that chains are opened from.
#![expect(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod dice;
pub(crate) mod sketch;
pub(crate) mod world;
