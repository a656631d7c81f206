//! Packed clusters: a deflate stream or a zstd frame each, unpacked whole.
//!
//! **Invariants.** What an entry says of a packed cluster's length bounds what is read, and a cluster's size what is made of it:
//! a bomb unpacks to one cluster. Unpacking is done beside the shard, by a helper thread. The last few clusters are kept: a
//! guest reads in smaller pieces.

use super::Core;
use super::resolve::Piece;
use crate::inflate::inflate;
use crate::{ErrorKind, Result};
use layout::qcow2::{Compression, Packed};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use std::io::Read;
use std::rc::Rc;

impl Core {
    /// Reads `range`, all of it in packed clusters, into `into`, which is as long.
    pub(super) async fn unpack_range(self: &Rc<Self>, range: GuestRange, into: &Iov) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let cluster = rest.start().align_down(self.cluster_size());
            let bytes = self.cluster(cluster, rest).await?;
            let inside = (rest.start() - cluster) as usize;
            let part = (bytes.len() - inside).min(rest.len() as usize);
            into.write((rest.start() - range.start()) as usize, &bytes[inside..inside + part]);
            rest = rest.skip(part as u64);
        }
        Ok(())
    }

    /// The cluster that holds the start of `range`, unpacked.
    async fn cluster(self: &Rc<Self>, cluster: GuestOffset, range: GuestRange) -> Result<Rc<[u8]>> {
        if let Some(kept) = self.kept.borrow().get(cluster) {
            return Ok(kept);
        }
        let packed = loop {
            match self.piece(range)? {
                None => self.load(range.start()).await?,
                Some((Piece::Packed(packed), ..)) => break packed,
                Some(_) => {
                    let what = format!("the cluster at guest offset {cluster} is not packed");
                    return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
                }
            }
        };
        let stream = self.read_packed(packed).await?;
        let (how, size) = (self.header.get().compression, self.cluster_size() as usize);
        let unpacked = ring::unblock(move || unpack(how, &stream, size)).await;
        let bytes: Rc<[u8]> = unpacked
            .map_err(|why| {
                let what = format!("the packed cluster for guest offset {cluster} cannot be unpacked: {why}");
                self.health.error(ErrorKind::Corrupt, Some(packed.at), what)
            })?
            .into();
        self.kept.borrow_mut().put(cluster, Rc::clone(&bytes));
        Ok(bytes)
    }

    /// The bytes of a packed cluster; the last one of a file may end before its last sector does.
    async fn read_packed(&self, packed: Packed) -> Result<Vec<u8>> {
        let length = self.store.size();
        if packed.at.get() >= length {
            let what = "a packed cluster lies past the end of the file";
            return Err(self.health.error(ErrorKind::Corrupt, Some(packed.at), what));
        }
        // An entry's length is at most some clusters, so this is bounded; nothing useful packs to more than two.
        let most = (2 * self.cluster_size()).max(1024);
        let bytes = Iov::alloc(packed.len.min(length - packed.at.get()).min(most) as usize);
        self.store.read(packed.at, bytes.clone()).await?;
        Ok(bytes.to_vec())
    }
}

/// Unpacks one cluster of `size` bytes. What follows the stream is somebody else's.
fn unpack(how: Compression, stream: &[u8], size: usize) -> std::result::Result<Vec<u8>, String> {
    match how {
        Compression::Deflate => {
            let cluster = inflate(stream, false, size)?;
            match cluster.len() {
                len if len == size => Ok(cluster),
                len => Err(format!("it has {len} bytes, not {size}")),
            }
        }
        Compression::Zstd => {
            let frame = zstd::stream::read::Decoder::with_buffer(stream).map_err(|error| error.to_string())?;
            let mut cluster = vec![0; size];
            frame.single_frame().read_exact(&mut cluster).map_err(|error| error.to_string())?;
            Ok(cluster)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn packed(how: Compression, bytes: &[u8]) -> Vec<u8> {
        match how {
            Compression::Deflate => {
                let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Zstd => zstd::bulk::compress(bytes, 3).unwrap(),
        }
    }

    #[test]
    fn a_cluster_comes_out_whole_or_not_at_all() {
        let cluster: Vec<u8> = (0..4096_u32).map(|n| ((n * n) >> 5) as u8).collect();
        for how in [Compression::Deflate, Compression::Zstd] {
            let mut stream = packed(how, &cluster);
            assert_eq!(unpack(how, &stream[..stream.len() / 2], 4096).ok(), None, "{how:?} cut off");
            stream.extend(b"what the next cluster has in the same sector");
            assert_eq!(unpack(how, &stream, 4096).unwrap(), cluster, "{how:?}");
            assert!(unpack(how, &packed(how, &cluster[..1000]), 4096).is_err(), "{how:?} too short");
            assert!(unpack(how, b"no stream at all", 4096).is_err(), "{how:?}");
            let bomb = packed(how, &vec![0; 8 << 20]);
            assert!(unpack(how, &bomb, 4096).is_ok_and(|cluster| cluster == [0; 4096]) || how == Compression::Deflate);
        }
    }
}
