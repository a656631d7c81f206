//! Opening QCOW, version 1.

use super::{Kind, Paged, Place, Segment, Sparse, read_directory};
use crate::grid::{damaged, read};
use crate::{BackingRef, Error, ErrorKind, Result};
use layout::HostOffset;
use layout::qcow::{Entry, HEADER_BYTES, Header};
use std::rc::Rc;
use store::Store;

pub(super) async fn open(store: Rc<dyn Store>) -> Result<Paged> {
    let head = read(&*store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&head).map_err(|error| damaged(&*store, &error))?;
    let directory = read_directory(&*store, header.l1, 8, true).await?;
    let mut places = Vec::with_capacity(directory.len());
    for (number, raw) in directory.into_iter().enumerate() {
        if i64::try_from(raw).is_err() {
            let at = header.l1.start() + number as u64 * 8;
            return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(at), "an L1 entry that makes no sense"));
        }
        places.push((raw != 0).then_some(HostOffset(raw)));
    }
    let backing = match header.backing {
        None => None,
        Some(place) => {
            let name = String::from_utf8(read(&*store, place).await?).map_err(|_| {
                Error::new(ErrorKind::Corrupt, store.name(), Some(place.start()), "the backing file's name is no text")
            })?;
            Some(BackingRef { name, format: None })
        }
    };
    let sparse = Sparse {
        block: 1 << header.cluster_bits,
        per_page: 1 << header.l2_bits,
        width: 8,
        big_endian: true,
        directory: places,
        entry: Box::new(|block| block),
        place: Box::new(move |raw| {
            Some(match header.entry(raw)? {
                Entry::Unallocated => Place::Unallocated,
                Entry::Data(at) => Place::Data(at),
                Entry::Packed(range) => Place::Packed(range),
            })
        }),
    };
    let segments = vec![Segment { start: 0, len: header.size, kind: Kind::Sparse(sparse) }];
    Ok(Paged { size: header.size, segments, backing, store })
}
