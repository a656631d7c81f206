//! Monitors over real sockets: an engine with disks in files, clients that talk to it as programs and people do.

extern crate headwater_control as control;

mod daemon;
mod flood;
mod framing;
mod hmp;
mod jobs;
mod queries;
mod shutdown;
