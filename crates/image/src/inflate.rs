//! Unpacking deflate streams.
//!
//! Whole streams are `libdeflate`'s, which takes half the time where both sides lie in memory. It knows nothing of streams that
//! are longer than what is wanted of them, or that have no end: those are zlib's.

use flate2::{Decompress, FlushDecompress};
use libdeflater::Decompressor;
use std::cell::RefCell;

thread_local! {
    /// Making them costs memory and time; they are used again.
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static WHOLE: RefCell<Decompressor> = RefCell::new(Decompressor::new());
}

/// Unpacks the stream at the start of `packed` (with zlib's frame around it or without) to `most` bytes at most: what it has
/// beyond that is not looked at, and what follows it is somebody else's.
pub(crate) fn inflate(packed: &[u8], zlib: bool, most: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; most];
    let whole = WHOLE.with_borrow_mut(|whole| {
        if zlib { whole.zlib_decompress(packed, &mut bytes) } else { whole.deflate_decompress(packed, &mut bytes) }
    });
    match whole {
        Ok(len) => {
            bytes.truncate(len);
            Ok(bytes)
        }
        Err(_) => inflate_piece(packed, zlib, most),
    }
}

/// The same, of what is likely not to have its end.
pub(crate) fn inflate_piece(packed: &[u8], zlib: bool, most: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; most];
    INFLATE.with_borrow_mut(|inflate| {
        inflate.reset(zlib);
        inflate.decompress(packed, &mut bytes, FlushDecompress::Finish).map_err(|error| error.to_string())?;
        bytes.truncate(inflate.total_out() as usize);
        Ok(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    fn deflated(bytes: &[u8], zlib: bool, end: FlushCompress) -> Vec<u8> {
        let mut packed = Vec::with_capacity(bytes.len() * 2 + 100);
        Compress::new(Compression::default(), zlib).compress_vec(bytes, &mut packed, end).unwrap();
        packed
    }

    #[test]
    fn both_ways_give_the_same() {
        let bytes: Vec<u8> = (0..70_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        for zlib in [false, true] {
            let packed = deflated(&bytes, zlib, FlushCompress::Finish);
            let mut followed = packed.clone();
            followed.extend([0xa5; 300]);
            for (packed, most) in
                [(&packed, bytes.len()), (&followed, bytes.len()), (&packed, 100_000), (&followed, 512)]
            {
                let expected = &bytes[..most.min(bytes.len())];
                assert!(inflate(packed, zlib, most).unwrap() == expected, "{zlib} {most}");
                assert!(inflate_piece(packed, zlib, most).unwrap() == expected, "{zlib} {most}");
            }
            let endless = deflated(&bytes, zlib, FlushCompress::Sync);
            assert!(inflate(&endless, zlib, bytes.len()).unwrap() == bytes);
            let mut damaged = packed.clone();
            for at in (0..damaged.len()).step_by(97) {
                damaged[at] ^= 0x5a;
                let (whole, piece) = (inflate(&damaged, zlib, bytes.len()), inflate_piece(&damaged, zlib, bytes.len()));
                // Where it stops is told by the second; what both take for good is the same.
                if let (Ok(whole), Ok(piece)) = (&whole, &piece) {
                    assert!(whole == piece, "{zlib} {at}");
                }
                assert_eq!(whole.is_ok(), piece.is_ok(), "{zlib} {at}");
                damaged[at] ^= 0x5a;
            }
        }
    }
}
