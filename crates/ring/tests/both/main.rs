//! The suite that every back end passes: each test runs once on io_uring and once on the thread pool.

// The name that the house gives it.
extern crate headwater_ring as ring;

use ring::{Backend, Config, Ring};
use std::io;

/// Instantiates each test (a function of a `Ring`) for both back ends.
macro_rules! on_both {
    ($($name:ident)*) => {
        mod uring {
            $(#[test] fn $name() {
                if let Some(ring) = crate::ring(ring::Backend::Uring) {
                    super::$name(&ring);
                }
            })*
        }
        mod threads {
            $(#[test] fn $name() {
                if let Some(ring) = crate::ring(ring::Backend::Threads) {
                    super::$name(&ring);
                }
            })*
        }
    };
}

mod files;
mod life;
mod streams;
mod tasks;

/// A ring on that back end. Where io_uring is refused its half is skipped, except under CI.
fn ring(backend: Backend) -> Option<Ring> {
    match Ring::new(config(backend)) {
        Ok(ring) => {
            assert_eq!(ring.backend(), backend);
            Some(ring)
        }
        Err(error) => {
            refused(&error);
            None
        }
    }
}

fn refused(error: &io::Error) {
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "io_uring is refused: {error}");
    println!("skipped: io_uring is refused here: {error}");
}

fn config(backend: Backend) -> Config {
    Config { backend, ..Config::default() }
}
