//! The metadata: a table of items, each with its place in the region.

use super::Guid;
use crate::field::{Error, ErrorKind};
use crate::number::{le16, le32, le64};

/// Bytes of the table, and where items begin.
pub const TABLE_BYTES: usize = 64 << 10;

/// The most items that the table has room for.
const ITEMS_MOST: u16 = 2047;

/// The longest item, in bytes.
const ITEM_MOST: u32 = 1 << 20;

/// The largest disk: 64 TiB.
const SIZE_MOST: u64 = 64 << 40;

const PARAMETERS: Guid = Guid::parse("caa16737-fa36-4d43-b3b6-33f0aa44e76b").expect("a GUID");
const SIZE: Guid = Guid::parse("2fa54224-cd1b-4876-b211-5dbed83bf4b8").expect("a GUID");
const DISK_ID: Guid = Guid::parse("beca12ab-b2e6-4523-93ef-c309e000c746").expect("a GUID");
const SECTOR: Guid = Guid::parse("8141bf1d-a96f-4709-ba47-f233a8faab5f").expect("a GUID");
const PHYSICAL_SECTOR: Guid = Guid::parse("cda348c7-445d-4471-9cc9-e9885251c556").expect("a GUID");
const PARENT_LOCATOR: Guid = Guid::parse("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").expect("a GUID");

/// The only type of parent locator there is.
const VHDX_LOCATOR: Guid = Guid::parse("b04aefb7-d19e-4a81-b789-25b8e9445913").expect("a GUID");

/// What lies below a differencing disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// The [`super::Header::data_write`] that it has.
    pub linkage: Option<Guid>,
    /// Where it is, seen from here, with backslashes.
    pub relative: Option<String>,
    /// Where it was on the machine that it was made on.
    pub absolute: Option<String>,
}

/// What the metadata say of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a block: a power of two.
    pub block: u64,
    /// Bytes of a sector, which a bit in a bitmap stands for: 512 or 4096.
    pub sector: u64,
    /// What lies below, if anything.
    pub parent: Option<Parent>,
}

