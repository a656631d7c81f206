//! Disks in memory behind a server on a ring, and a store that can be told to wait and to fail.

use disk::{Disk, DiskOptions, Layer};
use headwater_export::nbd::{Address, NbdExport, NbdServer};
use image::{Format, OpenOptions};
use layout::{HostOffset, HostRange};
use ring::sync::Event;
use ring::{Config, Iov, Ring};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;
use store::memory::MemoryStore;
use store::{HostExtent, IoFuture, Limits, Store, ZeroMode};
use tempfile::TempDir;

/// No test waits longer than this for anything: a hang is a failure, not a blocked run.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Runs a test on a ring of its own.
pub(crate) fn on_ring<F: Future>(test: F) -> F::Output {
    let ring = Ring::new(Config::default()).unwrap();
    ring.block_on(async { ring::timeout(PATIENCE, test).await.expect("the test hangs") })
}

/// A server with one disk, on a unix socket in a folder of its own.
pub(crate) struct Fixture {
    pub(crate) server: NbdServer,
    pub(crate) store: Rc<Reluctant>,
    pub(crate) disk: Rc<Disk>,
    _folder: TempDir,
}

impl Fixture {
    /// Over `size` zero bytes.
    pub(crate) async fn new(size: u64) -> Self {
        Self::with(MemoryStore::new("memory", size), false).await
    }

    /// Over `bytes`.
    pub(crate) async fn holding(bytes: &[u8]) -> Self {
        Self::with(MemoryStore::from_bytes("memory", bytes), false).await
    }

    pub(crate) async fn with(store: Rc<MemoryStore>, read_only: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Reluctant::new(store);
        let disk = disk("disk", Rc::clone(&store) as Rc<dyn Store>).await;
        let export = export("disk", &disk, read_only);
        let address = Address::Unix(folder.path().join("nbd.sock"));
        let server = NbdServer::start(address, vec![export]).await.unwrap();
        Self { server, store, disk, _folder: folder }
    }

    pub(crate) fn address(&self) -> &Address {
        self.server.address()
    }

    /// What a URI-speaking peer calls the export.
    pub(crate) fn uri(&self) -> String {
        let Address::Unix(path) = self.address() else { panic!("fixtures are on unix sockets") };
        format!("nbd+unix:///disk?socket={}", path.display())
    }

    /// All bytes of the disk.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.store.inner.to_vec()
    }
}

/// A raw disk over `store`.
pub(crate) async fn disk(name: &str, store: Rc<dyn Store>) -> Rc<Disk> {
    let image = image::open(store, Format::Raw, OpenOptions::default()).await.unwrap();
    let layer = Layer::new("top", name, image);
    Disk::new(name, vec![layer], DiskOptions::default())
}

pub(crate) fn export(name: &str, disk: &Rc<Disk>, read_only: bool) -> NbdExport {
    NbdExport {
        name: name.into(),
        description: Some(format!("the {name}")),
        disk: Rc::clone(disk),
        read_only,
        write_through: false,
    }
}

/// Bytes that differ everywhere, and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A store in memory whose reads wait while held, and whose operations fail when told to.
pub(crate) struct Reluctant {
    pub(crate) inner: Rc<MemoryStore>,
    held: Cell<bool>,
    released: Event,
    /// Reads that wait now.
    pub(crate) waiting: Cell<usize>,
    /// The most reads that ever waited at once.
    pub(crate) most_waiting: Cell<usize>,
    failure: RefCell<Option<i32>>,
    pub(crate) flushes: Cell<usize>,
    pub(crate) durable_writes: Cell<usize>,
}

impl Reluctant {
    fn new(inner: Rc<MemoryStore>) -> Rc<Self> {
        Rc::new(Self {
            inner,
            held: Cell::new(false),
            released: Event::new(),
            waiting: Cell::new(0),
            most_waiting: Cell::new(0),
            failure: RefCell::new(None),
            flushes: Cell::new(0),
            durable_writes: Cell::new(0),
        })
    }

    /// From now on reads wait.
    pub(crate) fn hold(&self) {
        self.held.set(true);
    }

    /// Lets every read go on.
    pub(crate) fn release(&self) {
        self.held.set(false);
        self.released.notify_all();
    }

    /// From now on operations fail with this error number, or with `None` no more.
    pub(crate) fn fail(&self, errno: Option<i32>) {
        *self.failure.borrow_mut() = errno;
    }

    /// Waits until `count` reads wait.
    pub(crate) async fn until_waiting(&self, count: usize) {
        while self.waiting.get() < count {
            ring::sleep(Duration::from_millis(1)).await;
        }
    }

    fn check(&self, operation: store::Operation) -> store::Result<()> {
        match *self.failure.borrow() {
            None => Ok(()),
            Some(errno) => {
                let source = std::io::Error::from_raw_os_error(errno);
                Err(store::Error::from_io(operation, "memory", None, source))
            }
        }
    }
}

impl Store for Reluctant {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.waiting.set(self.waiting.get() + 1);
            self.most_waiting.set(self.most_waiting.get().max(self.waiting.get()));
            while self.held.get() {
                self.released.wait().await;
            }
            self.waiting.set(self.waiting.get() - 1);
            self.check(store::Operation::Read)?;
            self.inner.read(at, into).await
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check(store::Operation::Write)?;
            self.durable_writes.set(self.durable_writes.get() + usize::from(fua));
            self.inner.write(at, from, fua).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check(store::Operation::Flush)?;
            self.flushes.set(self.flushes.get() + 1);
            self.inner.flush().await
        })
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check(store::Operation::Zero)?;
            self.inner.zero(range, mode).await
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.inner.set_size(size)
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.inner.allocate(range)
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        self.inner.extent(range)
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}
