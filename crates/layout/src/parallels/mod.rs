//! Parallels' disk image, versions with and without extended offsets (QEMU's `docs/interop/parallels.rst`): a header, a table with
//! the place of each cluster, clusters. All numbers are little-endian.

use crate::field::{Error, ErrorKind};
use crate::number::le32;
use crate::{HostOffset, HostRange};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;

/// What images begin with whose table counts sectors.
pub const MAGIC: [u8; 16] = *b"WithoutFreeSpace";

/// What images begin with whose table counts clusters.
pub const MAGIC_EXTENDED: [u8; 16] = *b"WithouFreSpacExt";

/// A header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Clusters; enough for the disk's size.
    pub clusters: u32,
    /// Bytes that an entry of the table counts.
    step: u64,
}

impl Header {
    /// From the first [`HEADER_BYTES`] of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |kind, field, at: u64, value: u64, why: &'static str| Err(Error::new(kind, field, at, value, why));
        let extended = bytes.starts_with(&MAGIC_EXTENDED);
        if bytes.len() < HEADER_BYTES || !extended && !bytes.starts_with(&MAGIC) {
            return fail(ErrorKind::Foreign, "magic", 0, le32(bytes, 0).into(), "not a Parallels image");
        }
        if le32(bytes, 16) != 2 {
            return fail(ErrorKind::Unsupported, "version", 16, le32(bytes, 16).into(), "only version 2 is known");
        }
        let (tracks, clusters) = (u64::from(le32(bytes, 28)), le32(bytes, 32));
        let low = u64::from(le32(bytes, 36));
        let sectors = if extended { low | u64::from(le32(bytes, 40)) << 32 } else { low };
        let cluster = tracks * 512;
        if !cluster.is_power_of_two() || cluster > 1 << 30 {
            return fail(ErrorKind::Unsupported, "tracks", 28, tracks, "clusters that are no power of two");
        }
        if sectors > i64::MAX as u64 / 512 || (sectors * 512).div_ceil(cluster) > clusters.into() {
            return fail(ErrorKind::Invalid, "nb_sectors", 36, sectors, "more than the clusters hold");
        }
        Ok(Self { size: sectors * 512, cluster, clusters, step: if extended { cluster } else { 512 } })
    }

    /// Where the table lies.
    pub fn table(&self) -> HostRange {
        HostOffset(HEADER_BYTES as u64).range(u64::from(self.clusters) * 4)
    }

    /// Where a cluster is that the table has this entry for.
    pub fn place(&self, entry: [u8; 4]) -> Option<HostOffset> {
        match u32::from_le_bytes(entry) {
            0 => None,
            entry => Some(HostOffset(u64::from(entry) * self.step)),
        }
    }
}
