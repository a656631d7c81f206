//! The log: what it says lies over the file, in memory.

use crate::master::{read_table, within};
use crate::{Error, ErrorKind, Result};
use layout::vhdx::Header;
use layout::vhdx::log::{Change, Log};
use std::rc::Rc;
use store::Store;
use store::patched::{PatchedStore, Patches};

/// The longest log: Hyper-V's have 1 MiB.
const LOG_MOST: u64 = 16 << 20;

/// What to do about a log that cannot be carried out here.
const REMEDY: &str = "attach the disk once where it came from, or try 'qemu-img check -r all' on a copy";

/// The file in `store` as it is once its log is carried out, and how many entries that has.
pub(super) async fn replay(store: Rc<dyn Store>, header: &Header) -> Result<(Rc<dyn Store>, usize)> {
    if header.log_id.is_zero() {
        return Ok((store, 0));
    }
    let place = header.log;
    let refuse = |what: &str| {
        let what = format!("its log is not empty, and {what}; {REMEDY}");
        Err(Error::new(ErrorKind::Corrupt, store.name(), Some(place.start()), what))
    };
    within(&*store, place, "the log")?;
    let bytes = read_table(&*store, place, LOG_MOST, "the log").await?;
    let log = Log::new(&bytes, header.log_id);
    let entries = log.active();
    let Some(newest) = entries.last() else { return refuse("no sequence of its entries is whole") };
    if newest.flushed_file > store.size() {
        return refuse("the file is shorter than it was when that was written: it was cut off");
    }
    let mut patches = Patches::default();
    for entry in &entries {
        let Some(changes) = log.changes(entry) else { return refuse("an entry makes no sense") };
        for change in changes {
            match change {
                Change::Write(at, sector) => patches.write(at, &sector[..]),
                Change::Zero(at, len) => patches.zero(at.range(len)),
            }
        }
    }
    let size = newest.last_file.min(i64::MAX as u64);
    let count = entries.len();
    tracing::warn!(image = store.name(), entries = count, "the log is not empty; it is read as if it were carried out");
    Ok((PatchedStore::new(store, patches, size), count))
}
