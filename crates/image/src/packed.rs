//! What formats with packed clusters share: unpacking a deflate stream, and the last few clusters that were unpacked.
//!
//! **Invariant.** A cluster's size bounds what is made of a stream: a bomb unpacks to one cluster.

use flate2::{Decompress, FlushDecompress};
use layout::GuestOffset;
use std::collections::VecDeque;
use std::rc::Rc;

/// Unpacked clusters that are kept, bytes (one in any case).
pub(crate) const KEPT_BYTES: usize = 4 << 20;

/// The last clusters that were unpacked, oldest first: a guest reads in smaller pieces.
#[derive(Default)]
pub(crate) struct Kept {
    clusters: VecDeque<(GuestOffset, Rc<[u8]>)>,
    bytes: usize,
}

impl Kept {
    pub(crate) fn get(&self, cluster: GuestOffset) -> Option<Rc<[u8]>> {
        self.clusters.iter().rev().find(|(at, _)| *at == cluster).map(|(_, bytes)| Rc::clone(bytes))
    }

    /// What the cluster held is no longer so.
    pub(crate) fn forget(&mut self, cluster: GuestOffset) {
        if let Some(at) = self.clusters.iter().position(|(kept, _)| *kept == cluster) {
            self.bytes -= self.clusters.remove(at).map_or(0, |(_, bytes)| bytes.len());
        }
    }

    pub(crate) fn put(&mut self, cluster: GuestOffset, bytes: Rc<[u8]>) {
        self.bytes += bytes.len();
        self.clusters.push_back((cluster, bytes));
        while self.bytes > KEPT_BYTES && self.clusters.len() > 1 {
            self.bytes -= self.clusters.pop_front().map_or(0, |(_, bytes)| bytes.len());
        }
    }
}

/// A deflate stream, as it is or in zlib's wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrapping {
    None,
    Zlib,
}

/// Unpacks a cluster of `size` bytes, of which the stream holds at least `least`. What follows the stream is somebody else's.
pub(crate) fn inflate(stream: &[u8], wrapping: Wrapping, size: usize, least: usize) -> Result<Vec<u8>, String> {
    let mut cluster = vec![0; size];
    let mut inflate = Decompress::new(wrapping == Wrapping::Zlib);
    inflate.decompress(stream, &mut cluster, FlushDecompress::Finish).map_err(|error| error.to_string())?;
    if (inflate.total_out() as usize) < least {
        return Err(format!("it has {} bytes, not {size}", inflate.total_out()));
    }
    Ok(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_few_are_kept() {
        let mut kept = Kept::default();
        for n in 0..100_u64 {
            kept.put(GuestOffset(n << 16), vec![0; 65536].into());
        }
        assert!(kept.bytes <= KEPT_BYTES && kept.get(GuestOffset(99 << 16)).is_some());
        assert!(kept.get(GuestOffset(0)).is_none());
        kept.put(GuestOffset(0), vec![0; 2 * KEPT_BYTES].into());
        assert_eq!(kept.clusters.len(), 1, "one in any case");
        kept.forget(GuestOffset(0));
        assert_eq!(kept.bytes, 0);
    }
}
