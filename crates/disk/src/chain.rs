//! Putting a chain together: from a file's name to its layers, top first.
//!
//! Opening what a header names is a decision about somebody else's string, so it goes through an [`Opener`].

use crate::names::{self, Name};
use crate::threshold::Thresholds;
use futures_util::future::LocalBoxFuture;
use image::{BackingRef, Companions, Error, ErrorKind, Format, Image, OpenOptions, Result, Surroundings};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use store::Store;
use store::file::FileStore;

/// More layers than this are a mistake (or an attack): nobody's reads should go through so many files.
pub const MAX_DEPTH: usize = 200;

/// One image of a chain.
#[derive(Clone)]
pub struct Layer {
    /// Unique in the chain: given by the user, or `#block123` as QEMU makes them.
    pub node: String,
    /// The name the user or the header above gave.
    pub name: String,
    /// The image.
    pub image: Rc<dyn Image>,
    /// Somebody else's: a disk settles what it has written to it, and leaves it open.
    pub lent: bool,
    /// Nothing lies below, whatever its header says: so its user said.
    pub bottom: bool,
    /// Marks that writes to it may pass.
    pub thresholds: Option<Thresholds>,
}

impl Layer {
    /// The disk's own, with what its header says below it.
    pub fn new(node: impl Into<String>, name: impl Into<String>, image: Rc<dyn Image>) -> Self {
        Self { node: node.into(), name: name.into(), image, lent: false, bottom: false, thresholds: None }
    }
}

/// How to open a chain.
#[derive(Clone, Debug, Default)]
pub struct ChainOptions {
    /// The top's format; `None` probes it.
    pub format: Option<Format>,
    /// Nothing is written.
    pub read_only: bool,
    /// Node name of the top.
    pub node: Option<String>,
    /// Only the top: its backing reference is left unopened (`info`, `check`).
    pub no_backing: bool,
    /// Only so many layers, from the top; what lies below them is left unopened (to be written to, `commit`).
    pub layers: Option<usize>,
    /// The image whose header names the top, by its store's name; nothing is written then.
    pub referrer: Option<String>,
    /// The top is opened for a check (see [`image::OpenOptions::for_check`]).
    pub for_check: bool,
    /// The internal snapshot of the top (its id, or its name) to show instead of its present state; read-only.
    pub snapshot: Option<String>,
    /// No guest writes to the top (see [`image::Surroundings::no_guest`]).
    pub no_guest: bool,
}

/// What lies below an image, where its name says so and its header does not count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Below {
    /// What its header names.
    #[default]
    Header,
    /// Nothing.
    Nothing,
    /// What this name stands for.
    Named(String),
}

/// What a name stands for.
#[derive(Clone)]
pub struct Opened {
    /// Its bytes.
    pub store: Rc<dyn Store>,
    /// The format they are in, if the name says that.
    pub format: Option<Format>,
    /// What lies below.
    pub below: Below,
    /// What unlocks it, if it is encrypted and the user gave that.
    pub passphrase: Option<Vec<u8>>,
}

impl<S: Store> From<Rc<S>> for Opened {
    fn from(store: Rc<S>) -> Self {
        Self { store, format: None, below: Below::Header, passphrase: None }
    }
}

impl From<Rc<dyn Store>> for Opened {
    fn from(store: Rc<dyn Store>) -> Self {
        Self { store, format: None, below: Below::Header, passphrase: None }
    }
}

/// Opens what names stand for.
pub trait Opener {
    /// Opens `name`; a relative one is relative to the folder of `referrer` (the image that names it, if any, by its store's
    /// name: as it was opened). Everything below the top is opened read-only.
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Opened>>;

    /// Opens another file of the image `referrer` ([`image::Companions`]): as [`Opener::open`] does, but writable where the image is.
    /// Refused unless there is a way.
    fn companion<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        image::NoCompanions.open(name, referrer, read_only)
    }

    /// The name that identifies what `name` (seen from `referrer`) stands for, to find cycles: a canonical path or URL.
    fn identify(&self, name: &str, referrer: Option<&str>) -> String;
}

