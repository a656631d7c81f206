//! Opening: the header is understood whole or the image is refused.

use super::header::HeaderZone;
use super::refcount::Refcounts;
use super::{Core, Qcow2Image, SLICE_BYTES, data_file, l1_form};
use crate::commits::Commits;
use crate::health::Health;
use crate::luks::{self, KeySlots};
use crate::reservation::Active;
use crate::room::Room;
use crate::slices::{CACHE_BYTES, Shelf, SliceCache};
use crate::space::Space;
use crate::tables::Tables;
use crate::{BackingRef, Error, ErrorKind, Format, Image, OpenOptions, Result, Surroundings};
use layout::qcow2::{
    self, AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, ErrorKind as HeaderErrorKind, Extensions, Features, Header,
};
use layout::{HostOffset, HostRange};
use ring::Iov;
use ring::sync::{Event, Mutex};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::Store;
use store::cipher::CipherStore;

/// Enough for any header's fixed part.
const HEAD: usize = 512;

/// How much of a table one read brings.
const READ_BYTES: usize = 1 << 20;

/// Opens the QCOW2 image in `store`.
pub(crate) async fn open(
    store: Rc<dyn Store>,
    options: OpenOptions,
    surroundings: Surroundings<'_>,
) -> Result<Rc<dyn Image>> {
    open_with(store, options, surroundings, CACHE_BYTES).await
}

/// Opens the QCOW2 image in `store` with a stated budget for L2 tables in memory, in bytes. [`crate::open()`] takes 32 MiB.
pub async fn open_with_table_memory(store: Rc<dyn Store>, options: OpenOptions, bytes: usize) -> Result<Rc<dyn Image>> {
    open_with(store, options, Surroundings::default(), bytes).await
}

async fn open_with(
    store: Rc<dyn Store>,
    options: OpenOptions,
    surroundings: Surroundings<'_>,
    bytes: usize,
) -> Result<Rc<dyn Image>> {
    let limits = store.limits();
    if limits.read_only && !options.read_only {
        let what = "it cannot be written to; open it read-only";
        return Err(Error::new(ErrorKind::ReadOnly, store.name(), None, what));
    }
    let head = Iov::alloc(HEAD);
    store.read(HostOffset::ZERO, head.clone()).await?;
    let refuse = |error: qcow2::Error| header_error(store.name(), &error);
    let header = Header::decode(&head.to_vec()).map_err(refuse)?;
    header.check_length(store.size()).map_err(refuse)?;
    if header.features.contains(Features::CORRUPT) && !options.read_only && !options.for_check {
        let what = "the image is marked as corrupt and must not be written to; check and repair it ('check -r all'), or open it \
                    read-only";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), None, what));
    }
    let zone = HeaderZone::read(&*store, &header).await?;
    let backing = read_backing(&*store, &header).await?;
    let l1 = read_l1(&*store, &header).await?;
    let data_file = data_file::read(&*store, &header).await?;
    if data_file.as_ref().is_some_and(|file| file.raw) && backing.is_some() && !options.read_only && !options.for_check
    {
        let what = "its raw data file cannot have a backing file; open it read-only, or take the backing file away";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), None, what));
    }
    let (payload, key_slots) = match &data_file {
        Some(file) => (data_file::open(&*store, file, options, surroundings).await?, None),
        None => payload(&store, &header, surroundings.passphrase).await?,
    };
    let unpinned = Rc::new(Event::new());
    let cluster = header.cluster_size();
    let length = store.size().next_multiple_of(cluster);
    let core = Rc::new(Core {
        health: Health::new(store.clone(), options.read_only, unpinned.clone()),
        for_check: options.for_check,
        zone: Mutex::new(zone),
        backing: RefCell::new(backing),
        reach: Cell::new(0),
        active: Active::default(),
        tables: RefCell::new(Tables::new(l1_form(cluster), l1)),
        cache: Shelf::new(SliceCache::new(bytes, SLICE_BYTES.min(cluster) as usize), unpinned.clone()),
        unpinned,
        room: Room::new(store.clone(), cluster, Space::full(cluster, length, !limits.fixed_size)),
        refcounts: RefCell::new(Refcounts::new(Vec::new())),
        metadata: RefCell::default(),
        linked: RefCell::default(),
        making_table: Mutex::new(()),
        commits: Commits::default(),
        kept: RefCell::default(),
        packing: RefCell::default(),
        key_slots,
        blank: header.crypt == 0,
        header: Cell::new(header),
        payload,
        data_file,
        store,
    });
    if let Some(snapshot) = surroundings.snapshot {
        core.show_snapshot(snapshot).await?;
    }
    if !options.read_only
        && let Err(error) = core.prepare_to_write(surroundings.no_guest).await
    {
        if core.has_data_file() {
            let _ = core.payload.close().await;
        }
        return Err(error);
    }
    Ok(Rc::new(Qcow2Image { core }))
}

/// Where guests' data are. Of an encrypted image that nobody has unlocked, everything but them can be looked at.
async fn payload(
    store: &Rc<dyn Store>,
    header: &Header,
    passphrase: Option<&[u8]>,
) -> Result<(Rc<dyn Store>, Option<KeySlots>)> {
    if header.crypt == 0 {
        return Ok((Rc::clone(store), None));
    }
    let place = encryption_header(&**store, header).await?;
    let (cipher, slots) = match passphrase {
        Some(passphrase) => {
            let unlocked = luks::unlock(store, place.start(), Some(place.len()), passphrase).await?;
            (Some(unlocked.cipher), Some(unlocked.slots))
        }
        None => (None, None),
    };
    // Sectors are numbered by where they are in the file.
    Ok((CipherStore::new(Rc::clone(store), cipher, HostOffset::ZERO), slots))
}

