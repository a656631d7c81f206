//! The header of a QED image.
//!
//! **Invariant.** A [`Header`] holds nothing that contradicts the specification, apart from what only the file's length can
//! tell ([`Header::check_length`]). Encoding it again gives the same 64 bytes, unknown bits included.

use super::geometry::SECTOR;
use super::{Error, ErrorKind, Geometry};
use crate::{HostOffset, HostRange};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first four bytes of every QED image.
pub const MAGIC: [u8; 4] = *b"QED\0";

/// Bytes of the header's fixed part.
pub const HEADER_BYTES: usize = 64;

/// Longest name of a backing file we write, bytes. (QEMU's own limit is 1023 in everything but the newest versions.)
pub const MAX_BACKING_NAME: usize = 1023;

/// Longest name of a backing file we read, bytes: `PATH_MAX` without its NUL.
pub const MAX_BACKING_NAME_READ: u32 = 4095;

bitflags::bitflags! {
    /// Features a program must know to open the image.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// There is a backing file.
        const BACKING_FILE = 0x1;
        /// The tables may be inconsistent: check before use.
        const NEED_CHECK = 0x2;
        /// The backing file is raw, whatever its first bytes look like.
        const BACKING_FORMAT_NO_PROBE = 0x4;
    }
}

/// The header as it lies on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    cluster_size: U32,
    table_size: U32,
    header_size: U32,
    features: U64,
    compat_features: U64,
    autoclear_features: U64,
    l1_table_offset: U64,
    image_size: U64,
    backing_filename_offset: U32,
    backing_filename_size: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// Where the backing file's name lies, counted from the start of the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NameSlot {
    /// First byte.
    pub offset: u32,
    /// Length in bytes; no NUL.
    pub len: u32,
}

impl NameSlot {
    /// The bytes it takes in the store.
    pub fn range(self) -> HostRange {
        HostRange::new(HostOffset(self.offset.into()), self.len.into())
    }
}

/// A valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Cluster and table sizes.
    pub geometry: Geometry,
    /// Clusters that belong to the header; data and tables lie behind them.
    pub header_clusters: u32,
    /// What must be known to open the image.
    pub features: Features,
    /// What may be ignored. No bit is defined yet; kept as found.
    pub compat_features: u64,
    /// What must be cleared by a writer that does not know it. No bit is defined yet.
    pub autoclear_features: u64,
    /// Where the L1 table begins.
    pub l1_table: HostOffset,
    /// Size of the guest's disk in bytes.
    pub image_size: u64,
    /// Where the backing file's name lies; only looked at with [`Features::BACKING_FILE`], kept as found without it.
    pub backing_name: NameSlot,
}

fn invalid(field: &'static str, offset: u64, value: u64, why: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, field, offset, value, why)
}

impl Header {
    /// The header of a new, empty image without a backing file. Fails when `image_size` is too large for the geometry or not
    /// a multiple of 512.
    pub fn new(geometry: Geometry, image_size: u64) -> Result<Self, Error> {
        check_image_size(geometry, image_size)?;
        Ok(Self {
            geometry,
            header_clusters: 1,
            features: Features::empty(),
            compat_features: 0,
            autoclear_features: 0,
            l1_table: HostOffset(geometry.cluster_size()),
            image_size,
            backing_name: NameSlot::default(),
        })
    }

