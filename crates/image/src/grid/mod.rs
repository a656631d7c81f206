//! Images that are a grid: one table, in memory as a whole, says where each block of the disk is. VDI, VHD (`vpc`) and Parallels.
//!
//! Read, never written: they are what masters come in. One file each says how such an image is opened.
//!
//! **Invariants.** Memory is bounded by what the file holds: a table that reaches past its end is an error. A block that the table
//! puts past the end of the file is an error with its place, when it is read.

mod parallels;
mod vdi;
mod vpc;

use crate::{
    BackingRef, CheckReport, Error, ErrorKind, Format, Image, ImageFuture, ImageInfo, Mapped, Mapping, OpenOptions,
    Purpose, Repair, Reservation, Result,
};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use store::Store;

/// Blocks that one look-up joins at most: it holds the shard meanwhile.
const LOOKUP_STEPS: usize = 4096;

/// How much of a table one read brings.
const READ_BYTES: u64 = 1 << 20;

/// A disk cut into blocks.
struct Grid {
    size: u64,
    block: u64,
    /// Where each block is; `None`: it reads as zeros.
    places: Vec<Option<HostOffset>>,
}

/// An open image.
struct GridImage {
    store: Rc<dyn Store>,
    format: Format,
    grid: Grid,
}

/// Opens the image in `store`, whose format is one of these.
pub(crate) async fn open(store: Rc<dyn Store>, format: Format, options: OpenOptions) -> Result<Rc<dyn Image>> {
    if !options.read_only {
        return Err(only_read(&*store, format));
    }
    let grid = match format {
        Format::Vdi => vdi::open(&*store).await?,
        Format::Vpc => vpc::open(&*store).await?,
        _ => parallels::open(&*store).await?,
    };
    Ok(Rc::new(GridImage { store, format, grid }))
}

/// Such images are not written.
pub(crate) fn only_read(store: &dyn Store, format: Format) -> Error {
    let what = format!(
        "{format} images are read, not written: open it read-only, put an overlay over it ('headwater create -f qcow2 -b \
         IMAGE -F {format} OVERLAY'), or convert it ('headwater img convert -O qcow2')"
    );
    Error::new(ErrorKind::ReadOnly, store.name(), None, what)
}

/// A header's error as a user sees it.
pub(crate) fn damaged(store: &dyn Store, error: &layout::field::Error) -> Error {
    let kind = match error.kind() {
        layout::field::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Corrupt,
    };
    Error::new(kind, store.name(), Some(error.offset()), format!("the image cannot be opened: {error}"))
}

pub(crate) async fn read(store: &dyn Store, range: HostRange) -> Result<Vec<u8>> {
    let bytes = Iov::alloc(range.len() as usize);
    store.read(range.start(), bytes.clone()).await?;
    Ok(bytes.to_vec())
}

/// Reads a table of four-byte entries.
async fn read_places(
    store: &dyn Store,
    table: HostRange,
    place: impl Fn([u8; 4]) -> Option<HostOffset>,
) -> Result<Vec<Option<HostOffset>>> {
    if table.end().get() > store.size() {
        let what = "the table of blocks reaches past the end of the file";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(table.start()), what));
    }
    let mut places = Vec::with_capacity(table.len() as usize / 4);
    let mut rest = table;
    while !rest.is_empty() {
        let part = rest.first(READ_BYTES);
        places.extend(read(store, part).await?.as_chunks().0.iter().map(|entry| place(*entry)));
        rest = rest.skip(part.len());
    }
    Ok(places)
}

impl GridImage {
    fn refused<T: 'static>(&self) -> ImageFuture<'_, T> {
        let what = format!("{} images are read, not written", self.format);
        let error = Error::new(ErrorKind::ReadOnly, self.store.name(), None, what);
        Box::pin(async { Err(error) })
    }

    /// The block that `at` is in, and how far that goes.
    fn piece(&self, at: GuestOffset) -> Result<Mapped> {
        let Grid { block, places, .. } = &self.grid;
        let (number, inside) = (at.get() / block, at.get() % block);
        let len = block - inside;
        let mapping = match places.get(number as usize).copied().flatten() {
            None => Mapping::Zero,
            Some(host) if host.get() >= self.store.size() => {
                let what = format!("block {number} lies past the end of the file");
                return Err(Error::new(ErrorKind::Corrupt, self.store.name(), Some(host), what));
            }
            Some(host) => Mapping::Data(host + inside),
        };
        Ok(Mapped { len, mapping })
    }
}

impl Image for GridImage {
    fn format(&self) -> Format {
        self.format
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.grid.size
    }

    fn cluster_size(&self) -> u64 {
        self.grid.block
    }

    fn read_only(&self) -> bool {
        true
    }

    fn backing(&self) -> Option<BackingRef> {
        None
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: Some(self.grid.block), ..ImageInfo::default() }
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        if range.is_empty() || range.end().get() > self.grid.size {
            let what = format!("the range {range} does not lie within the disk's {} bytes", self.grid.size);
            return Err(Error::new(ErrorKind::InvalidArgument, self.store.name(), None, what));
        }
        let mut run = self.piece(range.start())?;
        for _ in 0..LOOKUP_STEPS {
            if run.len >= range.len() {
                break;
            }
            let alike = match (run.mapping, self.piece(range.start() + run.len)) {
                (Mapping::Data(at), Ok(Mapped { len, mapping: Mapping::Data(next) }))
                    if at.checked_add(run.len) == Some(next) =>
                {
                    len
                }
                (Mapping::Zero, Ok(Mapped { len, mapping: Mapping::Zero })) => len,
                _ => break,
            };
            run.len += alike;
        }
        run.len = run.len.min(range.len());
        Ok(Some(run))
    }

    fn load(&self, _: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
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
        let what = format!("{} images are not checked here", self.format);
        let error = Error::new(ErrorKind::Unsupported, self.store.name(), None, what);
        Box::pin(async { Err(error) })
    }

    fn poisoned(&self) -> Option<Error> {
        None
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(self.store.close().await?) })
    }
}
