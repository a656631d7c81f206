//! Raw disks that are packed as a whole.
//!
//! What must hold: what the usual tools unpack from a file is what is read from it, here and there; a file that cannot be read here
//! and there is refused with a remedy, one that was cut off is refused; a piece that is damaged is an error with its place; a piece is
//! unpacked once, however many wait for it.

use crate::guest::Guest;
use crate::masters::{Dice, READ_ONLY, damaged, disk, in_sim, read_what_can_be_read};
use flate2::{Compress, Compression, Crc, FlushCompress};
use futures_util::future::{LocalBoxFuture, join_all};
use image::{Companions, Error, ErrorKind, Format, Image, NoCompanions, Result, Surroundings};
use std::process::{Command, Stdio};
use std::rc::Rc;
use store::memory::MemoryStore;
use store::trace::{Trace, TraceStore};
use store::{Operation, Store};

/// Bytes of a block that a BGZF block has room for, however badly they pack.
const BLOCK: usize = 60_000;

/// An index beside the file.
struct Index(Vec<u8>);

impl Companions for Index {
    fn open<'a>(&'a self, name: &'a str, referrer: &'a str, _: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        Box::pin(async move {
            if name == "./ours.gzi" {
                return Ok(MemoryStore::from_bytes("ours.gzi", &self.0).read_only() as Rc<dyn Store>);
            }
            Err(Error::new(ErrorKind::InvalidArgument, referrer, None, format!("no file '{name}'")))
        })
    }
}

async fn open_beside(bytes: &[u8], companions: &dyn Companions) -> Result<Rc<dyn Image>> {
    let store = MemoryStore::from_bytes("dir/ours", bytes).read_only();
    let format = image::probe::probe(&*store).await?;
    image::open_in(store, format, READ_ONLY, Surroundings { companions, ..Surroundings::default() }).await
}

async fn open(bytes: &[u8]) -> Result<Rc<dyn Image>> {
    open_beside(bytes, &NoCompanions).await
}

async fn refused(bytes: &[u8], kind: ErrorKind, words: &[&str]) {
    let error = open(bytes).await.map(drop).expect_err("it opened");
    let text = error.to_string();
    assert!(error.kind() == kind && words.iter().all(|word| text.contains(word)), "{:?} {text}", error.kind());
}

/// What a tool unpacks from `bytes`; `None` where it is not installed.
fn unpacked_by(tool: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("packed");
    std::fs::write(&file, bytes).unwrap();
    let input = std::fs::File::open(file).unwrap();
    let Ok(output) = Command::new(tool).args(["-d", "-c"]).stdin(Stdio::from(input)).output() else {
        eprintln!("skipped: {tool} is not installed");
        return None;
    };
    assert!(output.status.success(), "{tool}: {output:?}");
    Some(output.stdout)
}

/// zstd frames of `frame` bytes each, and a seek table.
fn seekable(bytes: &[u8], frame: usize, checksums: bool) -> Vec<u8> {
    let (mut file, mut entries) = (Vec::new(), Vec::new());
    let mut entry = |packed: usize, unpacked: usize, sum: u64| {
        entries.extend((packed as u32).to_le_bytes());
        entries.extend((unpacked as u32).to_le_bytes());
        if checksums {
            entries.extend((sum as u32).to_le_bytes());
        }
    };
    for (n, part) in bytes.chunks(frame).enumerate() {
        let packed = zstd::bulk::compress(part, 3).unwrap();
        entry(packed.len(), part.len(), layout::packed::xxh64(part));
        file.extend(packed);
        if n % 3 == 1 {
            // A frame to be skipped.
            file.extend(0x184d_2a50_u32.to_le_bytes());
            file.extend([4, 0, 0, 0, 1, 2, 3, 4]);
            entry(12, 0, 0);
        }
    }
    let count = entries.len() / if checksums { 12 } else { 8 };
    file.extend(0x184d_2a5e_u32.to_le_bytes());
    file.extend((entries.len() as u32 + 9).to_le_bytes());
    file.extend(&entries);
    file.extend((count as u32).to_le_bytes());
    file.push(if checksums { 0x80 } else { 0 });
    file.extend(0x8f92_eab1_u32.to_le_bytes());
    file
}

/// A raw deflate stream, or so much of one.
fn deflate(packer: &mut Compress, bytes: &[u8], how: FlushCompress) -> Vec<u8> {
    let mut packed = Vec::with_capacity(2 * bytes.len() + 1000);
    packer.compress_vec(bytes, &mut packed, how).unwrap();
    packed
}

