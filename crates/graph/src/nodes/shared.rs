//! Nodes that lie on each other, each of which may be somebody's disk: what one of them does to its layers, the others follow.
//!
//! # Invariants
//! * A node that others lie on is opened for writing (by a stream into the middle of a chain) while no request is inside their disks; they go
//!   on with what it is then.
//! * What a stream into such a node lets go of is let go of by all who lie on it, before it is closed.

use super::{Graph, GraphNode};
use disk::{Disk, Drained, LetGo, Sharers};
use futures_util::future::join_all;
use image::Result;
use std::cell::RefCell;
use std::rc::{Rc, Weak};

/// The disks that show the node `name` below their top.
fn disks_over(nodes: &[Rc<GraphNode>], name: &str) -> Vec<Rc<Disk>> {
    let mut over: Vec<Rc<Disk>> = Vec::new();
    // Parents come after their children, so the highest is first: its requests may wait for those of the disks below.
    for node in nodes.iter().rev() {
        let Some(disk) = node.disk.borrow().clone() else { continue };
        // A filter shares its child's disk.
        let is_new = !over.iter().any(|other| Rc::ptr_eq(other, &disk));
        if is_new && disk.chain()[1..].iter().any(|layer| layer.node == name) {
            over.push(disk);
        }
    }
    over
}

impl Graph {
    /// Lets nobody into the disks of nodes that lie on `node`.
    pub(super) async fn drain_above(&self, node: &GraphNode) -> Result<Vec<Drained>> {
        let over = disks_over(&self.nodes.borrow(), &node.name);
        let mut above = Vec::new();
        for disk in over {
            let drained = disk.drain().await?;
            if !disk.read_only() {
                drained.flush().await?;
            }
            above.push(drained);
        }
        Ok(above)
    }

    /// Shows the disks on `node`, which wait, what it is now.
    pub(super) async fn exchange_above(&self, node: &GraphNode, above: &mut [Drained]) -> Result<()> {
        if above.is_empty() {
            return Ok(());
        }
        let image = self.image_of(node).await?;
        for drained in above {
            let mut layers = drained.chain().to_vec();
            for layer in layers.iter_mut().skip(1).filter(|layer| layer.node == node.name) {
                layer.image = Rc::clone(&image);
            }
            let options = drained.options();
            drained.put(layers, options);
        }
        Ok(())
    }

    /// What tells the disks on a node of what a stream into it has let go of.
    pub(super) fn sharers(&self) -> Sharers {
        let nodes: Weak<RefCell<Vec<Rc<GraphNode>>>> = Rc::downgrade(&self.nodes);
        Rc::new(move |what: LetGo| {
            let over = nodes.upgrade().map(|nodes| disks_over(&nodes.borrow(), &what.top)).unwrap_or_default();
            let gone: Vec<_> = over.iter().map(|disk| disk.let_go(&what)).collect();
            Box::pin(async move {
                join_all(gone).await;
            })
        })
    }
}
