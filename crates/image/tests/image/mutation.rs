//! Damaged images, and what must be true of them: the body of the fuzz targets in `fuzz/`, and a deterministic smoke test of the
//! same here.
//!
//! The oracle is a second, naive reading of the specification ([`Naive`]). It knows for every damaged image what a check must
//! count, and for every cluster of the guest what a repair must leave there.

use crate::guest::Guest;
use image::{CheckReport, Format, Image, Mapping, OpenOptions, Repair};
use layout::qed::{HEADER_BYTES, Header};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::collections::HashSet;
use std::rc::Rc;
use store::memory::MemoryStore;

/// How much of the guest's disk is looked at.
const LOOKED_AT: u64 = 6 << 20;

/// Size of the images that are damaged: two and a half tables of the smallest geometry.
const SIZE: u64 = 5 << 20;

// ---------------------------------------------------------------------------------------------------------------------
// Making damage

/// The sound images that damage starts from.
fn bases() -> Vec<Vec<u8>> {
    Sim::new(1).block_on(async {
        let mut bases = Vec::new();
        for kind in 0..3u64 {
            let store = MemoryStore::new("base.qed", 0);
            let options = image::create::CreateOptions {
                format: Format::Qed,
                size: SIZE,
                backing: (kind == 2).then(|| image::BackingRef { name: "b.img".into(), format: None }),
                cluster_size: Some(4096),
                table_size: Some(1 + u32::from(kind == 1)),
                qcow2: image::qcow2::Options::default(),
                passphrase: None,
                iteration_time: None,
            };
            image::create::create(store.clone(), &options).await.unwrap();
            let guest = Guest::new(image::open(store.clone(), Format::Qed, OpenOptions::default()).await.unwrap(), &[]);
            for n in 0..10u64 {
                let at = (n * n * 31 + kind) * 16384 % (SIZE - 10_000);
                guest.write(at, &vec![0x10 * (kind as u8 + 1) + n as u8; 5000]).await.unwrap();
            }
            guest.image.write_zeroes(GuestRange::new(GuestOffset(2 << 20), 65536), true, true).await.unwrap();
            if kind == 2 {
                guest.image.commit().await.unwrap();
                // As a kill leaves it: need-check set, a reserved tail.
                bases.push(store.to_vec());
                continue;
            }
            guest.image.close().await.unwrap();
            bases.push(store.to_vec());
        }
        bases
    })
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// What an input makes of a base: seven bytes a change.
fn damaged(input: &[u8]) -> Vec<u8> {
    thread_local!(static BASES: Vec<Vec<u8>> = bases());
    if input.starts_with(b"QED\0") {
        return input.to_vec();
    }
    let (selector, changes) = input.split_first().unwrap_or((&0, &[]));
    let mut bytes = BASES.with(|bases| bases[*selector as usize % bases.len()].clone());
    let sound = bytes.clone();
    for change in changes.chunks_exact(7).take(64) {
        let index = usize::from(u16::from_le_bytes([change[1], change[2]]));
        let operand = u64::from(u16::from_le_bytes([change[4], change[5]]));
        let value = match change[3] % 9 {
            0 => operand,
            1 => (operand % 64) * 4096,
            2 => operand * 4096 + 1,
            3 => u64::MAX - operand,
            4 => operand << 48,
            5 => 1,
            6 => 0,
            7 => number(&sound, 4096 + (operand as usize % 4) * 8),
            _ => operand << 32,
        };
        let l1 = number(&sound, 40) as usize;
        match change[0] % 10 {
            0 => put(&mut bytes, index % HEADER_BYTES, &change[4..5]),
            1 => put(&mut bytes, 16 + index % 6 * 8, &value.to_le_bytes()),
            2 => put(&mut bytes, 4 + index % 3 * 4, &(value as u32).to_le_bytes()),
            3 => put(&mut bytes, l1 + index % 512 * 8, &value.to_le_bytes()),
            4 => put(&mut bytes, l1 + index % 4 * 8, &value.to_le_bytes()),
            5 | 6 => {
                let table = number(&sound, l1 + change[6] as usize % 3 * 8) as usize;
                put(&mut bytes, table + index % 512 * 8, &value.to_le_bytes());
            }
            7 => bytes.truncate(operand as usize * 64),
            8 => bytes.resize((bytes.len() + index % 40_000).min(1 << 20), change[6]),
            _ => {
                let at = index * 8 % bytes.len().max(1);
                put(&mut bytes, at, &value.to_le_bytes());
            }
        }
    }
    bytes
}

// ---------------------------------------------------------------------------------------------------------------------
// The oracle

/// What the specification says of an image's tables, worked out the simple way.
#[derive(Debug, Default)]
struct Naive {
    corruptions: u64,
    shared_data: u64,
    leaks: u64,
    allocated: u64,
    fragmented: u64,
    cluster: u64,
    reach: u64,
    /// L1 indices whose entry a repair must clear.
    lost_tables: HashSet<u64>,
    /// Guest clusters whose entry a repair must clear.
    lost_clusters: HashSet<u64>,
    /// Clusters of the file that are part of an L2 table.
    in_tables: HashSet<u64>,
    l1_follows_header: bool,
}

impl Naive {
    /// Of an image with a good header.
    fn of(bytes: &[u8]) -> Self {
        let word = |at: usize| u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
        let (cluster, table, header) = (word(4), word(8), word(12));
        let l1 = number(bytes, 40);
        let entries = cluster * table / 8;
        let clusters = bytes.len() as u64 / cluster;
        let mut it =
            Self { cluster, reach: entries * cluster, l1_follows_header: l1 == header * cluster, ..Self::default() };
        let good = |raw: u64, len: u64| {
            raw.is_multiple_of(cluster)
                && raw >= header * cluster
                && raw.checked_add(len * cluster).is_some_and(|end| end <= clusters * cluster)
        };
        let mut used: HashSet<u64> = (l1 / cluster..l1 / cluster + table).collect();
        let mut tables = Vec::new();
        for index in 0..entries {
            let raw = number(bytes, (l1 + index * 8) as usize);
            if raw == 0 {
                continue;
            }
            let mine: Vec<u64> = (raw / cluster..(raw / cluster).saturating_add(table)).collect();
            let overlap = mine.iter().filter(|c| used.contains(c)).count() as u64;
            if !good(raw, table) {
                it.corruptions += 1;
                it.lost_tables.insert(index);
            } else if overlap > 0 {
                it.corruptions += overlap;
                it.lost_tables.insert(index);
            } else {
                used.extend(&mine);
                it.in_tables.extend(mine);
                tables.push((index, raw));
            }
        }
        for (index, at) in tables {
            let mut last = 0u64;
            for entry in 0..entries {
                let raw = number(bytes, (at + entry * 8) as usize);
                if raw <= 1 {
                    continue;
                }
                if !good(raw, 1) || (raw >= l1 && raw < l1 + table * cluster) {
                    it.corruptions += 1;
                    it.lost_clusters.insert(index * entries + entry);
                } else if !used.insert(raw / cluster) {
                    it.corruptions += 1;
                    it.shared_data += 1;
                }
                it.allocated += 1;
                it.fragmented += u64::from(last != 0 && last.checked_add(cluster) != Some(raw));
                last = raw;
            }
        }
        it.leaks = clusters.saturating_sub(header + used.len() as u64);
        it
    }

    fn is_lost(&self, at: u64) -> bool {
        self.lost_tables.contains(&(at / self.reach)) || self.lost_clusters.contains(&(at / self.cluster))
    }
}

/// What a guest sees of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Damaged,
    Unallocated,
    Zero,
    Data { at: u64, bytes: Vec<u8> },
}

