//! Changing what can be changed of nodes in use (`blockdev-reopen`): whether they may be written to, what lies below an image, how
//! their files are opened, the group of a throttle.
//!
//! **Invariants.**
//! * All that was asked for is done, or nothing of it.
//! * Nobody looks while it is done: every disk that shows one of the nodes is stopped, the ones on top first (they wait for those
//!   below). Then they go on over the chain as it is.
//! * What cannot be changed is refused by its name, never passed over.

use super::busy::busy;
use super::{Edge, Graph, GraphNode};
use crate::node::{Backing, Child, How, Node, understand};
use crate::options::nest;
use crate::wrong;
use disk::{Disk, DiskOptions, Drained};
use image::{Error, ErrorKind, Result};
use serde_json::{Map, Value};
use std::rc::Rc;

/// What becomes of what lies below an image.
enum Below {
    /// It stays.
    Same,
    /// Nothing, or this node.
    Change(Option<Rc<GraphNode>>),
}

/// What is to become of a node.
struct Wanted {
    node: Rc<GraphNode>,
    how: How,
    group: Option<String>,
    discard: bool,
    below: Below,
}

/// What a node was.
struct Was {
    node: Rc<GraphNode>,
    how: How,
    group: Option<String>,
    discard: bool,
    frozen: bool,
    edges: Vec<Edge>,
    writable: bool,
}

impl Was {
    /// What `node` is now.
    fn of(node: &Rc<GraphNode>) -> Self {
        Self {
            node: Rc::clone(node),
            how: node.how(),
            group: node.group.borrow().clone(),
            discard: node.discard.get(),
            frozen: node.frozen.get(),
            edges: node.edges.borrow().clone(),
            writable: node.writable.get(),
        }
    }
}

/// The file of a node stays what it is.
fn check_same_file(node: &Rc<GraphNode>, file: &Child) -> Result<()> {
    let now = node.child("file").ok_or_else(|| cannot_change("file"))?;
    let same = match file {
        Child::Node(name) => *name == now.name,
        Child::Name(_) if !now.implicit => false,
        Child::Name(name) => match name.strip_prefix("json:").map(|text| crate::json::parse(text.as_bytes())) {
            Some(Ok(Value::Object(tree))) => understand(tree)?.plain() == now.meaning.plain(),
            _ => false,
        },
    };
    if same { Ok(()) } else { Err(cannot_change("file")) }
}

/// The error for an option that stays as it is.
fn cannot_change(option: &str) -> Error {
    wrong(format!("Cannot change the option '{option}'"))
}

