//! Changing the graph under those who use it: overlays are put on nodes, several at one go, all of them or none.
//!
//! **The order** (a kill between any two steps loses nothing):
//! 1. the disks of the nodes concerned are stopped: what guests had asked for has ended, and is made durable;
//! 2. each overlay is there, durably, with its header, and open;
//! 3. the edges are moved: whoever used the node uses the overlay. Up to here everything can be taken back;
//! 4. the old tops, which nobody writes to any more, are opened again for reading only;
//! 5. the disks go on, over the longer chains.

use super::{Edge, Graph, GraphNode};
use crate::node::Node;
use crate::wrong;
use disk::{Disk, DiskOptions, Drained};
use image::create::CreateOptions;
use image::{BackingRef, Error, ErrorKind, Format, Result};
use ring::sync::MutexGuard;
use serde_json::{Value, json};
use std::rc::Rc;

/// What is put on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// A node that is there (`blockdev-snapshot`).
    Node(String),
    /// A file (`blockdev-snapshot-sync`).
    File {
        /// Its name.
        file: String,
        /// What its node is called.
        node: Option<String>,
        /// Its format.
        format: String,
        /// It is there and has its header.
        existing: bool,
    },
}

/// A disk that is stopped.
struct Stopped {
    disk: Rc<Disk>,
    drained: Drained,
    /// The node that it shows by now.
    at: Rc<GraphNode>,
}

/// An overlay that was put on a node.
struct Put {
    old: Rc<GraphNode>,
    overlay: Rc<GraphNode>,
    parents: Vec<Rc<GraphNode>>,
    /// It was made for this.
    made: bool,
}

/// A change under way; nobody else changes the graph meanwhile. It ends by [`Change::commit`] or [`Change::abort`].
pub struct Change<'a> {
    graph: &'a Graph,
    _alone: MutexGuard<'a, ()>,
    stopped: Vec<Stopped>,
    put: Vec<Put>,
}

impl Graph {
    /// Begins a change.
    pub async fn change(&self) -> Change<'_> {
        let alone = self.changing.lock().await;
        self.tidy().await;
        Change { graph: self, _alone: alone, stopped: Vec::new(), put: Vec::new() }
    }

    /// Refuses to do something to a node that a job works on, or that lies below an image.
    fn check_may_be_overlaid(&self, node: &Rc<GraphNode>) -> Result<()> {
        let name = &node.name;
        if let Some((above, _)) = self.parents(node).into_iter().find(|(_, role)| *role == "backing") {
            let what = format!("Node '{name}' is busy: node is used as backing hd of '{}'", above.name);
            return Err(Error::new(ErrorKind::Busy, "", None, what));
        }
        if let Some(job) = self.job_on(name) {
            return Err(super::busy::busy(name, job));
        }
        if !matches!(node.meaning, Node::Format { .. }) {
            return Err(wrong(format!("Node '{name}' is not an image: an overlay goes on images only")));
        }
        Ok(())
    }
}

