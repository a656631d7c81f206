//! The descriptor: a text with a line for each extent.
//!
//! Lines are `key=value`, with the value in quotes or not, or begin with how an extent may be accessed: `RW 4192256 SPARSE
//! "disk-s001.vmdk"`. What is not known here (the disk data base) is left to those who know it. What is known must make sense.

use std::fmt;

/// What a descriptor in a file of its own begins with, in whichever case.
pub const TITLE: &str = "# Disk DescriptorFile";

/// The longest descriptor, in bytes.
pub const MOST_BYTES: usize = 1 << 20;

/// The most extents: 4 TiB in extents of 2 GiB.
pub const MOST_EXTENTS: usize = 2048;

/// The `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = u32::MAX;

/// What is wrong with a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    /// The line, from 1; 0: none in particular.
    pub line: usize,
    /// It is not known here, rather than wrong.
    pub unsupported: bool,
    why: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {} of its descriptor: ", self.line)?;
        }
        f.write_str(&self.why)
    }
}

/// How an extent may be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and written.
    ReadWrite,
    /// Only read.
    ReadOnly,
    /// Not at all.
    None,
}

/// What an extent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// A file's bytes as they are.
    Flat,
    /// A file with a header.
    Sparse,
    /// No file: zeros.
    Zero,
}

/// A line about an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The line, from 1.
    pub line: usize,
    /// How it may be accessed.
    pub access: Access,
    /// Its sectors.
    pub sectors: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// The file's name as it is written; empty where there is no file.
    pub file: String,
    /// Flat: the sector of the file that it begins at.
    pub start: u64,
}

/// A descriptor that makes sense.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Changes with the content.
    pub cid: Option<u32>,
    /// The parent's [`Descriptor::cid`] when this disk was made over it.
    pub parent_cid: Option<u32>,
    /// The parent's name.
    pub parent: Option<String>,
    /// What the makers call the whole: `monolithicSparse`.
    pub create_type: String,
    /// In the disk's order.
    pub extents: Vec<Extent>,
}

impl Descriptor {
    /// From a text, which may be followed by zeros.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |line, why: String| Err(Error { line, unsupported: false, why });
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.len() > MOST_BYTES {
            return fail(0, format!("its descriptor has more than {MOST_BYTES} bytes"));
        }
        let Ok(text) = std::str::from_utf8(text) else {
            let why = "its descriptor is not UTF-8; save it as UTF-8, and rename files whose names are not".to_owned();
            return fail(0, why);
        };
        let mut found = Self::default();
        let (mut cid, mut parent_cid, mut create_type) = (None, None, None);
        for (number, line) in text.lines().enumerate() {
            let (number, line) = (number + 1, line.trim());
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(extent) = extent(number, line)? {
                if found.extents.len() == MOST_EXTENTS {
                    return fail(number, format!("more than {MOST_EXTENTS} extents"));
                }
                found.extents.push(extent);
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = unquoted(value.trim());
            // The first one counts.
            match key.trim().to_ascii_lowercase().as_str() {
                "version" => match value.parse::<u32>() {
                    Ok(1..=4) => {}
                    _ => {
                        let why = format!("version {value} is not known; versions 1 to 4 are");
                        return Err(Error { line: number, unsupported: true, why });
                    }
                },
                "cid" => cid = cid.or(Some(hex(number, value)?)),
                "parentcid" => parent_cid = parent_cid.or(Some(hex(number, value)?)),
                "createtype" => create_type = create_type.or(Some(value.to_owned())),
                "parentfilenamehint" if found.parent.is_none() => found.parent = Some(value.to_owned()),
                _ => {}
            }
        }
        found.cid = cid;
        found.parent_cid = parent_cid.filter(|cid| *cid != NO_PARENT);
        found.create_type = create_type.unwrap_or_default();
        if found.parent_cid.is_some() && found.parent.as_deref().is_none_or(str::is_empty) {
            return fail(0, "it has a parent, and its descriptor does not name it (parentFileNameHint)".to_owned());
        }
        if found.parent_cid.is_none() {
            found.parent = None;
        }
        Ok(found)
    }
}