/// Where the header of the encryption is.
pub(super) async fn encryption_header(store: &dyn Store, header: &Header) -> Result<HostRange> {
    let start = u64::from(header.header_bytes);
    let end = header.backing_name.map(|name| name.start().get()).filter(|end| *end > start);
    let bytes = Iov::alloc((end.unwrap_or(header.cluster_size()) - start) as usize);
    store.read(HostOffset(start), bytes.clone()).await?;
    let found = Extensions::decode(&bytes.to_vec(), start).and_then(|extensions| extensions.encryption(header));
    found.map_err(|error| header_error(store.name(), &error))
}

impl Core {
    /// What a writer must do before anything else: repair what was left dirty, clear features it does not keep up, find out
    /// what is free.
    async fn prepare_to_write(self: &Rc<Self>, no_guest: bool) -> Result<()> {
        let header = self.header.get();
        let table = self.read_refcount_table(&header).await?;
        *self.refcounts.borrow_mut() = Refcounts::new(table);
        if self.for_check {
            return Ok(());
        }
        if header.features.contains(Features::DIRTY) {
            self.recover().await?;
        }
        // What could not be read would count as free, and be written over.
        let (header, length) = (self.header.get(), self.store.size().next_multiple_of(header.cluster_size()));
        if header.refcount_table.get() + header.refcount_table_bytes() > length {
            let what = "the refcount table lies past the end of the file; check and repair the image ('check -r all')";
            return Err(self.health.error(ErrorKind::Corrupt, Some(header.refcount_table), what));
        }
        let keeps_bitmaps = no_guest || self.suspend_bitmaps().await?;
        let mut kept = if keeps_bitmaps { AUTOCLEAR_BITMAPS } else { 0 };
        if header.has_data_file() {
            kept |= AUTOCLEAR_DATA_FILE_RAW;
        }
        let autoclear_features = header.autoclear_features & kept;
        if header.autoclear_features != autoclear_features {
            let mut zone = self.zone.lock().await;
            self.publish_header(&mut zone, Header { autoclear_features, ..header }).await?;
        }
        self.find_free().await
    }
}

/// A header's error as a user sees it.
pub(super) fn header_error(image: &str, error: &qcow2::Error) -> Error {
    let (kind, what) = match error.kind() {
        HeaderErrorKind::Foreign => (ErrorKind::Corrupt, format!("not a QCOW2 image: {error}; state the right format")),
        HeaderErrorKind::Unsupported => (ErrorKind::Unsupported, format!("this QCOW2 image cannot be opened: {error}")),
        _ => (ErrorKind::Corrupt, format!("the QCOW2 header is damaged: {error}")),
    };
    Error::new(kind, image, Some(error.offset()), what)
}

async fn read_backing(store: &dyn Store, header: &Header) -> Result<Option<BackingRef>> {
    let Some(slot) = header.backing_name else { return Ok(None) };
    let error = |kind, what: String| Err(Error::new(kind, store.name(), Some(slot.start()), what));
    let name = Iov::alloc(slot.len() as usize);
    store.read(slot.start(), name.clone()).await?;
    let Ok(name) = String::from_utf8(name.to_vec()) else {
        let what = "the name of the backing file is not UTF-8; rename the file and rebase the image";
        return error(ErrorKind::Unsupported, what.to_owned());
    };
    if name.contains('\0') {
        return error(ErrorKind::Corrupt, "the name of the backing file contains a NUL byte".to_owned());
    }
    // Extensions lie between the header and the name, or fill the first cluster.
    let start = u64::from(header.header_bytes);
    let end = if slot.start().get() > start { slot.start().get() } else { header.cluster_size() };
    let bytes = Iov::alloc(end.saturating_sub(start) as usize);
    store.read(HostOffset(start), bytes.clone()).await?;
    let extensions = Extensions::decode(&bytes.to_vec(), start).map_err(|error| header_error(store.name(), &error))?;
    let format = match extensions.backing_format() {
        None => None,
        Some(format) => match Format::from_name(&format) {
            Some(format) => Some(format),
            None => {
                let what = format!("its backing file '{name}' has the format '{format}', which is not supported");
                return error(ErrorKind::Unsupported, what);
            }
        },
    };
    Ok(Some(BackingRef { name, format }))
}

/// The clusters of the L1 table: at most 32 MiB, whatever the header says (see [`Header`]).
pub(super) async fn read_l1(store: &dyn Store, header: &Header) -> Result<Vec<u64>> {
    let bytes = header.l1_range().len().next_multiple_of(header.cluster_size()) as usize;
    let mut entries = Vec::with_capacity(bytes / 8);
    for at in (0..bytes).step_by(READ_BYTES) {
        let part = Iov::alloc(READ_BYTES.min(bytes - at));
        store.read(header.l1_table + at as u64, part.clone()).await?;
        entries.extend(part.to_vec().as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)));
    }
    Ok(entries)
}
