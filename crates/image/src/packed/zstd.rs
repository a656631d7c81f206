//! Opening zstd frames with a seek table.

use super::pieces::{PIECES_MOST, Pieces};
use super::{How, PackedImage};
use crate::master::{self, damaged, read, read_table};
use crate::{Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::HostOffset;
use layout::packed::seekable::{FOOTER_BYTES, MAGIC, SeekTable};
use std::rc::Rc;
use store::Store;

/// Opens the image in `store`.
pub(crate) async fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, Format::Zstd, options)?;
    let name = store.name();
    let refuse = |error: layout::field::Error| damaged(name, &error);
    let size = store.size();
    let footer = HostOffset(size.saturating_sub(FOOTER_BYTES)).range(FOOTER_BYTES.min(size));
    let footer = read(&*store, footer).await?;
    let Some(table) = SeekTable::decode(&footer, size).map_err(refuse)? else {
        let head = read(&*store, HostOffset::ZERO.range(4)).await?;
        let (kind, what) = if head == MAGIC {
            let what = "it is packed with zstd and has no seek table at its end, so it could only be read from its start: unpack it \
                        ('zstd -d'), or pack it in zstd's seekable format";
            (ErrorKind::Unsupported, what)
        } else {
            (ErrorKind::Corrupt, "it is not packed with zstd, and has no seek table at its end")
        };
        return Err(Error::new(kind, name, None, what));
    };
    let head = read(&*store, table.start.range(8)).await?;
    table.check_header(&head).map_err(refuse)?;
    let most = PIECES_MOST as u64 * 12;
    let entries = read_table(&*store, table.entries, most, "the seek table").await?;
    let mut pieces = Pieces::default();
    let mut at = 0_u64;
    for frame in table.decode_entries(&entries) {
        // So few frames, each shorter than 4 GiB: no overflow.
        pieces.push(name, HostOffset(at).range(frame.packed.into()), frame.unpacked.into(), frame.checksum)?;
        at += u64::from(frame.packed);
    }
    if at != table.start.get() {
        let what = format!("the frames of its seek table take {at} bytes, and it begins at byte {}", table.start.get());
        return Err(Error::new(ErrorKind::Corrupt, name, Some(table.start), what));
    }
    PackedImage::open(store, Format::Zstd, How::Zstd, pieces).await
}