/// Items that are looked at, as the table has them: where they are in the region, and their bytes.
struct Items<'a> {
    region: &'a [u8],
    base: u64,
    found: [Option<(usize, &'a [u8])>; 6],
}

const KNOWN: [Guid; 6] = [PARAMETERS, SIZE, DISK_ID, SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];

impl<'a> Items<'a> {
    fn fail<T>(
        &self,
        kind: ErrorKind,
        field: &'static str,
        at: usize,
        value: u64,
        why: &'static str,
    ) -> Result<T, Error> {
        Err(Error::new(kind, field, self.base + at as u64, value, why))
    }

    fn read(region: &'a [u8], base: u64) -> Result<Self, Error> {
        let mut items = Self { region, base, found: [None; 6] };
        if !region.starts_with(b"metadata") {
            return items.fail(ErrorKind::Invalid, "Signature", 0, le64(region, 0), "no table of metadata");
        }
        let count = le16(region, 10);
        if count > ITEMS_MOST {
            return items.fail(ErrorKind::Invalid, "EntryCount", 10, count.into(), "a table has 2047 entries at most");
        }
        for entry in (32..).step_by(32).take(count.into()) {
            let (offset, len, flags) = (le32(region, entry + 16), le32(region, entry + 20), le32(region, entry + 24));
            let (user, required) = (flags & 1 != 0, flags & 4 != 0);
            let id = Guid::at(region, entry);
            let Some(slot) = KNOWN.iter().position(|known| *known == id && !user) else {
                if required {
                    let why = "an item of a kind that must be known is not";
                    return items.fail(ErrorKind::Unsupported, "IsRequired", entry + 24, flags.into(), why);
                }
                continue;
            };
            let start = offset as usize;
            let bytes = region.get(start..).and_then(|rest| rest.get(..len as usize));
            let bytes = bytes.filter(|_| start >= TABLE_BYTES && len <= ITEM_MOST);
            let Some(bytes) = bytes else {
                return items.fail(
                    ErrorKind::Invalid,
                    "Offset",
                    entry + 16,
                    offset.into(),
                    "the item is not in the region",
                );
            };
            items.found[slot] = Some((start, bytes));
        }
        Ok(items)
    }

    /// An item that must be there, and where it is.
    fn get(&self, id: Guid, field: &'static str, len: usize) -> Result<(usize, &'a [u8]), Error> {
        let slot = KNOWN.iter().position(|known| *known == id);
        match slot.and_then(|slot| self.found[slot]) {
            Some((at, bytes)) if bytes.len() >= len => Ok((at, bytes)),
            _ => self.fail(ErrorKind::Invalid, field, 10, le16(self.region, 10).into(), "the item is missing"),
        }
    }
}

impl Metadata {
    /// From the region's bytes (its first megabyte will do), which lie at `base`.
    pub fn decode(region: &[u8], base: u64) -> Result<Self, Error> {
        let items = Items::read(region, base)?;
        let (at, parameters) = items.get(PARAMETERS, "File Parameters", 8)?;
        let (block, flags) = (u64::from(le32(parameters, 0)), le32(parameters, 4));
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            let why = "blocks have 1 to 256 MiB, a power of two";
            return items.fail(ErrorKind::Invalid, "BlockSize", at, block, why);
        }
        let (at, sector) = items.get(SECTOR, "Logical Sector Size", 4)?;
        let sector = u64::from(le32(sector, 0));
        if sector != 512 && sector != 4096 {
            return items.fail(ErrorKind::Invalid, "LogicalSectorSize", at, sector, "sectors have 512 or 4096 bytes");
        }
        let (at, size) = items.get(SIZE, "Virtual Disk Size", 8)?;
        let size = le64(size, 0);
        if size > SIZE_MOST || !size.is_multiple_of(sector) {
            return items.fail(ErrorKind::Invalid, "VirtualDiskSize", at, size, "no size of a disk");
        }
        let parent = if flags & 2 != 0 { Some(parent(&items)?) } else { None };
        Ok(Self { size, block, sector, parent })
    }
}

fn parent(items: &Items<'_>) -> Result<Parent, Error> {
    let (at, locator) = items.get(PARENT_LOCATOR, "Parent Locator", 20)?;
    if Guid::at(locator, 0) != VHDX_LOCATOR {
        let why = "the parent is located in a way that is not known";
        return items.fail(ErrorKind::Unsupported, "LocatorType", at, le64(locator, 0), why);
    }
    let mut parent = Parent::default();
    for entry in (20..).step_by(12).take(le16(locator, 18).into()) {
        let text = |offset: usize, len: usize| {
            let (start, len) = (le32(locator, entry + offset) as usize, le16(locator, entry + len) as usize);
            let bytes = locator.get(start..)?.get(..len)?;
            let units: Vec<u16> = bytes.as_chunks().0.iter().map(|unit| u16::from_le_bytes(*unit)).collect();
            String::from_utf16(&units).ok()
        };
        let (Some(key), Some(value)) = (text(0, 8), text(4, 10)) else {
            let why = "its text is not in the locator, or no UTF-16";
            return items.fail(ErrorKind::Invalid, "KeyOffset", at + entry, le32(locator, entry).into(), why);
        };
        match key.as_str() {
            "parent_linkage" => parent.linkage = Guid::parse(&value),
            "relative_path" => parent.relative = Some(value),
            "absolute_win32_path" => parent.absolute = Some(value),
            _ => {}
        }
    }
    if parent.relative.is_none() && parent.absolute.is_none() {
        let why = "it does not say where the parent is";
        return items.fail(ErrorKind::Invalid, "KeyValueCount", at + 18, le16(locator, 18).into(), why);
    }
    Ok(parent)
}
