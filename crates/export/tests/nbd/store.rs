//! The client that is a store, against the server: what one side writes the other has; and what a lost connection means.

use crate::fixture::{Fixture, disk, export, on_ring, pattern};
use headwater_export::nbd::{Address, NbdServer};
use layout::HostOffset;
use ring::Iov;
use std::path::Path;
use std::rc::Rc;
use store::memory::MemoryStore;
use store::nbd::{NbdStore, Target};
use store::{Backing, ErrorKind, Store, ZeroMode};

fn target(address: &Address, read_only: bool) -> Target {
    let address = match address {
        Address::Unix(path) => store::nbd::Address::Unix(path.clone()),
        Address::Tcp(host, port) => store::nbd::Address::Tcp(host.clone(), *port),
        Address::Inherited(number) => unreachable!("no test listens on descriptor {number}"),
    };
    Target { address, export: String::new(), read_only }
}

async fn bytes(store: &NbdStore, at: u64, len: usize) -> Vec<u8> {
    let into = Iov::alloc(len);
    store.read(HostOffset(at), into.clone()).await.unwrap();
    into.to_vec()
}

#[test]
fn everything_a_store_does_arrives() {
    on_ring(async {
        let fixture = Fixture::new(8 << 20).await;
        let store = NbdStore::open("far", target(fixture.address(), false)).await.unwrap();
        assert_eq!((store.size(), store.name()), (8 << 20, "far"));
        let written = pattern(5 << 20, 3);
        store.write(HostOffset(1000), Iov::from_slice(&written), false).await.unwrap();
        assert!(bytes(&store, 1000, 5 << 20).await == written);
        let flushes = fixture.store.flushes.get();
        store.flush().await.unwrap();
        assert!(fixture.store.flushes.get() > flushes);
        let zeroed = HostOffset(1 << 20).range(1 << 20);
        store.zero(zeroed, ZeroMode { unmap: true }).await.unwrap();
        assert!(bytes(&store, 1 << 20, 1 << 20).await.iter().all(|byte| *byte == 0));
        let extent = store.extent(zeroed).await.unwrap();
        assert_eq!((extent.len, extent.backing), (1 << 20, Backing::Hole));
        // Past the end are zeros, and nothing is written.
        assert!(bytes(&store, (8 << 20) - 10, 20).await.iter().all(|byte| *byte == 0));
        let past = store.write(HostOffset((8 << 20) - 10), Iov::zeroed(20), false).await.unwrap_err();
        assert_eq!(past.kind(), ErrorKind::OutOfRange);
        // Many at once, and some whose askers leave.
        let tasks: Vec<_> = (0..200_u64)
            .map(|n| {
                let store = Rc::clone(&store);
                ring::spawn(async move {
                    let write = store.write(HostOffset(n * 4096), Iov::from_slice(&pattern(4096, n)), n % 7 == 0);
                    if n % 5 == 0 {
                        let _ = ring::timeout(std::time::Duration::from_micros(n), write).await;
                    } else {
                        write.await.unwrap();
                    }
                    store.write(HostOffset(n * 4096), Iov::from_slice(&pattern(4096, n + 1000)), false).await.unwrap();
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        for n in 0..200 {
            assert!(bytes(&store, n * 4096, 4096).await == pattern(4096, n + 1000), "write {n}");
        }
        store.close().await.unwrap();
        assert!(store.read(HostOffset(0), Iov::alloc(1)).await.is_err());
        fixture.server.stop().await;
    });
}

async fn serve(path: &Path, memory: &Rc<MemoryStore>) -> NbdServer {
    let disk = disk("d", memory.clone()).await;
    NbdServer::start(Address::Unix(path.to_owned()), vec![export("d", &disk, false)]).await.unwrap()
}

#[test]
fn a_server_that_comes_back_is_read_again() {
    on_ring(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let memory = MemoryStore::from_bytes("m", &pattern(1 << 20, 1));
        let server = serve(&path, &memory).await;
        let store = NbdStore::open("far", target(server.address(), true)).await.unwrap();
        assert!(bytes(&store, 0, 4096).await == pattern(1 << 20, 1)[..4096]);
        server.stop().await;
        let away = store.read(HostOffset(0), Iov::alloc(4096)).await.unwrap_err();
        assert_eq!(away.kind(), ErrorKind::Unavailable, "{away}");
        let server = serve(&path, &memory).await;
        assert!(bytes(&store, 4096, 4096).await == pattern(1 << 20, 1)[4096..8192]);
        store.close().await.unwrap();
        server.stop().await;
    });
}

#[test]
fn what_was_written_and_not_flushed_is_never_called_durable_after_a_break() {
    on_ring(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let memory = MemoryStore::from_bytes("m", &pattern(1 << 20, 1));
        for flushed in [true, false] {
            let server = serve(&path, &memory).await;
            let store = NbdStore::open("far", target(server.address(), false)).await.unwrap();
            store.write(HostOffset(0), Iov::from_slice(&[7; 512]), false).await.unwrap();
            if flushed {
                store.flush().await.unwrap();
            }
            server.stop().await;
            let server = serve(&path, &memory).await;
            let flush = store.flush().await;
            let write = store.write(HostOffset(512), Iov::from_slice(&[8; 512]), false).await;
            if flushed {
                flush.unwrap();
                write.unwrap();
            } else {
                assert_eq!(flush.unwrap_err().kind(), ErrorKind::Poisoned);
                assert_eq!(write.unwrap_err().kind(), ErrorKind::Poisoned);
            }
            // It is read all the same.
            assert!(bytes(&store, 4096, 4096).await == pattern(1 << 20, 1)[4096..8192]);
            store.close().await.unwrap();
            server.stop().await;
        }
    });
}
