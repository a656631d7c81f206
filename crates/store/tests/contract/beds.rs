//! The stores under test, each with the executor it needs.

use ring::sim::Sim;
use ring::{Config, Ring};
use std::path::Path;
use std::rc::Rc;
use store::fault::FaultStore;
use store::file::{FileStore, OpenOptions};
use store::memory::MemoryStore;
use store::trace::{Trace, TraceStore};
use store::{ErrorKind, Store};
use tempfile::TempDir;

/// Runs `test` on a ring.
pub(crate) fn on_ring<T>(test: impl Future<Output = T>) -> T {
    Ring::new(Config::default()).expect("a ring").block_on(test)
}

/// A new file in `folder`, through the page cache or past it; `None` (and a word) where the file system refuses that.
pub(crate) async fn new_file(folder: &Path, direct: bool) -> Option<Rc<FileStore>> {
    let options = OpenOptions { direct, ..OpenOptions::default() };
    match FileStore::create(&folder.join("image"), options).await {
        Ok(store) => Some(store),
        Err(error) if direct && error.kind() == ErrorKind::Unsupported => {
            eprintln!("skipped past the page cache: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs `test` on an empty store of every kind; under the simulation with several seeds.
pub(crate) fn on_every_store(test: impl AsyncFn(Rc<dyn Store>)) {
    on_every_store_with(8, test);
}

/// [`on_every_store`] with as many seeds.
pub(crate) fn on_every_store_with(seeds: u64, test: impl AsyncFn(Rc<dyn Store>)) {
    for seed in 0..seeds {
        let sim = Sim::new(seed);
        sim.block_on(test(MemoryStore::new("memory", 0)));
        sim.block_on(test(FaultStore::new(MemoryStore::new("fault", 0), seed)));
        sim.block_on(async {
            let store = FaultStore::new(MemoryStore::new("volatile", 0), seed);
            store.make_volatile(512).await.unwrap();
            test(store).await;
        });
        sim.block_on(test(TraceStore::new(MemoryStore::new("trace", 0), Trace::keeping(16))));
    }
    let folder = TempDir::new().unwrap();
    on_ring(async {
        for direct in [false, true] {
            for wrapped in [false, true] {
                let Some(file) = new_file(folder.path(), direct).await else { continue };
                let closing = Rc::clone(&file);
                if wrapped {
                    test(TraceStore::new(FaultStore::new(file, 1), Trace::off())).await;
                } else {
                    test(file).await;
                }
                closing.close().await.unwrap();
            }
        }
    });
}
