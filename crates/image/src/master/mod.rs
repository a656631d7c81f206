//! What formats that are read and never written have in common: those that masters come in.
//!
//! Such a format says how one piece of the disk is mapped, and how a packed piece is unpacked ([`Master`]). The rest of what an
//! [`Image`] does is the same for all of them: joining pieces, keeping what was unpacked last, refusing writes.
//!
//! **Invariants.**
//! * A look-up joins a bounded number of pieces: it holds the shard meanwhile.
//! * Memory is bounded whatever the headers say: tables come in sheets ([`sheets`]), a few unpacked pieces are kept, so many bytes
//!   are being unpacked at once, and a piece is unpacked once however many wait for it.

pub(crate) mod bits;
pub(crate) mod sheets;

use crate::kept::Kept;
use crate::{
    BackingRef, CheckReport, Error, ErrorKind, Format, Image, ImageFuture, ImageInfo, Mapped, Mapping, OpenOptions,
    Purpose, Repair, Reservation, Result,
};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use ring::sync::{Event, Semaphore};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use store::Store;

/// Pieces that one look-up joins at most.
const LOOKUP_STEPS: usize = 1024;

/// What is being unpacked at once, in KiB: what comes of it, that is.
const UNPACKING_KIB: usize = 64 << 10;

/// How much of a table one read brings.
const READ_BYTES: u64 = 1 << 20;

/// What a format that is only read says of an open image.
pub(crate) trait Master: 'static {
    /// Which format.
    fn format(&self) -> Format;

    /// Where its bytes are.
    fn store(&self) -> &Rc<dyn Store>;

    /// The size the guest sees, in bytes.
    fn size(&self) -> u64;

    /// The unit in which it maps, in bytes (a power of two); 1 where it has none.
    fn unit(&self) -> u64;

    /// What lies below, if anything.
    fn backing(&self) -> Option<BackingRef> {
        None
    }

    /// See [`Image::identity`].
    fn identity(&self) -> Option<String> {
        None
    }

    /// See [`Image::backing_identity`].
    fn backing_identity(&self) -> Option<String> {
        None
    }

    /// See [`Image::lies_plainly`].
    fn lies_plainly(&self) -> bool {
        false
    }

    /// What `info` shows.
    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: Some(self.unit()), ..ImageInfo::default() }
    }

    /// How the disk is mapped at `at` (which lies on it), and how far one entry of its tables says so; `None` when they must be
    /// loaded first.
    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>>;

    /// Brings what `piece` needs for `at` into memory.
    fn load(&self, at: GuestOffset) -> ImageFuture<'_, ()>;

    /// The bounds of the packed piece that holds `at`.
    fn packed(&self, at: GuestOffset) -> GuestRange {
        at.range(1)
    }

    /// Unpacks a whole piece ([`Master::packed`]): exactly so many bytes.
    fn unpack(&self, piece: GuestRange) -> ImageFuture<'_, Vec<u8>> {
        let what = format!("the format packs nothing ({piece})");
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async { Err(error) })
    }
}

/// Refuses to open for writing.
pub(crate) fn only_read(store: &dyn Store, format: Format, options: OpenOptions) -> Result<()> {
    if options.read_only {
        return Ok(());
    }
    let what = format!(
        "{format} images are read, not written: open it read-only, put an overlay over it ('headwater create -f qcow2 -b \
         IMAGE -F {format} OVERLAY'), or convert it ('headwater img convert -O qcow2')"
    );
    Err(Error::new(ErrorKind::ReadOnly, store.name(), None, what))
}

/// A header's error as a user sees it.
pub(crate) fn damaged(image: &str, error: &layout::field::Error) -> Error {
    let kind = match error.kind() {
        layout::field::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Corrupt,
    };
    Error::new(kind, image, Some(error.offset()), format!("the image cannot be opened: {error}"))
}

