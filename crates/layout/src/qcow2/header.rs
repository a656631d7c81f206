//! The header of a QCOW2 image, and the extensions behind it.

use super::{Error, ErrorKind};
use crate::{HostOffset, HostRange};

/// The first four bytes of every QCOW2 image (and of its predecessor's; the version tells them apart).
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Longest name of a backing file, bytes.
pub const MAX_BACKING_NAME: u32 = 1023;

/// Bytes of a version 2 header, and of the part of a version 3 header that is always there.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// Largest L1 table, bytes; as QEMU has it.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;

/// Largest refcount table, bytes; as QEMU has it.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Longest header of an encryption, bytes: eight split keys, and alignment.
const MAX_ENCRYPTION_BYTES: u64 = 16 << 20;

/// Most internal snapshots; as QEMU has it.
const MAX_SNAPSHOTS: u32 = 65536;

/// Largest disk, bytes.
const MAX_SIZE: u64 = i64::MAX as u64 & !511;

bitflags::bitflags! {
    /// Features a program must know to open the image.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Refcounts may be inconsistent: they are repaired before anything is written. Of no concern to a reader.
        const DIRTY = 0x1;
        /// Something in the image is corrupt: it must not be written to.
        const CORRUPT = 0x2;
        /// Guest data are in a file of their own.
        const EXTERNAL_DATA = 0x4;
        /// Another compression than deflate is used.
        const COMPRESSION = 0x8;
        /// L2 entries are 128 bits long and have 32 subclusters each.
        const EXTENDED_L2 = 0x10;
    }
}

/// Encrypted by LUKS.
pub const CRYPT_LUKS: u32 = 2;

/// Autoclear feature: the bitmaps extension is consistent with the image.
pub const AUTOCLEAR_BITMAPS: u64 = 1;

/// Autoclear feature: the external data file is a raw image by itself.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 2;

/// Compatible feature: refcounts may be written late, under [`Features::DIRTY`].
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;

/// How clusters are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Raw deflate streams (RFC 1951).
    #[default]
    Deflate,
    /// Zstandard frames (RFC 8878).
    Zstd,
}

/// A valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the bytes in a cluster: 9 to 21.
    pub cluster_bits: u32,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Entries of the L1 table; enough for `size`.
    pub l1_entries: u32,
    /// Where the L1 table begins.
    pub l1_table: HostOffset,
    /// Where the backing file's name lies, if there is one.
    pub backing_name: Option<HostRange>,
    /// Where the refcount table begins.
    pub refcount_table: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// log2 of the bits of a refcount: 0 to 6.
    pub refcount_order: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table begins.
    pub snapshot_table: HostOffset,
    /// What must be known to open the image.
    pub features: Features,
    /// What may be ignored.
    pub compatible_features: u64,
    /// What a writer that does not know it must clear.
    pub autoclear_features: u64,
    /// How clusters are packed.
    pub compression: Compression,
    /// Clusters of guests' data are encrypted: 0 not, 2 by LUKS.
    pub crypt: u32,
    /// Bytes of the header; extensions follow.
    pub header_bytes: u32,
}

