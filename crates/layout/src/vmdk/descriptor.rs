//! The descriptor of a VMDK: which extents there are, and what lies below.

use crate::field::{Error, ErrorKind};

/// What a file that is a descriptor begins with.
pub const SIGNATURE: &[u8] = b"# Disk DescriptorFile";

/// Descriptors are no longer than this, in bytes.
pub const LONGEST: u64 = 1 << 20;

/// Extents at most: a disk of 2 TiB in parts of 2 GiB has 1024.
const MAX_EXTENTS: usize = 4096;

/// No parent.
const NO_PARENT: &str = "ffffffff";

/// What an extent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A sparse file.
    Sparse(String),
    /// A flat file, from this sector on.
    Flat(String, u64),
    /// Zeros.
    Zero,
}

/// One extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Sectors of the disk.
    pub sectors: u64,
    /// What holds them.
    pub kind: Kind,
}

/// A descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// `monolithicSparse` and the like.
    pub create_type: String,
    /// The file that lies below.
    pub parent: Option<String>,
    /// The extents, in the disk's order.
    pub extents: Vec<Extent>,
}

impl Descriptor {
    /// From its text; what follows a NUL is padding.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |field, at: usize, why: &'static str| Err(Error::new(ErrorKind::Invalid, field, at as u64, 0, why));
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let text = String::from_utf8_lossy(&bytes[..end]);
        let (mut descriptor, mut parent_id, mut hint) = (Self::default(), String::new(), None);
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let access = line.split_whitespace().next().unwrap_or_default();
            if matches!(access, "RW" | "RDONLY" | "NOACCESS") {
                if descriptor.extents.len() >= MAX_EXTENTS {
                    return fail("extents", 0, "more than any disk has");
                }
                descriptor.extents.push(extent(line)?);
            } else if let Some((key, value)) = line.split_once('=') {
                let value = value.trim().trim_matches('"').to_owned();
                match key.trim() {
                    "createType" => descriptor.create_type = value,
                    "parentCID" => parent_id = value,
                    "parentFileNameHint" => hint = Some(value),
                    _ => {}
                }
            }
        }
        if !parent_id.is_empty() && parent_id != NO_PARENT {
            match hint {
                Some(name) if !name.is_empty() => descriptor.parent = Some(name),
                _ => return fail("parentFileNameHint", 0, "there is a parent, and no name of it"),
            }
        }
        Ok(descriptor)
    }
}

fn extent(line: &str) -> Result<Extent, Error> {
    let fail = |kind, why: &'static str| Err(Error::new(kind, "extent", 0, 0, format!("{why}: {line:.200}")));
    let (head, rest) = line.split_once('"').map_or((line, ""), |(head, rest)| (head, rest));
    let (name, tail) = rest.split_once('"').unwrap_or((rest, ""));
    let mut words = head.split_whitespace().skip(1);
    let Some(sectors) =
        words.next().and_then(|word| word.parse::<u64>().ok()).filter(|n| *n <= (i64::MAX as u64) / 512)
    else {
        return fail(ErrorKind::Invalid, "an extent without a size");
    };
    let kind = match words.next() {
        Some("ZERO") => Kind::Zero,
        Some("SPARSE") if !name.is_empty() => Kind::Sparse(name.to_owned()),
        Some("FLAT" | "VMFS") if !name.is_empty() => {
            let at = tail.trim();
            let at = if at.is_empty() { Some(0) } else { at.parse().ok() };
            match at.filter(|at: &u64| *at <= (i64::MAX as u64) / 512) {
                Some(at) => Kind::Flat(name.to_owned(), at),
                None => return fail(ErrorKind::Invalid, "an extent without a place"),
            }
        }
        _ => return fail(ErrorKind::Unsupported, "a kind of extent that is not read"),
    };
    Ok(Extent { sectors, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_and_a_parent_are_read() {
        let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=12ab\nparentFileNameHint=\"../p.vmdk\"\n\
                    createType=\"twoGbMaxExtentSparse\"\n\nRW 100 SPARSE \"a b-s001.vmdk\"\nRDONLY 7 ZERO\n\
                    RW 50 FLAT \"f.vmdk\" 3\n\0padding";
        let descriptor = Descriptor::decode(text.as_bytes()).unwrap();
        assert_eq!(descriptor.parent.as_deref(), Some("../p.vmdk"));
        let kinds: Vec<Kind> = descriptor.extents.iter().map(|extent| extent.kind.clone()).collect();
        assert_eq!(kinds, [Kind::Sparse("a b-s001.vmdk".into()), Kind::Zero, Kind::Flat("f.vmdk".into(), 3)]);
        assert_eq!(Descriptor::decode(b"parentCID=ffffffff\n").unwrap().parent, None);
        for bad in ["RW x SPARSE \"a\"", "RW 1 TEA \"a\"", "RW 1 SPARSE", "parentCID=1\n", "RW 1 FLAT \"a\" x"] {
            assert!(Descriptor::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
