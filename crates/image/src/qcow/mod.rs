//! QCOW version 1: read, never written. `open` checks the header; `resolve` says where a guest's bytes are.
//!
//! **Invariants.** The L1 table is in memory (32 MiB at most), L2 tables come in sheets. A packed cluster is bounded by what its
//! entry says of its length, which is less than a cluster, and unpacks to one cluster. An entry that leads past the end of the
//! file is an error with its place, when it is read.
//!
//! Its header cannot say which format the backing file has, so that is looked at ([`crate::probe`]), as with old QED images.

mod open;
mod resolve;

pub(crate) use open::open;

use crate::BackingRef;
use crate::master::sheets::Sheets;
use layout::qcow::Header;
use std::rc::Rc;
use store::Store;

/// An open image.
struct QcowImage {
    store: Rc<dyn Store>,
    header: Header,
    backing: Option<BackingRef>,
    /// Where the L2 tables are; 0: nowhere.
    l1: Vec<u64>,
    tables: Sheets,
}
