//! Opening: the header is understood whole or the image is refused.

use super::header::HeaderZone;
use super::{Core, L1_FORM, QedImage};
use crate::commits::Commits;
use crate::health::Health;
use crate::reservation::Active;
use crate::room::Room;
use crate::slices::{CACHE_BYTES, Shelf, SliceCache};
use crate::space::Space;
use crate::tables::Tables;
use crate::{BackingRef, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::HostOffset;
use layout::qed::{
    self, ErrorKind as HeaderErrorKind, Features, Header, SLICE_BYTES, SLICE_ENTRIES, Slice, TableRules,
};
use ring::Iov;
use ring::sync::{Event, Mutex};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::Store;

/// How much of a table one read brings.
const READ_BYTES: u64 = 1 << 20;

/// Opens the QED image in `store`.
pub(crate) async fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    open_with_table_memory(store, options, CACHE_BYTES).await
}

/// Opens the QED image in `store` with a stated budget for L2 tables in memory, in bytes. [`crate::open()`] takes 32 MiB.
pub async fn open_with_table_memory(store: Rc<dyn Store>, options: OpenOptions, bytes: usize) -> Result<Rc<dyn Image>> {
    let limits = store.limits();
    if limits.read_only && !options.read_only {
        let what = "it cannot be written to; open it read-only";
        return Err(Error::new(ErrorKind::ReadOnly, store.name(), None, what));
    }
    let header = read_header(&*store).await?;
    let zone = HeaderZone::read(&*store, &header).await?;
    let backing = read_backing(&*store, &header).await?;
    let l1 = read_l1(&*store, &header, 0, header.image_size).await?;
    let need_check = header.features.contains(Features::NEED_CHECK);
    let unpinned = Rc::new(Event::new());
    let space = Space::full(header.geometry.cluster_size(), store.size(), !limits.fixed_size);
    let core = Rc::new(Core {
        health: Health::new(store.clone(), options.read_only, unpinned.clone()),
        room: Room::new(store.clone(), header.geometry.cluster_size(), space),
        geometry: header.geometry,
        rules: TableRules::new(&header),
        zone: Mutex::new(zone),
        backing: RefCell::new(backing),
        marked: Cell::new(false),
        active: Active::default(),
        tables: RefCell::new(Tables::new(L1_FORM, l1)),
        cache: Shelf::new(SliceCache::new(bytes, SLICE_BYTES), unpinned.clone()),
        unpinned,
        making_table: Mutex::new(()),
        commits: Commits::default(),
        barrier_due: Cell::new(false),
        found_dirty: Cell::new(need_check),
        reach: Cell::new(0),
        header: Cell::new(header),
        for_check: options.for_check,
        store,
    });
    if !core.health.read_only() && header.autoclear_features != 0 {
        let mut zone = core.zone.lock().await;
        core.publish_header(&mut zone, Header { autoclear_features: 0, ..header }).await?;
    }
    if !core.health.read_only() && !core.for_check && (need_check || limits.fixed_size) {
        core.recover().await?;
    }
    Ok(Rc::new(QedImage { core }))
}

async fn read_header(store: &dyn Store) -> Result<Header> {
    let bytes = Iov::alloc(SLICE_BYTES);
    store.read(HostOffset::ZERO, bytes.clone()).await?;
    let header = Header::decode(&bytes.to_vec()).map_err(|e| header_error(store.name(), &e))?;
    header.check_length(store.size()).map_err(|e| header_error(store.name(), &e))?;
    Ok(header)
}

/// A header's error as a user sees it.
fn header_error(image: &str, error: &qed::Error) -> Error {
    let (kind, what) = match error.kind() {
        HeaderErrorKind::Foreign => (ErrorKind::Corrupt, format!("not a QED image: {error}; state the right format")),
        HeaderErrorKind::Unsupported => (ErrorKind::Unsupported, format!("this QED image cannot be opened: {error}")),
        _ => (ErrorKind::Corrupt, format!("the QED header is damaged: {error}")),
    };
    Error::new(kind, image, Some(error.offset()), what)
}

async fn read_backing(store: &dyn Store, header: &Header) -> Result<Option<BackingRef>> {
    let Some(slot) = header.backing() else { return Ok(None) };
    let bytes = Iov::alloc(slot.len as usize);
    store.read(slot.range().start(), bytes.clone()).await?;
    let error = |kind, what: &str| Err(Error::new(kind, store.name(), Some(slot.range().start()), what));
    let name = bytes.to_vec();
    if name.contains(&0) {
        return error(ErrorKind::Corrupt, "the name of the backing file contains a NUL byte");
    }
    let Ok(name) = String::from_utf8(name) else {
        return error(
            ErrorKind::Unsupported,
            "the name of the backing file is not UTF-8; rename the file and rebase the image",
        );
    };
    let raw = header.features.contains(Features::BACKING_FORMAT_NO_PROBE);
    Ok(Some(BackingRef { name, format: raw.then_some(Format::Raw) }))
}

/// The L1 entries from `have` (a multiple of a slice) up to what a disk of `size` bytes needs, rounded up to a slice. At most
/// 16 MiB whatever the header says (see [`layout::qed::Geometry`]).
pub(super) async fn read_l1(store: &dyn Store, header: &Header, have: u64, size: u64) -> Result<Vec<u64>> {
    let need = header.geometry.l1_entries(size).next_multiple_of(SLICE_ENTRIES as u64);
    let mut entries = Vec::with_capacity(need.saturating_sub(have) as usize);
    let mut at = have * 8;
    while at < need * 8 {
        let bytes = Iov::alloc(READ_BYTES.min(need * 8 - at) as usize);
        store.read(header.l1_table + at, bytes.clone()).await?;
        let mut raw = [0; SLICE_BYTES];
        for offset in (0..bytes.len()).step_by(SLICE_BYTES) {
            bytes.read(offset, &mut raw);
            entries.extend_from_slice(Slice::decode(&raw).raw());
        }
        at += bytes.len() as u64;
    }
    Ok(entries)
}
