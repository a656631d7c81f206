//! Named nodes: a graph of places, formats and filters that users put together piece by piece (`--blockdev`, `blockdev-add`).
//!
//! `open` opens what a node stands for; `disks` gives a node to those who use it; `shared` keeps the disks of nodes on each other in step;
//! `busy` keeps jobs off each other's nodes; `info` says what it is; `change` puts overlays on nodes that are in use; `commit` takes layers
//! away from under those who use them; `create` makes images in nodes; `reopen` changes what can be changed of them.
//!
//! # Invariants
//! * A node is opened for reading when it is added. It is opened for writing when somebody first wants to write: so a file that is only
//!   read stays free for other readers, as with QEMU, whose locks follow what a node's users do.
//! * The graph owns what it opened, and closes it: disks have their layers lent. (Only what a stream lets go of is closed by the disk, where
//!   it was made along with it.)
//! * One change of the graph at a time.

mod busy;
mod change;
mod commit;
mod create;
mod disks;
mod info;
mod open;
mod reopen;
mod shared;

pub use busy::Busy;
pub use change::{Change, Overlay};
pub use commit::{CommitWish, Committing};
pub use create::{MadeIn, make_file};
pub use disks::NodeUse;
pub use info::NodeInfo;

use self::disks::Hold;
use crate::node::{Backing, Child, How, Node, no_node, understand};
use crate::options::nest;
use crate::{Objects, Sources, json, wrong};
use disk::chain::new_node_name;
use disk::{Disk, FileOpener, Threshold, Told};
use image::{Error, ErrorKind, Format, Image, Result};
use ring::sync::Mutex;
use serde_json::{Map, Value};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use store::Store;

/// Names are no longer than this, in bytes, as QEMU has it.
const LONGEST_NAME: usize = 31;

/// A node on top of another one, and what for.
#[derive(Clone)]
struct Edge {
    role: &'static str,
    node: Rc<GraphNode>,
}

/// The node that a job shows itself by, on top of the one it works on. It does nothing.
struct Filter {
    name: String,
    driver: &'static str,
    over: Rc<GraphNode>,
    /// Whoever uses the node is shown to use this.
    in_front: bool,
}

/// Shows such a node until it is dropped.
pub struct FilterShown {
    filters: Rc<RefCell<Vec<Filter>>>,
    name: String,
}

impl FilterShown {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for FilterShown {
    fn drop(&mut self) {
        self.filters.borrow_mut().retain(|filter| filter.name != self.name);
    }
}

/// A node.
pub(crate) struct GraphNode {
    name: String,
    /// Made along with its parent, and gone with it.
    implicit: bool,
    driver: String,
    /// The name of its file as its user wrote it.
    meaning: Node,
    /// What can be changed of it: how files are opened, and the throttle group.
    how: Cell<How>,
    group: RefCell<Option<String>>,
    discard: Cell<bool>,
    /// A disk above it closes it when a stream lets go of it: only a header names it.
    own: bool,
    /// Goes when nobody uses it any more: no user has made it a node of his own.
    fleeting: Cell<bool>,
    /// Something was put on top of it: it is read-only from then on.
    frozen: Cell<bool>,
    /// A job writes to it, whatever else is said of it.
    lifted: Cell<bool>,
    threshold: Rc<Threshold>,
    edges: RefCell<Vec<Edge>>,
    store: RefCell<Option<Rc<dyn Store>>>,
    image: RefCell<Option<Rc<dyn Image>>>,
    disk: RefCell<Option<Rc<Disk>>>,
    writable: Cell<bool>,
    readers: Cell<usize>,
    writers: Cell<usize>,
}

impl GraphNode {
    fn child(&self, role: &str) -> Option<Rc<GraphNode>> {
        self.edges.borrow().iter().find(|edge| edge.role == role).map(|edge| Rc::clone(&edge.node))
    }

    fn is_open(&self) -> bool {
        matches!(self.meaning, Node::CopyOnRead { .. })
            || self.store.borrow().is_some()
            || self.image.borrow().is_some()
    }

    fn in_use(&self) -> bool {
        self.readers.get() + self.writers.get() > 0
    }

    fn how(&self) -> How {
        self.how.get()
    }

