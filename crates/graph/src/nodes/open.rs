//! Opening what a node stands for, for reading and, later, for writing.

use super::{Edge, Graph, GraphNode};
use crate::node::{Backing, Child, How, Node};
use crate::wrong;
use disk::chain::{ChainOptions, Layer, new_node_name, open_chain};
use disk::{DiskStore, Opener};
use futures_util::future::LocalBoxFuture;
use image::{Companions, Error, ErrorKind, Format, Image, OpenOptions, Result, Surroundings};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::Store;
use store::debug::DebugStore;
use store::throttle::ThrottleStore;

/// Other files of an image come from where files come from.
struct FilesOf<'a>(&'a Graph);

impl Companions for FilesOf<'_> {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        self.0.sources.companion(name, referrer, read_only)
    }
}

impl Graph {
    /// Opens `node`, whose children are there. What was open of it is closed before.
    pub(super) async fn open(&self, node: &Rc<GraphNode>, writable: bool) -> Result<()> {
        let how = node.how();
        if writable && node.is_read_only() {
            return Err(wrong("Block node is read-only"));
        }
        match &node.meaning {
            Node::File { .. } | Node::Null { .. } | Node::Nbd(_) => {
                let mut meaning = node.meaning.clone();
                if let Node::File { how, .. } = &mut meaning {
                    *how = node.how();
                    if node.lifted.get() {
                        how.read_only = None;
                    }
                }
                let store = self.sources.node(meaning, &node.name, !writable, false, how).await?;
                *node.store.borrow_mut() = Some(store);
            }
            Node::Debug { rules, .. } => {
                let below = self.bytes_of(node, "image", writable).await?;
                *node.store.borrow_mut() = Some(DebugStore::new(below, rules.clone()));
            }
            Node::Throttle { .. } => {
                let group = node.group.borrow().clone().unwrap_or_default();
                let group = self.sources.objects().group(&group)?;
                let below = self.bytes_of(node, "file", writable).await?;
                *node.store.borrow_mut() = Some(ThrottleStore::new(below, group));
            }
            // It is its child's disk, seen through a filter.
            Node::CopyOnRead { .. } => {
                let child = node.child("file").ok_or_else(|| wrong("A copy-on-read node needs a file"))?;
                if writable {
                    Box::pin(self.make_writable_for(&child, Some(node))).await?;
                }
            }
            Node::Format { format, key_secret, .. } => {
                let store = self.bytes_of(node, "file", writable).await?;
                let format = match format {
                    Some(format) => *format,
                    None => image::probe::probe(&*store).await?,
                };
                let passphrase = key_secret.as_ref().map(|id| self.sources.objects().secret(id)).transpose()?;
                let passphrase = passphrase.as_ref().map(|secret| &secret[..]);
                let options = OpenOptions { read_only: !writable, for_check: false };
                let files = FilesOf(self);
                let surroundings = Surroundings { companions: &files, passphrase, ..Surroundings::default() };
                let image = image::open_in(store, format, options, surroundings).await?;
                *node.image.borrow_mut() = Some(image);
            }
        }
        node.writable.set(writable);
        Ok(())
    }

    /// What a child of `node` holds, as bytes.
    async fn bytes_of(&self, node: &GraphNode, role: &str, writable: bool) -> Result<Rc<dyn Store>> {
        let child = node.child(role).ok_or_else(|| wrong(format!("Node '{}' has no child '{role}'", node.name)))?;
        if writable && node.lifted.get() {
            // Whoever looks through what lies above is stopped.
            child.lifted.set(child.implicit);
            Box::pin(self.open_for_writing(&child)).await?;
        } else if writable {
            Box::pin(self.make_writable_for(&child, Some(node))).await?;
        } else if child.store.borrow().is_none() && child.image.borrow().is_none() {
            Box::pin(self.open(&child, false)).await?;
        }
        if matches!(child.meaning, Node::Format { .. } | Node::CopyOnRead { .. }) {
            let disk = Box::pin(self.disk_of(&child)).await?;
            return Ok(DiskStore::new(disk));
        }
        let store = child.store.borrow().clone();
        store.ok_or_else(|| wrong(format!("Node '{}' is closed", child.name)))
    }