/// Opens local files.
#[derive(Clone, Debug, Default)]
pub struct FileOpener {
    /// For the top.
    pub top: store::file::OpenOptions,
    /// For everything below (always read-only).
    pub below: store::file::OpenOptions,
}

impl Opener for FileOpener {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        let mut options = if referrer.is_none() { self.top.clone() } else { self.below.clone() };
        options.read_only |= read_only || referrer.is_some();
        Box::pin(async move { Ok(open_file(name, referrer, options).await?.into()) })
    }

    fn companion<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        let mut options = if read_only { self.below.clone() } else { self.top.clone() };
        options.read_only |= read_only;
        Box::pin(open_file(name, Some(referrer), options))
    }

    fn identify(&self, name: &str, referrer: Option<&str>) -> String {
        let Name::Local(local) = names::parse(name) else { return name.to_owned() };
        let path = names::resolve(local, referrer);
        let real = path.canonicalize().or_else(|_| std::path::absolute(&path)).unwrap_or(path);
        real.to_string_lossy().into_owned()
    }
}

/// The file that the image `referrer` means by `name`, where both are local; else `name` as it is.
pub fn resolve(name: &str, referrer: &str) -> String {
    match names::parse(name) {
        Name::Local(local) => names::resolve(local, Some(referrer)).to_string_lossy().into_owned(),
        Name::Remote(_) => name.to_owned(),
    }
}

/// How the image `above` is to name the file `below` as its backing file: as it is called, where that means the same seen from
/// `above`, else by its whole path.
pub async fn express(below: &str, above: &str) -> String {
    let means_the_same = match names::parse(below) {
        Name::Remote(_) => true,
        Name::Local(path) => std::path::Path::new(path).is_absolute() || names::same_folder(above, below),
    };
    if means_the_same {
        // A relative name is relative to the folder of the image that holds it.
        return match names::parse(below) {
            Name::Local(path) if !std::path::Path::new(path).is_absolute() => {
                let path = std::path::Path::new(path);
                path.file_name().map_or_else(|| below.to_owned(), |name| name.to_string_lossy().into_owned())
            }
            _ => below.to_owned(),
        };
    }
    let (below, above) = (below.to_owned(), above.to_owned());
    ring::unblock(move || names::express(&below, &above)).await
}

async fn open_file(name: &str, referrer: Option<&str>, options: store::file::OpenOptions) -> Result<Rc<dyn Store>> {
    match names::parse(name) {
        Name::Local(local) => Ok(FileStore::open(&names::resolve(local, referrer), options).await?),
        Name::Remote(protocol) => {
            let what = format!("Unknown protocol '{protocol}' (for a file of that name write './{name}')");
            Err(Error::new(ErrorKind::Unsupported, "", None, what))
        }
    }
}

/// Opens `name` and everything below it. Cycles, missing files and chains deeper than [`MAX_DEPTH`] are errors that name
/// the image whose header refers to the culprit. A backing reference without a format is probed only where the format's
/// own rules say so (QED without its no-probe bit).
pub async fn open_chain(opener: &dyn Opener, name: &str, options: ChainOptions) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    match open_layers(opener, name, &options, &mut layers).await {
        Ok(()) => Ok(layers),
        Err(error) => {
            // Locks are not kept on images of a chain that is not put together.
            for layer in &layers {
                let _ = layer.image.close().await;
            }
            Err(error)
        }
    }
}