fn trailer(bytes: &[u8]) -> Vec<u8> {
    let mut crc = Crc::new();
    crc.update(bytes);
    [crc.sum().to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat()
}

/// A BGZF file, and its `.gzi`.
fn bgzf(bytes: &[u8], block: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut file, mut index) = (Vec::new(), Vec::new());
    let mut at = 0_u64;
    for part in bytes.chunks(block).chain([&[][..]]) {
        if at > 0 {
            index.extend((file.len() as u64).to_le_bytes());
            index.extend(at.to_le_bytes());
        }
        let packed = deflate(&mut Compress::new(Compression::fast(), false), part, FlushCompress::Finish);
        file.extend([31, 139, 8, 4, 0, 0, 0, 0, 0, 255, 6, 0, 66, 67, 2, 0]);
        file.extend(u16::try_from(packed.len() + 25).unwrap().to_le_bytes());
        file.extend(packed);
        file.extend(trailer(part));
        at += part.len() as u64;
    }
    let count = index.len() as u64 / 16;
    (file, [&count.to_le_bytes()[..], &index].concat())
}

/// A dictzip file.
fn dictzip(bytes: &[u8], chunk: u16) -> Vec<u8> {
    let mut packer = Compress::new(Compression::default(), false);
    let parts: Vec<_> = bytes.chunks(chunk.into()).collect();
    let chunks: Vec<_> = parts
        .iter()
        .enumerate()
        .map(|(n, part)| {
            let last = n + 1 == parts.len();
            deflate(&mut packer, part, if last { FlushCompress::Finish } else { FlushCompress::Full })
        })
        .collect();
    let mut file = vec![31, 139, 8, 4 | 8, 0, 0, 0, 0, 0, 3];
    file.extend((10 + 2 * chunks.len() as u16).to_le_bytes());
    file.extend(b"RA");
    file.extend((6 + 2 * chunks.len() as u16).to_le_bytes());
    file.extend([1, 0]);
    file.extend(chunk.to_le_bytes());
    file.extend((chunks.len() as u16).to_le_bytes());
    for chunk in &chunks {
        file.extend((chunk.len() as u16).to_le_bytes());
    }
    file.extend(b"disk.raw\0");
    file.extend(chunks.concat());
    file.extend(trailer(bytes));
    file
}

/// Kinds: what messages call them, the tool that unpacks them, the file.
fn kinds(bytes: &[u8]) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    vec![
        ("frames", "zstd", seekable(bytes, 300_000, true)),
        ("small frames without checksums", "zstd", seekable(bytes, 4096, false)),
        ("blocks", "gzip", bgzf(bytes, BLOCK).0),
        ("small blocks", "gzip", bgzf(bytes, 3000).0),
        ("chunks", "gzip", dictzip(bytes, 58315)),
    ]
}

#[test]
fn what_is_packed_reads_as_it_unpacks() {
    // The last sector is not whole.
    let bytes = disk((2 << 20) + 700);
    let mut padded = bytes.clone();
    padded.resize(bytes.len().next_multiple_of(512), 0);
    for (kind, tool, file) in kinds(&bytes) {
        if let Some(theirs) = unpacked_by(tool, &file) {
            assert!(theirs == bytes, "{kind}: {tool}");
        }
        in_sim(async {
            let guest = Guest::new(open(&file).await.unwrap(), &[]);
            assert_eq!(guest.image.size(), padded.len() as u64, "{kind}");
            assert_eq!(guest.image.format().name(), tool, "{kind}");
            assert!(guest.read_all().await.unwrap() == padded, "{kind}");
            let mut dice = Dice(2);
            for _ in 0..50 {
                let at = dice.below(padded.len());
                let len = 1 + dice.below((padded.len() - at).min(200_000));
                assert!(guest.read(at as u64, len as u64).await.unwrap() == padded[at..at + len], "{kind}: {at} {len}");
            }
            guest.image.close().await.unwrap();
        });
    }
}

#[test]
fn an_index_beside_a_file_is_used_if_it_is_its() {
    let bytes = disk(1 << 20);
    let (file, index) = bgzf(&bytes, BLOCK);
    in_sim(async {
        for cut in [index.len(), index.len() - 16, 8 + 16, 8] {
            let mut index = index[..cut].to_vec();
            index[..8].copy_from_slice(&(cut as u64 / 16).to_le_bytes());
            let trace = Trace::keeping(0);
            let store = TraceStore::new(MemoryStore::from_bytes("dir/ours", &file), trace.clone());
            let beside = Index(index);
            let surroundings = Surroundings { companions: &beside, ..Surroundings::default() };
            let image = image::open_in(store, Format::Gzip, READ_ONLY, surroundings).await.unwrap();
            // One for the header, one to look into it, one or two for each block that is not in the index.
            let walked = (index_len(&index_full(&bytes)) - cut as u64 / 16) + 1;
            assert!(trace.count(Operation::Read).started <= 3 + 2 * walked, "{:?}", trace.count(Operation::Read));
            assert!(Guest::new(image, &[]).read_all().await.unwrap() == bytes);
        }
        // Another file's, or none at all.
        let (_, other) = bgzf(&disk(700_000), 5000);
        let image = open_beside(&file, &Index(other)).await;
        let error = match image {
            Ok(image) => Guest::new(image, &[]).read_all().await.map(drop).unwrap_err(),
            Err(error) => error,
        };
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("ours"), "{error}");
        for bad in [&index[..index.len() - 3], &[][..], &[0xff; 24]] {
            let error = open_beside(&file, &Index(bad.to_vec())).await.map(drop).unwrap_err();
            assert!(error.to_string().contains("ours.gzi") && error.to_string().contains("anew"), "{error}");
        }
    });
}

