//! What QEMU's own tests of its image tools assert, told anew in our words: the same lines for our tools and QEMU's, on the formats that
//! are written. `docs/iotests.md` says which test is told where, and which are not.

mod amend;
mod backing;
mod check;
mod convert;
mod create;
mod features;
mod neighbours;
mod patterns;
mod resize;
mod snapshots;
mod words;
mod zeros;

/// Formats with clusters and backing files.
const COW: [&str; 2] = ["qcow2", "qed"];

/// All that are written.
const ALL: [&str; 3] = ["qcow2", "qed", "raw"];
