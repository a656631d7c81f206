//! Opening: headers, the log, regions, metadata. What is not understood whole is refused.

use super::replay::replay;
use super::{VhdxImage, resolve};
use crate::master::sheets::{Sheets, Table};
use crate::master::{self, damaged, read, within};
use crate::{BackingRef, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::HostOffset;
use layout::field;
use layout::vhdx::header::{HEADER_BYTES, HEADERS_AT, REGIONS_AT, REGIONS_BYTES};
use layout::vhdx::{Bat, Header, Metadata, Parent, Regions, SIGNATURE};
use std::rc::Rc;
use store::Store;

/// How much of the metadata's region is looked at.
const METADATA_MOST: u64 = 8 << 20;

/// Opens the image in `store`.
pub(crate) async fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, Format::Vhdx, options)?;
    let head = read(&*store, HostOffset::ZERO.range(SIGNATURE.len() as u64)).await?;
    if head != SIGNATURE {
        let what = "it does not begin as a VHDX does";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(HostOffset::ZERO), what));
    }
    let header = read_header(&*store).await?;
    let (store, replayed) = replay(store, &header).await?;
    let regions = read_regions(&*store).await?;
    within(&*store, regions.metadata, "the metadata's region")?;
    within(&*store, regions.bat, "the BAT's region")?;
    let bytes = read(&*store, regions.metadata.first(METADATA_MOST)).await?;
    let metadata =
        Metadata::decode(&bytes, regions.metadata.start().get()).map_err(|error| damaged(store.name(), &error))?;
    let bat = Bat::of(&metadata);
    let place = regions.bat.start().range(bat.entries() * 8);
    if place.len() > regions.bat.len() {
        let what = format!("the BAT's region has {} bytes, the disk needs {}", regions.bat.len(), place.len());
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(regions.bat.start()), what));
    }
    let table = Table::new(&*store, place)?;
    let backing = metadata.parent.as_ref().map(|parent| backing(&*store, parent)).transpose()?;
    let bitmaps = Sheets::new(resolve::SHEET);
    let data_write = header.data_write;
    Ok(master::image(VhdxImage { store, metadata, bat, table, bitmaps, backing, data_write, replayed }))
}

/// The header that counts.
async fn read_header(store: &dyn Store) -> Result<Header> {
    let mut newest: Option<Header> = None;
    for at in HEADERS_AT {
        let bytes = read(store, HostOffset(at).range(HEADER_BYTES as u64)).await?;
        match Header::decode(&bytes, at) {
            Ok(header) if newest.is_none_or(|other| other.sequence < header.sequence) => newest = Some(header),
            Ok(_) => {}
            Err(error) if error.kind() == field::ErrorKind::Unsupported => return Err(damaged(store.name(), &error)),
            Err(_) => {}
        }
    }
    newest.ok_or_else(|| {
        let what = "neither of its two headers is whole";
        Error::new(ErrorKind::Corrupt, store.name(), Some(HostOffset(HEADERS_AT[0])), what)
    })
}

/// The table of regions, or its copy.
async fn read_regions(store: &dyn Store) -> Result<Regions> {
    let mut first = None;
    for at in REGIONS_AT {
        let bytes = read(store, HostOffset(at).range(REGIONS_BYTES as u64)).await?;
        match Regions::decode(&bytes, at) {
            Ok(regions) => return Ok(regions),
            Err(error) => first = first.or(Some(damaged(store.name(), &error))),
        }
    }
    // Two were tried, so there is an error.
    Err(first.unwrap_or_else(|| Error::new(ErrorKind::Corrupt, store.name(), None, "there is no table of regions")))
}

/// The parent as a chain looks for it: where it is seen from here, or else beside the image under the name it had.
fn backing(store: &dyn Store, parent: &Parent) -> Result<BackingRef> {
    let beside = |path: &str| path.rsplit('\\').next().unwrap_or_default().to_owned();
    let name = match (&parent.relative, &parent.absolute) {
        (Some(relative), _) => relative.replace('\\', "/"),
        (None, Some(absolute)) => beside(absolute),
        (None, None) => String::new(),
    };
    if name.is_empty() || name.contains('\0') {
        let what = "it has a parent, and does not say where; say it in its parent locator";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), None, what));
    }
    Ok(BackingRef { name, format: Some(Format::Vhdx) })
}
