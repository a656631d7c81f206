//! The guest's memory: the regions the front end shares, and buffers over them.
//!
//! # Invariant
//! A [`GuestMap`] never changes. A new memory table makes a new map; the old one stays mapped for as long as a request in
//! flight holds a buffer over it, because every buffer owns the map it was made from.
//!
//! This is the one module of the crate with `unsafe` in it: where validated ranges become an [`Iov`].
#![expect(unsafe_code, reason = "guest memory becomes I/O buffers here, and nowhere else")]

use super::chain::Segment;
use ring::Iov;
use smallvec::SmallVec;
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Regions a front end may share: what KVM on x86 has slots for, and what QEMU asks for at most.
pub(super) const MAX_REGIONS: usize = 509;

/// Pieces one buffer may have: what `preadv` takes.
const MAX_PIECES: usize = 1024;

/// The memory a queue is read from and written to.
pub(super) type Memory = GuestMemoryMmap<()>;

/// Why a region cannot be used.
#[derive(Debug)]
pub(super) enum RegionError {
    /// The file ends before the region does: touching it would be fatal.
    FileTooShort,
    /// It overlaps another region, in guest or in front-end addresses.
    Overlap,
    /// There are [`MAX_REGIONS`] already.
    TooMany,
    /// The addresses wrap.
    Address,
    /// No such region.
    Unknown,
    /// The system refused to map it.
    Map(String),
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FileTooShort => f.write_str("its file ends before the region does"),
            Self::Overlap => f.write_str("it overlaps another region"),
            Self::TooMany => write!(f, "there are {MAX_REGIONS} regions already"),
            Self::Address => f.write_str("its addresses wrap around"),
            Self::Unknown => f.write_str("there is no such region"),
            Self::Map(why) => write!(f, "it could not be mapped: {why}"),
        }
    }
}

/// One region: where the guest sees it, where the front end has it, where it is mapped here.
#[derive(Clone)]
pub(super) struct Region {
    guest: u64,
    user: u64,
    len: u64,
    mapping: Arc<GuestRegionMmap<()>>,
}

impl Region {
    /// Maps `len` bytes of `file` from `offset` on.
    pub(super) fn map(guest: u64, user: u64, len: u64, offset: u64, file: File) -> Result<Self, RegionError> {
        let end = offset.checked_add(len).ok_or(RegionError::Address)?;
        if guest.checked_add(len).is_none() || user.checked_add(len).is_none() || len == 0 {
            return Err(RegionError::Address);
        }
        let size = usize::try_from(len).map_err(|_| RegionError::Address)?;
        let meta = file.metadata().map_err(|e| RegionError::Map(e.to_string()))?;
        // Character devices (DAX) have no length; the system checks those when it maps them.
        if meta.is_file() && meta.len() < end {
            return Err(RegionError::FileTooShort);
        }
        let mapping = GuestRegionMmap::from_range(GuestAddress(guest), size, Some(FileOffset::new(file, offset)))
            .map_err(|e| RegionError::Map(e.to_string()))?;
        Ok(Self { guest, user, len, mapping: Arc::new(mapping) })
    }

    fn overlaps(&self, other: &Self) -> bool {
        // Ends do not wrap: `map` has checked.
        let meet = |a: u64, b: u64| a < b + other.len && b < a + self.len;
        meet(self.guest, other.guest) || meet(self.user, other.user)
    }
}

/// The front end's memory table as it stands; sorted by guest address. Lives on the protocol thread.
#[derive(Clone, Default)]
pub(super) struct Table {
    regions: Vec<Region>,
}

impl Table {
    /// Puts a region in.
    pub(super) fn add(&mut self, region: Region) -> Result<(), RegionError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(RegionError::TooMany);
        }
        if self.regions.iter().any(|r| r.overlaps(&region)) {
            return Err(RegionError::Overlap);
        }
        let at = self.regions.partition_point(|r| r.guest < region.guest);
        self.regions.insert(at, region);
        Ok(())
    }

    /// Takes a region out, identified as the protocol does it.
    pub(super) fn remove(&mut self, guest: u64, user: u64, len: u64) -> Result<(), RegionError> {
        let at = self.regions.iter().position(|r| r.guest == guest && r.user == user && r.len == len);
        self.regions.remove(at.ok_or(RegionError::Unknown)?);
        Ok(())
    }

    /// What the shard works with; `None` while there is no memory.
    pub(super) fn to_map(&self) -> Option<GuestMap> {
        let regions = self.regions.iter().map(|r| Arc::clone(&r.mapping)).collect();
        // Sorted and without overlap, so the only refusal left is that of an empty list.
        let memory = Memory::from_arc_regions(regions).ok()?;
        Some(GuestMap { memory, regions: self.regions.clone() })
    }
}