async fn open_layers(opener: &dyn Opener, name: &str, options: &ChainOptions, layers: &mut Vec<Layer>) -> Result<()> {
    let top_options = OpenOptions { read_only: options.read_only, for_check: options.for_check };
    let referrer = options.referrer.as_deref();
    let (image, mut below) = open_one(opener, name, referrer, options.format, (top_options, options)).await?;
    let mut seen = HashSet::from([opener.identify(name, referrer)]);
    let node = options.node.clone().unwrap_or_else(new_node_name);
    layers.push(Layer::new(node, name, image));
    if options.no_backing {
        return Ok(());
    }
    let below_options = (OpenOptions { read_only: true, for_check: false }, &ChainOptions::default());
    while let Some(above) = layers.last().map(|layer| Rc::clone(&layer.image)) {
        let named = matches!(below, Below::Named(_));
        let backing = match std::mem::take(&mut below) {
            Below::Header => above.backing(),
            Below::Nothing => {
                if let Some(layer) = layers.last_mut() {
                    layer.bottom = true;
                }
                None
            }
            // It says all there is to say, or leaves the rest to a look at it: the user's words, not a guest's.
            Below::Named(name) => Some(BackingRef { name, format: None }),
        };
        let Some(backing) = backing else { return Ok(()) };
        if options.layers.is_some_and(|most| layers.len() >= most) {
            return Ok(());
        }
        let referrer = above.file().name();
        let refuse = |what: String| Error::new(ErrorKind::Chain, referrer, None, what);
        if backing.format.is_none() && !named && !above.may_probe_backing() {
            return Err(refuse(format!(
                "it names its backing file '{0}' without a format, and a guess would leave it to the guest what is opened; \
                 state it: 'qemu-img rebase -u -b {0} -F FORMAT {1}'",
                backing.name, referrer
            )));
        }
        if layers.len() >= MAX_DEPTH {
            return Err(refuse(format!("the chain of backing files is longer than {MAX_DEPTH} images")));
        }
        if !seen.insert(opener.identify(&backing.name, Some(referrer))) {
            return Err(refuse(format!(
                "its backing file '{}' is above it in the same chain: the chain bites its own tail; rebase one of them",
                backing.name
            )));
        }
        let (image, next) = open_one(opener, &backing.name, Some(referrer), backing.format, below_options)
            .await
            .map_err(|e| refuse(format!("could not open its backing file '{}'", backing.name)).because(e))?;
        if let (Some(wanted), Some(found)) = (above.backing_identity(), image.identity())
            && wanted != found
        {
            let _ = image.close().await;
            return Err(refuse(format!(
                "its backing file '{}' was changed since, or is another one: it says it is {found}, and {wanted} is needed; \
                 put the one back that this image was made over",
                backing.name
            )));
        }
        below = next;
        layers.push(Layer::new(new_node_name(), backing.name, image));
    }
    Ok(())
}

/// The other files of an image come from where the image comes from.
struct FilesOf<'a>(&'a dyn Opener);

impl Companions for FilesOf<'_> {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        self.0.companion(name, referrer, read_only)
    }
}

async fn open_one(
    opener: &dyn Opener,
    name: &str,
    referrer: Option<&str>,
    format: Option<Format>,
    (options, more): (OpenOptions, &ChainOptions),
) -> Result<(Rc<dyn Image>, Below)> {
    let Opened { store, format: said, below, passphrase } = opener.open(name, referrer, options.read_only).await?;
    let opened = async {
        let format = match format.or(said) {
            Some(format) => format,
            None => image::probe::probe(&*store).await?,
        };
        let surroundings = Surroundings {
            companions: &FilesOf(opener),
            passphrase: passphrase.as_deref(),
            snapshot: more.snapshot.as_deref(),
            no_guest: more.no_guest,
        };
        image::open_in(Rc::clone(&store), format, options, surroundings).await
    };
    let result = opened.await;
    if result.is_err() {
        let _ = store.close().await;
    }
    result.map(|image| (image, below))
}

/// A node name that nobody else in this process has. QEMU's look alike; `#` keeps them apart from users' own.
pub fn new_node_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("#block{:03}", NEXT.fetch_add(1, Ordering::Relaxed))
}
