//! The whole stack below the exports, simulated: disks, images and stores of a chain, guests and a stream at work on it,
//! faults, power cuts. Beside the floors: it uses them all up to `job`, and nothing uses it.
//!
//! # One seed, one run
//! A seed decides the chain, the load, the faults and every interleaving ([`ring::sim::Sim`]), on a virtual clock. The
//! same seed gives the same operations on every store, in the same order ([`Tally::hash`]).
//!
//! # What must hold
//! * Every read is legal by the oracle: it knows every change to every sector, and when it began, ended and became durable.
//! * Errors are only what the phase's faults explain; after a failed flush every flush fails; a poisoned image
//!   refuses changes, and goes on reading.
//! * A stream's progress never runs backwards; one that ended well ignored no error; its end is durable.
//! * **Every state that a power cut may leave**, at any moment: it opens, is clean, shows only legal sectors, and names a
//!   backing file it may name.
//!
//! `cargo xtask sim --planted` plants known bugs one at a time and shows that all this can fail.
#![forbid(unsafe_code)]

mod content;
mod cut;
mod dice;
mod load;
mod master;
mod oracle;
mod plan;
mod run;
mod streaming;
mod world;

pub use run::{Options, Tally, run};