/// The guest's memory at one moment. Never changes.
pub(super) struct GuestMap {
    memory: Memory,
    regions: Vec<Region>,
}

impl GuestMap {
    /// For reading and writing rings and headers.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where the guest sees what the front end has at `user`; `None` unless all `len` bytes lie in one region.
    pub(super) fn guest_address(&self, user: u64, len: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|r| {
            let from = user.checked_sub(r.user)?;
            (from <= r.len && len <= r.len - from).then(|| GuestAddress(r.guest + from))
        })
    }

    /// Copies the bytes of `segments` out; false if some of them are no memory. Lengths must add up to `into`'s.
    pub(super) fn read(&self, segments: impl Iterator<Item = Segment>, into: &mut [u8]) -> bool {
        let mut rest = into;
        for segment in segments {
            let Some((part, tail)) = rest.split_at_mut_checked(segment.len as usize) else { return false };
            if self.memory.read_slice(part, segment.at).is_err() {
                return false;
            }
            rest = tail;
        }
        rest.is_empty()
    }

    /// Whether there is memory at `at`.
    pub(super) fn has(&self, at: GuestAddress) -> bool {
        self.memory.address_in_range(at)
    }

    /// A buffer over `segments`; `None` if some of it is no memory, or it comes in too many pieces.
    pub(super) fn buffer(self: &Rc<Self>, segments: impl Iterator<Item = Segment>) -> Option<Iov> {
        let mut pieces: SmallVec<[(*mut u8, usize); 8]> = SmallVec::new();
        for segment in segments {
            for slice in GuestMemoryBackend::get_slices(&self.memory, segment.at, segment.len as usize) {
                let slice = slice.ok()?;
                if pieces.len() == MAX_PIECES {
                    return None;
                }
                pieces.push((slice.ptr_guard_mut().as_ptr(), slice.len()));
            }
        }
        let owner: Rc<dyn Any> = Rc::<Self>::clone(self);
        // SAFETY: each piece is a slice that `get_slices` has checked to lie inside one mapped region. Regions are mapped
        // shared, readable and writable (`MmapRegion::from_file`), and are unmapped only when the last `Arc` to them is
        // gone; `owner` is this map, which holds one for every region and never changes. Concurrent access by the guest
        // is what `Iov` expects.
        Some(unsafe { Iov::from_raw(pieces, owner) })
    }

    /// A map over memory of this process, at the same addresses for guest and front end.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn anonymous(ranges: &[(u64, usize)]) -> Rc<Self> {
        let mapped = |guest, len| GuestRegionMmap::from_range(GuestAddress(guest), len, None).expect("some memory");
        let regions = ranges
            .iter()
            .map(|&(guest, len)| Region { guest, user: guest, len: len as u64, mapping: Arc::new(mapped(guest, len)) })
            .collect();
        Rc::new(Table { regions }.to_map().expect("there are regions"))
    }
}

impl fmt::Debug for GuestMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.memory.iter().map(|r| (r.start_addr(), r.len()))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        assert!(matches!(Region::map(0, 0, 0x2000, 0, file(0x1000)), Err(RegionError::FileTooShort)));
        assert!(matches!(Region::map(0, 0, 0x1000, 0x1000, file(0x1000)), Err(RegionError::FileTooShort)));
        assert!(matches!(Region::map(u64::MAX - 0xfff, 0, 0x2000, 0, file(0x2000)), Err(RegionError::Address)));
        assert!(matches!(Region::map(0, 0, 0x1000, u64::MAX - 1, file(0x1000)), Err(RegionError::Address)));
    }

    #[test]
    fn a_table_stays_sorted_and_without_overlap() {
        let region = |guest, user| Region::map(guest, user, 0x1000, 0, file(0x1000)).unwrap();
        let mut table = Table::default();
        assert!(table.to_map().is_none());
        table.add(region(0x8000, 0x70_8000)).unwrap();
        table.add(region(0x4000, 0x70_4000)).unwrap();
        assert!(matches!(table.add(region(0x8800, 0x71_0000)), Err(RegionError::Overlap)));
        assert!(matches!(table.add(region(0x1_0000, 0x70_4fff)), Err(RegionError::Overlap)));
        let map = table.to_map().unwrap();
        assert_eq!(map.guest_address(0x70_4010, 0xff0), Some(GuestAddress(0x4010)));
        assert_eq!(map.guest_address(0x70_4010, 0xff1), None);
        assert_eq!(map.guest_address(0x70_9000, 1), None);
        assert!(matches!(table.remove(0x8000, 0x70_8000, 0x800), Err(RegionError::Unknown)));
        table.remove(0x8000, 0x70_8000, 0x1000).unwrap();
        assert_eq!(table.to_map().unwrap().guest_address(0x70_8000, 1), None);
        assert!(map.has(GuestAddress(0x8000)), "the old map stays as it was");
    }
}
