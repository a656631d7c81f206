//! Opening: a sparse extent with its descriptor, or a descriptor in a file of its own.

use super::extents::Files;
use super::{Content, Extent, File, SparseExtent, VmdkImage};
use crate::master::sheets::Sheets;
use crate::master::{self, damaged, read, read_table, within};
use crate::{BackingRef, Companions, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::vmdk::descriptor::{self, MOST_BYTES, TITLE};
use layout::vmdk::header::{FOOTER_FROM_END, HEADER_BYTES, MAGIC, MAGIC_COWD};
use layout::vmdk::{Access, Descriptor, ExtentKind, SECTOR, SparseHeader};
use layout::{GuestOffset, HostOffset};
use std::rc::Rc;
use store::Store;

/// Memory for the directories of all extents: what 256 TiB in grains of 64 KiB have.
const DIRECTORIES_MOST: u64 = 32 << 20;

/// Opens the image in `store`.
pub(crate) async fn open(
    store: Rc<dyn Store>,
    options: OpenOptions,
    companions: &dyn Companions,
) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, Format::Vmdk, options)?;
    let head = read(&*store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    if head.starts_with(&MAGIC) {
        return open_sparse(store).await;
    }
    if head.starts_with(&MAGIC_COWD) {
        let what =
            "it is a sparse extent of ESX ('COWD'), which is not supported; clone the disk first ('vmkfstools -i')";
        return Err(Error::new(ErrorKind::Unsupported, store.name(), None, what));
    }
    let title = head.get(..TITLE.len()).is_some_and(|title| title.eq_ignore_ascii_case(TITLE.as_bytes()));
    if !title || store.size() > MOST_BYTES as u64 {
        let what = "it is no VMDK: neither a sparse extent nor a descriptor";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), None, what));
    }
    let text = read(&*store, HostOffset::ZERO.range(store.size())).await?;
    let descriptor = Descriptor::parse(&text).map_err(|error| unreadable(&*store, &error))?;
    let mut files = Files::default();
    match open_extents(&store, &descriptor, companions, &mut files).await {
        Ok(image) => Ok(master::image(image)),
        Err(error) => {
            files.close().await;
            Err(error)
        }
    }
}

/// A descriptor's error as a user sees it.
fn unreadable(store: &dyn Store, error: &descriptor::Error) -> Error {
    let kind = if error.unsupported { ErrorKind::Unsupported } else { ErrorKind::Corrupt };
    Error::new(kind, store.name(), None, format!("the image cannot be opened: {error}"))
}

impl VmdkImage {
    /// Without extents so far.
    fn new(store: Rc<dyn Store>, descriptor: Descriptor, split: bool) -> Self {
        let parent = descriptor.parent.as_deref();
        // VMware on Windows separates folders its own way.
        let parent = parent.map(|name| if name.contains('/') { name.to_owned() } else { name.replace('\\', "/") });
        Self {
            store,
            extents: Vec::new(),
            tables: Sheets::new(0),
            size: 0,
            grain: None,
            backing: parent.map(|name| BackingRef { name, format: Some(Format::Vmdk) }),
            descriptor,
            split,
            warnings: Vec::new(),
            unclean: false,
        }
    }

    fn push(&mut self, sectors: u64, content: Content) -> Result<()> {
        let len = sectors.checked_mul(SECTOR);
        let Some(end) = len.and_then(|len| self.size.checked_add(len)).filter(|end| i64::try_from(*end).is_ok()) else {
            let what = "its extents make up more than any disk has";
            return Err(Error::new(ErrorKind::Corrupt, self.store.name(), None, what));
        };
        if let Content::Sparse(sparse) = &content {
            self.grain.get_or_insert(sparse.header.grain);
            self.unclean |= sparse.header.unclean;
        }
        let place = layout::GuestRange::between(GuestOffset(self.size), GuestOffset(end));
        if !place.is_empty() {
            self.extents.push(Extent { place, content });
        }
        self.size = end;
        Ok(())
    }

    /// Room for tables, now that all extents are known.
    fn finish(mut self) -> Self {
        let largest = self.extents.iter().map(|extent| match &extent.content {
            Content::Sparse(sparse) => sparse.header.table_bytes(),
            _ => 0,
        });
        self.tables = Sheets::new(largest.max().unwrap_or(0));
        if self.unclean {
            self.warnings.push("the image was not closed: what was written last may be missing".to_owned());
        }
        self
    }
}

