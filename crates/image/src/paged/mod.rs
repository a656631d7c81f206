//! Images whose tables are read in pages: a directory says where pages are, pages say where blocks are. QCOW (version 1), VMDK and
//! VHDX. Read, never written: they are what masters come in. One file each says how such an image is opened.
//!
//! A disk is a row of segments; each is flat, zeros, or sparse with tables of its own.
//!
//! **Invariants.** Memory is bounded by what the file holds (directories) and by `PAGES` (pages). A page or block that lies past the end
//! of the file, and an entry that makes no sense, is an error with its place, when it is read; the rest of the image is served.

mod pages;
mod qcow;
mod vhdx;
mod vmdk;

use crate::packed::{Kept, Wrapping, inflate};
use crate::{
    BackingRef, CheckReport, Error, ErrorKind, Format, Image, ImageFuture, ImageInfo, Mapped, Mapping, OpenOptions,
    Purpose, Repair, Reservation, Result, Surroundings,
};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use pages::Pages;
use ring::Iov;
use std::cell::RefCell;
use std::rc::Rc;
use store::Store;

/// Blocks that one look-up joins at most: it holds the shard meanwhile.
const LOOKUP_STEPS: usize = 4096;

/// What a stream may be longer than what it holds, in bytes.
const STREAM_SLACK: u64 = 64 << 10;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Unallocated,
    Zero,
    Data(HostOffset),
    /// A deflate stream.
    Packed(HostRange),
    /// A marker, and a deflate stream behind it.
    Marked(HostOffset),
}

/// The tables of a sparse segment.
struct Sparse {
    /// Bytes of a block: a power of two.
    block: u64,
    /// Entries of a page.
    per_page: u64,
    /// Bytes of an entry: 4 or 8.
    width: usize,
    /// Most significant byte first.
    big_endian: bool,
    /// Where each page is; `None`: none of its blocks is there.
    directory: Vec<Option<HostOffset>>,
    /// Which entry is about a block.
    entry: Box<dyn Fn(u64) -> u64>,
    /// What an entry says; `None`: it makes no sense.
    place: Box<dyn Fn(u64) -> Option<Place>>,
}

/// What a part of the disk is.
enum Kind {
    Flat(HostOffset),
    Zero,
    Sparse(Sparse),
}

struct Segment {
    start: u64,
    len: u64,
    kind: Kind,
}

/// An image that was understood.
struct Paged {
    size: u64,
    segments: Vec<Segment>,
    backing: Option<BackingRef>,
    /// Unallocated blocks are what lies below; else zeros.
    store: Rc<dyn Store>,
}

/// An open image.
struct PagedImage {
    store: Rc<dyn Store>,
    format: Format,
    size: u64,
    block: u64,
    segments: Vec<Segment>,
    backing: Option<BackingRef>,
    pages: Pages,
    kept: RefCell<Kept>,
}

/// Opens the image in `store`, whose format is one of these.
pub(crate) async fn open(
    store: Rc<dyn Store>,
    format: Format,
    options: OpenOptions,
    surroundings: Surroundings<'_>,
) -> Result<Rc<dyn Image>> {
    if !options.read_only {
        return Err(crate::grid::only_read(&*store, format));
    }
    let paged = match format {
        Format::Qcow => qcow::open(store).await?,
        Format::Vhdx => vhdx::open(store).await?,
        _ => vmdk::open(store, surroundings).await?,
    };
    let blocks = paged.segments.iter().filter_map(|segment| match &segment.kind {
        Kind::Sparse(sparse) => Some(sparse.block),
        _ => None,
    });
    Ok(Rc::new(PagedImage {
        block: blocks.max().unwrap_or(64 << 10),
        store: paged.store,
        format,
        size: paged.size,
        segments: paged.segments,
        backing: paged.backing,
        pages: Pages::default(),
        kept: RefCell::default(),
    }))
}

/// One block or less, as far as tables in memory tell.
struct Piece {
    len: u64,
    place: Place,
}