    /// From the first bytes of a store (at least 64; more do no harm).
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
            let why = "shorter than a QED header";
            return Err(Error::new(ErrorKind::Foreign, "length", 0, bytes.len() as u64, why));
        };
        if raw.magic != MAGIC {
            let value = u32::from_be_bytes(raw.magic);
            return Err(Error::new(ErrorKind::Foreign, "magic", 0, value.into(), "not a QED image"));
        }
        let geometry = Geometry::new(raw.cluster_size.get().into(), raw.table_size.get())?;
        let features = raw.features.get();
        let Some(features) = Features::from_bits(features) else {
            let unknown = features & !Features::all().bits();
            let bits: Vec<String> = (0..64).filter(|bit| unknown >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
            let plural = if bits.len() == 1 { "" } else { "s" };
            let why = format!(
                "feature bit{plural} {} unknown to this version; a newer one may open the image",
                bits.join(", ")
            );
            return Err(Error::new(ErrorKind::Unsupported, "features", 16, features, why));
        };
        let header = Self {
            geometry,
            header_clusters: raw.header_size.get(),
            features,
            compat_features: raw.compat_features.get(),
            autoclear_features: raw.autoclear_features.get(),
            l1_table: HostOffset(raw.l1_table_offset.get()),
            image_size: raw.image_size.get(),
            backing_name: NameSlot { offset: raw.backing_filename_offset.get(), len: raw.backing_filename_size.get() },
        };
        header.validate()?;
        Ok(header)
    }

    /// Everything the fields alone can tell.
    pub fn validate(&self) -> Result<(), Error> {
        if self.header_clusters == 0 {
            return Err(invalid("header_size", 12, 0, "the header takes at least one cluster"));
        }
        let l1 = self.l1_table.get();
        if !self.l1_table.is_aligned(self.geometry.cluster_size()) {
            return Err(invalid("l1_table_offset", 40, l1, "not a multiple of the cluster size"));
        }
        if l1 < self.header_bytes() {
            return Err(invalid("l1_table_offset", 40, l1, "inside the header"));
        }
        if l1.checked_add(self.geometry.table_bytes()).is_none_or(|end| end > i64::MAX as u64) {
            return Err(invalid("l1_table_offset", 40, l1, "past the end of any file"));
        }
        check_image_size(self.geometry, self.image_size)?;
        if self.features.contains(Features::BACKING_FILE) {
            let NameSlot { offset, len } = self.backing_name;
            if u64::from(offset) + u64::from(len) > self.header_bytes() {
                return Err(invalid(
                    "backing_filename_offset",
                    56,
                    offset.into(),
                    "the name reaches past the header's clusters",
                ));
            }
            if (offset as usize) < HEADER_BYTES {
                return Err(invalid(
                    "backing_filename_offset",
                    56,
                    offset.into(),
                    "the name lies inside the header's fields",
                ));
            }
            if len == 0 || len > MAX_BACKING_NAME_READ {
                return Err(invalid("backing_filename_size", 60, len.into(), "a name has 1 to 4095 bytes"));
            }
        }
        Ok(())
    }

    /// Whether the L1 table lies within a file of `length` bytes.
    pub fn check_length(&self, length: u64) -> Result<(), Error> {
        if self.l1_table.get() + self.geometry.table_bytes() > length {
            let why = format!("the L1 table ends past the end of the file ({length} bytes): the file was cut off");
            return Err(Error::new(ErrorKind::Invalid, "l1_table_offset", 40, self.l1_table.get(), why));
        }
        Ok(())
    }

    /// The fixed part as it lies on disk.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let raw = RawHeader {
            magic: MAGIC,
            cluster_size: U32::new(self.geometry.cluster_size() as u32),
            table_size: U32::new(self.geometry.table_size()),
            header_size: U32::new(self.header_clusters),
            features: U64::new(self.features.bits()),
            compat_features: U64::new(self.compat_features),
            autoclear_features: U64::new(self.autoclear_features),
            l1_table_offset: U64::new(self.l1_table.get()),
            image_size: U64::new(self.image_size),
            backing_filename_offset: U32::new(self.backing_name.offset),
            backing_filename_size: U32::new(self.backing_name.len),
        };
        zerocopy::transmute!(raw)
    }

    /// Bytes of the clusters that belong to the header.
    pub fn header_bytes(&self) -> u64 {
        u64::from(self.header_clusters) << self.geometry.cluster_bits()
    }

    /// The L1 table's clusters.
    pub fn l1_range(&self) -> HostRange {
        self.l1_table.range(self.geometry.table_bytes())
    }

    /// Where the backing file's name lies, if there is a backing file.
    pub fn backing(&self) -> Option<NameSlot> {
        self.features.contains(Features::BACKING_FILE).then_some(self.backing_name)
    }
}

