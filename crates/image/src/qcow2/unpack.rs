//! Packed clusters: a deflate stream or a zstd frame each, unpacked whole.
//!
//! **Invariants.** What an entry says of a packed cluster's length bounds what is read, and a cluster's size what is made of it:
//! a bomb unpacks to one cluster. Unpacking is done beside the shard, by a helper thread, several clusters at a time where
//! several are asked for. Clusters of which only a part is read are kept for a while: a guest reads in smaller pieces.

use super::Core;
use super::resolve::Piece;
use crate::inflate::inflate;
use crate::{Error, ErrorKind, Result};
use futures_util::future::try_join_all;
use layout::qcow2::{Compression, Packed};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::cell::RefCell;
use std::io::Read;
use std::ops::Range;
use std::rc::Rc;

/// Clusters that are unpacked at one go, at most; and their bytes (one in any case).
const BATCH: usize = 64;
const BATCH_BYTES: u64 = 512 << 10;

/// Packed clusters that lie so near each other in the file are read together, bytes.
const NEAR: u64 = 4096;

/// A stretch of the file with packed clusters in it, and where they are there.
struct Stretch {
    range: HostRange,
    clusters: Vec<Range<usize>>,
}

impl Core {
    /// Reads `range`, all of it in packed clusters, into `into`, which is as long.
    pub(super) async fn unpack_range(self: &Rc<Self>, range: GuestRange, into: &Iov) -> Result<()> {
        let cluster = self.cluster_size();
        let mut rest = range;
        while !rest.is_empty() {
            let start = rest.start().align_down(cluster);
            let kept = self.kept.borrow().get(start);
            if let Some(bytes) = kept {
                rest = deliver(&bytes, start, range, rest, into);
                continue;
            }
            let first = rest.start().align_down(cluster);
            for (number, bytes) in (0..).zip(self.unpack_some(rest).await?) {
                let start = first + number * cluster;
                rest = deliver(&bytes, start, range, rest, into);
                // Whoever reads only a part will come for the rest.
                if start < range.start() || start + cluster > range.end() {
                    self.kept.borrow_mut().put(start, bytes.into());
                }
            }
        }
        Ok(())
    }

    /// The clusters at the start of `range`, unpacked: one at least.
    async fn unpack_some(self: &Rc<Self>, range: GuestRange) -> Result<Vec<Vec<u8>>> {
        let stretches = self.packed_stretches(range).await?;
        let reads = stretches.iter().map(async |stretch| {
            let bytes = Iov::alloc(stretch.range.len() as usize);
            self.store.read(stretch.range.start(), bytes.clone()).await?;
            Ok::<_, Error>(bytes.to_vec())
        });
        let streams = try_join_all(reads).await?;
        let places: Vec<HostOffset> = stretches
            .iter()
            .flat_map(|stretch| stretch.clusters.iter().map(|cluster| stretch.range.start() + cluster.start as u64))
            .collect();
        let (how, size) = (self.header.get().compression, self.cluster_size() as usize);
        let unpacked = ring::unblock(move || {
            let clusters = stretches.iter().zip(&streams);
            let clusters = clusters.flat_map(|(stretch, bytes)| stretch.clusters.iter().map(|at| &bytes[at.clone()]));
            clusters.map(|stream| unpack(how, stream, size)).collect::<Vec<_>>()
        });
        let mut clusters = Vec::new();
        for (unpacked, at) in unpacked.await.into_iter().zip(places) {
            match unpacked {
                Ok(cluster) => clusters.push(cluster),
                // Those in front of it are good; it is met again by itself.
                Err(_) if !clusters.is_empty() => break,
                Err(why) => {
                    let guest = range.start().align_down(self.cluster_size());
                    let what = format!("the packed cluster for guest offset {guest} cannot be unpacked: {why}");
                    return Err(self.health.error(ErrorKind::Corrupt, Some(at), what));
                }
            }
        }
        Ok(clusters)
    }

    /// Where the clusters at the start of `range` are packed: a batch of them at most, as far as they are and their tables are in
    /// memory; one in any case.
    async fn packed_stretches(self: &Rc<Self>, range: GuestRange) -> Result<Vec<Stretch>> {
        let cluster = self.cluster_size();
        let most = ((BATCH_BYTES / cluster) as usize).clamp(1, BATCH);
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut rest = range;
        while self.piece(rest)?.is_none() {
            self.load(rest.start()).await?;
        }
        for number in 0..most {
            if rest.is_empty() {
                break;
            }
            let found = match self.piece(rest) {
                Ok(Some((Piece::Packed(packed), ..))) => self.bounds(packed),
                Ok(Some(_)) if number == 0 => {
                    let what =
                        format!("the cluster at guest offset {} is not packed", rest.start().align_down(cluster));
                    return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
                }
                Ok(_) => break,
                Err(error) => Err(error),
            };
            let found = match found {
                Ok(found) => found,
                Err(error) if number == 0 => return Err(error),
                // What is wrong with others is told when it is their turn.
                Err(_) => break,
            };
            let near = |last: &Stretch| {
                found.start() >= last.range.start() && found.start().get() <= last.range.end().get() + NEAR
            };
            if !stretches.last().is_some_and(near) {
                stretches.push(Stretch { range: found.first(0), clusters: Vec::new() });
            }
            if let Some(last) = stretches.last_mut() {
                let from = (found.start() - last.range.start()) as usize;
                last.clusters.push(from..from + found.len() as usize);
                let end = last.range.end().max(found.end());
                last.range = HostRange::new(last.range.start(), end - last.range.start());
            }
            rest = rest.skip((cluster - rest.start().get() % cluster).min(rest.len()));
        }
        Ok(stretches)
    }

    /// The bytes of a packed cluster; the last one of a file may end before its last sector does.
    fn bounds(&self, packed: Packed) -> Result<HostRange> {
        let length = self.store.size();
        if packed.at.get() >= length {
            let what = "a packed cluster lies past the end of the file";
            return Err(self.health.error(ErrorKind::Corrupt, Some(packed.at), what));
        }
        // An entry's length is at most some clusters, so this is bounded; nothing useful packs to more than two.
        let most = (2 * self.cluster_size()).max(1024);
        Ok(packed.at.range(packed.len.min(length - packed.at.get()).min(most)))
    }
}

/// Copies what `bytes` (the cluster at `start`) holds of `rest` to its place in `into`, which is as long as `range`; what is left.
fn deliver(bytes: &[u8], start: GuestOffset, range: GuestRange, rest: GuestRange, into: &Iov) -> GuestRange {
    let inside = (rest.start() - start) as usize;
    let part = (bytes.len() - inside).min(rest.len() as usize);
    into.write((rest.start() - range.start()) as usize, &bytes[inside..inside + part]);
    rest.skip(part as u64)
}

thread_local! {
    /// Making one costs as much as unpacking a cluster.
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Unpacks the frame at the start of `stream`, if it holds `size` bytes exactly and says where it ends.
fn unpack_frame(stream: &[u8], size: usize) -> Option<Vec<u8>> {
    let len = zstd::zstd_safe::find_frame_compressed_size(stream).ok()?;
    ZSTD.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Decompressor::new().ok();
        }
        let cluster = slot.as_mut()?.decompress(stream.get(..len)?, size).ok()?;
        (cluster.len() == size).then_some(cluster)
    })
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
            if let Some(cluster) = unpack_frame(stream, size) {
                return Ok(cluster);
            }
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
