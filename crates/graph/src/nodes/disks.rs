//! Giving nodes to those who use them: exports, jobs, monitors.

use super::{Edge, Graph, GraphNode};
use crate::node::{Node, no_node};
use crate::wrong;
use disk::{Disk, DiskOptions, Layer, Thresholds};
use image::Result;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// A hold on a node: while it lives, the node stays, and is open as it was asked for. When another node takes its place in front
/// of those who use it (a snapshot, a commit), it is a hold on that one.
pub struct NodeUse {
    hold: Rc<Hold>,
}

/// Who is held, as the graph may change it.
pub(super) struct Hold {
    node: RefCell<Rc<GraphNode>>,
    disk: Rc<Disk>,
    writable: bool,
}

impl Hold {
    fn count<'a>(&self, node: &'a GraphNode) -> &'a Cell<usize> {
        if self.writable { &node.writers } else { &node.readers }
    }
}

impl NodeUse {
    /// What the node shows.
    pub fn disk(&self) -> &Rc<Disk> {
        &self.hold.disk
    }

    /// The node's name.
    pub fn node(&self) -> String {
        self.hold.node.borrow().name.clone()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let node = Rc::clone(&self.node.borrow());
        let count = self.count(&node);
        count.set(count.get() - 1);
    }
}

impl Graph {
    /// Takes hold of the node `name`, to write to it or only to read.
    ///
    /// # Errors
    /// There is no such node; it is read-only, or cannot be opened for writing now.
    pub async fn take(&self, name: &str, writable: bool) -> Result<NodeUse> {
        let _alone = self.changing.lock().await;
        self.tidy().await;
        let node = self.find(name).ok_or_else(|| no_node(name))?;
        // Who looks at a layer that is written to, or taken away, must know of it: only the disk on top does.
        if node.disk.borrow().is_none() && self.is_committed(name) {
            self.check_free(name)?;
        }
        if writable {
            self.make_writable(&node).await?;
        }
        let disk = self.disk_of(&node).await?;
        let hold = Rc::new(Hold { node: RefCell::new(Rc::clone(&node)), disk, writable });
        let count = hold.count(&node);
        count.set(count.get() + 1);
        let mut holds = self.holds.borrow_mut();
        holds.retain(|hold| hold.strong_count() > 0);
        holds.push(Rc::downgrade(&hold));
        Ok(NodeUse { hold })
    }

    /// Whoever uses `from` uses `to` from now on, whose disk is what `from`'s was. Nodes that lie on `from` other than as an image on
    /// its backing file lie on `to`.
    pub(super) fn move_users(&self, from: &Rc<GraphNode>, to: &Rc<GraphNode>, parents: &[Rc<GraphNode>]) {
        for hold in self.holds.borrow().iter().filter_map(Weak::upgrade) {
            let mut node = hold.node.borrow_mut();
            if Rc::ptr_eq(&node, from) {
                let (before, after) = (hold.count(from), hold.count(to));
                before.set(before.get() - 1);
                after.set(after.get() + 1);
                *node = Rc::clone(to);
            }
        }
        for parent in parents {
            let mut edges = parent.edges.borrow_mut();
            for edge in edges.iter_mut().filter(|edge| edge.role != "backing" && Rc::ptr_eq(&edge.node, from)) {
                edge.node = Rc::clone(to);
            }
        }
        let disk = from.disk.borrow_mut().take();
        *to.disk.borrow_mut() = disk;
    }

    /// The nodes that lie on `node` other than as an image on its backing file.
    pub(super) fn users_above(&self, node: &Rc<GraphNode>) -> Vec<Rc<GraphNode>> {
        self.parents(node).into_iter().filter(|(_, role)| *role != "backing").map(|(parent, _)| parent).collect()
    }

    /// The disks that nodes have at present: those that somebody has used.
    pub fn disks(&self) -> Vec<(String, Rc<Disk>)> {
        let nodes = self.nodes.borrow();
        nodes.iter().filter_map(|node| Some((node.name.clone(), node.disk.borrow().clone()?))).collect()
    }

