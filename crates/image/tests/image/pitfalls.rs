//! Bugs that other format engines have shipped, where no other suite here would have caught them (docs/pitfalls.md).

use crate::guest::Guest;
use crate::subject::subjects;
use image::{Keep, Purpose};
use layout::{GuestOffset, GuestRange, HostRange};
use ring::sim::Sim;
use store::Operation;
use store::memory::MemoryStore;
use store::trace::{Moment, Trace, TraceStore};

/// A first-level table that just fits, or just does not, must not reach over what lies next to it: at creation, and when
/// the disk grows over the boundary.
#[test]
fn an_image_works_at_every_size_boundary() {
    for subject in subjects() {
        let cluster = subject.cluster_size.unwrap_or(65536);
        let entries = subject.entries();
        let table = cluster * entries;
        let most = (table * entries).min(64 << 40);
        let sizes =
            [512, cluster - 512, cluster, cluster + 512, table - 512, table, table + 512, 8 * table, most / 2, most];
        for size in sizes.into_iter().filter(|size| (512..=most).contains(size)) {
            Sim::new(1).block_on(async {
                let memory = MemoryStore::new("test.img", 0);
                subject.create(memory.clone(), size, None).await;
                subject.assert_clean(memory.clone()).await;
                let guest = Guest::new(subject.open(memory.clone()).await.unwrap(), &[]);
                for at in [0, size / 2 / 512 * 512, size - 512] {
                    guest.write(at, &[7; 512]).await.unwrap();
                }
                let mut grown = size;
                if size < most {
                    grown = (size + table).min(most);
                    guest.image.resize(grown).await.unwrap();
                    guest.write(grown - 512, &[8; 512]).await.unwrap();
                }
                guest.image.close().await.unwrap();
                subject.assert_clean(memory.clone()).await;
                let guest = Guest::new(subject.open(memory).await.unwrap(), &[]);
                for at in [0, size / 2 / 512 * 512, size - 512] {
                    assert_eq!(guest.read(at, 512).await.unwrap(), [7; 512], "{} of {size} at {at}", subject.name);
                }
                if grown > size {
                    assert_eq!(guest.read(grown - 512, 512).await.unwrap(), [8; 512]);
                }
                guest.image.close().await.unwrap();
            });
        }
    }
}

/// No write of the guest's ever meets a place that the image writes tables or its header to, however the two alternate.
#[test]
fn guest_data_leaves_header_and_tables_alone() {
    for subject in subjects() {
        for seed in 0..4 {
            Sim::new(seed).block_on(async {
                let memory = MemoryStore::new("test.img", 0);
                subject.create(memory.clone(), 64 << 20, None).await;
                let trace = Trace::keeping(1 << 16);
                let image = subject.open(TraceStore::new(memory, trace.clone())).await.unwrap();
                let cluster = image.cluster_size();
                let mut data: Vec<HostRange> = Vec::new();
                for n in 0..120_u64 {
                    let at = GuestOffset((n * 7919 * (seed + 1) * cluster) % (64 << 20) / cluster * cluster);
                    let reservation = image.reserve(GuestRange::new(at, cluster), Purpose::Data).await.unwrap();
                    let host = reservation.host().unwrap();
                    // Some are given up.
                    if n % 5 != 0 && reservation.link(Keep::Unallocated, |_| false).linked > 0 {
                        data.push(host.range(cluster));
                    }
                    if n % 7 == 0 {
                        image.commit().await.unwrap();
                    }
                }
                image.commit().await.unwrap();
                // Nobody wrote data here: every write is the image's own, to its header and its tables.
                let began = trace.records().into_iter().filter(|r| r.moment == Moment::Started);
                let own: Vec<_> = began.filter(|r| r.operation == Operation::Write).filter_map(|r| r.range).collect();
                assert!(own.len() > 5);
                assert!(data.len() > 50);
                for range in own {
                    let met = data.iter().find(|data| data.overlaps(range));
                    assert_eq!(met, None, "{}: the image wrote {range}", subject.name);
                }
                image.close().await.unwrap();
            });
        }
    }
}