impl Change<'_> {
    /// Stops the disk of the node `name`, if it has one. Of several nodes all are stopped before anything is done, so that their
    /// overlays begin at one moment.
    ///
    /// # Errors
    /// What had been written cannot be made durable.
    pub async fn stop(&mut self, name: &str) -> Result<()> {
        let Some(node) = self.graph.find(name) else { return Ok(()) };
        let Some(disk) = node.disk.borrow().clone() else { return Ok(()) };
        if matches!(node.meaning, Node::CopyOnRead { .. })
            || disk.claimed()
            || self.stopped.iter().any(|stopped| Rc::ptr_eq(&stopped.disk, &disk))
        {
            return Ok(());
        }
        let drained = disk.drain().await?;
        let flushed = if disk.read_only() { Ok(()) } else { drained.flush().await };
        self.stopped.push(Stopped { disk, drained, at: node });
        flushed
    }

    /// Puts an overlay on the node `name`.
    ///
    /// # Errors
    /// In QEMU's words. What was done for it is taken back; what was done before is not.
    pub async fn put(&mut self, name: &str, overlay: Overlay) -> Result<()> {
        let graph = self.graph;
        let old = graph.find(name).ok_or_else(|| crate::node::no_node(name))?;
        graph.check_may_be_overlaid(&old)?;
        if let Overlay::File { node, .. } = &overlay {
            let node = node.as_ref().ok_or_else(|| wrong("New overlay node-name missing"))?;
            if graph.has(node) {
                return Err(wrong("New overlay node-name already in use"));
            }
        }
        self.stop(name).await?;
        let (overlay, made) = match overlay {
            Overlay::Node(name) => (graph.find(&name).ok_or_else(|| crate::node::no_node(&name))?, false),
            Overlay::File { file, node, format, existing } => {
                (self.make(&old, &file, node.unwrap_or_default(), &format, existing).await?, true)
            }
        };
        let ready = self.make_ready(&old, &overlay).await;
        if let Err(error) = ready {
            if made {
                // The failure itself is what gets reported.
                let _ = graph.dissolve(&overlay).await;
            }
            return Err(error);
        }
        let parents = graph.users_above(&old);
        overlay.edges.borrow_mut().push(Edge { role: "backing", node: Rc::clone(&old) });
        graph.move_users(&old, &overlay, &parents);
        for stopped in self.stopped.iter_mut().filter(|stopped| Rc::ptr_eq(&stopped.at, &old)) {
            stopped.at = Rc::clone(&overlay);
        }
        self.put.push(Put { old, overlay, parents, made });
        Ok(())
    }

    /// Makes the file and a node of it.
    async fn make(
        &self,
        old: &Rc<GraphNode>,
        file: &str,
        node: String,
        format: &str,
        existing: bool,
    ) -> Result<Rc<GraphNode>> {
        let image = self.graph.image_of(old).await?;
        let kind = Format::from_name(format).ok_or_else(|| wrong(format!("Unknown file format '{format}'")))?;
        if !existing {
            if !has_backing(kind) {
                return Err(wrong(format!("Backing file not supported for file format '{format}'")));
            }
            let name = disk::chain::express(image.file().name(), file).await;
            let backing = Some(BackingRef { name, format: Some(image.format()) });
            let size = old.disk.borrow().as_ref().map_or_else(|| image.size(), |disk| disk.size());
            let size = self.stopped.iter().find(|stopped| Rc::ptr_eq(&stopped.at, old)).map_or(size, |s| s.disk.size());
            super::create::overlay(file, &CreateOptions { backing, ..CreateOptions::new(kind, size) }).await?;
        }
        let tree = json!({
            "driver": format, "node-name": node, "backing": null, "discard": if old.discard.get() { "unmap" } else { "ignore" },
            "file": { "driver": "file", "filename": file },
        });
        let Value::Object(tree) = tree else { return Err(wrong("no tree")) };
        let made = self.graph.make_as(tree, true, false).await;
        made.map_err(|error| in_qemus_words(file, format, error))
    }

    /// Makes sure that `overlay` can be put on `old`.
    async fn make_ready(&self, old: &Rc<GraphNode>, overlay: &Rc<GraphNode>) -> Result<()> {
        let graph = self.graph;
        if overlay.in_use() || !graph.parents(overlay).is_empty() || Rc::ptr_eq(old, overlay) {
            return Err(wrong("The overlay is already in use"));
        }
        let Node::Format { .. } = overlay.meaning else {
            return Err(wrong("The overlay does not support backing images"));
        };
        let image = graph.image_of(overlay).await?;
        if overlay.child("backing").is_some() {
            return Err(wrong("The overlay already has a backing image"));
        }
        if !has_backing(image.format()) {
            return Err(wrong("The overlay does not support backing images"));
        }
        drop(image);
        // A disk of its own that somebody used once.
        let disk = overlay.disk.borrow_mut().take();
        if let Some(disk) = disk {
            disk.close().await?;
        }
        let is_written = old.writers.get() > 0 || old.writable.get() && !graph.users_above(old).is_empty();
        if is_written { graph.make_writable(overlay).await } else { Ok(()) }
    }

    /// Carries it out: the disks go on over the longer chains. Hands back the disks that show another size than before.
    ///
    /// # Errors
    /// An old top cannot be opened again; the disk above it then has nothing below and fails.
    pub async fn commit(self) -> Result<Vec<Rc<Disk>>> {
        let Self { graph, _alone, stopped, put } = self;
        let mut outcome = Ok(());
        for Put { old, .. } in &put {
            outcome = outcome.and(graph.freeze(old).await);
        }
        let mut resized = Vec::new();
        for Stopped { disk, mut drained, at } in stopped {
            let (size, options) = (disk.size(), drained.options());
            match graph.chain(&at).await {
                Ok(layers) => drained.put(layers, DiskOptions { discard: at.discard.get(), ..options }),
                Err(error) => outcome = outcome.and(Err(error)),
            }
            drop(drained);
            if disk.size() != size {
                resized.push(disk);
            }
        }
        // Overlays on what nobody uses have nobody to be there for.
        for Put { overlay, made, .. } in &put {
            overlay.fleeting.set(*made);
        }
        graph.tidy().await;
        outcome.map(|()| resized)
    }

    /// Takes everything back: the disks go on as they were. Files that were made stay, as with QEMU.
    pub async fn abort(self) {
        let Self { graph, _alone, stopped, put } = self;
        for Put { old, overlay, parents, made } in put.into_iter().rev() {
            overlay.edges.borrow_mut().retain(|edge| edge.role != "backing");
            graph.move_users(&overlay, &old, &parents);
            if made && let Err(error) = graph.dissolve(&overlay).await {
                tracing::warn!(node = overlay.name, %error, "could not be closed");
            }
        }
        drop(stopped);
    }
}

impl Graph {
    /// Nobody writes to `node` any more: it is opened again for reading, so that others may read its file, too.
    async fn freeze(&self, node: &Rc<GraphNode>) -> Result<()> {
        if !node.writable.get() {
            node.frozen.set(true);
            return Ok(());
        }
        self.close_image(node).await?;
        node.frozen.set(true);
        match self.open(node, false).await {
            Ok(()) => Ok(()),
            Err(error) => {
                node.frozen.set(false);
                // Better open for writing than not at all.
                self.open(node, true).await.map_err(|_| error)
            }
        }
    }
}

/// Whether images of this format that we write can lie on others.
fn has_backing(format: Format) -> bool {
    matches!(format, Format::Qcow2 | Format::Qed)
}

/// Why a file could not be opened as an overlay, as QEMU says it.
fn in_qemus_words(file: &str, format: &str, error: Error) -> Error {
    match error.store_error().and_then(store::Error::os_text) {
        Some(text) => wrong(format!("Could not open '{file}': {text}")),
        None if error.kind() == ErrorKind::Corrupt => wrong(format!("Image is not in {format} format")),
        None => error,
    }
}