/// A big-endian number out of the header's bytes; zero past their end, which is checked before.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// From the first bytes of a store (at least 112; more do no harm).
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |kind, field, at, value, why: &'static str| Err(Error::new(kind, field, at, value, why));
        if bytes.len() < V2_BYTES || bytes[..4] != MAGIC {
            return fail(ErrorKind::Foreign, "magic", 0, u32_at(bytes, 0).into(), "not a QCOW2 image");
        }
        let version = u32_at(bytes, 4);
        if !(2..=3).contains(&version) {
            return fail(ErrorKind::Unsupported, "version", 4, version.into(), "only versions 2 and 3 are known");
        }
        if version == 3 && bytes.len() < V3_BYTES {
            return fail(ErrorKind::Invalid, "length", 0, bytes.len() as u64, "shorter than its header");
        }
        let features = if version == 3 { u64_at(bytes, 72) } else { 0 };
        let unknown = features & !Features::all().bits();
        if unknown != 0 {
            let why = format!("incompatible feature bit {} is not known", unknown.trailing_zeros());
            return Err(Error::new(ErrorKind::Unsupported, "incompatible_features", 72, features, why));
        }
        let features = Features::from_bits_retain(features);
        let cluster_bits = u32_at(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return fail(ErrorKind::Invalid, "cluster_bits", 20, cluster_bits.into(), "not between 9 and 21");
        }
        if features.contains(Features::EXTENDED_L2) && cluster_bits < 14 {
            let why = "clusters with subclusters have 16 KiB at least";
            return fail(ErrorKind::Invalid, "cluster_bits", 20, cluster_bits.into(), why);
        }
        let crypt = u32_at(bytes, 32);
        if crypt != 0 && crypt != CRYPT_LUKS {
            let why = "only LUKS is supported; decrypt it with 'qemu-img convert'";
            return fail(ErrorKind::Unsupported, "crypt_method", 32, crypt.into(), why);
        }
        let header_bytes = if version == 3 { u32_at(bytes, 100) } else { V2_BYTES as u32 };
        if version == 3
            && (header_bytes < V3_BYTES as u32 || header_bytes > 1 << cluster_bits || !header_bytes.is_multiple_of(8))
        {
            return fail(ErrorKind::Invalid, "header_length", 100, header_bytes.into(), "no length of a header");
        }
        let refcount_order = if version == 3 { u32_at(bytes, 96) } else { 4 };
        if refcount_order > 6 {
            return fail(ErrorKind::Invalid, "refcount_order", 96, refcount_order.into(), "more than 64 bits");
        }
        let compression = match (header_bytes > 104, bytes.get(104).copied().unwrap_or(0)) {
            (false, _) | (true, 0) => Compression::Deflate,
            (true, 1) => Compression::Zstd,
            (true, other) => {
                return fail(ErrorKind::Unsupported, "compression_type", 104, other.into(), "not known");
            }
        };
        if (compression != Compression::Deflate) != features.contains(Features::COMPRESSION) {
            let why = "the compression type and its feature bit disagree";
            return fail(ErrorKind::Invalid, "compression_type", 104, bytes.get(104).copied().unwrap_or(0).into(), why);
        }
        let header = Self {
            version,
            cluster_bits,
            size: u64_at(bytes, 24),
            l1_entries: u32_at(bytes, 36),
            l1_table: HostOffset(u64_at(bytes, 40)),
            backing_name: backing_name(bytes, cluster_bits)?,
            refcount_table: HostOffset(u64_at(bytes, 48)),
            refcount_table_clusters: u32_at(bytes, 56),
            refcount_order,
            snapshots: u32_at(bytes, 60),
            snapshot_table: HostOffset(u64_at(bytes, 64)),
            features,
            compatible_features: if version == 3 { u64_at(bytes, 80) } else { 0 },
            autoclear_features: if version == 3 { u64_at(bytes, 88) } else { 0 },
            compression,
            crypt,
            header_bytes,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Error> {
        let fail = |field, at, value, why: &'static str| Err(Error::new(ErrorKind::Invalid, field, at, value, why));
        if self.size > MAX_SIZE {
            return fail("size", 24, self.size, "larger than any disk");
        }
        let bytes = u64::from(self.l1_entries) * 8;
        if bytes > MAX_L1_BYTES {
            return fail("l1_size", 36, self.l1_entries.into(), "a first-level table of more than 32 MiB");
        }
        if self.size.div_ceil(self.table_reach()) > u64::from(self.l1_entries) {
            return fail("l1_size", 36, self.l1_entries.into(), "too few entries for the disk's size");
        }
        let at = self.l1_table.get();
        if bytes > 0 && (!self.l1_table.is_aligned(self.cluster_size()) || at == 0 || at.checked_add(bytes).is_none()) {
            return fail("l1_table_offset", 40, at, "no place for a table");
        }
        if self.refcount_table_bytes() > MAX_REFCOUNT_TABLE_BYTES.max(self.cluster_size()) {
            let why = "a refcount table of more than 8 MiB";
            return fail("refcount_table_clusters", 56, self.refcount_table_clusters.into(), why);
        }
        let at = self.refcount_table.get();
        if !self.refcount_table.is_aligned(self.cluster_size()) || at > i64::MAX as u64 - MAX_REFCOUNT_TABLE_BYTES {
            return fail("refcount_table_offset", 48, at, "no place for a table");
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return fail("nb_snapshots", 60, self.snapshots.into(), "more than 65536");
        }
        let at = self.snapshot_table.get();
        if self.snapshots > 0 && (!self.snapshot_table.is_aligned(self.cluster_size()) || at == 0) {
            return fail("snapshots_offset", 64, at, "no place for a table");
        }
        Ok(())
    }

    /// Writes every field over a header's bytes (as long as [`Header::header_bytes`] says, at least). What is not known stays.
    pub fn encode_over(&self, bytes: &mut [u8]) {
        let mut put = |at: usize, value: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(0, &MAGIC);
        put(4, &self.version.to_be_bytes());
        put(8, &self.backing_name.map_or(0, |name| name.start().get()).to_be_bytes());
        put(16, &self.backing_name.map_or(0, |name| name.len() as u32).to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(32, &self.crypt.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_table.get().to_be_bytes());
        put(48, &self.refcount_table.get().to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.snapshots.to_be_bytes());
        put(64, &self.snapshot_table.get().to_be_bytes());
        if self.version >= 3 {
            put(72, &self.features.bits().to_be_bytes());
            put(80, &self.compatible_features.to_be_bytes());
            put(88, &self.autoclear_features.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &self.header_bytes.to_be_bytes());
            if self.header_bytes > 104 {
                put(104, &[u8::from(self.compression == Compression::Zstd)]);
            }
        }
    }

    /// Checks what [`Header::decode`] would, of a header that was made by other means.
    pub fn validate(&self) -> Result<(), Error> {
        self.check()
    }

    /// Where the L1 table lies.
    pub fn l1_range(&self) -> HostRange {
        self.l1_table.range(u64::from(self.l1_entries) * 8)
    }

    /// Bytes of the refcount table.
    pub fn refcount_table_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << self.cluster_bits
    }

    /// Refcounts in a refcount block, which fills a cluster.
    pub fn refcounts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.table_reach())
    }

    /// The largest disk that an L1 table can map.
    pub fn max_size(&self) -> u64 {
        (MAX_L1_BYTES / 8).saturating_mul(self.table_reach()).min(MAX_SIZE)
    }

    /// Checks what only the file's length can tell.
    pub fn check_length(&self, length: u64) -> Result<(), Error> {
        let end = self.l1_table.get() + u64::from(self.l1_entries) * 8;
        if self.l1_entries > 0 && end > length {
            let why = "the first-level table reaches past the end of the file";
            return Err(Error::new(ErrorKind::Invalid, "l1_table_offset", 40, self.l1_table.get(), why));
        }
        Ok(())
    }

    /// Guest data are in a file of their own, every cluster where the guest sees it.
    pub fn has_data_file(&self) -> bool {
        self.features.contains(Features::EXTERNAL_DATA)
    }

    /// That file is a raw image by itself, at any time.
    pub fn data_file_is_raw(&self) -> bool {
        self.has_data_file() && self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry: 8, or 16 with subclusters.
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.features.contains(Features::EXTENDED_L2) { 16 } else { 8 }
    }

    /// Entries of an L2 table, which fills a cluster.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_bytes()
    }

    /// Guest bytes that one L2 table maps.
    pub fn table_reach(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }
}

