//! What the disk's tests stand on: a store that can be held and watched, an image that is as awkward as its contract
//! allows, and a world of named files that chains are opened from.
#![expect(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod dice;
pub(crate) mod sketch;
pub(crate) mod valve;
pub(crate) mod world;