async fn look(image: &Rc<dyn Image>) -> Vec<Seen> {
    let end = image.size().min(LOOKED_AT);
    let mut seen = Vec::new();
    for at in (0..end).step_by(image.cluster_size() as usize) {
        let range = GuestRange::new(GuestOffset(at), 512.min(image.size() - at));
        let guest = Guest::new(image.clone(), &[]);
        seen.push(match guest.mapping(range).await {
            Err(error) => {
                assert_eq!(error.kind(), image::ErrorKind::Corrupt, "{error}");
                Seen::Damaged
            }
            Ok(mapped) => match mapped.mapping {
                Mapping::Packed | Mapping::Shared(_) => panic!("QED packs and shares nothing"),
                Mapping::Unallocated => Seen::Unallocated,
                Mapping::Zero => Seen::Zero,
                Mapping::Data(host) => Seen::Data { at: host.get(), bytes: guest.read(at, range.len()).await.unwrap() },
            },
        });
    }
    seen
}

async fn check(store: Rc<MemoryStore>, repair: Repair) -> CheckReport {
    let options = OpenOptions { read_only: repair == Repair::None, for_check: true };
    let image = image::open(store, Format::Qed, options).await.expect("opened before");
    let report = image.check(repair).await.unwrap();
    image.close().await.unwrap();
    report
}

