//! The disk under test: bytes in memory behind a gate that holds requests for as long as a test wants.

use disk::{Disk, DiskOptions, Layer};
use image::{
    BackingRef, CheckReport, Format, Image, ImageFuture, ImageInfo, Mapped, Mapping, Purpose, Repair, Reservation,
};
use layout::{GuestRange, HostOffset, HostRange};
use ring::Iov;
use ring::sync::Event;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::memory::MemoryStore;
use store::{HostExtent, IoFuture, Limits, Store, ZeroMode};

/// Bytes in memory; reads and writes wait while the gate is closed.
pub(crate) struct Gated {
    bytes: Rc<MemoryStore>,
    closed: Cell<bool>,
    opened: Event,
    waiting: Cell<usize>,
    log: RefCell<Vec<String>>,
}

impl Gated {
    pub(crate) fn new(size: u64) -> Rc<Self> {
        Rc::new(Self {
            bytes: MemoryStore::new("gated", size),
            closed: Cell::new(false),
            opened: Event::new(),
            waiting: Cell::new(0),
            log: RefCell::default(),
        })
    }

    pub(crate) fn close_gate(&self) {
        self.closed.set(true);
    }

    pub(crate) fn open_gate(&self) {
        self.closed.set(false);
        self.opened.notify_all();
    }

    /// Requests that wait before the gate.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.get()
    }

    /// What has been done so far, in order; forgets it.
    pub(crate) fn take_log(&self) -> Vec<String> {
        self.log.take()
    }

    fn note(&self, what: impl Into<String>) {
        self.log.borrow_mut().push(what.into());
    }

    async fn pass(&self) {
        self.waiting.set(self.waiting.get() + 1);
        loop {
            let opened = self.opened.wait();
            if !self.closed.get() {
                break;
            }
            opened.await;
        }
        self.waiting.set(self.waiting.get() - 1);
    }
}

impl Store for Gated {
    fn name(&self) -> &str {
        self.bytes.name()
    }
    fn size(&self) -> u64 {
        self.bytes.size()
    }
    fn limits(&self) -> Limits {
        self.bytes.limits()
    }
    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        self.note(format!("read {}+{}", at.get(), into.len()));
        Box::pin(async move {
            self.pass().await;
            self.bytes.read(at, into).await
        })
    }
    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        self.note(format!("write {}+{}{}", at.get(), from.len(), if fua { " fua" } else { "" }));
        Box::pin(async move {
            self.pass().await;
            self.bytes.write(at, from, fua).await
        })
    }
    fn flush(&self) -> IoFuture<'_, ()> {
        self.note("flush");
        self.bytes.flush()
    }
    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        self.note(format!("zero {}+{}{}", range.start().get(), range.len(), if mode.unmap { " unmap" } else { "" }));
        self.bytes.zero(range, mode)
    }
    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.bytes.set_size(size)
    }
    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.bytes.allocate(range)
    }
    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        self.bytes.extent(range)
    }
    fn close(&self) -> IoFuture<'_, ()> {
        self.bytes.close()
    }
}

/// The guest's bytes as they are in the store. An export knows no format, so neither does its test.
struct Flat {
    store: Rc<dyn Store>,
    read_only: bool,
}

fn done<'a>() -> ImageFuture<'a, ()> {
    Box::pin(async { Ok(()) })
}

impl Image for Flat {
    fn format(&self) -> Format {
        Format::Raw
    }
    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }
    fn size(&self) -> u64 {
        self.store.size()
    }
    fn cluster_size(&self) -> u64 {
        1
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn backing(&self) -> Option<BackingRef> {
        None
    }
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }
    fn lookup(&self, range: GuestRange) -> image::Result<Option<Mapped>> {
        Ok(Some(Mapped { len: range.len(), mapping: Mapping::Data(HostOffset(range.start().get())) }))
    }
    fn load(&self, _: GuestRange) -> ImageFuture<'_, ()> {
        done()
    }
    fn reserve(&self, _: GuestRange, _: Purpose) -> ImageFuture<'_, Reservation> {
        unreachable!("everything is allocated")
    }
    fn write_zeroes(&self, range: GuestRange, unmap: bool, _: bool) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            let range = HostRange::new(HostOffset(range.start().get()), range.len());
            self.store.zero(range, ZeroMode { unmap }).await.map_err(Into::into)
        })
    }
    fn is_dirty(&self) -> bool {
        false
    }
    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { self.store.flush().await.map_err(Into::into) })
    }
    fn settle(&self) -> ImageFuture<'_, ()> {
        done()
    }
    fn resize(&self, size: u64) -> ImageFuture<'_, ()> {
        Box::pin(async move { self.store.set_size(size).await.map_err(Into::into) })
    }
    fn set_backing(&self, _: Option<BackingRef>) -> ImageFuture<'_, ()> {
        unreachable!("there is none")
    }
    fn check(&self, _: Repair) -> ImageFuture<'_, CheckReport> {
        unreachable!("not checked here")
    }
    fn poisoned(&self) -> Option<image::Error> {
        None
    }
    fn close(&self) -> ImageFuture<'_, ()> {
        done()
    }
}

/// A disk over `store`.
pub(crate) fn over(store: &Rc<Gated>, read_only: bool) -> Rc<Disk> {
    let image = Rc::new(Flat { store: Rc::<Gated>::clone(store), read_only });
    let layer = Layer::new("node", "flat", image);
    Disk::new("test", vec![layer], DiskOptions::default())
}