    /// Whether nobody may write to it.
    fn is_read_only(&self) -> bool {
        !self.lifted.get() && (self.frozen.get() || self.how().read_only == Some(true))
    }
}

/// Whether nodes can be of this driver; none is looked for where it is left open.
pub(crate) fn known_driver(name: &str) -> bool {
    const OTHERS: [&str; 10] =
        ["", "file", "host_device", "host_cdrom", "null-co", "null-aio", "nbd", "blkdebug", "throttle", "copy-on-read"];
    OTHERS.contains(&name) || Format::from_name(name).is_some()
}

/// All nodes of a shard.
pub struct Graph {
    sources: Sources,
    /// Disks know of each other by it ([`shared`]).
    nodes: Rc<RefCell<Vec<Rc<GraphNode>>>>,
    jobs: Rc<RefCell<Vec<busy::Work>>>,
    holds: RefCell<Vec<Weak<Hold>>>,
    filters: Rc<RefCell<Vec<Filter>>>,
    changing: Mutex<()>,
}

impl Graph {
    /// Without nodes; they may refer to these objects.
    pub fn new(objects: Rc<Objects>) -> Self {
        Self {
            sources: Sources::new(FileOpener::default(), objects),
            nodes: Rc::default(),
            jobs: Rc::default(),
            holds: RefCell::default(),
            filters: Rc::default(),
            changing: Mutex::new(()),
        }
    }

    /// What nodes may refer to.
    pub fn objects(&self) -> &Objects {
        self.sources.objects()
    }

    fn find(&self, name: &str) -> Option<Rc<GraphNode>> {
        self.nodes.borrow().iter().find(|node| node.name == name).cloned()
    }

    fn is_there(&self, node: &Rc<GraphNode>) -> bool {
        self.nodes.borrow().iter().any(|other| Rc::ptr_eq(other, node))
    }

    /// Whether there is a node of this name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Adds the node that `tree` describes, and what lies below it (`blockdev-add`).
    ///
    /// # Errors
    /// In QEMU's words, where the tree makes no sense, a name is missing or taken, or something cannot be opened; nothing of
    /// it is left then.
    pub async fn add(&self, tree: Map<String, Value>) -> Result<()> {
        let _alone = self.changing.lock().await;
        let tree = nest(tree)?;
        if !tree.contains_key("node-name") {
            return Err(wrong("'node-name' must be specified for the root node"));
        }
        self.make(tree, false).await.map(drop)
    }

    /// [`Graph::add`], of `[driver=]DRIVER,node-name=NAME,…` or JSON.
    pub async fn add_text(&self, text: &str) -> Result<()> {
        let tree = if text.trim_start().starts_with('{') {
            match json::parse(text.as_bytes()).map_err(wrong)? {
                Value::Object(tree) => tree,
                _ => return Err(wrong("Invalid JSON object given")),
            }
        } else {
            crate::keyval(text, Some("driver"))?
        };
        self.add(tree).await
    }