impl PagedImage {
    fn corrupt(&self, at: HostOffset, what: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, self.store.name(), Some(at), what)
    }

    fn segment(&self, at: GuestOffset) -> Option<(usize, &Segment)> {
        let number = self.segments.partition_point(|segment| segment.start <= at.get()).checked_sub(1)?;
        let segment = self.segments.get(number)?;
        (at.get() - segment.start < segment.len).then_some((number, segment))
    }

    /// What is at `at`; `None` if its page is not in memory.
    fn piece(&self, at: GuestOffset) -> Result<Option<Piece>> {
        let Some((number, segment)) = self.segment(at) else {
            return Ok(Some(Piece { len: self.size - at.get(), place: Place::Zero }));
        };
        let (inside, left) = (at.get() - segment.start, segment.start + segment.len - at.get());
        let sparse = match &segment.kind {
            Kind::Flat(host) => {
                let place = *host + inside;
                // What the file does not have is zeros.
                return Ok(Some(Piece { len: left, place: Place::Data(place) }));
            }
            Kind::Zero => return Ok(Some(Piece { len: left, place: Place::Zero })),
            Kind::Sparse(sparse) => sparse,
        };
        let block = inside / sparse.block;
        let len = (sparse.block - inside % sparse.block).min(left);
        let entry = (sparse.entry)(block);
        let page = entry / sparse.per_page;
        let Some(Some(page_at)) = sparse.directory.get(page as usize).copied() else {
            return Ok(Some(Piece { len, place: Place::Unallocated }));
        };
        let Some(entries) = self.pages.get(number, page) else { return Ok(None) };
        let which = entry % sparse.per_page;
        let raw = entries.get(which as usize).copied().unwrap_or_default();
        let entry_at = page_at + which * sparse.width as u64;
        let place = (sparse.place)(raw)
            .ok_or_else(|| self.corrupt(entry_at, format!("the entry of block {block} makes no sense ({raw:#x})")))?;
        let first = match place {
            Place::Data(host) | Place::Marked(host) => Some(host),
            Place::Packed(range) => Some(range.start()),
            Place::Unallocated | Place::Zero => None,
        };
        if let Some(host) = first.filter(|host| host.get() >= self.store.size()) {
            return Err(self.corrupt(host, format!("block {block} lies past the end of the file")));
        }
        let place = match place {
            Place::Data(host) => Place::Data(host + inside % sparse.block),
            other => other,
        };
        Ok(Some(Piece { len, place }))
    }

    /// Where a block that is unallocated shows what lies below, and what it shows otherwise.
    fn mapping(&self, place: Place) -> Mapping {
        match place {
            Place::Unallocated if self.backing.is_some() => Mapping::Unallocated,
            Place::Unallocated | Place::Zero => Mapping::Zero,
            Place::Data(host) => Mapping::Data(host),
            Place::Packed(_) | Place::Marked(_) => Mapping::Packed,
        }
    }

    /// The block that holds `at`, unpacked, and where it begins.
    async fn unpacked(&self, at: GuestOffset) -> Result<(GuestOffset, Rc<[u8]>)> {
        let what = || Error::new(ErrorKind::InvalidArgument, self.store.name(), None, "no packed block is there");
        let (_, segment) = self.segment(at).ok_or_else(what)?;
        let Kind::Sparse(sparse) = &segment.kind else { return Err(what()) };
        let inside = (at.get() - segment.start) / sparse.block * sparse.block;
        let start = GuestOffset(segment.start + inside);
        if let Some(kept) = self.kept.borrow().get(start) {
            return Ok((start, kept));
        }
        let place = loop {
            match self.piece(at)? {
                Some(piece) => break piece.place,
                None => self.load_page(at).await?,
            }
        };
        let (stream, wrapping) = match place {
            Place::Packed(range) => (range, Wrapping::None),
            Place::Marked(marker) => (self.behind_marker(marker, at, sparse.block).await?, Wrapping::Zlib),
            _ => return Err(what()),
        };
        if stream.len() > sparse.block + STREAM_SLACK {
            return Err(self.corrupt(stream.start(), "a packed block longer than a plain one"));
        }
        let bytes = Iov::alloc(stream.len() as usize);
        self.store.read(stream.start(), bytes.clone()).await?;
        let (bytes, size) = (bytes.to_vec(), sparse.block as usize);
        let least = (segment.len - inside).min(sparse.block) as usize;
        let unpacked = ring::unblock(move || inflate(&bytes, wrapping, size, least)).await;
        let unpacked: Rc<[u8]> = unpacked
            .map_err(|why| self.corrupt(stream.start(), format!("a packed block cannot be unpacked: {why}")))?
            .into();
        self.kept.borrow_mut().put(start, Rc::clone(&unpacked));
        Ok((start, unpacked))
    }

    async fn behind_marker(&self, marker: HostOffset, at: GuestOffset, block: u64) -> Result<HostRange> {
        let bytes = Iov::alloc(layout::vmdk::MARKER_BYTES);
        self.store.read(marker, bytes.clone()).await?;
        let (_, len) = bytes.to_vec().first_chunk().map_or((0, 0), layout::vmdk::marker);
        if len == 0 || u64::from(len) > block + STREAM_SLACK {
            return Err(self.corrupt(marker, format!("the marker of the grain at guest offset {at} makes no sense")));
        }
        Ok((marker + layout::vmdk::MARKER_BYTES as u64).range(len.into()))
    }

    /// Brings the page into memory that says where `at` is.
    async fn load_page(&self, at: GuestOffset) -> Result<()> {
        let Some((number, segment)) = self.segment(at) else { return Ok(()) };
        let Kind::Sparse(sparse) = &segment.kind else { return Ok(()) };
        let entry = (sparse.entry)((at.get() - segment.start) / sparse.block);
        let page = entry / sparse.per_page;
        let Some(Some(place)) = sparse.directory.get(page as usize).copied() else { return Ok(()) };
        if self.pages.get(number, page).is_some() {
            return Ok(());
        }
        if place.get() >= self.store.size() {
            return Err(self.corrupt(place, format!("table {page} lies past the end of the file")));
        }
        let bytes = Iov::alloc(sparse.per_page as usize * sparse.width);
        self.store.read(place, bytes.clone()).await?;
        self.pages.put(number, page, decoded(&bytes.to_vec(), sparse.width, sparse.big_endian));
        Ok(())
    }

    fn refused<T: 'static>(&self) -> ImageFuture<'_, T> {
        let error = crate::grid::only_read(&*self.store, self.format);
        Box::pin(async { Err(error) })
    }
}

