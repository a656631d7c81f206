//! Where the pieces of a packed disk are.

use crate::{Error, ErrorKind, Result};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};

/// The most pieces that are held in memory, at some 24 bytes each.
pub(super) const PIECES_MOST: usize = 4 << 20;

/// The longest piece, unpacked: each is unpacked as a whole.
pub(super) const PIECE_MOST: u64 = 32 << 20;

/// A piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it begins in the disk.
    start: GuestOffset,
    /// Where it is in the file.
    host: HostOffset,
    len: u32,
    /// The checksum of what comes of it, as far as the index knows.
    pub(super) checksum: Option<u32>,
}

impl Piece {
    /// Where it is in the file.
    pub(super) fn host(&self) -> HostRange {
        self.host.range(self.len.into())
    }
}

/// All of them, in the disk's order, without a gap.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    pieces: Vec<Piece>,
    /// Bytes of the disk.
    size: u64,
}

impl Pieces {
    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Adds the next one, of `unpacked` bytes; one without any is left out. `image` is who to name in an error.
    pub(super) fn push(&mut self, image: &str, host: HostRange, unpacked: u64, checksum: Option<u32>) -> Result<()> {
        if unpacked == 0 {
            return Ok(());
        }
        let fail = |kind, what: String| Err(Error::new(kind, image, Some(host.start()), what));
        if unpacked > PIECE_MOST {
            let what = format!(
                "a piece of it has {unpacked} bytes unpacked; at most {PIECE_MOST} are served: pack it again in smaller ones"
            );
            return fail(ErrorKind::Unsupported, what);
        }
        // Nothing useful packs to more than twice its size.
        let len = match u32::try_from(host.len()) {
            Ok(len) if host.len() <= 2 * unpacked + 4096 => len,
            _ => {
                let what = format!("a piece of {unpacked} bytes takes {} packed: that cannot be", host.len());
                return fail(ErrorKind::Corrupt, what);
            }
        };
        if self.pieces.len() == PIECES_MOST {
            let what = format!("it has more than {PIECES_MOST} pieces: pack it again in larger ones");
            return fail(ErrorKind::Unsupported, what);
        }
        self.pieces.push(Piece { start: GuestOffset(self.size), host: host.start(), len, checksum });
        // At most so many pieces of so many bytes: no overflow.
        self.size += unpacked;
        Ok(())
    }

    /// The piece that holds `at`, which lies in one, and its bounds.
    pub(super) fn find(&self, at: GuestOffset) -> Option<(Piece, GuestRange)> {
        let behind = self.pieces.partition_point(|piece| piece.start <= at);
        let piece = *self.pieces.get(behind.checked_sub(1)?)?;
        let end = self.pieces.get(behind).map_or(GuestOffset(self.size), |next| next.start);
        (at < end).then(|| (piece, GuestRange::between(piece.start, end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_is_in_one_piece() {
        let mut pieces = Pieces::default();
        for (at, unpacked) in [(0, 100), (50, 0), (60, 7), (100, 3)] {
            pieces.push("x", HostOffset(at).range(40), unpacked, None).unwrap();
        }
        assert_eq!(pieces.size(), 110);
        let found = |at| {
            pieces.find(GuestOffset(at)).map(|(piece, range)| (piece.host.get(), range.start().get(), range.len()))
        };
        assert_eq!(found(0), Some((0, 0, 100)));
        assert_eq!(found(99), Some((0, 0, 100)));
        assert_eq!(found(100), Some((60, 100, 7)));
        assert_eq!(found(109), Some((100, 107, 3)));
        assert_eq!(found(110), None);
        assert_eq!(Pieces::default().find(GuestOffset(0)), None);
        assert!(pieces.push("x", HostOffset(0).range(9000), 100, None).is_err());
        assert!(pieces.push("x", HostOffset(0).range(9000), PIECE_MOST + 1, None).is_err());
    }
}
