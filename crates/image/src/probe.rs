//! Which format a store holds, and the only place that ever guesses.
//!
//! Probing is done once, when a user names an image without its format. What was recorded as raw is never probed.

use crate::{Error, ErrorKind, Result};
use layout::HostOffset;
use ring::Iov;
use std::fmt;
use store::Store;

/// The formats Headwater knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Bytes as they are.
    Raw,
    /// QEMU Enhanced Disk.
    Qed,
    /// QCOW2.
    Qcow2,
    /// VirtualBox's, read only.
    Vdi,
    /// Virtual PC's (VHD), read only.
    Vpc,
    /// Parallels', read only.
    Parallels,
    /// QCOW version 1, read only.
    Qcow,
    /// VMware's, read only.
    Vmdk,
    /// Hyper-V's, read only.
    Vhdx,
}

impl Format {
    /// All of them: first those that are written, too.
    pub const ALL: [Self; 9] =
        [Self::Raw, Self::Qed, Self::Qcow2, Self::Vdi, Self::Vpc, Self::Parallels, Self::Qcow, Self::Vmdk, Self::Vhdx];

    /// The name users write: `raw`, `qed`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qed => "qed",
            Self::Qcow2 => "qcow2",
            Self::Vdi => "vdi",
            Self::Vpc => "vpc",
            Self::Parallels => "parallels",
            Self::Qcow => "qcow",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }

    /// From the name users write.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether images of it are made and written, not only read.
    pub fn is_written(self) -> bool {
        matches!(self, Self::Raw | Self::Qed | Self::Qcow2)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Formats that are recognised by their first bytes, and not served: offset, bytes, name.
const FOREIGN: [(usize, &[u8], &str); 8] = [
    (0, b"COWD", "VMDK (version 3)"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (0, b"OOOM", "User-mode Linux COW"),
    (0, b"ZFile\0\x01", "overlaybd ZFile"),
    (0, b"EVF\x09\r\n\xff\0", "Expert Witness (EWF)"),
    (0, b"AFF", "AFF"),
];

/// The same, by their last 512 bytes.
const FOREIGN_TAIL: [(&[u8], &str); 1] = [(b"koly", "DMG")];

/// How many bytes at the start are looked at.
const HEAD: usize = 512;

/// What the first bytes look like; `Raw` when like nothing known. Formats that are recognised but not served (LUKS, DMG, …)
/// are an error that names them: serving their bytes as raw would be a guess.
pub async fn probe(store: &dyn Store) -> Result<Format> {
    let head = Iov::alloc(HEAD);
    store.read(HostOffset::ZERO, head.clone()).await?;
    let head = head.to_vec();
    if head.starts_with(&layout::qed::MAGIC) {
        return Ok(Format::Qed);
    }
    // Version 1 has the same magic and is another format.
    if head.starts_with(&layout::qcow::MAGIC) {
        return Ok(Format::Qcow);
    }
    if head.starts_with(&layout::qcow2::MAGIC) {
        return Ok(Format::Qcow2);
    }
    if head.starts_with(&layout::vpc::COOKIE) {
        return Ok(Format::Vpc);
    }
    if head.starts_with(&layout::vhdx::SIGNATURE) {
        return Ok(Format::Vhdx);
    }
    let title = layout::vmdk::descriptor::TITLE;
    if head.starts_with(&layout::vmdk::header::MAGIC) || head[..title.len()].eq_ignore_ascii_case(title.as_bytes()) {
        return Ok(Format::Vmdk);
    }
    if head[layout::vdi::SIGNATURE_AT..].starts_with(&layout::vdi::SIGNATURE) {
        return Ok(Format::Vdi);
    }
    if head.starts_with(&layout::parallels::MAGIC) || head.starts_with(&layout::parallels::MAGIC_EXTENDED) {
        return Ok(Format::Parallels);
    }
    let foreign = FOREIGN.iter().find(|(at, magic, _)| head[*at..].starts_with(magic)).map(|(_, _, name)| *name);
    let foreign = match foreign {
        None if store.size() >= 2 * HEAD as u64 => {
            let tail = Iov::alloc(HEAD);
            store.read(HostOffset(store.size() - HEAD as u64), tail.clone()).await?;
            let tail = tail.to_vec();
            if tail.starts_with(&layout::vpc::COOKIE) {
                return Ok(Format::Vpc);
            }
            FOREIGN_TAIL.iter().find(|(magic, _)| tail.starts_with(magic)).map(|(_, name)| *name)
        }
        found => found,
    };
    match foreign {
        None => Ok(Format::Raw),
        Some(name) => {
            let what = format!(
                "it looks like a {name} image, a format that is not supported; convert it first ('qemu-img convert -O qed'), or state \
                 its format as raw if these are a guest's own bytes"
            );
            Err(Error::new(ErrorKind::Unsupported, store.name(), None, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::memory::MemoryStore;

    fn probed(bytes: &[u8]) -> Result<Format> {
        let store = MemoryStore::from_bytes("x.img", bytes);
        ring::sim::Sim::new(1).block_on(async move { probe(&*store).await })
    }

    #[test]
    fn known_formats_are_told_apart() {
        assert_eq!(probed(b"").unwrap(), Format::Raw);
        assert_eq!(probed(b"QED\0").unwrap(), Format::Qed);
        assert_eq!(probed(b"QFI\xfb\0\0\0\x03").unwrap(), Format::Qcow2);
        assert_eq!(probed(b"QFI\xfb\0\0\0\x02").unwrap(), Format::Qcow2);
        assert_eq!(probed(b"QFI\xfb\0\0\0\x01").unwrap(), Format::Qcow);
        assert_eq!(probed(b"KDMV").unwrap(), Format::Vmdk);
        assert_eq!(probed(b"vhdxfile").unwrap(), Format::Vhdx);
        assert_eq!(probed(b"# disk descriptorfile\n").unwrap(), Format::Vmdk);
        assert_eq!(probed(&[0; 4096]).unwrap(), Format::Raw);
    }

    #[test]
    fn every_format_has_its_name() {
        for format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
        assert_eq!(Format::from_name("QCOW2"), None);
    }

    #[test]
    fn foreign_formats_are_named() {
        for (at, magic, name) in FOREIGN {
            let mut bytes = vec![0; 4096];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            let error = probed(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(name), "{error}");
        }
        for (magic, name) in FOREIGN_TAIL {
            let mut bytes = vec![0; 4096];
            bytes[4096 - 512..][..magic.len()].copy_from_slice(magic);
            assert!(probed(&bytes).unwrap_err().to_string().contains(name));
        }
    }
}