/// Opens an image that is one sparse extent.
async fn open_sparse(store: Rc<dyn Store>) -> Result<Rc<dyn Image>> {
    let file = File { store: Rc::clone(&store), base: HostOffset::ZERO };
    let extent = open_sparse_extent(file, &mut Budget::default()).await?;
    let descriptor = match extent.header.descriptor {
        None => None,
        Some(place) => {
            within(&*store, place, "the descriptor")?;
            let text = read(&*store, place.first(MOST_BYTES as u64)).await?;
            Some(Descriptor::parse(&text).map_err(|error| unreadable(&*store, &error))?)
        }
    };
    let warnings = match &descriptor {
        Some(_) => Vec::new(),
        None => vec!["it has no descriptor: it may be one of several extents of a disk".to_owned()],
    };
    let descriptor = descriptor.unwrap_or_default();
    let extents = descriptor.extents.len();
    if extents > 1 {
        let what = format!("its descriptor names {extents} extents; only descriptors in a file of their own may do so");
        return Err(Error::new(ErrorKind::Unsupported, store.name(), None, what));
    }
    let mut image = VmdkImage::new(store, descriptor, false);
    image.warnings = warnings;
    image.push(extent.header.sectors, Content::Sparse(extent))?;
    Ok(master::image(image.finish()))
}

/// Opens the extents that a descriptor names.
async fn open_extents(
    store: &Rc<dyn Store>,
    descriptor: &Descriptor,
    companions: &dyn Companions,
    files: &mut Files,
) -> Result<VmdkImage> {
    let refuse = |kind, line: usize, what: String| {
        Err(Error::new(kind, store.name(), None, format!("line {line} of its descriptor: {what}")))
    };
    if descriptor.extents.is_empty() {
        let what = "its descriptor names no extents (is the disk encrypted?)";
        return Err(Error::new(ErrorKind::Unsupported, store.name(), None, what));
    }
    let mut numbers = Vec::with_capacity(descriptor.extents.len());
    for extent in &descriptor.extents {
        if extent.access == Access::None {
            let what = "an extent that must not be accessed (NOACCESS) cannot be served".to_owned();
            return refuse(ErrorKind::Unsupported, extent.line, what);
        }
        numbers.push(match extent.kind {
            ExtentKind::Zero => None,
            _ => Some(files.open(companions, &extent.file, store.name()).await?),
        });
    }
    let (joined, places) = files.join(store)?;
    let mut image = VmdkImage::new(joined, descriptor.clone(), true);
    let mut budget = Budget::default();
    for (extent, number) in descriptor.extents.iter().zip(numbers) {
        let Some(file) = number.map(|number| places[number].clone()) else {
            image.push(extent.sectors, Content::Zero)?;
            continue;
        };
        let store = Rc::clone(&file.store);
        let (name, len) = (store.name(), store.size());
        let content = if extent.kind == ExtentKind::Flat {
            let start = HostOffset(extent.start * SECTOR);
            if start.get().saturating_add(extent.sectors.saturating_mul(SECTOR)) > len {
                let what = format!(
                    "{} sectors from sector {} on should be in '{name}', which has only {len} bytes: it was cut off",
                    extent.sectors, extent.start
                );
                return refuse(ErrorKind::Corrupt, extent.line, what);
            }
            Content::Flat { file, start }
        } else {
            let sparse = open_sparse_extent(file, &mut budget).await?;
            let has = sparse.header.sectors;
            if has < extent.sectors {
                let what = format!("{} sectors should be in '{name}', which has {has}", extent.sectors);
                return refuse(ErrorKind::Corrupt, extent.line, what);
            }
            Content::Sparse(sparse)
        };
        image.push(extent.sectors, content)?;
    }
    Ok(image.finish())
}

/// What the directories of all extents have taken.
#[derive(Default)]
struct Budget {
    tables: u64,
}

/// Reads the header of a sparse extent, or its footer, and the directory.
async fn open_sparse_extent(file: File, budget: &mut Budget) -> Result<SparseExtent> {
    let store = &*file.store;
    let refuse = |error: layout::field::Error| damaged(store.name(), &error);
    let bytes = read(store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    let mut header = SparseHeader::decode(&bytes, 0).map_err(refuse)?;
    if header.continues_in_footer() {
        let at = HostOffset(store.size().saturating_sub(FOOTER_FROM_END));
        let bytes = read(store, at.range(HEADER_BYTES as u64)).await?;
        let mut footer = SparseHeader::decode(&bytes, at.get()).map_err(refuse)?;
        if footer.continues_in_footer() {
            let what =
                "the footer does not say where the directory of grains is: the file was cut off, or is being written";
            return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(at), what));
        }
        footer.descriptor = header.descriptor;
        header = footer;
    }
    let most = DIRECTORIES_MOST - budget.tables * 4;
    let directory = read_table(store, header.directory(), most, "the directory of grains").await?;
    let directory: Vec<u32> = directory.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
    let first_sheet = budget.tables;
    budget.tables += directory.len() as u64;
    Ok(SparseExtent { file, header, directory, first_sheet })
}