/// Entries of a table.
fn decoded(bytes: &[u8], width: usize, big_endian: bool) -> Rc<[u64]> {
    let shift = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
    let number = |entry: &[u8]| {
        if big_endian { entry.iter().fold(0, shift) } else { entry.iter().rev().fold(0, shift) }
    };
    bytes.chunks_exact(width).map(number).collect()
}

/// Reads the directory of a sparse segment, which lies within the file.
async fn read_directory(store: &dyn Store, at: HostRange, width: usize, big_endian: bool) -> Result<Vec<u64>> {
    if at.end().get() > store.size() {
        let what = "the directory of its tables reaches past the end of the file";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(at.start()), what));
    }
    let bytes = crate::grid::read(store, at).await?;
    Ok(decoded(&bytes, width, big_endian).to_vec())
}

impl Image for PagedImage {
    fn format(&self) -> Format {
        self.format
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        self.block
    }

    fn read_only(&self) -> bool {
        true
    }

    fn backing(&self) -> Option<BackingRef> {
        self.backing.clone()
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { cluster_size: Some(self.block), ..ImageInfo::default() }
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        if range.is_empty() || range.end().get() > self.size {
            let what = format!("the range {range} does not lie within the disk's {} bytes", self.size);
            return Err(Error::new(ErrorKind::InvalidArgument, self.store.name(), None, what));
        }
        let Some(first) = self.piece(range.start())? else { return Ok(None) };
        let mut run = Mapped { len: first.len, mapping: self.mapping(first.place) };
        for _ in 0..LOOKUP_STEPS {
            if run.len >= range.len() {
                break;
            }
            let Ok(Some(next)) = self.piece(range.start() + run.len) else { break };
            let alike = match (run.mapping, self.mapping(next.place)) {
                (Mapping::Data(at), Mapping::Data(host)) => at.checked_add(run.len) == Some(host),
                (a, b) => a == b,
            };
            if !alike {
                break;
            }
            run.len += next.len;
        }
        run.len = run.len.min(range.len());
        Ok(Some(run))
    }

    fn unpack(&self, range: GuestRange, into: Iov) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            let mut rest = range;
            while !rest.is_empty() {
                let (start, bytes) = self.unpacked(rest.start()).await?;
                let inside = (rest.start() - start) as usize;
                let part = (bytes.len() - inside).min(rest.len() as usize);
                into.write((rest.start() - range.start()) as usize, &bytes[inside..inside + part]);
                rest = rest.skip(part as u64);
            }
            Ok(())
        })
    }

    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(self.load_page(range.start()))
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
