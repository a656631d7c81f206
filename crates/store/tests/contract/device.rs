//! A block device: fixed in size, zeroed in whole blocks. Needs the right to make loop devices; skipped without.

use crate::beds::on_ring;
use crate::suite::{askew, pattern, range};
use layout::HostOffset;
use ring::Iov;
use std::path::PathBuf;
use std::process::Command;
use store::file::{FileStore, OpenOptions};
use store::{ErrorKind, Store, ZeroMode};
use tempfile::NamedTempFile;

const SIZE: u64 = 1 << 20;

/// A loop device over a temporary file, until it is dropped.
struct Loop {
    path: PathBuf,
    _file: NamedTempFile,
}

impl Loop {
    fn new(block: u32) -> Option<Self> {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size"])
            .arg(block.to_string())
            .arg(file.path())
            .output();
        match made {
            Ok(output) if output.status.success() => {
                let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned());
                Some(Self { path, _file: file })
            }
            Ok(output) => {
                eprintln!("skipped: no loop device: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: no losetup: {error}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn a_block_device_is_bytes_of_a_fixed_number() {
    for (block, direct) in [(512, false), (4096, false), (4096, true), (512, true)] {
        let Some(device) = Loop::new(block) else { return };
        on_ring(async {
            let options = OpenOptions { direct, ..OpenOptions::default() };
            let store = FileStore::open(&device.path, options).await.unwrap();
            let limits = store.limits();
            assert_eq!((store.size(), limits.fixed_size, limits.sparse), (SIZE, true, false));
            assert_eq!(limits.offset_align, if direct { block } else { 1 });

            let mut model = pattern(1, SIZE as usize);
            store.write(HostOffset(0), Iov::from_slice(&model), false).await.unwrap();
            for (start, len) in [(100, 5), (4000, 10_000), (SIZE as usize - 4097, 4097), (8192, 4096), (0, 1)] {
                let bytes = pattern(start as u8, len);
                model[start..start + len].copy_from_slice(&bytes);
                store.write(HostOffset(start as u64), askew(&bytes), true).await.unwrap();
            }
            for (unmap, start, len) in
                [(false, 20_000, 30_001), (true, 70_001, 9_000), (true, 131_072, 65_536), (false, SIZE as usize - 7, 7)]
            {
                store.zero(range(start as u64, len as u64), ZeroMode { unmap }).await.unwrap();
                model[start..start + len].fill(0);
            }
            store.flush().await.unwrap();
            let into = Iov::alloc(SIZE as usize + 100);
            store.read(HostOffset(0), into.clone()).await.unwrap();
            assert!(into.slice(0..SIZE as usize).to_vec() == model, "block {block}, direct {direct}");
            assert!(into.slice(SIZE as usize..SIZE as usize + 100).is_zero());

            let past = range(SIZE - 1, 2);
            for result in [
                store.write(past.start(), Iov::zeroed(2), false).await,
                store.zero(past, ZeroMode::default()).await,
                store.allocate(past).await,
                store.set_size(SIZE + 1).await,
                store.set_size(SIZE - 1).await,
            ] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfRange);
            }
            store.set_size(SIZE).await.unwrap();
            store.allocate(range(0, SIZE)).await.unwrap();
            let extent = store.extent(range(0, SIZE * 2)).await.unwrap();
            assert!((1..=SIZE).contains(&extent.len));
            store.close().await.unwrap();
        });
    }
}