fn check_image_size(geometry: Geometry, size: u64) -> Result<(), Error> {
    if !size.is_multiple_of(SECTOR) {
        return Err(invalid("image_size", 48, size, "the disk's size must be a multiple of 512"));
    }
    if size > geometry.max_image_size() {
        let why = format!(
            "clusters of {} bytes and tables of {} clusters reach at most {} bytes",
            geometry.cluster_size(),
            geometry.table_size(),
            geometry.max_image_size()
        );
        return Err(Error::new(ErrorKind::Invalid, "image_size", 48, size, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Header {
        Header::new(Geometry::new(65536, 4).unwrap(), 1 << 30).unwrap()
    }

    fn patched(at: usize, bytes: &[u8]) -> Result<Header, Error> {
        let mut raw = sample().encode();
        raw[at..at + bytes.len()].copy_from_slice(bytes);
        Header::decode(&raw)
    }

    #[test]
    fn empty_image_is_what_the_reference_writes() {
        let mut expected = [0u8; HEADER_BYTES];
        expected[..4].copy_from_slice(b"QED\0");
        (expected[6], expected[8], expected[12], expected[42], expected[51]) = (1, 4, 1, 1, 0x40);
        assert_eq!(sample().encode(), expected);
    }

    #[test]
    fn every_bad_field_is_named_with_its_offset() {
        let field = |at, bytes: &[u8]| {
            let error = patched(at, bytes).unwrap_err();
            assert_eq!(error.offset(), HostOffset(at as u64), "{error}");
            error.field()
        };
        assert_eq!(field(0, b"QFI\xfb"), "magic");
        assert_eq!(field(4, &1000u32.to_le_bytes()), "cluster_size");
        assert_eq!(field(8, &0u32.to_le_bytes()), "table_size");
        assert_eq!(field(12, &0u32.to_le_bytes()), "header_size");
        assert_eq!(field(16, &8u64.to_le_bytes()), "features");
        assert_eq!(field(40, &0u64.to_le_bytes()), "l1_table_offset");
        assert_eq!(field(40, &65537u64.to_le_bytes()), "l1_table_offset");
        assert_eq!(field(40, &(u64::MAX << 16).to_le_bytes()), "l1_table_offset");
        assert_eq!(field(48, &513u64.to_le_bytes()), "image_size");
        assert_eq!(field(48, &(1u64 << 60).to_le_bytes()), "image_size");
    }

    #[test]
    fn name_is_bound_only_where_there_is_a_backing_file() {
        assert!(patched(56, &[0xff; 8]).is_ok());
        let with_name = |offset: u32, len: u32| {
            let mut header = sample();
            header.features = Features::BACKING_FILE;
            header.backing_name = NameSlot { offset, len };
            Header::decode(&header.encode())
        };
        assert!(with_name(64, 1).is_ok() && with_name(65535, 1).is_ok() && with_name(64, 4095).is_ok());
        assert_eq!(with_name(65535, 2).unwrap_err().field(), "backing_filename_offset");
        assert_eq!(with_name(u32::MAX, u32::MAX).unwrap_err().field(), "backing_filename_offset");
        assert_eq!(with_name(10, 5).unwrap_err().field(), "backing_filename_offset");
        assert_eq!(with_name(64, 0).unwrap_err().field(), "backing_filename_size");
        assert_eq!(with_name(64, 4096).unwrap_err().field(), "backing_filename_size");
    }

    #[test]
    fn unknown_feature_bits_are_named_unknown_others_kept() {
        let error = patched(16, &(1u64 << 3 | 1 << 40).to_le_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("feature bits 3, 40"), "{error}");
        assert_eq!(patched(24, &[0xa5; 8]).unwrap().compat_features, 0xa5a5_a5a5_a5a5_a5a5);
        assert_eq!(patched(32, &[0x5a; 8]).unwrap().autoclear_features, 0x5a5a_5a5a_5a5a_5a5a);
    }

    #[test]
    fn l1_table_must_lie_in_the_file() {
        assert!(sample().check_length(5 << 16).is_ok());
        assert_eq!(sample().check_length((5 << 16) - 1).unwrap_err().field(), "l1_table_offset");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_and_what_decodes_encodes_back(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), magic: bool,
            cluster in 10u32..28, table in 0u32..6, l1 in 0u64..40, size in 0u64..1 << 30) {
            if magic && bytes.len() >= HEADER_BYTES {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..8].copy_from_slice(&(1u32 << cluster).to_le_bytes());
                bytes[8..12].copy_from_slice(&(1u32 << table).to_le_bytes());
                let (clusters, features) = (u32::from(bytes[12]) % 5, u64::from(bytes[16]) % 10);
                bytes[12..16].copy_from_slice(&clusters.to_le_bytes());
                bytes[16..24].copy_from_slice(&features.to_le_bytes());
                bytes[40..48].copy_from_slice(&(l1 << cluster).to_le_bytes());
                bytes[48..56].copy_from_slice(&(size * 512).to_le_bytes());
                bytes[58..60].fill(0);
                bytes[62..64].fill(0);
            }
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(&header.encode()[..], &bytes[..HEADER_BYTES]);
                header.validate().unwrap();
                let _ = (header.check_length(1 << 40), header.l1_range().end(), header.backing().map(|n| n.range().end()));
            }
        }
    }
}
