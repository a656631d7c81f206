//! VHD: differencing images, which no tool here makes, and footers that are not whole.
//!
//! What must hold: sectors that a bitmap does not name are left to the parent; the parent is found by what the header says, and known
//! by its identifier; of two footers a whole one counts.

use crate::guest::Guest;
use crate::masters::{Dice, READ_ONLY, disk, in_sim, read_what_can_be_read};
use crate::reference::{lab, ok};
use image::{ErrorKind, Format, Image, Mapping, Result};
use layout::{GuestOffset, GuestRange};
use std::path::Path;
use std::rc::Rc;
use store::memory::MemoryStore;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Where QEMU puts the header and the table of a dynamic image.
const HEADER: usize = 512;
const TABLE: usize = 1536;

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

/// Makes a checksum right.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = bytes.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    put(bytes, at, &(!sum).to_be_bytes());
}

async fn open(bytes: &[u8]) -> Result<Rc<dyn Image>> {
    image::open(MemoryStore::from_bytes("ours", bytes).read_only(), Format::Vpc, READ_ONLY).await
}

/// A dynamic image of 9 MiB, with blocks of 2 MiB.
fn made(folder: &Path, name: &str, writes: &[&str]) -> Vec<u8> {
    ok(folder, &["qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", name, "9M"]);
    let mut line = vec!["qemu-io", "-f", "vpc"];
    for write in writes {
        line.extend(["-c", write]);
    }
    line.push(name);
    ok(folder, &line);
    std::fs::read(folder.join(name)).unwrap()
}

/// Makes of a dynamic image one over a parent, of whose blocks only the sectors of these pieces are here.
fn differencing(
    bytes: &[u8],
    parent: &str,
    name: &str,
    locators: &[(&[u8; 4], &str)],
    pieces: &[(usize, usize)],
) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let end = bytes.len() - 512;
    let footer = bytes.split_off(end);
    let id: Vec<u8> = (0..16).map(|n| u8::from_str_radix(&parent[2 * n..2 * n + 2], 16).unwrap()).collect();
    put(&mut bytes, HEADER + 40, &id);
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
    put(&mut bytes, HEADER + 64, &name);
    for (n, (kind, path)) in locators.iter().enumerate() {
        let path: Vec<u8> = path.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let entry = HEADER + 576 + 24 * n;
        put(&mut bytes, entry, *kind);
        put(&mut bytes, entry + 4, &1_u32.to_be_bytes());
        put(&mut bytes, entry + 8, &(path.len() as u32).to_be_bytes());
        let at = bytes.len() as u64;
        put(&mut bytes, entry + 16, &at.to_be_bytes());
        bytes.extend(&path);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    seal(&mut bytes[HEADER..HEADER + 1024], 36);
    // Bitmaps in front of blocks: the first sector of a byte is its greatest bit.
    for block in 0..5 {
        let sector = u32::from_be_bytes(bytes[TABLE + 4 * block..][..4].try_into().unwrap());
        if sector == u32::MAX {
            continue;
        }
        let bitmap = sector as usize * 512;
        bytes[bitmap..bitmap + 512].fill(0);
        for (start, end) in pieces {
            for number in start.max(&(block * 2 * MIB)) / 512..end.min(&((block + 1) * 2 * MIB)) / 512 {
                bytes[bitmap + number % 4096 / 8] |= 0x80 >> (number % 8);
            }
        }
    }
    bytes.extend(&footer);
    for at in [0, bytes.len() - 512] {
        bytes[at + 63] = 4;
        seal(&mut bytes[at..at + 512], 64);
    }
    bytes
}

