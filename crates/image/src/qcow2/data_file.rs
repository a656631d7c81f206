//! The external data file: guest data in a file of their own, tables in the image.
//!
//! **Invariants.**
//! * Every cluster lies in the data file where the guest sees it: an entry that says otherwise is refused. So no two entries lead
//!   to the same bytes, and nothing there is counted or handed out.
//! * A barrier that covers data covers both files. A failure of either one poisons the image.
//! * A raw data file reads as the guest sees it: clusters that become zeros are zeroed there.

use super::Core;
use crate::{Error, ErrorKind, OpenOptions, Result, Surroundings};
use layout::qcow2::{Extension, Extensions, Header};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::rc::Rc;
use store::{Store, ZeroMode};

/// An image's data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name, as the image has it: relative to the image's folder.
    pub name: String,
    /// It is a raw image by itself.
    pub raw: bool,
}

/// Longest name of a data file, bytes: names of files are not longer.
pub(super) const MAX_NAME: usize = 1023;

impl DataFile {
    /// Checks it before anything is written.
    pub(super) fn check(&self) -> Result<()> {
        let fail = |what: &str| Err(Error::new(ErrorKind::InvalidArgument, "", None, what));
        if self.name.is_empty() {
            return fail("the name of the data file is empty");
        }
        if self.name.len() > MAX_NAME || self.name.contains('\0') {
            return fail("the name of a data file has at most 1023 bytes, none of them NUL");
        }
        Ok(())
    }

    /// The extension that names it.
    pub(super) fn extension(&self) -> Extension {
        Extension { kind: Extension::DATA_FILE, data: self.name.as_bytes().to_vec() }
    }
}

/// What the header says of a data file, if it has one.
pub(super) async fn read(store: &dyn Store, header: &Header) -> Result<Option<DataFile>> {
    if !header.has_data_file() {
        return Ok(None);
    }
    let fail = |what: &str| Err(Error::new(ErrorKind::Corrupt, store.name(), None, what));
    let start = u64::from(header.header_bytes);
    let name_start = header.backing_name.map(|name| name.start().get()).filter(|name| *name > start);
    let end = name_start.unwrap_or(header.cluster_size());
    let bytes = Iov::alloc(end.saturating_sub(start) as usize);
    store.read(HostOffset(start), bytes.clone()).await?;
    let extensions = Extensions::decode(&bytes.to_vec(), start);
    let extensions = extensions.map_err(|error| super::open::header_error(store.name(), &error))?;
    let Some(name) = extensions.get(Extension::DATA_FILE) else {
        return fail(
            "its data are in a file of their own, whose name is missing; QEMU's tools open it where that is said \
             ('data-file.filename=')",
        );
    };
    match String::from_utf8(name.to_vec()) {
        Ok(name) if !name.is_empty() && name.len() <= MAX_NAME && !name.contains('\0') => {
            Ok(Some(DataFile { name, raw: header.data_file_is_raw() }))
        }
        _ => fail("the name of its data file is no name of a file"),
    }
}

/// Opens the data file of the image in `store`.
pub(super) async fn open(
    store: &dyn Store,
    file: &DataFile,
    options: OpenOptions,
    surroundings: Surroundings<'_>,
) -> Result<Rc<dyn Store>> {
    let opened = surroundings.companions.open(&file.name, store.name(), options.read_only).await;
    let refuse = |kind, what| Error::new(kind, store.name(), None, what);
    let opened = opened.map_err(|error| {
        let what = format!("could not open its data file '{}'", file.name);
        refuse(error.kind(), what).because(error)
    })?;
    if opened.limits().read_only && !options.read_only {
        let _ = opened.close().await;
        let what = format!("its data file '{}' cannot be written to; open the image read-only", file.name);
        return Err(refuse(ErrorKind::ReadOnly, what));
    }
    Ok(opened)
}

impl Core {
    /// Whether guest data are in a file of their own.
    pub(super) fn has_data_file(&self) -> bool {
        self.header.get().has_data_file()
    }

    /// A barrier that covers the guest's data, too. A failure poisons.
    pub(super) async fn data_barrier(&self) -> Result<()> {
        if self.has_data_file() {
            self.payload.flush().await.map_err(|error| self.health.fail(error.into()))?;
        }
        self.health.barrier().await
    }

    /// Makes clusters of the data file read as zeros, to the end even if the caller goes away.
    pub(super) async fn zero_places(self: &Rc<Self>, range: GuestRange) -> Result<()> {
        let core = self.clone();
        ring::spawn(async move {
            let places = HostOffset(range.start().get()).range(range.len());
            Ok(core.payload.zero(places, ZeroMode { unmap: true }).await?)
        })
        .await
    }

    /// The data file of a disk that grows from `old` to `new` bytes is as long, and one that is raw has zeros there.
    pub(super) async fn lengthen_data_file(self: &Rc<Self>, old: u64, new: u64) -> Result<()> {
        if !self.has_data_file() {
            return Ok(());
        }
        let is_raw = self.header.get().data_file_is_raw();
        if is_raw && self.payload.size() > old {
            self.zero_places(GuestRange::between(GuestOffset(old), GuestOffset(new))).await?;
        }
        if self.payload.size() < new {
            self.payload.set_size(new).await?;
        }
        self.data_barrier().await
    }

    /// The data file of a disk that has shrunk to `size` bytes is no longer than that.
    pub(super) async fn shorten_data_file(&self, size: u64) -> Result<()> {
        if self.has_data_file() && self.payload.size() > size && !self.payload.limits().fixed_size {
            self.payload.set_size(size).await?;
        }
        Ok(())
    }

    /// Refuses what images with a data file do not have.
    pub(super) fn check_no_data_file(&self, what: &str) -> Result<()> {
        if self.has_data_file() {
            let what = format!("{what} are not supported in an image with a data file");
            return Err(self.health.error(ErrorKind::Unsupported, None, what));
        }
        Ok(())
    }
}