fn backing_name(bytes: &[u8], cluster_bits: u32) -> Result<Option<HostRange>, Error> {
    let (offset, len) = (u64_at(bytes, 8), u32_at(bytes, 16));
    if offset == 0 {
        return Ok(None);
    }
    if len == 0 || len > MAX_BACKING_NAME {
        let why = "no length of a backing file's name";
        return Err(Error::new(ErrorKind::Invalid, "backing_file_size", 16, len.into(), why));
    }
    if offset.checked_add(len.into()).is_none_or(|end| end > 1 << cluster_bits) {
        let why = "the backing file's name does not lie in the first cluster";
        return Err(Error::new(ErrorKind::Invalid, "backing_file_offset", 8, offset, why));
    }
    Ok(Some(HostRange::new(HostOffset(offset), len.into())))
}

/// A header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

impl Extension {
    /// Nothing follows.
    pub const END: u32 = 0;
    /// The backing file's format.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits, for messages.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// The name of the data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
    /// Where bitmaps are.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the header of the encryption is: offset and length, 64 bits each.
    pub const ENCRYPTION: u32 = 0x0537_be77;

    /// Its bytes, padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + self.data.len().next_multiple_of(8));
        bytes.extend(self.kind.to_be_bytes());
        bytes.extend((self.data.len() as u32).to_be_bytes());
        bytes.extend(&self.data);
        bytes.resize(8 + self.data.len().next_multiple_of(8), 0);
        bytes
    }
}

/// The header's extensions, in order, without the one that ends them. Those that are not known are kept like the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// All of them.
    pub all: Vec<Extension>,
}

impl Extensions {
    /// From the bytes behind the header, up to the backing file's name or the end of the first cluster.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        let mut found = Self::default();
        let mut at = 0;
        while let (Some(_), kind, len) = (bytes.get(at..at + 8), u32_at(bytes, at), u32_at(bytes, at + 4) as usize) {
            if kind == Extension::END {
                break;
            }
            let Some(data) = bytes.get(at + 8..).and_then(|rest| rest.get(..len)) else {
                let why = "a header extension reaches past the first cluster";
                return Err(Error::new(ErrorKind::Invalid, "extension length", base + at as u64 + 4, len as u64, why));
            };
            found.all.push(Extension { kind, data: data.to_vec() });
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }

    /// The data of the first one of this kind.
    pub fn get(&self, kind: u32) -> Option<&[u8]> {
        self.all.iter().find(|extension| extension.kind == kind).map(|extension| &*extension.data)
    }

