//! Opening what names stand for.

use crate::name::{Meaning, meaning};
use crate::node::{Backing, How, Node};
use crate::objects::Objects;
use crate::wrong;
use disk::chain::{ChainOptions, open_chain};
use disk::{Below, Disk, DiskOptions, DiskStore, FileOpener, Opened, Opener};
use futures_util::future::LocalBoxFuture;
use image::{Format, Result};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::Store;
use store::debug::DebugStore;
use store::file::{FileStore, Locking};
use store::nbd::{Address, NbdStore, Target};
use store::null::NullStore;
use store::part::PartStore;
use store::throttle::ThrottleStore;

/// Nodes within each other.
const DEEPEST: usize = 16;

/// Opens files as `files` says, and everything else that names can stand for.
#[derive(Default)]
pub struct Sources {
    files: FileOpener,
    objects: Rc<Objects>,
    /// What is opened in place of any other file that an image names.
    data_file: Option<String>,
    debugs: RefCell<Vec<Rc<DebugStore>>>,
    depth: Cell<usize>,
}

/// Counts how deep it goes.
struct Deeper<'a>(&'a Cell<usize>);

impl Drop for Deeper<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// How an NBD export is called in messages.
fn nbd_name(target: &Target) -> String {
    match &target.address {
        Address::Unix(path) => format!("nbd+unix:///{}?socket={}", target.export, path.display()),
        Address::Tcp(host, port) => format!("nbd://{host}:{port}/{}", target.export),
    }
}

impl Sources {
    /// For files opened like this, and these objects.
    pub fn new(files: FileOpener, objects: Rc<Objects>) -> Self {
        Self { files, objects, ..Self::default() }
    }

    /// With a data file that has moved: what images name otherwise is opened here.
    pub fn with_data_file(self, name: Option<String>) -> Self {
        Self { data_file: name, ..self }
    }

    /// What `--object` made.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The `blkdebug` nodes opened so far, in order.
    pub fn debugs(&self) -> Vec<Rc<DebugStore>> {
        self.debugs.borrow().clone()
    }

    /// Opens `name` as it is, whatever is in it: as the child of a node. `below`: as files below the top are opened.
    fn store<'a>(
        &'a self,
        name: &'a str,
        read_only: bool,
        below: bool,
        above: How,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        Box::pin(async move {
            match meaning(name)? {
                Meaning::Local => Ok(self.files.open(name, None, read_only).await?.store),
                Meaning::Node { node, .. } => self.node(node, name, read_only, below, above).await,
            }
        })
    }

    /// Opens a node whose children, if it has any, are names.
    pub(crate) fn node<'a>(
        &'a self,
        node: Node,
        name: &'a str,
        read_only: bool,
        below: bool,
        above: How,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        Box::pin(async move {
            if self.depth.get() >= DEEPEST {
                return Err(wrong(format!("nodes are nested more than {DEEPEST} deep")));
            }
            self.depth.set(self.depth.get() + 1);
            let _deeper = Deeper(&self.depth);
            Ok(match node {
                Node::File { path, how } => {
                    let mut options = if below { self.files.below.clone() } else { self.files.top.clone() };
                    options.read_only |= read_only || how.read_only == Some(true);
                    options.direct = how.direct.or(above.direct).unwrap_or(options.direct);
                    options.no_flush = how.no_flush.or(above.no_flush).unwrap_or(options.no_flush);
                    options.locking = match how.locking {
                        Some(true) => Locking::On,
                        Some(false) => Locking::Off,
                        None => options.locking,
                    };
                    FileStore::open(&path, options).await? as Rc<dyn Store>
                }
                Node::Null { size, latency } => NullStore::new("null-co://", size, latency, read_only),
                Node::Nbd(target) => {
                    let target = Target { read_only: read_only || target.read_only, ..target };
                    NbdStore::open(&nbd_name(&target), target).await?
                }
                Node::Debug { rules, file } => {
                    let debug = DebugStore::new(self.store(file.name()?, read_only, below, above).await?, rules);
                    self.debugs.borrow_mut().push(Rc::clone(&debug));
                    debug
                }
                Node::Throttle { group, file } => {
                    let group = self.objects.group(&group)?;
                    ThrottleStore::new(self.store(file.name()?, read_only, below, above).await?, group)
                }
                Node::CopyOnRead { bottom: Some(bottom), .. } => {
                    // There are no nodes here that could be called so.
                    return Err(wrong(format!("Bottom node '{bottom}' not found")));
                }
                Node::CopyOnRead { file, bottom: None } => {
                    if read_only {
                        return Err(wrong("Block node is read-only"));
                    }
                    self.stack(file.name()?, read_only, true).await?
                }
                Node::Format { .. } => self.stack(name, read_only, false).await?,
            })
        })
    }

    /// The disk that the chain `name` shows, as a store.
    async fn stack(&self, name: &str, read_only: bool, copy_on_read: bool) -> Result<Rc<dyn Store>> {
        let options = ChainOptions { read_only, ..ChainOptions::default() };
        let chain = open_chain(self, name, options).await?;
        Ok(DiskStore::new(Disk::new(name, chain, DiskOptions { copy_on_read, ..DiskOptions::default() })))
    }
}

impl Opener for Sources {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let (node, stated) = match meaning(name)? {
                Meaning::Local => return self.files.open(name, referrer, read_only).await,
                Meaning::Node { node, stated } => (node, stated),
            };
            let below = referrer.is_some();
            let read_only = read_only || below;
            match node {
                Node::Format { format, file, below: next, key_secret, how, part } => {
                    if how.read_only == Some(true) && !read_only {
                        return Err(wrong("Block node is read-only"));
                    }
                    let passphrase = key_secret.map(|id| self.objects.secret(&id)).transpose()?;
                    let passphrase = passphrase.map(|secret| secret.to_vec());
                    let next = match next {
                        Backing::Header => Below::Header,
                        Backing::Nothing => Below::Nothing,
                        Backing::Child(child) => Below::Named(child.name()?.to_owned()),
                    };
                    let mut store = self.store(file.name()?, read_only, below, how).await?;
                    if let Some((offset, size)) = part {
                        store = match PartStore::new(Rc::clone(&store), offset, size) {
                            Ok(part) => part,
                            Err(error) => {
                                let _ = store.close().await;
                                return Err(error.into());
                            }
                        };
                    }
                    Ok(Opened { store, format, below: next, passphrase })
                }
                node => {
                    let store = self.node(node, name, read_only, below, How::default()).await?;
                    // Bytes as they are, where a driver was stated.
                    Ok(Opened { store, format: stated.then_some(Format::Raw), below: Below::Header, passphrase: None })
                }
            }
        })
    }

    fn companion<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        self.files.companion(self.data_file.as_deref().unwrap_or(name), referrer, read_only)
    }

    fn identify(&self, name: &str, referrer: Option<&str>) -> String {
        match meaning(name) {
            Ok(Meaning::Node { node: Node::File { path, .. }, .. }) => {
                self.files.identify(&format!("file:{}", path.display()), None)
            }
            Ok(Meaning::Node { node: Node::Format { file, .. }, .. }) => {
                file.name().map_or_else(|_| name.to_owned(), |file| self.identify(file, None))
            }
            Ok(Meaning::Node { .. }) => name.to_owned(),
            _ => self.files.identify(name, referrer),
        }
    }
}
