//! The vhost-user server against a front end that plays a guest, its driver and its monitor, well and badly.

mod connection;
mod disk;
mod driver;
mod hostile;
mod requests;
mod server;
mod state;
