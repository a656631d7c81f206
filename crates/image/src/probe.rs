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
    /// A raw disk packed with zstd, in frames with a seek table; read only.
    Zstd,
    /// A raw disk packed with gzip, in members or chunks that can be found; read only.
    Gzip,
    /// An encrypted volume (LUKS, version 1).
    Luks,
}

impl Format {
    /// All of them: first those that are written, too.
    pub const ALL: [Self; 12] = [
        Self::Raw,
        Self::Qed,
        Self::Qcow2,
        Self::Vdi,
        Self::Vpc,
        Self::Parallels,
        Self::Qcow,
        Self::Vmdk,
        Self::Vhdx,
        Self::Zstd,
        Self::Gzip,
        Self::Luks,
    ];

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
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
            Self::Luks => "luks",
        }
    }

    /// From the name users write.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether images of it are made and written, not only read.
    pub fn is_written(self) -> bool {
        matches!(self, Self::Raw | Self::Qed | Self::Qcow2 | Self::Luks)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Formats that are recognised by their first bytes, and not served: offset, bytes, name.
const FOREIGN: [(usize, &[u8], &str); 7] = [
    (0, b"COWD", "VMDK (version 3)"),
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

/// What some bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// A format that is served.
    Known(Format),
    /// One that is not, by its name.
    Foreign(&'static str),
    /// Nothing that is known.
    Nothing,
}

/// What an image's first [`HEAD`] bytes say it is.
fn by_head(head: &[u8]) -> Found {
    let is = |magic: &[u8]| head.starts_with(magic);
    let title = layout::vmdk::descriptor::TITLE.as_bytes();
    let is_text = head.get(..title.len()).is_some_and(|text| text.eq_ignore_ascii_case(title));
    let signature = head.get(layout::vdi::SIGNATURE_AT..).unwrap_or_default();
    Found::Known(if is(&layout::qed::MAGIC) {
        Format::Qed
    } else if is(&layout::qcow::MAGIC) {
        // Version 1 has QCOW2's magic and is another format.
        Format::Qcow
    } else if is(&layout::qcow2::MAGIC) {
        Format::Qcow2
    } else if is(&layout::luks::MAGIC) {
        Format::Luks
    } else if is(&layout::vpc::COOKIE) {
        Format::Vpc
    } else if is(&layout::vhdx::SIGNATURE) {
        Format::Vhdx
    } else if is(&layout::packed::seekable::MAGIC) {
        Format::Zstd
    } else if is(&layout::packed::gzip::MAGIC) {
        Format::Gzip
    } else if is(&layout::vmdk::header::MAGIC) || is_text {
        Format::Vmdk
    } else if signature.starts_with(&layout::vdi::SIGNATURE) {
        Format::Vdi
    } else if is(&layout::parallels::MAGIC) || is(&layout::parallels::MAGIC_EXTENDED) {
        Format::Parallels
    } else {
        let foreign = FOREIGN.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
        return foreign.map_or(Found::Nothing, |(_, _, name)| Found::Foreign(name));
    })
}

/// What an image's last [`HEAD`] bytes say it is.
fn by_tail(tail: &[u8]) -> Found {
    if tail.starts_with(&layout::vpc::COOKIE) {
        return Found::Known(Format::Vpc);
    }
    if tail.ends_with(&layout::packed::seekable::FOOTER_MAGIC) {
        return Found::Known(Format::Zstd);
    }
    let foreign = FOREIGN_TAIL.iter().find(|(magic, _)| tail.starts_with(magic));
    foreign.map_or(Found::Nothing, |(_, name)| Found::Foreign(name))
}

/// The name of the format that a disk's own first bytes look like, though they should be a guest's.
pub(crate) fn like_an_image(head: &[u8]) -> Option<&'static str> {
    match by_head(head) {
        Found::Known(format) => Some(format.name()),
        Found::Foreign(name) => Some(name),
        Found::Nothing => None,
    }
}

/// What the first bytes look like; `Raw` when like nothing known. Formats that are recognised but not served (DMG, Bochs, …)
/// are an error that names them: serving their bytes as raw would be a guess.
pub async fn probe(store: &dyn Store) -> Result<Format> {
    let head = Iov::alloc(HEAD);
    store.read(HostOffset::ZERO, head.clone()).await?;
    let found = match by_head(&head.to_vec()) {
        Found::Nothing if store.size() >= 2 * HEAD as u64 => {
            let tail = Iov::alloc(HEAD);
            store.read(HostOffset(store.size() - HEAD as u64), tail.clone()).await?;
            by_tail(&tail.to_vec())
        }
        found => found,
    };
    match found {
        Found::Known(format) => Ok(format),
        Found::Nothing => Ok(Format::Raw),
        Found::Foreign(name) => {
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
        assert_eq!(probed(b"\x28\xb5\x2f\xfd").unwrap(), Format::Zstd);
        assert_eq!(probed(b"\x1f\x8b\x08\0").unwrap(), Format::Gzip);
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
