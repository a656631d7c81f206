//! What users say of where a disk is, and opening it: file names with a protocol (`nbd://…`, `blkdebug:…`), trees of nodes
//! (`json:{…}`, `--image-opts`), objects they refer to (`--object secret,…`). Floor 5: it puts stores, images and chains together.
//!
//! The words, defaults and messages are QEMU's: people have scripts full of them.
//!
//! * [`json`] reads JSON as QEMU's reader does; `options` reads `key=value,…` and dotted keys into the same tree, and takes a tree
//!   apart; `node` says what a tree means; `name` what a file name means; `config` reads blkdebug's file.
//! * [`objects`] are what `--object` makes.
//! * [`Sources`] opens: it is the [`disk::Opener`] of tools and daemons.
//!
//! # Invariants
//! * **A tree is a name.** A tree of nodes is written as `json:{…}` and goes wherever a file name goes, into a backing reference too;
//!   whatever takes a name takes a tree.
//! * Nothing a user said is ignored in silence: an option that is not known, or known and not served, is an error that names it.
//!   (Options that only tune QEMU's own caches and threads are taken; `node` lists them.)
//! * A node that states its driver is never probed.
//! * Nesting is bounded, in texts and in what is opened.
#![forbid(unsafe_code)]

mod config;
pub mod json;
mod name;
mod node;
pub mod nodes;
pub mod objects;
mod options;
mod served;
mod sources;

pub use name::{display_name, from_image_options, nbd_target};
pub use nodes::Graph;
pub use objects::Objects;
pub use options::{keyval, nest as nested};
pub use served::{Refers, serves_name, serves_tree};
pub use sources::Sources;

use image::{Error, ErrorKind};

/// What a user got wrong, in QEMU's words.
fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, "", None, what)
}