    /// The kind of job that works on a node, if any does.
    pub fn job_on(&self, name: &str) -> Option<&'static str> {
        let node = self.find(name)?;
        let disk = node.disk.borrow().clone();
        let claimed = || disk.filter(|disk| disk.claimed()).map(|_| "stream");
        self.occupied(name).or_else(claimed)
    }

    /// What `node` shows, made when it is first asked for.
    pub(super) async fn disk_of(&self, node: &Rc<GraphNode>) -> Result<Rc<Disk>> {
        if let Some(disk) = node.disk.borrow().clone() {
            return Ok(disk);
        }
        let disk = if let Node::CopyOnRead { bottom, .. } = &node.meaning {
            let child = node.child("file").ok_or_else(|| wrong("A copy-on-read node needs a file"))?;
            let disk = Box::pin(self.disk_of(&child)).await?;
            disk.set_copy_on_read(true);
            disk.set_copies_down_to(bottom.clone());
            disk
        } else {
            let options = DiskOptions { discard: node.discard.get(), ..DiskOptions::default() };
            let disk = Disk::new(&node.name, self.chain(node).await?, options);
            disk.set_sharers(self.sharers());
            disk
        };
        *node.disk.borrow_mut() = Some(Rc::clone(&disk));
        Ok(disk)
    }

    /// What lies right below a node that others lie on. What a stream into it has let go of is not there any more, though the graph
    /// has not followed yet ([`Graph::reconcile`]): it may be closed.
    fn still_below(at: &GraphNode) -> Option<Rc<GraphNode>> {
        let mut below = at.child("backing");
        let Some(disk) = at.disk.borrow().clone() else { return below };
        let chain = disk.chain();
        let kept = chain.get(1).map(|layer| layer.node.as_str());
        while let Some(gone) = below.take_if(|below| Some(below.name.as_str()) != kept) {
            below = gone.child("backing");
        }
        below
    }

    /// The images from `node` down.
    pub(super) async fn chain(&self, node: &Rc<GraphNode>) -> Result<Vec<Layer>> {
        let image = self.image_of(node).await?;
        let name = image.file().name().to_owned();
        let thresholds = |node: &GraphNode| {
            let file = node.child("file").map(|file| Rc::clone(&file.threshold)).unwrap_or_default();
            Some(Thresholds { node: Rc::clone(&node.threshold), file })
        };
        let first = Layer::new(&node.name, name, image);
        let mut layers = vec![Layer { lent: true, thresholds: thresholds(node), ..first }];
        // What only headers name, right below, is the disk's own; what a user made a node of is not.
        let mut own = true;
        let mut next = node.child("backing");
        while let Some(below) = next {
            own &= below.own;
            let image = self.image_of(&below).await?;
            let said = layers.last().and_then(|above| above.image.backing()).map(|backing| backing.name);
            let name = said.unwrap_or_else(|| image.file().name().to_owned());
            let layer = Layer::new(&below.name, name, image);
            layers.push(Layer { lent: !own, thresholds: thresholds(&below), ..layer });
            next = Self::still_below(&below);
        }
        if let Some(last) = layers.last_mut() {
            last.bottom = true;
        }
        Ok(layers)
    }

    /// Follows what streams have done to chains: what was let go of is no longer below.
    pub(super) fn reconcile(&self) {
        let all = self.nodes.borrow().clone();
        for node in all {
            let Some(disk) = node.disk.borrow().clone() else { continue };
            if matches!(node.meaning, Node::CopyOnRead { .. }) {
                continue;
            }
            let chain = disk.chain();
            let wanted = chain.get(1).map(|layer| layer.node.as_str());
            let Some(first) = node.child("backing") else { continue };
            if Some(first.name.as_str()) == wanted {
                continue;
            }
            let (mut between, mut at) = (Vec::new(), Some(first));
            while let Some(below) = at.take_if(|below| Some(below.name.as_str()) != wanted) {
                at = below.child("backing");
                between.push(below);
            }
            node.edges.borrow_mut().retain(|edge| edge.role != "backing");
            if let Some(base) = at {
                node.edges.borrow_mut().push(Edge { role: "backing", node: base });
            }
            for gone in between {
                if !gone.implicit || !self.parents(&gone).is_empty() {
                    break;
                }
                let files = std::mem::take(&mut *gone.edges.borrow_mut());
                let is_gone = |node: &Rc<GraphNode>| {
                    Rc::ptr_eq(node, &gone)
                        || files.iter().any(|edge| edge.role == "file" && Rc::ptr_eq(&edge.node, node))
                };
                self.nodes.borrow_mut().retain(|other| !is_gone(other));
            }
        }
    }
}