    fn check_name(&self, name: &str) -> Result<()> {
        let well_formed = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if !well_formed {
            return Err(wrong(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > LONGEST_NAME {
            return Err(wrong("Node name too long"));
        }
        if self.has(name) || self.filters.borrow().iter().any(|filter| filter.name == name) {
            return Err(wrong(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(())
    }

    /// Shows a node of `driver` on top of the node `over`, called `name` or by a name of its own; `in_front`: whoever uses that node
    /// is shown to use this.
    ///
    /// # Errors
    /// In QEMU's words, where the name cannot be, or is taken.
    pub fn show_filter(
        &self,
        name: Option<&str>,
        driver: &'static str,
        over: &str,
        in_front: bool,
    ) -> Result<FilterShown> {
        if let Some(name) = name {
            self.check_name(name)?;
        }
        let name = name.map_or_else(new_node_name, str::to_owned);
        let over = self.find(over).ok_or_else(|| no_node(over))?;
        self.filters.borrow_mut().push(Filter { name: name.clone(), driver, over, in_front });
        Ok(FilterShown { filters: Rc::clone(&self.filters), name })
    }

    /// Makes a node and its children; on a failure nothing is left.
    async fn make(&self, tree: Map<String, Value>, implicit: bool) -> Result<Rc<GraphNode>> {
        self.make_as(tree, implicit, implicit).await
    }

    async fn make_as(&self, mut tree: Map<String, Value>, implicit: bool, own: bool) -> Result<Rc<GraphNode>> {
        let name = match tree.get("node-name") {
            Some(Value::String(name)) => {
                self.check_name(name)?;
                name.clone()
            }
            None => new_node_name(),
            Some(_) => return Err(wrong("Invalid parameter type for 'node-name', expected: string")),
        };
        // A file's name alone says which protocol it is.
        if !tree.contains_key("driver") && tree.contains_key("filename") {
            tree.insert("driver".to_owned(), Value::String("file".to_owned()));
        }
        let driver = tree.get("driver").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !known_driver(&driver) {
            return Err(wrong(format!("Parameter 'driver' does not accept value '{driver}'")));
        }
        if driver == "file" && !tree.contains_key("filename") {
            return Err(wrong("Parameter 'filename' is missing"));
        }
        let discard = tree.get("discard").and_then(Value::as_str).is_some_and(|word| word == "unmap" || word == "on");
        let meaning = understand(tree)?;
        let node = Rc::new(GraphNode {
            name,
            implicit,
            driver,
            how: Cell::new(meaning.how()),
            group: RefCell::new(meaning.group()),
            discard: Cell::new(discard),
            own,
            fleeting: Cell::new(false),
            frozen: Cell::new(false),
            lifted: Cell::new(false),
            threshold: Rc::default(),
            edges: RefCell::default(),
            store: RefCell::default(),
            image: RefCell::default(),
            disk: RefCell::default(),
            writable: Cell::new(false),
            readers: Cell::new(0),
            writers: Cell::new(0),
            meaning,
        });
        let made = async {
            let (role, child) = match &node.meaning {
                Node::File { .. } | Node::Null { .. } | Node::Nbd(_) => (None, None),
                Node::Debug { file, .. } => (Some("image"), Some(file)),
                Node::Throttle { file, .. } | Node::CopyOnRead { file, .. } | Node::Format { file, .. } => {
                    (Some("file"), Some(file))
                }
            };
            if let (Some(role), Some(child)) = (role, child) {
                self.attach(&node, role, child).await?;
            }
            if let Node::CopyOnRead { bottom: Some(bottom), .. } = &node.meaning {
                self.check_bottom(&node, bottom)?;
            }
            self.open(&node, false).await?;
            self.nodes.borrow_mut().push(Rc::clone(&node));
            if let Node::Format { below, .. } = &node.meaning {
                match below {
                    Backing::Child(child) => self.attach(&node, "backing", child).await?,
                    Backing::Header => self.attach_header(&node).await?,
                    Backing::Nothing => {}
                }
            }
            Ok(())
        };
        match made.await {
            Ok(()) => Ok(node),
            Err(error) => {
                // The failure itself is what gets reported.
                let _ = self.dissolve(&node).await;
                Err(error)
            }
        }
    }

    /// The lowest layer that a filter copies from is one of those below it.
    fn check_bottom(&self, node: &Rc<GraphNode>, bottom: &str) -> Result<()> {
        if !self.has(bottom) {
            return Err(wrong(format!("Bottom node '{bottom}' not found")));
        }
        let mut at = node.child("file");
        while let Some(layer) = at {
            if layer.name == bottom {
                return Ok(());
            }
            at = layer.child("backing");
        }
        Err(wrong(format!("Bottom node '{bottom}' is not below '{}' in its chain", node.name)))
    }

    /// Puts a child below `node`: one that is there, or one that is made.
    async fn attach(&self, node: &Rc<GraphNode>, role: &'static str, child: &Child) -> Result<()> {
        let below = match child {
            Child::Node(name) => self.find(name).ok_or_else(|| no_node(name))?,
            Child::Name(name) => {
                let tree = match name.strip_prefix("json:").map(|text| json::parse(text.as_bytes())) {
                    Some(Ok(Value::Object(tree))) => tree,
                    _ => crate::name::protocol_tree_of(name)?,
                };
                Box::pin(self.make(tree, true)).await?
            }
        };
        node.edges.borrow_mut().push(Edge { role, node: below });
        Ok(())
    }

    /// Who lies on top of `node`: its name, and what for.
    fn parents(&self, node: &Rc<GraphNode>) -> Vec<(Rc<GraphNode>, &'static str)> {
        let mut parents = Vec::new();
        for parent in self.nodes.borrow().iter() {
            for edge in parent.edges.borrow().iter().filter(|edge| Rc::ptr_eq(&edge.node, node)) {
                parents.push((Rc::clone(parent), edge.role));
            }
        }
        parents
    }

    /// Takes a node away (`blockdev-del`), and with it what was made along with it.
    pub async fn remove(&self, name: &str) -> Result<()> {
        let _alone = self.changing.lock().await;
        self.tidy().await;
        if self.filters.borrow().iter().any(|filter| filter.name == name) {
            return Err(Error::new(ErrorKind::Busy, "", None, format!("Node {name} is in use")));
        }
        let node = self.find(name).ok_or_else(|| wrong(format!("Failed to find node with node-name='{name}'")))?;
        if node.in_use() || self.is_committed(&node.name) {
            return Err(Error::new(ErrorKind::Busy, "", None, format!("Node {name} is in use")));
        }
        if let Some((parent, role)) = self.parents(&node).into_iter().next() {
            let what = match role {
                "backing" => format!("Node '{name}' is busy: node is used as backing hd of '{}'", parent.name),
                _ => format!("Block device {name} is in use"),
            };
            return Err(Error::new(ErrorKind::Busy, "", None, what));
        }
        if node.implicit {
            return Err(wrong(format!("Node {name} is not owned by the monitor")));
        }
        self.dissolve(&node).await
    }

    /// Closes a node that nobody uses, and its implicit children that nobody else has.
    async fn dissolve(&self, node: &Rc<GraphNode>) -> Result<()> {
        self.nodes.borrow_mut().retain(|other| !Rc::ptr_eq(other, node));
        let mut outcome = self.close(node).await;
        let edges = std::mem::take(&mut *node.edges.borrow_mut());
        for edge in edges {
            let child = edge.node;
            if child.implicit && child.in_use() {
                child.fleeting.set(true);
            } else if child.implicit && self.parents(&child).is_empty() {
                outcome = outcome.and(Box::pin(self.dissolve(&child)).await);
            } else if !child.is_open() && self.is_there(&child) {
                // It stays what it was before somebody lay on it.
                outcome = outcome.and(Box::pin(self.open(&child, false)).await);
            }
        }
        outcome
    }

    /// Follows what streams have done, and takes away what was there for somebody who is gone.
    async fn tidy(&self) {
        self.reconcile();
        loop {
            let is_left =
                |node: &&Rc<GraphNode>| node.fleeting.get() && !node.in_use() && self.parents(node).is_empty();
            let left = self.nodes.borrow().iter().find(is_left).cloned();
            let Some(node) = left else { return };
            if let Err(error) = self.dissolve(&node).await {
                tracing::warn!(node = node.name, %error, "could not be closed");
            }
        }
    }

    /// Takes away nodes that were there only for somebody who uses them no longer (an overlay that `blockdev-snapshot-sync` made).
    pub async fn sweep(&self) {
        let _alone = self.changing.lock().await;
        self.tidy().await;
    }

    /// Whether nobody may write to the node `name`.
    pub fn is_read_only(&self, name: &str) -> bool {
        self.find(name).is_some_and(|node| node.is_read_only())
    }

    /// Tells `told` when something is written behind `at` of the node `name`, in a guest's bytes as the node shows them or in those of
    /// its file; 0: no longer.
    ///
    /// # Errors
    /// There is no such node.
    pub fn set_threshold(&self, name: &str, at: u64, told: Told) -> Result<()> {
        let node = self.find(name).ok_or_else(|| wrong(format!("Device '{name}' not found")))?;
        node.threshold.set(at, told);
        Ok(())
    }

    /// Closes everything, tops first.
    pub async fn close_all(&self) -> Result<()> {
        let _alone = self.changing.lock().await;
        self.reconcile();
        let mut outcome = Ok(());
        let mut left = self.nodes.take();
        let lies_on = |above: &Rc<GraphNode>, node: &Rc<GraphNode>| {
            above.edges.borrow().iter().any(|edge| Rc::ptr_eq(&edge.node, node))
        };
        while !left.is_empty() {
            // There are no circles: a node is made after what lies below it.
            let top = left.iter().position(|node| !left.iter().any(|above| lies_on(above, node))).unwrap_or(0);
            let node = left.remove(top);
            outcome = outcome.and(self.close(&node).await);
        }
        outcome
    }
}