    /// The image of a node that is one, or that holds bytes: then they are the image.
    pub(super) async fn image_of(&self, node: &GraphNode) -> Result<Rc<dyn Image>> {
        if let Some(image) = node.image.borrow().clone() {
            return Ok(image);
        }
        let store = node.store.borrow().clone().ok_or_else(|| wrong(format!("Node '{}' is closed", node.name)))?;
        let options = OpenOptions { read_only: !node.writable.get(), for_check: false };
        let image = image::open(store, Format::Raw, options).await?;
        *node.image.borrow_mut() = Some(Rc::clone(&image));
        Ok(image)
    }

    /// Opens a node, which was opened for reading, for writing.
    pub(super) async fn make_writable(&self, node: &Rc<GraphNode>) -> Result<()> {
        self.make_writable_for(node, None).await
    }

    /// The same, for `opener`, which lies on it, if it is not for somebody from outside: who looks through that one was thought of.
    async fn make_writable_for(&self, node: &Rc<GraphNode>, opener: Option<&GraphNode>) -> Result<()> {
        if node.writable.get() {
            return Ok(());
        }
        if node.is_read_only() {
            return Err(wrong("Block node is read-only"));
        }
        // Whoever has it below an image can wait a moment; whoever takes it for bytes has them open.
        let mut by_bytes = self.users_above(node);
        by_bytes.retain(|parent| !opener.is_some_and(|opener| std::ptr::eq(Rc::as_ptr(parent), opener)));
        by_bytes.extend(by_bytes.clone().iter().flat_map(|parent| self.ancestors(parent)));
        let watched = by_bytes.iter().find(|parent| parent.in_use());
        if node.in_use() || watched.is_some() {
            let by = watched.map_or_else(String::new, |parent| format!(" by '{}'", parent.name));
            let what = format!(
                "Conflicts with use{by}: '{}' is being read, and cannot be opened for writing until that has ended",
                node.name
            );
            return Err(Error::new(ErrorKind::Busy, "", None, what));
        }
        // Disks that somebody used once and that show this node: they are made anew when they are asked for.
        for parent in self.ancestors(node).into_iter().filter(|parent| !parent.in_use()) {
            let disk = parent.disk.borrow_mut().take();
            if let Some(disk) = disk.filter(|_| !matches!(parent.meaning, Node::CopyOnRead { .. })) {
                disk.retire().await?;
            }
        }
        let disk = node.disk.borrow_mut().take();
        if let Some(disk) = disk.filter(|_| !matches!(node.meaning, Node::CopyOnRead { .. })) {
            disk.retire().await?;
        }
        let mut above = self.drain_above(node).await?;
        let opened = self.open_for_writing(node).await;
        let shown = self.exchange_above(node, &mut above).await;
        opened.and(shown)
    }

    /// The same, where nobody looks.
    pub(super) async fn open_for_writing(&self, node: &Rc<GraphNode>) -> Result<()> {
        if node.writable.get() {
            return Ok(());
        }
        self.close_image(node).await?;
        match Box::pin(self.open(node, true)).await {
            Ok(()) => Ok(()),
            Err(error) => {
                // It goes on being what it was.
                if let Err(worse) = Box::pin(self.open(node, false)).await {
                    tracing::error!(node = node.name, error = %worse, "could not be opened again for reading");
                }
                Err(error)
            }
        }
    }

    /// Everything that lies on `node`, however far above.
    pub(super) fn ancestors(&self, node: &Rc<GraphNode>) -> Vec<Rc<GraphNode>> {
        let mut found: Vec<Rc<GraphNode>> = Vec::new();
        let mut left = vec![Rc::clone(node)];
        while let Some(node) = left.pop() {
            for (parent, _) in self.parents(&node) {
                if !found.iter().any(|other| Rc::ptr_eq(other, &parent)) {
                    found.push(Rc::clone(&parent));
                    left.push(parent);
                }
            }
        }
        found
    }

