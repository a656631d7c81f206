//! Unpacking deflate streams.

use flate2::{Decompress, FlushDecompress};

/// Unpacks the stream at the start of `packed` (with zlib's frame around it or without) to `most` bytes at most: what it has
/// beyond that is not looked at, and what follows it is somebody else's.
pub(crate) fn inflate(packed: &[u8], zlib: bool, most: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; most];
    let mut inflate = Decompress::new(zlib);
    inflate.decompress(packed, &mut bytes, FlushDecompress::Finish).map_err(|error| error.to_string())?;
    bytes.truncate(inflate.total_out() as usize);
    Ok(bytes)
}