/// Everything a damaged image must stand.
pub(crate) fn image_stands(input: &[u8]) {
    let bytes = damaged(input);
    Sim::new(9).block_on(async {
        let store = MemoryStore::from_bytes("damaged.qed", &bytes);
        let options = OpenOptions { read_only: true, for_check: true };
        let Ok(image) = image::open(store.read_only(), Format::Qed, options).await else {
            let normal =
                image::open(MemoryStore::from_bytes("again.qed", &bytes), Format::Qed, OpenOptions::default()).await;
            assert!(normal.is_err(), "what cannot be opened for a check cannot be opened at all");
            return;
        };
        let naive = Naive::of(&bytes);
        let before = look(&image).await;
        let found = image.check(Repair::None).await.unwrap();
        assert_eq!(
            (found.corruptions, found.leaks, found.allocated_clusters, found.fragmented_clusters, found.check_errors),
            (naive.corruptions, naive.leaks, naive.allocated, naive.fragmented, 0),
            "{found:#?}"
        );

        let repaired = MemoryStore::from_snapshot("repaired.qed", store.snapshot());
        let report = check(repaired.clone(), Repair::All).await;
        let few = naive.shared_data <= 256;
        assert!(report.corruptions == 0 || !few, "{report:#?}");
        let again = check(repaired.clone(), Repair::None).await;
        assert_eq!((again.corruptions, again.leaks), (report.corruptions, report.leaks), "{report:#?}\n{again:#?}");
        assert!(again.leaks == 0 || !few || !naive.l1_follows_header, "{again:#?}");
        let most = 2 * bytes.len() as u64 + 256 * naive.cluster + (4 << 20);
        assert!(repaired.peek().held() <= most, "{} bytes from {}", repaired.peek().held(), bytes.len());
        if report.corruptions > 0 {
            return;
        }
        let image = image::open(repaired.clone(), Format::Qed, OpenOptions::default()).await.unwrap();
        assert!(!image.info().dirty);
        let cluster = image.cluster_size();
        for (n, (before, after)) in before.iter().zip(look(&image).await).enumerate() {
            let at = n as u64 * cluster;
            match (before, after) {
                (_, Seen::Unallocated) if naive.is_lost(at) => {}
                (Seen::Data { at: host, bytes }, Seen::Data { bytes: kept, .. }) => {
                    // What is data to one entry and a table to another changes with the table.
                    assert!(*bytes == kept || naive.in_tables.contains(&(host / cluster)), "guest offset {at}");
                }
                (before, after) => assert_eq!(*before, after, "guest offset {at}, lost: {}", naive.is_lost(at)),
            }
        }
        let guest = Guest::new(image, &[]);
        let room = guest.image.size().min(LOOKED_AT);
        if room > 0 && cluster <= 65536 {
            guest.write(room / 2, &vec![0xfe; (room - room / 2).min(3 * cluster) as usize]).await.unwrap();
        }
        guest.image.close().await.unwrap();
        let end = check(repaired, Repair::None).await;
        assert!(end.corruptions == 0 && (end.leaks == 0 || !naive.l1_follows_header), "{end:#?}");
    });
}

/// Everything bytes that may be a header must stand.
pub(crate) fn header_stands(input: &[u8]) {
    if let Ok(header) = Header::decode(input) {
        assert_eq!(header.encode(), input[..HEADER_BYTES]);
        header.validate().unwrap();
        let _ = header.check_length(u64::from(u32::MAX));
        let _ = (header.l1_range().end(), header.header_bytes(), header.backing().map(|name| name.range().end()));
    }
    Sim::new(2).block_on(async {
        let store = MemoryStore::from_bytes("header.qed", input);
        for read_only in [true, false] {
            let options = OpenOptions { read_only, for_check: read_only };
            if let Ok(image) = image::open(store.clone(), Format::Qed, options).await {
                let _ = (image.size(), image.backing(), image.info());
                image.close().await.unwrap();
            }
        }
        let _ = image::probe::probe(&*store).await;
    });
}

#[cfg(test)]
mod smoke {
    use super::*;

    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn sound_images_stand() {
        for base in 0..3 {
            image_stands(&[base]);
        }
    }

    /// Inputs that once found something; `fuzz/corpus/qed_image` starts from them, too.
    #[test]
    fn inputs_that_found_something_stand() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/qed_image");
        let mut inputs = 0;
        for file in std::fs::read_dir(corpus).unwrap() {
            image_stands(&std::fs::read(file.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs >= 2);
    }

    #[test]
    fn damaged_images_stand() {
        let rounds = std::env::var("MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
        for round in 0..rounds {
            let mut state = round;
            let changes = random(&mut state) % 6 + 1;
            let mut input = vec![random(&mut state) as u8];
            for _ in 0..changes {
                input.extend(&random(&mut state).to_le_bytes()[..7]);
            }
            println!("input of round {round}: {input:?}");
            image_stands(&input);
        }
    }

    #[test]
    fn damaged_headers_stand() {
        let sound = damaged(&[2]);
        for round in 0..2000 {
            let mut state = round;
            let mut bytes = sound[..if round % 3 == 0 { 64 + round as usize % 64 } else { sound.len() }].to_vec();
            for _ in 0..=(random(&mut state) % 4) {
                let at = random(&mut state) as usize % HEADER_BYTES;
                bytes[at] = random(&mut state) as u8;
            }
            header_stands(&bytes);
        }
    }
}
