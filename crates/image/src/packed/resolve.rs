//! Where a guest's bytes are: in pieces, and behind the last one zeros, up to the end of a sector.

use super::pieces::Piece;
use super::{How, PackedImage};
use crate::inflate::{inflate, inflate_piece};
use crate::master::{Master, read};
use crate::probe::like_an_image;
use crate::{Error, ErrorKind, Format, ImageFuture, ImageInfo, Mapped, Mapping, Result};
use flate2::Crc;
use layout::packed::gzip::{Extra, Header, TRAILER, checksum};
use layout::packed::xxh64;
use layout::{GuestOffset, GuestRange};
use std::rc::Rc;
use store::Store;

/// The size of a guest's disk is a multiple of this, bytes.
const SECTOR: u64 = 512;

impl PackedImage {
    /// Refuses an image of another format that is packed as a whole: its bytes are not a guest's.
    pub(super) async fn check_content(&self) -> Result<()> {
        let Some((_, first)) = self.pieces.find(GuestOffset::ZERO) else { return Ok(()) };
        let bytes = self.unpack_piece(first).await?;
        let Some(inside) = like_an_image(&bytes) else { return Ok(()) };
        let what = format!(
            "what is packed in it looks like an image itself ({inside}): unpack it first; only raw disks are read packed"
        );
        Err(Error::new(ErrorKind::Unsupported, self.store.name(), None, what))
    }

    async fn unpack_piece(&self, range: GuestRange) -> Result<Vec<u8>> {
        let Some((piece, _)) = self.pieces.find(range.start()) else {
            let what = format!("nothing is packed at guest offset {}", range.start());
            return Err(Error::new(ErrorKind::InvalidArgument, self.store.name(), None, what));
        };
        let packed = read(&*self.store, piece.host()).await?;
        let (how, len) = (self.how, range.len() as usize);
        ring::unblock(move || unpack(how, piece, &packed, len)).await.map_err(|why| {
            let what = format!("the piece for guest offset {} cannot be unpacked: {why}", range.start());
            Error::new(ErrorKind::Corrupt, self.store.name(), Some(piece.host().start()), what)
        })
    }
}

/// Unpacks a piece to exactly `len` bytes.
fn unpack(how: How, piece: Piece, packed: &[u8], len: usize) -> std::result::Result<Vec<u8>, String> {
    let bytes = match how {
        How::Zstd => {
            let mut bytes = vec![0; len];
            let got = zstd::bulk::decompress_to_buffer(packed, &mut bytes).map_err(|error| error.to_string())?;
            bytes.truncate(got);
            bytes
        }
        How::Chunk => inflate_piece(packed, false, len)?,
        How::Member => {
            let header = Header::decode(packed, 0).map_err(|error| error.to_string())?;
            let stream = packed.len().checked_sub(TRAILER).and_then(|end| packed.get(header.len..end));
            let Some(stream) = stream.filter(|_| header.extra == Extra::Block(packed.len() as u32)) else {
                return Err("no block of this length is here; is the index another file's?".to_owned());
            };
            let bytes = inflate(stream, false, len)?;
            let mut crc = Crc::new();
            crc.update(&bytes);
            if bytes.len() == len && crc.sum() != checksum(&packed[packed.len() - TRAILER..]) {
                return Err("its checksum is wrong".to_owned());
            }
            bytes
        }
    };
    if bytes.len() != len {
        return Err(format!("it has {} bytes, not {len}", bytes.len()));
    }
    if piece.checksum.is_some_and(|sum| sum != xxh64(&bytes) as u32) {
        return Err("its checksum is wrong".to_owned());
    }
    Ok(bytes)
}

impl Master for PackedImage {
    fn format(&self) -> Format {
        self.format
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.pieces.size().next_multiple_of(SECTOR)
    }

    fn unit(&self) -> u64 {
        1
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>> {
        let (len, mapping) = match self.pieces.size().checked_sub(at.get()) {
            None | Some(0) => (self.size() - at.get(), Mapping::Zero),
            Some(left) => (left, Mapping::Packed),
        };
        Ok(Some(Mapped { len, mapping }))
    }

    fn load(&self, _: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn packed(&self, at: GuestOffset) -> GuestRange {
        self.pieces.find(at).map_or(at.range(1), |(_, range)| range)
    }

    fn unpack(&self, piece: GuestRange) -> ImageFuture<'_, Vec<u8>> {
        Box::pin(self.unpack_piece(piece))
    }
}