    /// The backing file's format, as its name.
    pub fn backing_format(&self) -> Option<String> {
        self.get(Extension::BACKING_FORMAT).map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Where the header of the encryption is, in whole clusters.
    pub fn encryption(&self, header: &Header) -> Result<HostRange, Error> {
        let fail = |value, why: &'static str| Err(Error::new(ErrorKind::Invalid, "encryption header", 0, value, why));
        let Some(data) = self.get(Extension::ENCRYPTION) else {
            return fail(0, "it is encrypted, and does not say how");
        };
        let number = |at: usize| data.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
        let (at, len) = (number(0), number(8));
        let end = at.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        if data.len() < 16 || at == 0 || at % header.cluster_size() != 0 || end.is_none() || len > MAX_ENCRYPTION_BYTES
        {
            return fail(at, "no place for it");
        }
        Ok(HostOffset(at).range(len))
    }

    /// Their bytes, with the end that closes them.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.all.iter().flat_map(Extension::encode).collect();
        bytes.extend([0; 8]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&MAGIC);
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &0x30000_u64.to_be_bytes());
        put(48, &0x10000_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        bytes
    }

    #[test]
    fn a_sound_header_is_understood() {
        let header = Header::decode(&sample()).unwrap();
        assert_eq!((header.cluster_size(), header.l2_entries(), header.table_reach()), (65536, 8192, 512 << 20));
        assert_eq!(header.check_length(0x30010), Ok(()));
        assert!(header.check_length(0x3000f).is_err());
    }

    #[test]
    fn every_bad_field_is_named() {
        let cases: [(usize, &[u8], &str); 19] = [
            (0, b"QED\0", "magic"),
            (4, &4_u32.to_be_bytes(), "version"),
            (8, &600_u64.to_be_bytes(), "backing_file_size"),
            (20, &8_u32.to_be_bytes(), "cluster_bits"),
            (20, &22_u32.to_be_bytes(), "cluster_bits"),
            (24, &u64::MAX.to_be_bytes(), "size"),
            (32, &1_u32.to_be_bytes(), "crypt_method"),
            (36, &1_u32.to_be_bytes(), "l1_size"),
            (36, &u32::MAX.to_be_bytes(), "l1_size"),
            (40, &0x30001_u64.to_be_bytes(), "l1_table_offset"),
            (40, &0_u64.to_be_bytes(), "l1_table_offset"),
            (48, &0x10001_u64.to_be_bytes(), "refcount_table_offset"),
            (56, &u32::MAX.to_be_bytes(), "refcount_table_clusters"),
            (60, &u32::MAX.to_be_bytes(), "nb_snapshots"),
            (60, &1_u32.to_be_bytes(), "snapshots_offset"),
            (72, &0x20_u64.to_be_bytes(), "incompatible_features"),
            (96, &7_u32.to_be_bytes(), "refcount_order"),
            (100, &90_u32.to_be_bytes(), "header_length"),
            (104, &[7], "compression_type"),
        ];
        for (at, value, field) in cases {
            let mut bytes = sample();
            bytes[at..at + value.len()].copy_from_slice(value);
            let error = Header::decode(&bytes).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error} for {field}");
        }
        let mut bytes = sample();
        bytes[79] = 0x20;
        assert!(Header::decode(&bytes).unwrap_err().to_string().contains("bit 5"));
    }

    #[test]
    fn what_is_written_is_what_was_read() {
        let mut bytes = sample();
        bytes[300] = 7;
        let header = Header::decode(&bytes).unwrap();
        let mut again = bytes.clone();
        again[..112].fill(0);
        header.encode_over(&mut again);
        assert_eq!(again, bytes);
    }

    #[test]
    fn a_header_may_end_where_it_says() {
        let mut bytes = sample();
        bytes[100..104].copy_from_slice(&104_u32.to_be_bytes());
        bytes.truncate(V3_BYTES);
        assert!(Header::decode(&bytes).is_ok());
        // Another compression is announced, and there is no room to say which.
        bytes[79] = 8;
        assert!(Header::decode(&bytes).is_err());
        assert!((0..V3_BYTES).all(|len| Header::decode(&bytes[..len]).is_err()));
    }

    #[test]
    fn extensions_are_walked_and_bounded() {
        let mut bytes = Vec::new();
        let mut put = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        put(0x1234_5678, b"whatever");
        put(0xe279_2aca, b"raw");
        put(0, b"");
        let found = Extensions::decode(&bytes, 112).unwrap();
        assert_eq!(found.backing_format().as_deref(), Some("raw"));
        assert_eq!(found.encode(), bytes);
        bytes[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(Extensions::decode(&bytes, 112).is_err());
        assert_eq!(Extensions::decode(&[1, 2, 3], 112), Ok(Extensions::default()));
    }
}
