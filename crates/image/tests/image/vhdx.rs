//! VHDX: two headers, a log that has not been carried out, and disks over a parent.
//!
//! What must hold: of two headers the newer whole one counts; a log that is not empty reads as QEMU reads the image once it has
//! carried the log out, and the file stays as it was; a log that cannot be carried out is refused with a remedy; sectors that a
//! bitmap says are below are left to what lies below.

use crate::guest::Guest;
use crate::masters::{Dice, READ_ONLY, disk, flattened, in_sim, read_what_can_be_read};
use crate::reference::{lab, ok};
use image::{ErrorKind, Format, Image, Mapping, Result};
use layout::vhdx::{Guid, crc32c};
use layout::{GuestOffset, GuestRange};
use std::path::Path;
use std::rc::Rc;
use store::memory::MemoryStore;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SECTOR: usize = 4096;

/// Where QEMU puts things.
const HEADERS: [usize; 2] = [64 * KIB, 128 * KIB];
const REGIONS: [usize; 2] = [192 * KIB, 256 * KIB];
const LOG: usize = MIB;
const BAT: usize = 2 * MIB;
const METADATA: usize = 3 * MIB;

const LOG_ID: Guid = Guid([0x5a; 16]);

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

/// Makes a checksum right.
fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = crc32c(bytes);
    put(bytes, 4, &crc.to_le_bytes());
}

/// A small dynamic disk with blocks of 1 MiB that qemu-img made.
fn made(folder: &Path, name: &str, writes: &[&str]) -> Vec<u8> {
    ok(folder, &["qemu-img", "create", "-q", "-f", "vhdx", "-o", "subformat=dynamic,block_size=1M", name, "9M"]);
    let mut line = vec!["qemu-io", "-f", "vhdx"];
    for write in writes {
        line.extend(["-c", write]);
    }
    line.push(name);
    ok(folder, &line);
    std::fs::read(folder.join(name)).unwrap()
}

async fn open(bytes: &[u8]) -> Result<Rc<dyn Image>> {
    image::open(MemoryStore::from_bytes("ours", bytes).read_only(), Format::Vhdx, READ_ONLY).await
}

async fn refused(bytes: &[u8], kind: ErrorKind, words: &[&str]) {
    let error = open(bytes).await.map(drop).expect_err("it opened");
    let text = error.to_string();
    assert!(error.kind() == kind && words.iter().all(|word| text.contains(word)), "{:?} {text}", error.kind());
}

#[test]
fn the_newer_whole_header_counts() {
    let Some(lab) = lab() else { return };
    let bytes = made(lab.path(), "a", &["write -P 5 70000 5000"]);
    let newer = usize::from(le64(&bytes, HEADERS[0] + 8) < le64(&bytes, HEADERS[1] + 8));
    in_sim(async {
        // A log that cannot be is what tells which of them was looked at.
        for (which, counts) in [(newer, true), (1 - newer, false)] {
            let mut bytes = bytes.clone();
            put(&mut bytes, HEADERS[which] + 48, &LOG_ID.0);
            assert!(open(&bytes).await.is_ok(), "a header that is not whole does not count");
            seal(&mut bytes[HEADERS[which]..][..SECTOR]);
            assert_eq!(open(&bytes).await.is_err(), counts);
        }
        let mut bytes = bytes;
        put(&mut bytes, REGIONS[0] + 20, b"?");
        assert!(open(&bytes).await.is_ok(), "the other table of regions is whole");
        put(&mut bytes, REGIONS[1] + 20, b"?");
        refused(&bytes, ErrorKind::Corrupt, &["'ours'", "regions"]).await;
        for at in HEADERS {
            bytes[at] = 0;
        }
        refused(&bytes, ErrorKind::Corrupt, &["headers"]).await;
    });
}

