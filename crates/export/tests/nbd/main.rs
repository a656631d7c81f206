//! The NBD server over disks in memory: with our own strict client, with hostile ones, and with everybody else's.

mod client;
mod fixture;
mod hostile;
mod limits;
mod peers;
mod requests;
mod server;
mod store;