    /// What the header of `node`'s image names goes below it, as nodes of their own.
    pub(super) async fn attach_header(&self, node: &Rc<GraphNode>) -> Result<()> {
        let Some(image) = node.image.borrow().clone() else { return Ok(()) };
        let Some(backing) = image.backing() else { return Ok(()) };
        let referrer = image.file().name().to_owned();
        let refuse = |what: String| Error::new(ErrorKind::Chain, &referrer, None, what);
        if backing.format.is_none() && !image.may_probe_backing() {
            let what = format!(
                "it names its backing file '{0}' without a format, and a guess would leave it to the guest what is opened; \
                 state it: 'qemu-img rebase -u -b {0} -F FORMAT {1}'",
                backing.name, referrer
            );
            return Err(refuse(what));
        }
        let options = ChainOptions {
            format: backing.format,
            read_only: true,
            referrer: Some(referrer.clone()),
            ..ChainOptions::default()
        };
        let chain = open_chain(&self.sources, &backing.name, options)
            .await
            .map_err(|error| Error::new(ErrorKind::Chain, "", None, "Could not open backing file").because(error))?;
        let mut above = Rc::clone(node);
        for layer in chain {
            let (file, below) = implicit_image(layer);
            self.nodes.borrow_mut().extend([file, Rc::clone(&below)]);
            above.edges.borrow_mut().push(Edge { role: "backing", node: Rc::clone(&below) });
            above = below;
        }
        Ok(())
    }

    /// Closes what is open of a node, and the disk that shows it.
    pub(super) async fn close_content(&self, node: &GraphNode) -> Result<()> {
        let disk = node.disk.borrow_mut().take();
        let outcome = match disk {
            Some(disk) if matches!(node.meaning, Node::CopyOnRead { .. }) => {
                // It is the image's below, which goes on without the filter.
                disk.set_copy_on_read(false);
                disk.set_copies_down_to(None);
                Ok(())
            }
            Some(disk) => disk.retire().await,
            None => Ok(()),
        };
        outcome.and(self.close_image(node).await)
    }

    /// Closes what is open of a node; a disk that shows it is stopped.
    pub(super) async fn close_image(&self, node: &GraphNode) -> Result<()> {
        let mut outcome = Ok(());
        let image = node.image.borrow_mut().take();
        let store = node.store.borrow_mut().take();
        if let Some(image) = image {
            // It closes the store it lies in: its child's.
            outcome = outcome.and(image.close().await);
        } else if let Some(store) = store {
            outcome = outcome.and(store.close().await.map_err(Error::from));
        }
        if let Some(child) = node.child("file").or_else(|| node.child("image"))
            && !matches!(node.meaning, Node::CopyOnRead { .. })
        {
            forget(&child);
        }
        node.writable.set(false);
        outcome
    }

    /// Closes a node for good.
    pub(super) async fn close(&self, node: &GraphNode) -> Result<()> {
        self.close_content(node).await
    }
}

/// What lay in this node was closed by who lay on it.
fn forget(node: &GraphNode) {
    *node.store.borrow_mut() = None;
    *node.image.borrow_mut() = None;
    *node.disk.borrow_mut() = None;
    node.writable.set(false);
    if let Some(child) = node.child("file").or_else(|| node.child("image")) {
        forget(&child);
    }
}

/// Nodes for an image that was opened with the chain it is in: its file's and its own.
fn implicit_image(layer: Layer) -> (Rc<GraphNode>, Rc<GraphNode>) {
    let Layer { node: name, image, .. } = layer;
    let how = How { read_only: Some(true), ..How::default() };
    let path = Node::File { path: image.file().name().into(), how };
    let node = |name: String, driver: &str, meaning: Node, edges: Vec<Edge>, image: Option<Rc<dyn Image>>| {
        Rc::new(GraphNode {
            name,
            implicit: true,
            driver: driver.to_owned(),
            how: Cell::new(meaning.how()),
            group: RefCell::default(),
            meaning,
            discard: Cell::new(false),
            own: true,
            fleeting: Cell::new(false),
            frozen: Cell::new(false),
            lifted: Cell::new(false),
            threshold: Rc::default(),
            edges: RefCell::new(edges),
            store: RefCell::default(),
            image: RefCell::new(image),
            disk: RefCell::default(),
            writable: Cell::new(false),
            readers: Cell::new(0),
            writers: Cell::new(0),
        })
    };
    // It has nothing open of its own: what lies in it does.
    let file = node(new_node_name(), image.file().protocol(), path, Vec::new(), None);
    let edges = vec![Edge { role: "file", node: Rc::clone(&file) }];
    // So that it can be opened again.
    let format = Some(image.format());
    let (child, below) = (Child::Node(file.name.clone()), Backing::Nothing);
    let meaning = Node::Format { format, file: child, below, key_secret: None, how, part: None };
    let driver = image.format().name();
    (file, node(name, driver, meaning, edges, Some(image)))
}