/// An entry of the log: what these sectors are to hold, and a stretch of zeros.
fn entry(sequence: u64, tail: usize, file: usize, writes: &[(usize, &[u8])], zero: Option<(usize, usize)>) -> Vec<u8> {
    let descriptors = writes.len() + usize::from(zero.is_some());
    let front = (64 + 32 * descriptors).next_multiple_of(SECTOR);
    let mut bytes = vec![0; front + writes.len() * SECTOR];
    let len = bytes.len() as u32;
    put(&mut bytes, 0, b"loge");
    put(&mut bytes, 8, &len.to_le_bytes());
    put(&mut bytes, 12, &(tail as u32).to_le_bytes());
    put(&mut bytes, 16, &sequence.to_le_bytes());
    put(&mut bytes, 24, &(descriptors as u32).to_le_bytes());
    put(&mut bytes, 32, &LOG_ID.0);
    put(&mut bytes, 48, &(file as u64).to_le_bytes());
    put(&mut bytes, 56, &(file as u64).to_le_bytes());
    for (n, (at, sector)) in writes.iter().enumerate() {
        let descriptor = 64 + 32 * n;
        put(&mut bytes, descriptor, b"desc");
        put(&mut bytes, descriptor + 4, &sector[SECTOR - 4..]);
        put(&mut bytes, descriptor + 8, &sector[..8]);
        put(&mut bytes, descriptor + 16, &(*at as u64).to_le_bytes());
        put(&mut bytes, descriptor + 24, &sequence.to_le_bytes());
        let data = front + n * SECTOR;
        put(&mut bytes, data, sector);
        put(&mut bytes, data, b"data");
        put(&mut bytes, data + 4, &((sequence >> 32) as u32).to_le_bytes());
        put(&mut bytes, data + SECTOR - 4, &(sequence as u32).to_le_bytes());
    }
    if let Some((at, len)) = zero {
        let descriptor = 64 + 32 * writes.len();
        put(&mut bytes, descriptor, b"zero");
        put(&mut bytes, descriptor + 8, &(len as u64).to_le_bytes());
        put(&mut bytes, descriptor + 16, &(at as u64).to_le_bytes());
        put(&mut bytes, descriptor + 24, &sequence.to_le_bytes());
    }
    seal(&mut bytes);
    bytes
}

/// Puts entries into the log, one behind the other from `start` on, and says in both headers that it is not empty.
fn with_log(bytes: &[u8], start: usize, entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = start;
    for part in entries.iter().flat_map(|entry| entry.chunks(SECTOR)) {
        put(&mut bytes, LOG + at % MIB, part);
        at += SECTOR;
    }
    for header in HEADERS {
        put(&mut bytes, header + 48, &LOG_ID.0);
        seal(&mut bytes[header..][..SECTOR]);
    }
    bytes
}

/// The image with a log: block 1 comes into being where block 3 was, whose entry becomes zeros; the first sectors of block 0's data are
/// overwritten and zeroed. The log begins at `tail`. Also the image without it.
fn dirty(folder: &Path, tail: usize) -> (Vec<u8>, Vec<u8>) {
    let bytes = made(folder, "a", &["write -P 5 70000 5000", "write -P 6 3M 1M"]);
    let mut table = bytes[BAT..BAT + SECTOR].to_vec();
    let first = (le64(&table, 0) >> 20 << 20) as usize;
    table.copy_within(24..32, 8);
    put(&mut table, 24, &2_u64.to_le_bytes());
    let mut data = bytes[first + 64 * KIB..][..SECTOR].to_vec();
    data[10..20].fill(9);
    let entries = [
        entry(70, tail, bytes.len(), &[(BAT, &table), (first + 64 * KIB, &[7; SECTOR])], None),
        entry(71, tail, bytes.len(), &[(first + 64 * KIB, &data)], Some((first + 72 * KIB, 4096))),
    ];
    (with_log(&bytes, tail, &entries), bytes)
}

#[test]
fn a_log_that_is_not_empty_reads_as_if_it_were_carried_out() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let (dirty, clean) = dirty(folder, 8 * SECTOR);
    std::fs::write(folder.join("d"), &dirty).unwrap();
    ok(folder, &["qemu-img", "check", "-q", "-f", "vhdx", "-r", "all", "d"]);
    let expected = flattened(folder, "vhdx", "d");
    in_sim(async {
        let store = MemoryStore::from_bytes("ours", &dirty);
        let image = image::open(store.clone(), Format::Vhdx, READ_ONLY).await.unwrap();
        assert!(image.info().dirty && image.info().warnings[0].contains("2 entries"));
        let guest = Guest::new(image, &[]);
        let bytes = guest.read_all().await.unwrap();
        let differs = bytes.iter().zip(&expected).position(|(ours, theirs)| ours != theirs);
        assert_eq!(differs, None, "as the reference reads it");
        assert!(bytes[MIB..2 * MIB].iter().all(|byte| *byte == 6) && bytes[3 * MIB] == 0);
        assert_eq!(bytes[64 * KIB + 15], 9);
        assert!(store.to_vec() == dirty, "nothing is written");
        // Round the log's end it is the same. (QEMU 10 carries out only what it finds at the log's start then.)
        for sectors in 1..4 {
            let (round, _) = self::dirty(folder, MIB - sectors * SECTOR);
            assert!(Guest::new(open(&round).await.unwrap(), &[]).read_all().await.unwrap() == expected);
        }
        let unlogged = Guest::new(open(&clean).await.unwrap(), &[]).read_all().await.unwrap();
        assert!(unlogged != expected, "the log matters");
    });
}

