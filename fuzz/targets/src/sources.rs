//! Images of the formats that are only read: any bytes, in files that are mostly zeros.
//!
//! An input is a format (one byte) and a list of stretches: where (four bytes), how many bytes (two), the bytes. What no stretch
//! holds is zeros. A stretch without bytes is where the file ends; at [`NEXT`] another file begins, the one that the image finds
//! beside it, whatever it calls it. Checksums are made right, as by somebody who knows how, so that what lies behind them is reached.
//!
//! What must hold: it opens or says why not, and whose fault it is; look-ups are within what was asked, and say the same of a part as
//! of the whole; what can be read twice is the same twice; a piece that does not unpack is damaged, and so it is said.

use futures_util::future::LocalBoxFuture;
use image::{Companions, ErrorKind, Format, Image, Mapped, Mapping, OpenOptions, Result, Surroundings};
use layout::vhdx::crc32c;
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::memory::{MemoryStore, Snapshot};

/// In the order in which an input counts them.
const FORMATS: [Format; 8] =
    [Format::Vdi, Format::Vpc, Format::Parallels, Format::Qcow, Format::Vmdk, Format::Vhdx, Format::Zstd, Format::Gzip];

/// A stretch that begins here begins another file.
const NEXT: u32 = u32::MAX;

/// How far files reach.
const FILE_MOST: u64 = 64 << 20;

/// Guest bytes that are looked at, from the start and at the end.
const LOOKED_AT: u64 = 2 << 20;

/// Look-ups at most.
const STEPS: usize = 3000;

/// A file that is mostly zeros.
struct Sparse {
    content: Snapshot,
    cut: Option<u64>,
}

impl Sparse {
    fn new() -> Self {
        Self { content: Snapshot::zeros(0), cut: None }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.content.write(at, bytes);
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.content.read(at, &mut bytes);
        bytes
    }

    /// Makes the checksum of `len` bytes at `at` right, which lies in them at `place`.
    fn seal(&mut self, at: u64, len: usize, place: usize, sum: fn(&[u8]) -> [u8; 4]) {
        let mut bytes = self.bytes(at, len);
        if bytes.iter().all(|byte| *byte == 0) {
            return;
        }
        bytes[place..place + 4].fill(0);
        self.put(at + place as u64, &sum(&bytes));
    }

    fn seal_all(&mut self, format: Format) {
        let crc = |bytes: &[u8]| crc32c(bytes).to_le_bytes();
        let inverted = |bytes: &[u8]| (!bytes.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte))).to_be_bytes();
        match format {
            Format::Vhdx => {
                for (at, len) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)] {
                    self.seal(at, len, 4, crc);
                }
                // Entries of the log, where QEMU puts it.
                for at in (1 << 20..(1 << 20) + (32 << 10)).step_by(4096) {
                    let head = self.bytes(at, 12);
                    let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
                    if head.starts_with(b"loge") && (1..=16).contains(&(len / 4096)) {
                        self.seal(at, len, 4, crc);
                    }
                }
            }
            Format::Vpc => {
                let end = self.content.size();
                for at in [0, end.saturating_sub(512)] {
                    self.seal(at, 512, 64, inverted);
                }
            }
            _ => {}
        }
        if let Some(cut) = self.cut {
            self.content.set_size(cut.min(FILE_MOST));
        }
    }

    fn store(self, name: &str) -> Rc<dyn Store> {
        MemoryStore::from_snapshot(name, self.content).read_only()
    }
}

/// The files that an input describes.
fn files(mut input: &[u8]) -> Vec<Sparse> {
    let mut files = vec![Sparse::new()];
    while let Some((head, rest)) = input.split_first_chunk::<6>() {
        let at = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let len = usize::from(u16::from_le_bytes([head[4], head[5]]));
        let (bytes, rest) = rest.split_at(len.min(rest.len()));
        input = rest;
        if at == NEXT && files.len() < 2 {
            files.push(Sparse::new());
            continue;
        }
        let Some(file) = files.last_mut() else { break };
        let at = u64::from(at) % FILE_MOST;
        if len == 0 {
            file.cut = Some(at);
        } else {
            file.put(at, bytes);
        }
    }
    files
}