/// Reads `range`, whose length the caller has bounded.
pub(crate) async fn read(store: &dyn Store, range: HostRange) -> Result<Vec<u8>> {
    let bytes = Iov::alloc(range.len() as usize);
    store.read(range.start(), bytes.clone()).await?;
    Ok(bytes.to_vec())
}

/// Reads a table (`what`) that is held in memory as a whole: of `most` bytes at most, and within the file.
pub(crate) async fn read_table(store: &dyn Store, table: HostRange, most: u64, what: &str) -> Result<Vec<u8>> {
    within(store, table, what)?;
    if table.len() > most {
        let what = format!("{what} has {} bytes; at most {most} are held in memory", table.len());
        return Err(Error::new(ErrorKind::Unsupported, store.name(), Some(table.start()), what));
    }
    let mut bytes = Vec::with_capacity(table.len() as usize);
    let mut rest = table;
    while !rest.is_empty() {
        let part = rest.first(READ_BYTES);
        bytes.extend(read(store, part).await?);
        rest = rest.skip(part.len());
    }
    Ok(bytes)
}

/// Checks that a table (`what`) lies within the file.
pub(crate) fn within(store: &dyn Store, table: HostRange, what: &str) -> Result<()> {
    if table.end().get() <= store.size() {
        return Ok(());
    }
    let what = format!("{what} reaches past the end of the file");
    Err(Error::new(ErrorKind::Corrupt, store.name(), Some(table.start()), what))
}

/// An open image of such a format.
pub(crate) struct MasterImage<M> {
    master: M,
    kept: RefCell<Kept>,
    /// Packed pieces being unpacked, by their starts; the event tells when one is there or has failed.
    under_way: RefCell<HashMap<GuestOffset, Event>>,
    unpacking: Semaphore,
}

/// Makes the image of what a format has opened.
pub(crate) fn image(master: impl Master) -> Rc<dyn Image> {
    let unpacking = Semaphore::new(UNPACKING_KIB);
    Rc::new(MasterImage { master, kept: RefCell::default(), under_way: RefCell::default(), unpacking })
}

/// Whoever unpacks a piece; when this is dropped, those who wait look for themselves.
struct UnderWay<'a> {
    all: &'a RefCell<HashMap<GuestOffset, Event>>,
    start: GuestOffset,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let event = self.all.borrow_mut().remove(&self.start);
        if let Some(event) = event {
            event.notify_all();
        }
    }
}

impl<M: Master> MasterImage<M> {
    fn error(&self, kind: ErrorKind, what: impl Into<String>) -> Error {
        Error::new(kind, self.master.store().name(), None, what)
    }

    fn refused<T: 'static>(&self) -> ImageFuture<'_, T> {
        let what = format!("{} images are read, not written", self.master.format());
        let error = self.error(ErrorKind::ReadOnly, what);
        Box::pin(async { Err(error) })
    }

    fn check_range(&self, range: GuestRange) -> Result<()> {
        if range.is_empty() || range.end().get() > self.master.size() {
            let what = format!("the range {range} does not lie within the disk's {} bytes", self.master.size());
            return Err(self.error(ErrorKind::InvalidArgument, what));
        }
        Ok(())
    }