/// A line about an extent; `None` where it is about something else.
fn extent(number: usize, line: &str) -> Result<Option<Extent>, Error> {
    let fail = |unsupported, why: String| Err(Error { line: number, unsupported, why });
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let access = match word {
        "RW" => Access::ReadWrite,
        "RDONLY" => Access::ReadOnly,
        "NOACCESS" => Access::None,
        _ => return Ok(None),
    };
    let (sectors, rest) = rest.trim_start().split_once(char::is_whitespace).unwrap_or_default();
    let sectors = match sectors.parse::<u64>() {
        Ok(sectors) if sectors <= i64::MAX as u64 / super::SECTOR => sectors,
        _ => return fail(false, format!("'{line}' does not say how many sectors the extent has")),
    };
    let rest = rest.trim();
    let (kind, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let kind = match kind {
        "FLAT" | "VMFS" => ExtentKind::Flat,
        "SPARSE" => ExtentKind::Sparse,
        "ZERO" => ExtentKind::Zero,
        _ => {
            let why = format!(
                "extents of type {kind} are not supported; FLAT, VMFS, SPARSE and ZERO are: export the disk ('ovftool', 'vmkfstools -i')"
            );
            return fail(true, why);
        }
    };
    let mut extent = Extent { line: number, access, sectors, kind, file: String::new(), start: 0 };
    if kind == ExtentKind::Zero {
        return Ok(Some(extent));
    }
    let Some((file, rest)) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"')) else {
        return fail(false, format!("'{line}' names no file in quotes"));
    };
    file.clone_into(&mut extent.file);
    let rest = rest.split_whitespace().next();
    match rest.map(str::parse::<u64>) {
        None => {}
        Some(Ok(start)) if start <= i64::MAX as u64 / super::SECTOR / 2 => extent.start = start,
        Some(_) => return fail(false, format!("'{line}' does not say where in its file the extent begins")),
    }
    Ok(Some(extent))
}

fn hex(line: usize, value: &str) -> Result<u32, Error> {
    u32::from_str_radix(value, 16).map_err(|_| Error {
        line,
        unsupported: false,
        why: format!("'{value}' is no number of eight hexadecimal digits"),
    })
}

fn unquoted(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\nCID=fffffffe\nparentCID=12ab34cd\ncreateType=\"twoGbMaxExtentSparse\"\n\
        parentFileNameHint = \"the base.vmdk\"\n\n# Extent description\nRW 4192256 SPARSE \"a b.vmdk\"\nRDONLY 63 ZERO\n\
        RW  100   FLAT \"c.vmdk\" 7\nNOACCESS 5 VMFS \"d\"\n\nddb.adapterType = \"ide\"\n";

    #[test]
    fn what_is_known_is_found() {
        let mut bytes = TEXT.as_bytes().to_vec();
        bytes.extend([0, 0, 7]);
        let found = Descriptor::parse(&bytes).unwrap();
        assert_eq!((found.cid, found.parent_cid), (Some(0xffff_fffe), Some(0x12ab_34cd)));
        assert_eq!((found.parent.as_deref(), &*found.create_type), (Some("the base.vmdk"), "twoGbMaxExtentSparse"));
        let extents: Vec<_> =
            found.extents.iter().map(|e| (e.access, e.sectors, e.kind, e.file.as_str(), e.start)).collect();
        assert_eq!(
            extents,
            [
                (Access::ReadWrite, 4_192_256, ExtentKind::Sparse, "a b.vmdk", 0),
                (Access::ReadOnly, 63, ExtentKind::Zero, "", 0),
                (Access::ReadWrite, 100, ExtentKind::Flat, "c.vmdk", 7),
                (Access::None, 5, ExtentKind::Flat, "d", 0),
            ]
        );
        assert_eq!(found.extents[2].line, 11);
    }

    #[test]
    fn what_makes_no_sense_is_named_with_its_line() {
        for (text, line) in [
            ("\nRW SPARSE \"a\"", 2),
            ("RW", 1),
            ("RW 5", 1),
            ("RW 5 FLAT a.vmdk", 1),
            ("RW 5 FLAT \"a.vmdk", 1),
            ("RW 5 FLAT \"a.vmdk\" x", 1),
            ("RW 18446744073709551615 ZERO", 1),
            ("RW 5 VMFSSPARSE \"a\"", 1),
            ("RW 5 SESPARSE \"a\"", 1),
            ("CID=zz", 1),
            ("version=9", 1),
            ("parentCID=1", 0),
            ("parentCID=1\nparentFileNameHint=\"\"", 0),
            ("\u{ff}", 0),
        ] {
            let bytes: Vec<u8> = if line == 0 && text == "\u{ff}" { vec![0xff] } else { text.into() };
            assert_eq!(Descriptor::parse(&bytes).unwrap_err().line, line, "{text}");
        }
        let many = "RW 1 ZERO\n".repeat(MOST_EXTENTS + 1);
        assert_eq!(Descriptor::parse(many.as_bytes()).unwrap_err().line, MOST_EXTENTS + 1);
        assert!(Descriptor::parse(&vec![b'x'; MOST_BYTES + 1]).is_err());
    }

    #[test]
    fn a_hint_without_a_parent_means_nothing() {
        let found = Descriptor::parse(b"parentCID=ffffffff\nparentFileNameHint=\"a\"\nparentCID=1").unwrap();
        assert_eq!((found.parent_cid, found.parent), (None, None));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "[RWDONLYFATSPEZ0-9 \"=\n\r#a-c]{0,200}") {
            let _ = Descriptor::parse(text.as_bytes());
        }
    }
}
