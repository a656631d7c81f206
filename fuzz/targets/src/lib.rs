//! What fuzzing feeds, and what must be true of it. A target is a function over bytes that panics if it is not.
//!
//! Three programs call them: libFuzzer's (`fuzz/`, by `cargo xtask fuzz`), the test of this crate, which replays the corpus
//! and feeds some thousand mutations of it in every run, and whoever looks into a finding.
//!
//! The oracles are stronger than "it does not crash": what comes in pieces means the same as what comes whole, what was
//! decoded encodes again, replies can be read by a client, what is held is bounded, and everything ends.
#![forbid(unsafe_code)]

pub mod mutate;

mod kept;
mod nbd;
mod qcow2;
mod qmp;
mod sources;
mod vhost_user;

#[path = "../../../crates/image/tests/image/guest.rs"]
#[expect(dead_code, reason = "shared with tests that use more of it")]
mod guest;
#[path = "../../../crates/image/tests/image/mutation.rs"]
mod mutation;

/// A target: its name (its corpus is the folder of that name) and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("image_kept", kept::kept),
    ("nbd_client", nbd::client),
    ("nbd_server", nbd::server),
    ("qcow2_image", qcow2::image),
    ("qcow2_repair", qcow2::repair),
    ("qed_header", mutation::header_stands),
    ("qed_image", mutation::image_stands),
    ("qmp_framer", qmp::framer),
    ("sources", sources::sources),
    ("vhost_request", vhost_user::request),
    ("vhost_session", vhost_user::session),
];
