//! Opening VHDX.

use super::{Kind, Paged, Place, Segment, Sparse};
use crate::grid::{damaged, read};
use crate::{Error, ErrorKind, Result};
use layout::vhdx::{Block, Disk, HEADER_BYTES, HEADERS, Header, METADATA_BYTES, REGION_BYTES, REGIONS, Regions, items};
use std::rc::Rc;
use store::Store;

/// Entries of the table that are read at a time.
const PER_PAGE: u64 = 512;

pub(super) async fn open(store: Rc<dyn Store>) -> Result<Paged> {
    let refuse = |kind, at, what: &str| Error::new(kind, store.name(), Some(at), what);
    let mut newest: Option<Header> = None;
    for at in HEADERS {
        let header = Header::decode(&read(&*store, at.range(HEADER_BYTES as u64)).await?);
        newest = newest.into_iter().chain(header).max_by_key(|header| header.sequence);
    }
    let header = newest.ok_or_else(|| refuse(ErrorKind::Corrupt, HEADERS[0], "neither of its headers is whole"))?;
    if header.has_log {
        let what = "it was not closed cleanly: its log holds what is not in its tables yet. Open it once where it was made, or repair \
                    it ('qemu-img check -r all')";
        return Err(refuse(ErrorKind::Unsupported, HEADERS[0], what));
    }
    let first = read(&*store, REGIONS[0].range(REGION_BYTES as u64)).await?;
    let regions = match Regions::decode(&first, REGIONS[0]) {
        Ok(regions) => regions,
        Err(first) => {
            let second = read(&*store, REGIONS[1].range(REGION_BYTES as u64)).await?;
            // If both are damaged, the first says how.
            Regions::decode(&second, REGIONS[1]).map_err(|_| damaged(&*store, &first))?
        }
    };
    let base = regions.metadata.start();
    let table = read(&*store, base.range(METADATA_BYTES as u64)).await?;
    let places = items(&table, base).map_err(|error| damaged(&*store, &error))?;
    let mut values = [[0_u8; 8]; 3];
    for (value, at) in values.iter_mut().zip(places) {
        *value = read(&*store, at.range(8)).await?.first_chunk().copied().unwrap_or_default();
    }
    let [parameters, size, sector] = values;
    let disk = Disk::decode(parameters, size, sector).map_err(|error| damaged(&*store, &error))?;
    let (entries, bat) = (disk.entries(), regions.bat);
    if entries * 8 > bat.len() || bat.start().get() + entries * 8 > store.size() {
        return Err(refuse(ErrorKind::Corrupt, bat.start(), "the table of blocks is shorter than the disk needs"));
    }
    let pages = entries.div_ceil(PER_PAGE);
    let sparse = Sparse {
        block: disk.block,
        per_page: PER_PAGE,
        width: 8,
        big_endian: false,
        directory: (0..pages).map(|page| Some(bat.start() + page * PER_PAGE * 8)).collect(),
        entry: Box::new(move |block| disk.entry(block)),
        place: Box::new(|raw| {
            Some(match Disk::block(raw)? {
                Block::Zero => Place::Zero,
                Block::Data(at) => Place::Data(at),
            })
        }),
    };
    let segments = vec![Segment { start: 0, len: disk.size, kind: Kind::Sparse(sparse) }];
    Ok(Paged { size: disk.size, segments, backing: None, store: Rc::clone(&store) })
}
