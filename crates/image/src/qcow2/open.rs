//! Opening: the header is understood whole or the image is refused.

use super::Qcow2Image;
use super::resolve::Slices;
use super::unpack::Kept;
use crate::{BackingRef, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::HostOffset;
use layout::qcow2::{self, ErrorKind as HeaderErrorKind, Extensions, Features, Header};
use ring::Iov;
use std::cell::RefCell;
use std::rc::Rc;
use store::Store;

/// Enough for any header's fixed part.
const HEAD: usize = 512;

/// How much of a table one read brings.
const READ_BYTES: usize = 1 << 20;

/// Opens the QCOW2 image in `store`.
pub(crate) async fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    if !options.read_only {
        let what = "QCOW2 images are read, not written, so far: open it read-only, or put an overlay over it \
                    ('headwater create -f qed -b IMAGE -F qcow2 OVERLAY')";
        return Err(Error::new(ErrorKind::ReadOnly, store.name(), None, what));
    }
    let head = Iov::alloc(HEAD);
    store.read(HostOffset::ZERO, head.clone()).await?;
    let refuse = |error: qcow2::Error| header_error(store.name(), &error);
    let header = Header::decode(&head.to_vec()).map_err(refuse)?;
    header.check_length(store.size()).map_err(refuse)?;
    if header.features.contains(Features::EXTERNAL_DATA) {
        let what = "its data are in a file of their own, which is not supported; convert it with 'qemu-img convert'";
        return Err(Error::new(ErrorKind::Unsupported, store.name(), None, what));
    }
    let backing = read_backing(&*store, &header).await?;
    let l1 = read_l1(&*store, &header).await?;
    let (slices, kept) = (RefCell::new(Slices::default()), RefCell::new(Kept::default()));
    Ok(Rc::new(Qcow2Image { store, header, backing, l1, slices, kept }))
}

/// A header's error as a user sees it.
fn header_error(image: &str, error: &qcow2::Error) -> Error {
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
    let format = match extensions.backing_format {
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

/// The L1 table: at most 32 MiB, whatever the header says (see [`Header`]), and no longer than the file.
async fn read_l1(store: &dyn Store, header: &Header) -> Result<Vec<u64>> {
    let bytes = header.l1_entries as usize * 8;
    let mut entries = Vec::with_capacity(header.l1_entries as usize);
    for at in (0..bytes).step_by(READ_BYTES) {
        let part = Iov::alloc(READ_BYTES.min(bytes - at));
        store.read(header.l1_table + at as u64, part.clone()).await?;
        entries.extend(part.to_vec().as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)));
    }
    Ok(entries)
}