#[test]
fn a_log_that_cannot_be_carried_out_is_refused() {
    let Some(lab) = lab() else { return };
    let (dirty, clean) = dirty(lab.path(), MIB - SECTOR);
    in_sim(async {
        // The newest entry is torn: its tail is an older one's, which is whole; so the older counts.
        let mut torn = dirty.clone();
        torn[LOG + 2 * SECTOR + 100] ^= 1;
        let older = open(&torn).await.map(|image| image.info().warnings[0].clone());
        assert!(older.is_ok_and(|warning| warning.contains("1 entries")));
        // None is whole.
        torn[LOG + 200] ^= 1;
        refused(&torn, ErrorKind::Corrupt, &["'ours'", "log", "attach"]).await;
        // The file was cut off behind what the log relies on.
        let mut short = dirty.clone();
        short.truncate(clean.len() - MIB);
        refused(&short, ErrorKind::Corrupt, &["cut off"]).await;
        // It writes past what a file can hold, or not to a sector.
        for place in [usize::MAX - 4095, i64::MAX as usize / SECTOR * SECTOR, 100] {
            let bad = with_log(&clean, 0, &[entry(1, 0, clean.len(), &[(place, &[1; SECTOR])], None)]);
            refused(&bad, ErrorKind::Corrupt, &["makes no sense"]).await;
        }
        // It is longer than we hold.
        let mut long = dirty;
        for header in HEADERS {
            put(&mut long, header + 68, &(32_u32 << 20).to_le_bytes());
            seal(&mut long[header..][..SECTOR]);
        }
        long.resize(64 << 20, 0);
        refused(&long, ErrorKind::Unsupported, &["the log", "at most"]).await;
    });
}

