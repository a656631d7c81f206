//! Opening VMDK: one sparse file with a descriptor inside (also as it is streamed), or a descriptor that names extents.
//!
//! Extents lie in the descriptor's folder: a descriptor is a text that anybody can write, and must not be able to show a guest the
//! host's other files.

use super::{Kind, Paged, Place, Segment, Sparse, read_directory};
use crate::grid::{damaged, read};
use crate::{BackingRef, Error, ErrorKind, Format, Result, Surroundings};
use layout::HostOffset;
use layout::vmdk::descriptor::{Descriptor, Kind as ExtentKind, LONGEST};
use layout::vmdk::{FOOTER_FROM_END, Grain, HEADER_BYTES, Header, MAGIC, SECTOR};
use std::rc::Rc;
use store::Store;
use store::joined::JoinedStore;

pub(super) async fn open(store: Rc<dyn Store>, surroundings: Surroundings<'_>) -> Result<Paged> {
    let head = read(&*store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    if !head.starts_with(&MAGIC) {
        let text = read(&*store, HostOffset::ZERO.range(store.size().min(LONGEST))).await?;
        let descriptor = Descriptor::decode(&text).map_err(|error| damaged(&*store, &error))?;
        return several(store, descriptor, surroundings).await;
    }
    let header = sparse_header(&*store, HostOffset::ZERO, store.size()).await?;
    let backing = match header.descriptor {
        None => None,
        Some(place) => {
            let text = read(&*store, place).await?;
            Descriptor::decode(&text).map_err(|error| damaged(&*store, &error))?.parent
        }
    };
    let sparse = tables(&*store, header, HostOffset::ZERO).await?;
    let segments = vec![Segment { start: 0, len: header.size, kind: Kind::Sparse(sparse) }];
    Ok(Paged { size: header.size, segments, backing: backing.map(parent), store })
}

fn parent(name: String) -> BackingRef {
    BackingRef { name, format: Some(Format::Vmdk) }
}

/// The header of the sparse extent of `len` bytes at `base`: the one in front, or the one at the end that it leaves things to.
async fn sparse_header(store: &dyn Store, base: HostOffset, len: u64) -> Result<Header> {
    let bytes = read(store, base.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&bytes).map_err(|error| damaged(store, &error))?;
    if header.directory.is_some() {
        return Ok(header);
    }
    let footer = base + len.saturating_sub(FOOTER_FROM_END);
    let bytes = read(store, footer.range(HEADER_BYTES as u64)).await?;
    let last = Header::decode(&bytes).map_err(|error| damaged(store, &error))?;
    if last.directory.is_none() {
        let what = "neither its header nor its footer says where its directory is: it is cut off";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(footer), what));
    }
    // The one in front may not know the size yet.
    Ok(Header { descriptor: header.descriptor, ..last })
}

/// The tables of the sparse extent at `base`.
async fn tables(store: &dyn Store, header: Header, base: HostOffset) -> Result<Sparse> {
    let Some(directory) = header.directory else {
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(base), "it has no directory"));
    };
    let place = (base + directory.start().get()).range(directory.len());
    let directory = read_directory(store, place, 4, false).await?;
    Ok(Sparse {
        block: header.grain,
        per_page: header.table_entries,
        width: 4,
        big_endian: false,
        directory: directory.into_iter().map(|sector| (sector != 0).then(|| base + sector * SECTOR)).collect(),
        entry: Box::new(|block| block),
        place: Box::new(move |raw| {
            Some(match header.grain(raw as u32) {
                Grain::Unallocated => Place::Unallocated,
                Grain::Zero => Place::Zero,
                Grain::At(at) if header.packed => Place::Marked(base + at.get()),
                Grain::At(at) => Place::Data(base + at.get()),
            })
        }),
    })
}

/// An image of several files.
async fn several(store: Rc<dyn Store>, descriptor: Descriptor, surroundings: Surroundings<'_>) -> Result<Paged> {
    let name = store.name().to_owned();
    if descriptor.extents.is_empty() {
        return Err(Error::new(ErrorKind::Corrupt, &name, None, "its descriptor names no extents"));
    }
    let mut parts = vec![Rc::clone(&store)];
    for extent in &descriptor.extents {
        let (ExtentKind::Sparse(file) | ExtentKind::Flat(file, _)) = &extent.kind else { continue };
        let opened = open_part(&name, file, surroundings).await;
        match opened {
            Ok(part) => parts.push(part),
            Err(error) => {
                // The descriptor's own store is closed by whoever opened it.
                for part in &parts[1..] {
                    let _ = part.close().await;
                }
                return Err(error);
            }
        }
    }
    let sizes: Vec<u64> = parts.iter().map(|part| part.size()).collect();
    let (joined, places) = JoinedStore::new(&name, parts)?;
    let mut files = places.into_iter().zip(sizes).skip(1);
    let (mut at, mut segments) = (0_u64, Vec::new());
    for extent in descriptor.extents {
        let len = extent.sectors * SECTOR;
        let mut file = || files.next().unwrap_or((HostOffset::ZERO, 0));
        let kind = match extent.kind {
            ExtentKind::Zero => Kind::Zero,
            ExtentKind::Flat(_, sector) => Kind::Flat(file().0 + sector * SECTOR),
            ExtentKind::Sparse(_) => {
                let (base, size) = file();
                let header = sparse_header(&*joined, base, size).await?;
                Kind::Sparse(tables(&*joined, header, base).await?)
            }
        };
        let too_long = || Error::new(ErrorKind::Corrupt, &name, None, "its extents are longer than any disk");
        let end = at.checked_add(len).filter(|end| i64::try_from(*end).is_ok()).ok_or_else(too_long)?;
        segments.push(Segment { start: at, len, kind });
        at = end;
    }
    Ok(Paged { size: at, segments, backing: descriptor.parent.map(parent), store: joined })
}

async fn open_part(image: &str, file: &str, surroundings: Surroundings<'_>) -> Result<Rc<dyn Store>> {
    if file.contains('/') || file == ".." || file == "." {
        let what = format!(
            "its descriptor names an extent in another folder, '{file}': put it beside the descriptor, and name it without a folder"
        );
        return Err(Error::new(ErrorKind::Unsupported, image, None, what));
    }
    // As a plain file, whatever its name looks like.
    let plain = format!("file:{file}");
    let opened = surroundings.companions.open(&plain, image, true).await;
    opened.map_err(|error| {
        Error::new(ErrorKind::Chain, image, None, format!("could not open its extent '{file}'")).because(error)
    })
}
