//! Opening gzip members that say how long they are (BGZF), or one with an index in its header (dictzip).
//!
//! A BGZF file has no index of its own: it is walked from block to block, one small read each. Where `FILE.gzi` lies beside it, as
//! `bgzip -i` makes it, that is the index; only what it does not cover is walked.

use super::pieces::{PIECES_MOST, Pieces};
use super::{How, PackedImage};
use crate::master::{self, damaged, read, read_table};
use crate::{Companions, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::packed::gzip::{BGZF_END, BGZF_HEADER, Extra, HEADER_MOST, Header, TRAILER, unpacked_len};
use layout::{HostOffset, HostRange};
use std::path::Path;
use std::rc::Rc;
use store::Store;

/// The most bytes that a BGZF block has, packed and unpacked.
const BLOCK_MOST: u64 = 64 << 10;

/// Opens the image in `store`.
pub(crate) async fn open(
    store: Rc<dyn Store>,
    options: OpenOptions,
    companions: &dyn Companions,
) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, Format::Gzip, options)?;
    let header = read_header(&*store, HostOffset::ZERO).await?;
    let (how, pieces) = match header.extra {
        Extra::Block(_) => (How::Member, blocks(&*store, companions).await?),
        Extra::Chunks(len, ref sizes) => (How::Chunk, chunks(&*store, header.len, len, sizes).await?),
        Extra::None => {
            let what = "it is packed with gzip and has no index, so it could only be read from its start: unpack it ('gzip -d'), pack it \
                        with bgzip, or convert what was in it ('headwater img convert -c -O qcow2')";
            return Err(Error::new(ErrorKind::Unsupported, store.name(), None, what));
        }
    };
    PackedImage::open(store, Format::Gzip, how, pieces).await
}

/// The header of the member at `at`.
async fn read_header(store: &dyn Store, at: HostOffset) -> Result<Header> {
    let len = store.size().saturating_sub(at.get()).min(HEADER_MOST as u64);
    let bytes = read(store, at.range(len)).await?;
    Header::decode(&bytes, at.get()).map_err(|error| damaged(store.name(), &error))
}

/// The blocks of a BGZF file.
async fn blocks(store: &dyn Store, companions: &dyn Companions) -> Result<Pieces> {
    let fail = |at, what: &str| Err(Error::new(ErrorKind::Corrupt, store.name(), Some(at), what));
    let mut pieces = Pieces::default();
    let mut at = read_index(store, companions, &mut pieces).await?;
    let mut header = Some(read_header(store, at).await?);
    for _ in 0..=PIECES_MOST {
        let Some(Header { extra: Extra::Block(len), .. }) = header else {
            return fail(at, "a gzip member that says how long it is is followed by one that does not");
        };
        let block = at.range(len.into());
        if block.len() < (BGZF_HEADER + TRAILER) as u64 || block.end().get() > store.size() {
            return fail(at, "a block reaches past the end of the file: it was cut off");
        }
        let between = HostOffset(block.end().get() - TRAILER as u64).range((TRAILER + BGZF_HEADER) as u64);
        let bytes = read(store, between).await?;
        let (trailer, next) = bytes.split_at(TRAILER);
        let unpacked = u64::from(unpacked_len(trailer));
        if unpacked > BLOCK_MOST {
            return fail(at, "a block says that it unpacks to more than blocks do");
        }
        pieces.push(store.name(), block, unpacked, None)?;
        if block.end().get() == store.size() {
            if unpacked > 0 || block.len() != BGZF_END.len() as u64 {
                return fail(at, "it does not end with an empty block: it was cut off");
            }
            return Ok(pieces);
        }
        at = block.end();
        if store.size() - at.get() < BGZF_HEADER as u64 {
            return fail(at, "a block's header is not whole: it was cut off");
        }
        header = match Header::decode(next, at.get()) {
            Ok(header @ Header { extra: Extra::Block(_), .. }) => Some(header),
            // It may have more in it than headers of blocks have as a rule.
            _ => Some(read_header(store, at).await?),
        };
    }
    let what = format!("it has more than {PIECES_MOST} blocks");
    Err(Error::new(ErrorKind::Unsupported, store.name(), Some(at), what))
}

/// Takes over what a `.gzi` beside the file says; returns where the last block begins that it knows of.
async fn read_index(store: &dyn Store, companions: &dyn Companions, pieces: &mut Pieces) -> Result<HostOffset> {
    let none = Ok(HostOffset::ZERO);
    let Some(file) = Path::new(store.name()).file_name().and_then(|file| file.to_str()) else { return none };
    let Ok(index) = companions.open(&format!("./{file}.gzi"), store.name(), true).await else { return none };
    let entries = read_entries(&*index).await;
    let closed = index.close().await;
    let entries = entries?;
    closed?;
    let mut last = (0, 0);
    for (host, guest) in entries {
        let block = HostRange::between(HostOffset(last.0), HostOffset(host));
        let unpacked = guest.checked_sub(last.1);
        let Some(unpacked) =
            unpacked.filter(|len| *len <= BLOCK_MOST && !block.is_empty() && block.len() <= BLOCK_MOST)
        else {
            let what = format!("it is no index of '{}'; make it anew ('bgzip -r'), or remove it", store.name());
            return Err(Error::new(ErrorKind::Corrupt, index.name(), None, what));
        };
        pieces.push(store.name(), block, unpacked, None)?;
        last = (host, guest);
    }
    Ok(HostOffset(last.0))
}

/// The entries of a `.gzi`: where blocks begin, packed and unpacked; the first block is not among them.
async fn read_entries(index: &dyn Store) -> Result<Vec<(u64, u64)>> {
    let bytes =
        read_table(index, HostOffset::ZERO.range(index.size()), PIECES_MOST as u64 * 16 + 8, "the index").await?;
    let mut words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
    let count = words.next().unwrap_or(0);
    if count.checked_mul(16).and_then(|len| len.checked_add(8)) != Some(bytes.len() as u64) {
        let what =
            format!("it says that it has {count} entries, and has {} bytes; make it anew ('bgzip -r')", bytes.len());
        return Err(Error::new(ErrorKind::Corrupt, index.name(), Some(HostOffset::ZERO), what));
    }
    Ok(std::iter::from_fn(|| Some((words.next()?, words.next()?))).collect())
}

/// The chunks of a dictzip file, whose stream begins at `start`.
async fn chunks(store: &dyn Store, start: usize, len: u32, sizes: &[u16]) -> Result<Pieces> {
    let trailer = HostOffset(store.size().saturating_sub(TRAILER as u64));
    let total = u64::from(unpacked_len(&read(store, trailer.range(TRAILER as u64)).await?));
    if total.div_ceil(len.into()) != sizes.len() as u64 {
        let what = format!("it has {total} bytes unpacked, and an index of {} chunks of {len}", sizes.len());
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(trailer), what));
    }
    let mut pieces = Pieces::default();
    let mut at = HostOffset(start as u64);
    for size in sizes {
        let chunk = at.range((*size).into());
        let unpacked = (total - pieces.size()).min(len.into());
        pieces.push(store.name(), chunk, unpacked, None)?;
        at = chunk.end();
    }
    if at > trailer {
        let what = "its chunks reach past the end of the file: it was cut off";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(trailer), what));
    }
    Ok(pieces)
}