/// Makes of a dynamic disk one over a parent: of what is allocated in it only the sectors of the `pieces` (which lie in the first
/// block) are here, all of the other blocks is.
fn differencing(bytes: &[u8], parent: Guid, pieces: &[(usize, usize)], keys: &[(&str, String)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    // The item that locates the parent, at the end of the metadata's region.
    let mut locator = vec![0_u8; 20 + 12 * (keys.len() + 1)];
    put(&mut locator, 0, &Guid::parse("b04aefb7-d19e-4a81-b789-25b8e9445913").unwrap().0);
    put(&mut locator, 18, &(keys.len() as u16 + 1).to_le_bytes());
    let linkage = ("parent_linkage", format!("{{{parent}}}"));
    for (n, (key, value)) in std::iter::once(&linkage).chain(keys).enumerate() {
        for (offset, len, text) in [(0, 8, *key), (4, 10, value.as_str())] {
            let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let (start, bytes) = (locator.len() as u32, utf16.len() as u16);
            put(&mut locator, 20 + 12 * n + offset, &start.to_le_bytes());
            put(&mut locator, 20 + 12 * n + len, &bytes.to_le_bytes());
            locator.extend(utf16);
        }
    }
    put(&mut bytes, METADATA + 512 * KIB, &locator);
    let count = bytes[METADATA + 10];
    let item = METADATA + 32 + 32 * usize::from(count);
    put(&mut bytes, item, &Guid::parse("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").unwrap().0);
    put(&mut bytes, item + 16, &(512 * KIB as u32).to_le_bytes());
    put(&mut bytes, item + 20, &(locator.len() as u32).to_le_bytes());
    put(&mut bytes, item + 24, &4_u32.to_le_bytes());
    bytes[METADATA + 10] = count + 1;
    // The first item is the file's parameters.
    bytes[METADATA + 64 * KIB + 4] |= 2;
    for block in 0..9 {
        let entry = BAT + 8 * block;
        if bytes[entry] & 7 != 6 {
            bytes[entry] = 0;
        }
    }
    // A bitmap at the end of the file; 4096 blocks of 1 MiB in a chunk.
    bytes[BAT] = 7;
    let bitmap = bytes.len().next_multiple_of(MIB);
    bytes.resize(bitmap + MIB, 0);
    put(&mut bytes, BAT + 8 * 4096, &(bitmap as u64 | 6).to_le_bytes());
    for (start, end) in pieces {
        for sector in start / 512..end / 512 {
            bytes[bitmap + sector / 8] |= 1 << (sector % 8);
        }
    }
    bytes
}

#[test]
fn a_disk_over_a_parent_leaves_to_it_what_its_bitmap_leaves() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let below = disk(9 * MIB);
    std::fs::write(folder.join("m.raw"), &below).unwrap();
    ok(folder, &["qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", "m.raw", "base.vhdx"]);
    let base = std::fs::read(folder.join("base.vhdx")).unwrap();
    let top = made(folder, "top", &["write -P 9 0 1M", "write -P 8 3M 1M"]);
    let pieces = [(512, 1024), (70_144, 70_144 + 4096), (500 * 1024, 900 * 1024), (MIB - 512, MIB)];
    let mut expected = below.clone();
    for (start, end) in pieces {
        expected[start..end].fill(9);
    }
    expected[3 * MIB..4 * MIB].fill(8);
    in_sim(async {
        let base = open(&base).await.unwrap();
        let identity = base.identity().unwrap();
        let parent = Guid::parse(&identity).unwrap();
        let relative = [("relative_path", "..\\sub\\base.vhdx".to_owned())];
        let bytes = differencing(&top, parent, &pieces, &relative);
        let image = open(&bytes).await.unwrap();
        let backing = image.backing().unwrap();
        assert_eq!((backing.name.as_str(), backing.format), ("../sub/base.vhdx", Some(Format::Vhdx)));
        assert_eq!(image.backing_identity(), Some(identity));
        let guest = Guest::new(image, &below);
        assert!(guest.read_all().await.unwrap() == expected);
        let run = guest.mapping(GuestRange::new(GuestOffset(600), 4096)).await.unwrap();
        assert!(run.len == 424 && matches!(run.mapping, Mapping::Data(_)), "{run:?}");
        let run = guest.mapping(GuestRange::new(GuestOffset(1024), 4 << 20)).await.unwrap();
        assert_eq!((run.len, run.mapping), (70_144 - 1024, Mapping::Unallocated));
        let run = guest.mapping(GuestRange::new(GuestOffset(MIB as u64), 8 << 20)).await.unwrap();
        assert_eq!((run.len, run.mapping), (2 << 20, Mapping::Unallocated));
        // Only where it was: the parent is looked for beside the image.
        let absolute = [("absolute_win32_path", "\\\\?\\c:\\vm\\base.vhdx".to_owned())];
        let image = open(&differencing(&top, parent, &pieces, &absolute)).await.unwrap();
        assert_eq!(image.backing().unwrap().name, "base.vhdx");
        let nowhere = differencing(&top, parent, &pieces, &[]);
        refused(&nowhere, ErrorKind::Corrupt, &["KeyValueCount"]).await;
        // A block that is partly here, and no bitmap.
        let mut lost = bytes.clone();
        lost[BAT + 8 * 4096..][..8].fill(0);
        let error = Guest::new(open(&lost).await.unwrap(), &below).read(0, 512).await.unwrap_err();
        assert!(error.to_string().contains("block 0") && error.to_string().contains("bitmap"), "{error}");
        // Without a parent there is no such thing.
        let mut alone = top;
        alone[BAT] = 7;
        let error = Guest::new(open(&alone).await.unwrap(), &[]).read(0, 512).await.unwrap_err();
        assert!(error.to_string().contains("block 0") && error.to_string().contains("state 7"), "{error}");
    });
}

#[test]
fn whatever_is_damaged_is_answered() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let (dirty, clean) = dirty(folder, 0);
    let over = differencing(&clean, LOG_ID, &[(512, 1024)], &[("relative_path", "base.vhdx".to_owned())]);
    let mut dice = Dice(9);
    for sound in [dirty, clean, over] {
        for round in 0..150 {
            let mut bytes = sound.clone();
            let (start, len) = match round % 5 {
                0 => (HEADERS[round % 2], 96),
                1 => (REGIONS[round % 2], 96),
                2 => (BAT, 80),
                3 => (METADATA, 300),
                _ => (METADATA + 64 * KIB, 64),
            };
            let at = start + dice.below(len);
            bytes[at..at + 4].copy_from_slice(&[[0xff; 4], [0; 4], [0, 0, 0x10, 0], [7, 0, 0, 1]][dice.below(4)]);
            // As somebody would who knows how.
            for (at, len) in HEADERS.map(|at| (at, SECTOR)).into_iter().chain(REGIONS.map(|at| (at, 64 * KIB))) {
                seal(&mut bytes[at..][..len]);
            }
            in_sim(async {
                match open(&bytes).await {
                    Ok(image) => read_what_can_be_read(&Guest::new(image, &[]), "ours").await,
                    Err(error) => assert!(error.to_string().contains("ours"), "{error}"),
                }
            });
        }
    }
}