    async fn unpack_range(&self, range: GuestRange, into: &Iov) -> Result<()> {
        self.check_range(range)?;
        let mut rest = range;
        while !rest.is_empty() {
            let whole = self.master.packed(rest.start());
            let bytes = self.unpacked(whole).await?;
            let part = rest.intersect(whole);
            let inside = (part.start() - whole.start()) as usize;
            into.write((part.start() - range.start()) as usize, &bytes[inside..inside + part.len() as usize]);
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// A whole packed piece.
    async fn unpacked(&self, whole: GuestRange) -> Result<Rc<[u8]>> {
        loop {
            if let Some(kept) = self.kept.borrow().get(whole.start()) {
                return Ok(kept);
            }
            let other = self.under_way.borrow().get(&whole.start()).map(Event::wait);
            match other {
                Some(other) => other.await,
                None => break,
            }
        }
        self.under_way.borrow_mut().insert(whole.start(), Event::new());
        let _under_way = UnderWay { all: &self.under_way, start: whole.start() };
        let _permit = self.unpacking.acquire((whole.len() >> 10) as usize + 1).await;
        let bytes: Rc<[u8]> = self.master.unpack(whole).await?.into();
        if bytes.len() as u64 != whole.len() || bytes.is_empty() {
            let what = format!("the packed piece {whole} has {} bytes", bytes.len());
            return Err(self.error(ErrorKind::Corrupt, what));
        }
        self.kept.borrow_mut().put(whole.start(), Rc::clone(&bytes));
        Ok(bytes)
    }
}

/// Whether `next`, which begins `len` bytes behind the start of `first`, is alike.
fn goes_on_with(first: Mapping, len: u64, next: Mapping) -> bool {
    match (first, next) {
        (Mapping::Data(at), Mapping::Data(next)) => at.checked_add(len) == Some(next),
        (Mapping::Data(_), _) => false,
        _ => first == next,
    }
}

impl<M: Master> Image for MasterImage<M> {
    fn format(&self) -> Format {
        self.master.format()
    }

    fn store(&self) -> &Rc<dyn Store> {
        self.master.store()
    }

    fn size(&self) -> u64 {
        self.master.size()
    }

    fn cluster_size(&self) -> u64 {
        self.master.unit()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn backing(&self) -> Option<BackingRef> {
        self.master.backing()
    }

    fn identity(&self) -> Option<String> {
        self.master.identity()
    }

    fn backing_identity(&self) -> Option<String> {
        self.master.backing_identity()
    }

    fn lies_plainly(&self) -> bool {
        self.master.lies_plainly()
    }

    fn info(&self) -> ImageInfo {
        self.master.info()
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        self.check_range(range)?;
        let Some(mut run) = self.master.piece(range.start())? else { return Ok(None) };
        for _ in 0..LOOKUP_STEPS {
            if run.len >= range.len() {
                break;
            }
            // What cannot be told now, or is damaged, is for a later look-up.
            match self.master.piece(range.start() + run.len) {
                Ok(Some(next)) if goes_on_with(run.mapping, run.len, next.mapping) => run.len += next.len,
                _ => break,
            }
        }
        run.len = run.len.min(range.len());
        Ok(Some(run))
    }

    fn unpack(&self, range: GuestRange, into: Iov) -> ImageFuture<'_, ()> {
        Box::pin(async move { self.unpack_range(range, &into).await })
    }

    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.check_range(range)?;
            self.master.load(range.start()).await
        })
    }

    fn reserve(&self, _: GuestRange, _: Purpose) -> ImageFuture<'_, Reservation> {
        self.refused()
    }

    fn write_zeroes(&self, _: GuestRange, _: bool, _: bool) -> ImageFuture<'_, ()> {
        self.refused()
    }

    fn is_dirty(&self) -> bool {
        false
    }

    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn settle(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn resize(&self, _: u64) -> ImageFuture<'_, ()> {
        self.refused()
    }

    fn set_backing(&self, _: Option<BackingRef>) -> ImageFuture<'_, ()> {
        self.refused()
    }

    fn check(&self, _: Repair) -> ImageFuture<'_, CheckReport> {
        let error = self.error(ErrorKind::Unsupported, format!("{} images are not checked here", self.master.format()));
        Box::pin(async { Err(error) })
    }

    fn poisoned(&self) -> Option<Error> {
        None
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(self.master.store().close().await?) })
    }
}

/// An error that says that what the tables say lies at `host` lies past the end of the file `name`.
pub(crate) fn past_the_end(name: &str, host: HostOffset, what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, name, Some(host), format!("{what} lies past the end of the file"))
}