fn index_full(bytes: &[u8]) -> Vec<u8> {
    bgzf(bytes, BLOCK).1
}

fn index_len(index: &[u8]) -> u64 {
    u64::from_le_bytes(index[..8].try_into().unwrap())
}

#[test]
fn what_cannot_be_read_here_and_there_is_refused() {
    let bytes = disk(1 << 20);
    in_sim(async {
        let plain = zstd::bulk::compress(&bytes, 3).unwrap();
        refused(&plain, ErrorKind::Unsupported, &["ours", "no seek table", "zstd -d"]).await;
        let mut plain = vec![31, 139, 8, 0, 0, 0, 0, 0, 0, 3];
        plain.extend(deflate(&mut Compress::new(Compression::fast(), false), &bytes, FlushCompress::Finish));
        plain.extend(trailer(&bytes));
        refused(&plain, ErrorKind::Unsupported, &["ours", "no index", "gzip -d", "bgzip"]).await;
        let large = seekable(&vec![7; 33 << 20], 33 << 20, false);
        refused(&large, ErrorKind::Unsupported, &["smaller"]).await;
        // An image of another format, packed as a whole.
        let mut inside = b"QFI\xfb\0\0\0\x03".to_vec();
        inside.resize(100_000, 1);
        for (kind, _, file) in kinds(&inside) {
            let error = open(&file).await.map(drop).expect_err(kind);
            assert!(error.to_string().contains("qcow2") && error.to_string().contains("unpack it first"), "{error}");
        }
        // A file that was cut off, where a piece begins or inside of one.
        let (file, index) = bgzf(&bytes, BLOCK);
        let last = u64::from_le_bytes(index[8 + 16 * 9..][..8].try_into().unwrap()) as usize;
        for len in [last, last - 5, last + 5, file.len() - 28, file.len() - 1] {
            refused(&file[..len], ErrorKind::Corrupt, &["ours", "cut off"]).await;
        }
        let chunks = dictzip(&bytes, 58315);
        assert!(open(&chunks[..chunks.len() - 4000]).await.is_err());
        let frames = seekable(&bytes, 65536, true);
        for len in [frames.len() - 1, frames.len() / 2] {
            assert!(open(&frames[..len]).await.is_err());
        }
        refused(&[&frames[..1000], &frames[2000..]].concat(), ErrorKind::Corrupt, &["ours"]).await;
    });
}

#[test]
fn whatever_is_damaged_is_answered() {
    let bytes = disk(300_000);
    for (kind, _, sound) in kinds(&bytes) {
        let mut dice = Dice(5);
        for round in 0..60 {
            let file = damaged(&sound, round, &mut dice);
            in_sim(async {
                match open(&file).await {
                    Ok(image) if image.format() == Format::Raw => {}
                    Ok(image) => {
                        let guest = Guest::new(image, &[]);
                        read_what_can_be_read(&guest, "ours").await;
                        // What has checksums is right or an error.
                        if !kind.contains("without") && kind != "chunks" {
                            let size = (guest.image.size() as usize).min(bytes.len());
                            if let Ok(read) = guest.read(0, size as u64).await {
                                assert!(read == bytes[..size], "{kind}: {round}");
                            }
                        }
                    }
                    Err(error) => assert!(error.to_string().contains("ours"), "{error}"),
                }
            });
        }
    }
}

#[test]
fn a_piece_is_unpacked_once_for_all_who_wait() {
    let bytes = disk(8 << 20);
    let file = seekable(&bytes, 1 << 20, true);
    in_sim(async {
        let trace = Trace::keeping(0);
        let store = TraceStore::new(MemoryStore::from_bytes("ours", &file), trace.clone());
        let image = image::open(store, Format::Zstd, READ_ONLY).await.unwrap();
        let guest = Guest::new(image, &[]);
        let before = trace.count(Operation::Read).started;
        let reads = (0..64_u64).map(|n| {
            let guest = guest.clone();
            async move { guest.read((3 << 20) + n * 5000, 4096).await.unwrap() }
        });
        for (n, read) in join_all(reads).await.into_iter().enumerate() {
            let at = (3 << 20) + n * 5000;
            assert!(read == bytes[at..at + 4096]);
        }
        assert_eq!(trace.count(Operation::Read).started - before, 1);
    });
}