#[test]
fn a_differencing_image_leaves_to_its_parent_what_its_bitmaps_leave() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let below = disk(9 * MIB);
    std::fs::write(folder.join("m.raw"), &below).unwrap();
    ok(folder, &["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", "m.raw", "base.vhd"]);
    let base = std::fs::read(folder.join("base.vhd")).unwrap();
    let top = made(folder, "top", &["write -P 9 0 2M", "write -P 8 6M 3M"]);
    let pieces =
        [(512, 1024), (70_144, 70_144 + 4096), (500 * KIB, 900 * KIB), (2 * MIB - 512, 2 * MIB), (7 * MIB, 9 * MIB)];
    let mut expected = below.clone();
    for (start, end) in pieces {
        expected[start..end].fill(if start < 2 * MIB { 9 } else { 8 });
    }
    in_sim(async {
        let identity = open(&base).await.unwrap().identity().unwrap();
        let locators: [(&[u8; 4], &str); 2] = [(b"W2ku", "C:\\vm\\gone.vhd"), (b"W2ru", ".\\sub\\base.vhd")];
        let bytes = differencing(&top, &identity, "other.vhd", &locators, &pieces);
        assert_eq!(image::probe::probe(&*MemoryStore::from_bytes("a", &bytes)).await.unwrap(), Format::Vpc);
        let image = open(&bytes).await.unwrap();
        let backing = image.backing().unwrap();
        assert_eq!((backing.name.as_str(), backing.format), ("./sub/base.vhd", Some(Format::Vpc)));
        assert_eq!(image.backing_identity(), Some(identity.clone()));
        assert_ne!(image.identity(), Some(identity.clone()));
        let guest = Guest::new(image, &below);
        assert!(guest.read_all().await.unwrap() == expected);
        let run = guest.mapping(GuestRange::new(GuestOffset(600), 4096)).await.unwrap();
        assert!(run.len == 424 && matches!(run.mapping, Mapping::Data(_)), "{run:?}");
        let run = guest.mapping(GuestRange::new(GuestOffset(2 << 20), 7 << 20)).await.unwrap();
        assert_eq!((run.len, run.mapping), (5 << 20, Mapping::Unallocated));
        // Other ways to say where the parent is.
        for (name, locators, found) in [
            ("vm\\base.vhd", &locators[..0], "base.vhd"),
            ("", &locators[..1], "gone.vhd"),
            ("base.vhd", &locators[..1], "base.vhd"),
        ] {
            let image = open(&differencing(&top, &identity, name, locators, &pieces)).await.unwrap();
            assert_eq!(image.backing().unwrap().name, found);
        }
        let error = open(&differencing(&top, &identity, "", &[], &pieces)).await.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("parent"), "{error}");
        let mut dice = Dice(4);
        for round in 0..200 {
            let mut bytes = bytes.clone();
            let at = [HEADER, TABLE, HEADER + 560, bytes.len() - 512][round % 4]
                + dice.below(if round % 4 == 1 { 20 } else { 100 });
            bytes[at..at + 4].copy_from_slice(&[[0xff; 4], [0; 4], [0, 0, 0x10, 0], [7, 0, 0, 1]][dice.below(4)]);
            match open(&bytes).await {
                Ok(image) => read_what_can_be_read(&Guest::new(image, &[]), "ours").await,
                Err(error) => assert!(error.to_string().contains("ours"), "{error}"),
            }
        }
    });
}

#[test]
fn a_footer_that_is_whole_counts() {
    let Some(lab) = lab() else { return };
    let mut bytes = made(lab.path(), "a", &["write -P 9 0 2M"]);
    let end = bytes.len() - 512;
    in_sim(async {
        let before = open(&bytes).await.unwrap();
        // The disk's size, in front.
        bytes[48 + 4] ^= 1;
        assert_eq!(open(&bytes).await.unwrap().size(), before.size(), "the one at the end is whole");
        bytes[end + 48 + 4] ^= 1;
        let error = open(&bytes).await.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("not whole"), "{error}");
        seal(&mut bytes[end..], 64);
        assert!(open(&bytes).await.map(drop).unwrap_err().to_string().contains("table entries"));
        let error = open(&[7; 2000]).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("not a VHD"), "{error}");
    });
}