/// The other file, under any name.
struct Beside(Rc<dyn Store>);

impl Companions for Beside {
    fn open<'a>(&'a self, name: &'a str, _: &'a str, read_only: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        assert!(read_only && !name.starts_with('/') && !name.contains(".."), "{name}");
        Box::pin(async { Ok(Rc::clone(&self.0)) })
    }
}

/// See the module.
pub(crate) fn sources(input: &[u8]) {
    let Some((format, input)) = input.split_first() else { return };
    let format = FORMATS[usize::from(*format) % FORMATS.len()];
    let mut files = files(input);
    for file in &mut files {
        file.seal_all(format);
    }
    let beside = if files.len() > 1 { files.pop() } else { None };
    let Some(file) = files.pop() else { return };
    Sim::new(3).block_on(async {
        let beside = Beside(beside.unwrap_or_else(Sparse::new).store("fuzzed.beside"));
        let options = OpenOptions { read_only: true, for_check: false };
        let surroundings = Surroundings { companions: &beside, ..Surroundings::default() };
        match image::open_in(file.store("fuzzed"), format, options, surroundings).await {
            Ok(image) => walk(&*image).await,
            Err(error) => assert!(error.to_string().contains("fuzzed"), "{error}"),
        }
    });
}

/// Looks at an image from its start, and at its end.
async fn walk(image: &dyn Image) {
    let size = image.size();
    let _ = (image.info(), image.backing(), image.identity(), image.backing_identity());
    let end = GuestRange::between(GuestOffset(size.saturating_sub(4096)), GuestOffset(size));
    let mut steps = 0;
    for mut rest in [GuestRange::new(GuestOffset(0), size.min(LOOKED_AT)), end] {
        while !rest.is_empty() && steps < STEPS {
            steps += 1;
            match look(image, rest).await {
                Some(mapped) => {
                    read(image, rest.first(mapped.len.min(3000)), mapped.mapping).await;
                    rest = rest.skip(mapped.len);
                }
                None => rest = rest.skip(512),
            }
        }
    }
    image.close().await.expect("memory closes");
}

/// The first run of `range`; `None` where it is damaged.
async fn look(image: &dyn Image, range: GuestRange) -> Option<Mapped> {
    let damaged = |error: image::Error| {
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("fuzzed"), "{error}");
    };
    // A table and a bitmap at most.
    for _ in 0..4 {
        match image.lookup(range) {
            Ok(Some(mapped)) => {
                assert!(mapped.len > 0 && mapped.len <= range.len(), "{mapped:?} of {range}");
                let behind = range.first(mapped.len).skip(mapped.len / 2);
                if let Ok(Some(half)) = image.lookup(behind) {
                    let host = |mapped: Mapped| mapped.mapping.stored().map(|host| host.get());
                    assert_eq!(host(half), host(mapped).map(|host| host + mapped.len / 2), "{mapped:?} and {half:?}");
                    assert!(half.mapping == mapped.mapping || host(half).is_some(), "{mapped:?} and {half:?}");
                }
                return Some(mapped);
            }
            Ok(None) => {
                if let Err(error) = image.load(range).await {
                    damaged(error);
                    return None;
                }
            }
            Err(error) => {
                damaged(error);
                return None;
            }
        }
    }
    panic!("tables are loaded, and looked up, and still not there: {range}");
}

async fn read(image: &dyn Image, range: GuestRange, mapping: Mapping) {
    let once = async || {
        let into = Iov::zeroed(range.len() as usize);
        match mapping {
            Mapping::Packed => {
                if let Err(error) = image.unpack(range, into.clone()).await {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    return None;
                }
            }
            _ => image.store().read(mapping.stored()?, into.clone()).await.expect("memory is read"),
        }
        Some(into.to_vec())
    };
    assert_eq!(once().await, once().await);
}
