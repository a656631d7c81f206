//! What only files do.

use crate::beds::{new_file, on_ring};
use crate::suite::{askew, pattern, range};
use layout::HostOffset;
use ring::Iov;
use std::fs;
use std::rc::Rc;
use store::file::{FileStore, Locking, OpenOptions};
use store::{Backing, ErrorKind, Store, ZeroMode};
use tempfile::TempDir;

#[test]
fn a_file_reads_what_others_wrote_and_they_read_what_it_wrote() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image");
    for direct in [false, true] {
        let bytes = pattern(5, 70_001);
        fs::write(&path, &bytes).unwrap();
        on_ring(async {
            let options = OpenOptions { direct, ..OpenOptions::default() };
            let store = match FileStore::open(&path, options).await {
                Ok(store) => store,
                Err(error) if direct && error.kind() == ErrorKind::Unsupported => return,
                Err(error) => panic!("{error}"),
            };
            assert_eq!(store.size(), 70_001);
            assert_eq!(store.name(), path.display().to_string());
            let into = Iov::alloc(80_000);
            store.read(HostOffset(0), into.clone()).await.unwrap();
            assert!(into.slice(0..70_001).to_vec() == bytes);
            assert!(into.slice(70_001..80_000).is_zero());
            store.write(HostOffset(69_990), askew(b"the tail, and a little more"), false).await.unwrap();
            store.flush().await.unwrap();
            store.close().await.unwrap();
            let error = store.read(HostOffset(0), into).await.unwrap_err();
            assert!(error.to_string().contains("closed"), "{error}");
        });
        let now = fs::read(&path).unwrap();
        assert_eq!(now.len(), 70_017, "a tail of a block is not padded");
        assert_eq!(&now[69_990..], b"the tail, and a little more");
        assert!(now[..69_990] == bytes[..69_990]);
    }
}

#[test]
fn past_the_page_cache_alignment_is_stated() {
    let folder = TempDir::new().unwrap();
    on_ring(async {
        let Some(store) = new_file(folder.path(), true).await else { return };
        let limits = store.limits();
        eprintln!("{limits:?}");
        assert!(limits.offset_align.is_power_of_two() && limits.memory_align.is_power_of_two());
        assert!(limits.sparse && !limits.fixed_size && !limits.read_only);
        let cached = new_file(TempDir::new().unwrap().path(), false).await.unwrap();
        assert_eq!((cached.limits().offset_align, cached.limits().memory_align), (1, 1));
    });
}

#[test]
fn read_only_refuses_every_change() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, b"bytes").unwrap();
    on_ring(async {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let store = FileStore::open(&path, options.clone()).await.unwrap();
        assert!(store.limits().read_only);
        for result in [
            store.write(HostOffset(0), Iov::from_slice(b"x"), false).await,
            store.zero(range(0, 1), ZeroMode::default()).await,
            store.set_size(0).await,
            store.allocate(range(0, 1)).await,
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
        }
        store.flush().await.unwrap();
        let error = FileStore::create(&path, options).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
    });
    assert_eq!(fs::read(&path).unwrap(), b"bytes");
}

#[test]
fn what_cannot_be_opened_is_named() {
    let folder = TempDir::new().unwrap();
    on_ring(async {
        let open = async |path: &std::path::Path| {
            let error = FileStore::open(path, OpenOptions::default()).await.err().expect("refused");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            error
        };
        assert_eq!(open(&folder.path().join("absent")).await.kind(), ErrorKind::NotFound);
        open(folder.path()).await;
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        assert_eq!(open(&pipe).await.kind(), ErrorKind::Unsupported, "a pipe is refused, not waited for");
        let below = folder.path().join("absent/image");
        let error = FileStore::create(&below, OpenOptions::default()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    });
}

#[test]
fn creating_empties_only_what_it_could_lock() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, b"bytes").unwrap();
    on_ring(async {
        let reader = FileStore::open(&path, OpenOptions { read_only: true, ..OpenOptions::default() }).await.unwrap();
        let error = FileStore::create(&path, OpenOptions::default()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert_eq!(fs::read(&path).unwrap(), b"bytes");
        reader.close().await.unwrap();
        let store = FileStore::create(&path, OpenOptions::default()).await.unwrap();
        assert_eq!(store.size(), 0);
    });
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn unmapping_gives_space_back_and_zeroing_without_it_keeps_it() {
    use std::os::unix::fs::MetadataExt;
    let folder = TempDir::new().unwrap();
    on_ring(async {
        let store = new_file(folder.path(), false).await.unwrap();
        let blocks = || fs::metadata(folder.path().join("image")).unwrap().blocks() * 512;
        store.write(HostOffset(0), Iov::from_slice(&pattern(1, 1 << 20)), false).await.unwrap();
        store.flush().await.unwrap();
        assert!(blocks() >= 1 << 20);
        store.zero(range(0, 1 << 19), ZeroMode { unmap: false }).await.unwrap();
        assert!(blocks() >= 1 << 20);
        store.zero(range(0, 1 << 19), ZeroMode { unmap: true }).await.unwrap();
        if blocks() >= 1 << 20 {
            eprintln!("this file system keeps holes' space");
            return;
        }
        let extent = store.extent(range(0, 1 << 20)).await.unwrap();
        assert_eq!((extent.len, extent.backing), (1 << 19, Backing::Hole));
    });
}

#[test]
fn a_closed_file_can_be_opened_again_at_once() {
    let folder = TempDir::new().unwrap();
    on_ring(async {
        for _ in 0..20 {
            let store = new_file(folder.path(), false).await.unwrap();
            let write = ring::spawn({
                let store = Rc::clone(&store);
                async move { store.write(HostOffset(0), Iov::zeroed(100_000), false).await }
            });
            // Given up, but still counted.
            let mut given_up = store.write(HostOffset(1 << 20), Iov::zeroed(100_000), false);
            let _ = futures_util::poll!(&mut given_up);
            drop(given_up);
            ring::yield_now().await;
            store.close().await.unwrap();
            write.await.unwrap();
        }
    });
}

#[test]
fn unsafe_caching_flushes_nothing_and_says_so_to_nobody() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image");
    on_ring(async {
        let options = OpenOptions { no_flush: true, locking: Locking::Off, ..OpenOptions::default() };
        let store = FileStore::create(&path, options).await.unwrap();
        store.write(HostOffset(0), Iov::from_slice(b"x"), true).await.unwrap();
        store.flush().await.unwrap();
    });
}