impl Graph {
    /// Changes nodes to what these trees say.
    ///
    /// # Errors
    /// In QEMU's words, where one of them cannot be changed so: nothing is changed then.
    pub async fn reopen(&self, trees: Vec<Map<String, Value>>) -> Result<()> {
        let _alone = self.changing.lock().await;
        self.tidy().await;
        let mut wanted = Vec::new();
        for tree in trees {
            wanted.push(self.wanted(tree)?);
        }
        let mut stopped = self.stop_all_above(&wanted).await?;
        let was: Vec<Was> = wanted.iter().map(|wanted| Was::of(&wanted.node)).collect();
        let mut outcome = Ok(());
        for wanted in &wanted {
            if outcome.is_ok() {
                outcome = self.change_to(wanted).await;
            }
        }
        if outcome.is_err() {
            for was in was.iter().rev() {
                if let Err(error) = self.change_back(was).await {
                    tracing::error!(node = was.node.name, %error, "could not be opened again as it was");
                }
            }
        }
        // The lowest first: those above read through them.
        while let Some((node, _, mut drained)) = stopped.pop() {
            let options = DiskOptions { discard: node.discard.get(), ..drained.options() };
            match self.chain(&node).await {
                Ok(layers) => drained.put(layers, options),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        for was in was {
            for edge in was.edges.into_iter().filter(|edge| edge.role == "backing") {
                if edge.node.implicit && !edge.node.in_use() && self.parents(&edge.node).is_empty() {
                    outcome = outcome.and(self.dissolve(&edge.node).await);
                }
            }
        }
        outcome
    }

    /// What a tree wants of the node that it names.
    fn wanted(&self, tree: Map<String, Value>) -> Result<Wanted> {
        let tree = nest(tree)?;
        let name = tree.get("node-name").and_then(Value::as_str).unwrap_or_default();
        if name.is_empty() {
            return Err(wrong("node-name not specified"));
        }
        let node = self.find(name).ok_or_else(|| wrong(format!("Failed to find node with node-name='{name}'")))?;
        if tree.get("driver").and_then(Value::as_str) != Some(&node.driver) {
            return Err(cannot_change("driver"));
        }
        let discard = tree.get("discard").and_then(Value::as_str).is_some_and(|word| word == "unmap" || word == "on");
        let meaning = understand(tree)?;
        let mut below = Below::Same;
        match (&node.meaning, &meaning) {
            (Node::File { path, how }, Node::File { path: new, how: now }) => {
                if path != new {
                    return Err(cannot_change("filename"));
                }
                if how.locking != now.locking {
                    return Err(cannot_change("locking"));
                }
            }
            (Node::Throttle { .. }, Node::Throttle { group, file }) => {
                self.sources.objects().group(group)?;
                check_same_file(&node, file)?;
            }
            (Node::CopyOnRead { bottom, .. }, Node::CopyOnRead { file, bottom: now }) => {
                check_same_file(&node, file)?;
                if bottom != now {
                    return Err(cannot_change("bottom"));
                }
            }
            (
                Node::Format { key_secret, part, .. },
                Node::Format { file, below: new, key_secret: now, part: cut, .. },
            ) => {
                check_same_file(&node, file)?;
                if key_secret != now {
                    return Err(cannot_change("key-secret"));
                }
                if part != cut {
                    return Err(cannot_change("offset"));
                }
                below = self.below(&node, new)?;
            }
            (now, new) if now.plain() == new.plain() => {}
            _ => return Err(wrong(format!("Cannot change the options of a '{}' node", node.driver))),
        }
        let how = meaning.how();
        let is_written = |node: &Rc<GraphNode>| {
            node.writers.get() > 0
                || self.ancestors(node).iter().any(|above| above.writers.get() > 0 && shows(above, node))
        };
        if how.read_only == Some(true) && is_written(&node) {
            let what = format!("Read-only block node '{}' cannot support read-write users", node.name);
            return Err(wrong(what));
        }
        // A job knows the chain as it was.
        for above in self.ancestors(&node).iter().chain([&node]) {
            if let Some(job) = self.job_on(&above.name) {
                return Err(busy(&above.name, job));
            }
        }
        Ok(Wanted { how, group: meaning.group(), discard, below, node })
    }

    /// What is wanted below an image.
    fn below(&self, node: &Rc<GraphNode>, wanted: &Backing) -> Result<Below> {
        let now = node.child("backing");
        let new = match wanted {
            Backing::Header => {
                return match now {
                    None => Ok(Below::Same),
                    Some(_) => Err(wrong(format!("backing is missing for '{}'", node.name))),
                };
            }
            Backing::Nothing => None,
            Backing::Child(Child::Name(_)) => {
                return Err(wrong("Cannot change the option 'backing' to a new node: add it first"));
            }
            Backing::Child(Child::Node(name)) => {
                let missing = || wrong(format!("Cannot find device='' nor node-name='{name}'"));
                Some(self.find(name).ok_or_else(missing)?)
            }
        };
        let same = match (&now, &new) {
            (None, None) => true,
            (Some(now), Some(new)) => Rc::ptr_eq(now, new),
            _ => false,
        };
        if same {
            return Ok(Below::Same);
        }
        if let Some(new) = &new {
            if Rc::ptr_eq(new, node) || self.ancestors(node).iter().any(|above| Rc::ptr_eq(above, new)) {
                let what = format!("Making '{}' a backing child of '{}' would create a cycle", new.name, node.name);
                return Err(wrong(what));
            }
            if let Some(job) = self.job_on(&new.name) {
                return Err(busy(&new.name, job));
            }
            if new.writable.get() && (new.in_use() || !self.users_above(new).is_empty()) {
                let what = format!("Conflicts with use: '{}' is being written to", new.name);
                return Err(Error::new(ErrorKind::Busy, "", None, what));
            }
        }
        if let Some(job) = now.as_ref().and_then(|now| self.job_on(&now.name)) {
            return Err(busy(&node.name, job));
        }
        Ok(Below::Change(new))
    }

    /// Stops every disk that shows one of the nodes, the ones on top first.
    async fn stop_all_above(&self, wanted: &[Wanted]) -> Result<Vec<(Rc<GraphNode>, Rc<Disk>, Drained)>> {
        let mut nodes: Vec<Rc<GraphNode>> = Vec::new();
        for node in wanted.iter().flat_map(|wanted| {
            let mut all = self.ancestors(&wanted.node);
            all.push(Rc::clone(&wanted.node));
            all
        }) {
            if !nodes.iter().any(|other| Rc::ptr_eq(other, &node)) {
                nodes.push(node);
            }
        }
        // One that lies on more of the others is further up.
        let above = |node: &Rc<GraphNode>| self.ancestors(node).len();
        nodes.sort_by_key(above);
        let mut stopped: Vec<(Rc<GraphNode>, Rc<Disk>, Drained)> = Vec::new();
        for node in nodes {
            let disk = node.disk.borrow().clone();
            let Some(disk) = disk.filter(|_| !matches!(node.meaning, Node::CopyOnRead { .. })) else { continue };
            let drained = disk.drain().await?;
            let flushed = if disk.read_only() { Ok(()) } else { drained.flush().await };
            stopped.push((node, disk, drained));
            flushed?;
        }
        Ok(stopped)
    }

    async fn change_to(&self, wanted: &Wanted) -> Result<()> {
        let Wanted { node, how, group, discard, below } = wanted;
        let was = Was::of(node);
        node.how.set(*how);
        node.group.borrow_mut().clone_from(group);
        node.discard.set(*discard);
        node.frozen.set(false);
        if let Below::Change(new) = below {
            let mut edges = node.edges.borrow_mut();
            edges.retain(|edge| edge.role != "backing");
            edges.extend(new.iter().map(|new| Edge { role: "backing", node: Rc::clone(new) }));
        }
        // What was made along with an image is opened as the image is.
        let file = node.child("file").filter(|file| file.implicit && matches!(file.meaning, Node::File { .. }));
        if let Some(file) = &file {
            file.how.set(How { direct: how.direct, no_flush: how.no_flush, ..file.how() });
        }
        let opened_otherwise = (was.how.direct, was.how.no_flush) != (how.direct, how.no_flush)
            || was.group != *group
            || (node.is_read_only() && was.writable);
        if opened_otherwise { self.open_again(node, was.writable && !node.is_read_only()).await } else { Ok(()) }
    }

    async fn change_back(&self, was: &Was) -> Result<()> {
        let node = &was.node;
        let now = Was::of(node);
        node.how.set(was.how);
        node.group.borrow_mut().clone_from(&was.group);
        node.discard.set(was.discard);
        node.frozen.set(was.frozen);
        node.edges.borrow_mut().clone_from(&was.edges);
        if let Some(file) = node.child("file").filter(|file| file.implicit && matches!(file.meaning, Node::File { .. }))
        {
            file.how.set(How { direct: was.how.direct, no_flush: was.how.no_flush, ..file.how() });
        }
        let changed = (now.how.direct, now.how.no_flush) != (was.how.direct, was.how.no_flush)
            || now.group != was.group
            || now.writable != was.writable
            || !node.is_open();
        if changed { self.open_again(node, was.writable).await } else { Ok(()) }
    }

    /// Closes and opens a node; where another one holds what it has open, that one.
    async fn open_again(&self, node: &Rc<GraphNode>, writable: bool) -> Result<()> {
        let holder = self.users_above(node).into_iter().find(|above| !matches!(above.meaning, Node::CopyOnRead { .. }));
        if let Some(holder) = holder {
            let writable = holder.writable.get();
            return Box::pin(self.open_again(&holder, writable)).await;
        }
        self.close_image(node).await?;
        // Nobody looks: whoever would is stopped.
        node.lifted.set(writable);
        let opened = self.open(node, writable).await;
        node.lifted.set(false);
        opened
    }
}

/// Whether `above` writes to `node` when somebody writes to it: it lies on it, and not as an image on its backing file.
fn shows(above: &Rc<GraphNode>, node: &Rc<GraphNode>) -> bool {
    let edges = above.edges.borrow();
    edges.iter().any(|edge| edge.role != "backing" && (Rc::ptr_eq(&edge.node, node) || shows(&edge.node, node)))
}
