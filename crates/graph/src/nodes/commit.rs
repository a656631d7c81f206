//! Taking layers away from under those who use them, once a job has carried what they hold into a lower one.
//!
//! **The order** (a kill between any two steps loses nothing):
//! 1. the base is opened for writing and grown, under a disk that is stopped for that moment; the job carries;
//! 2. what was carried is durable in the base;
//! 3. layers in the middle: the image above them names the base in its header, durably. The active layer: nothing is written
//!    anywhere, those who use it use the base;
//! 4. the disk goes on over the shorter chain; what only a header named is closed.

use super::busy::COMMIT;
use super::{Busy, Edge, FilterShown, Graph, GraphNode, NodeUse};
use crate::node::Node;
use crate::wrong;
use disk::{Claim, Dirty, Disk, DiskOptions, Drained, StreamBase};
use image::{BackingRef, Error, ErrorKind, Result};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What to commit, as its user says it.
#[derive(Clone, Debug, Default)]
pub struct CommitWish {
    /// The node of the active layer.
    pub device: String,
    /// The topmost layer to commit, by its file's name.
    pub top: Option<String>,
    /// Or by its node; by default the active layer.
    pub top_node: Option<String>,
    /// The layer to commit into, by its file's name.
    pub base: Option<String>,
    /// Or by its node; by default the lowest.
    pub base_node: Option<String>,
    /// What the header above the layers shall call the base.
    pub backing_file: Option<String>,
    /// What the node that stands for the job is called.
    pub filter: Option<String>,
    /// The job.
    pub job: String,
    /// Why there can be no such job; told when all else is in order, as QEMU does.
    pub refused: Option<String>,
}

/// A commit under way.
pub struct Committing {
    /// From the active layer down to the base.
    line: Vec<Rc<GraphNode>>,
    /// Where the topmost layer that is committed is in it.
    top: usize,
    hold: RefCell<Option<NodeUse>>,
    claim: RefCell<Option<Claim>>,
    /// The node that stands for the job, and its hold on the line.
    marks: RefCell<Option<(FilterShown, Busy)>>,
    disk: Rc<Disk>,
    source: Rc<Disk>,
    into: Rc<Disk>,
    changed: Option<Rc<Dirty>>,
    backing_file: Option<String>,
    /// The base was open for writing before.
    was_writable: bool,
    drained: RefCell<Option<Drained>>,
    published: Cell<bool>,
}

impl Committing {
    /// The disk from the topmost layer that is committed down.
    pub fn source(&self) -> &Rc<Disk> {
        &self.source
    }

    /// The disk from the base down.
    pub fn lower(&self) -> &Rc<Disk> {
        &self.into
    }

    /// The base's node.
    pub fn base_node(&self) -> &str {
        &self.base().name
    }

    /// What guests change, where the active layer is committed.
    pub fn changed(&self) -> Option<Rc<Dirty>> {
        self.changed.clone()
    }

    fn base(&self) -> &Rc<GraphNode> {
        &self.line[self.line.len() - 1]
    }

    fn active(&self) -> &Rc<GraphNode> {
        &self.line[0]
    }
}

/// From `node` down, by backing files.
fn line_of(node: &Rc<GraphNode>) -> Vec<Rc<GraphNode>> {
    let mut line = vec![Rc::clone(node)];
    while let Some(below) = line.last().and_then(|node| node.child("backing")) {
        line.push(below);
    }
    line
}

impl Graph {
    /// Which of `line` a user means; `None` where there is nothing that is called so.
    async fn place(&self, line: &[Rc<GraphNode>], disk: &Disk, file: &str) -> Result<Option<usize>> {
        if self.image_of(&line[0]).await?.file().name() == file {
            return Ok(Some(0));
        }
        Ok(match disk.find_base(file) {
            Some(StreamBase::Node(name)) => line.iter().position(|node| node.name == name),
            _ => None,
        })
    }

    fn place_of_node(&self, line: &[Rc<GraphNode>], name: &str) -> Result<usize> {
        if !self.has(name) {
            return Err(wrong(format!("Cannot find device='' nor node-name='{name}'")));
        }
        line.iter()
            .position(|node| node.name == name)
            .ok_or_else(|| wrong(format!("'{name}' is not in this backing file chain")))
    }

    /// Prepares a commit: the base is open for writing afterwards, and as long as what is committed.
    ///
    /// # Errors
    /// In QEMU's words, where it makes no sense, somebody is in the way, or the base cannot be written to.
    pub async fn begin_commit(&self, wish: &CommitWish) -> Result<Rc<Committing>> {
        let device = self.find(&wish.device).ok_or_else(|| crate::node::no_node(&wish.device))?;
        if !self.parents(&device).is_empty() || self.job_on(&wish.device).is_some() {
            return Err(wrong("Need a root block node"));
        }
        if !matches!(device.meaning, Node::Format { .. }) {
            return Err(wrong(format!("Node '{}' is not an image with a backing file", wish.device)));
        }
        let hold = self.take(&wish.device, false).await?;
        let _alone = self.changing.lock().await;
        let disk = Rc::clone(hold.disk());
        let line = line_of(&device);
        let top = match (&wish.top_node, &wish.top) {
            (Some(_), Some(_)) => return Err(wrong("'top-node' and 'top' are mutually exclusive")),
            (Some(node), None) => self.place_of_node(&line, node)?,
            (None, Some(file)) => {
                let found = self.place(&line, &disk, file).await?;
                found.ok_or_else(|| wrong(format!("Top image file {file} not found")))?
            }
            (None, None) => 0,
        };
        let base = match (&wish.base_node, &wish.base) {
            (Some(_), Some(_)) => return Err(wrong("'base-node' and 'base' are mutually exclusive")),
            (Some(node), None) => self.place_of_node(&line, node)?,
            (None, Some(file)) => {
                let found = self.place(&line, &disk, file).await?;
                found.ok_or_else(|| wrong(format!("Can't find '{file}' in the backing chain")))?
            }
            (None, None) => line.len() - 1,
        };
        if base < top {
            return Err(wrong(format!("'{}' is not in this backing file chain", line[base].name)));
        }
        if base == top {
            return Err(wrong("cannot commit an image into itself"));
        }
        if top == 0 && wish.backing_file.is_some() {
            return Err(wrong("'backing-file' specified, but 'top' is the active layer"));
        }
        let line = line[..=base].to_vec();
        self.check_commit(&line)?;
        if let Some(refused) = &wish.refused {
            return Err(wrong(refused.clone()));
        }
        let driver = if top == 0 { "mirror_top" } else { "commit_top" };
        let filter = self.show_filter(wish.filter.as_deref(), driver, &line[top].name, top == 0)?;
        let names = line.iter().map(|node| node.name.clone()).collect();
        let busy = self.occupy(COMMIT, Some(filter.name().to_owned()), names)?;
        let claim = disk.claim(&wish.job)?;
        let begun = self.open_base(&line, top, &disk).await;
        let (source, into, was_writable) = begun?;
        let changed = (top == 0).then(Rc::<Dirty>::default);
        if let Some(changed) = &changed {
            disk.watch(changed);
        }
        Ok(Rc::new(Committing {
            line,
            top,
            hold: RefCell::new(Some(hold)),
            claim: RefCell::new(Some(claim)),
            marks: RefCell::new(Some((filter, busy))),
            disk,
            source,
            into,
            changed,
            backing_file: wish.backing_file.clone(),
            was_writable,
            drained: RefCell::new(None),
            published: Cell::new(false),
        }))
    }

    /// Refuses where somebody else looks at the layers: he would not hear of what becomes of them.
    fn check_commit(&self, line: &[Rc<GraphNode>]) -> Result<()> {
        for (at, node) in line.iter().enumerate().skip(1) {
            self.check_free(&node.name)?;
            let others = self.parents(node).into_iter().map(|(parent, _)| parent);
            let mut others = others.filter(|parent| !Rc::ptr_eq(parent, &line[at - 1]));
            let other = others.find(|parent| parent.in_use() || parent.disk.borrow().is_some());
            if node.in_use() || other.is_some() {
                let by = other.map_or_else(String::new, |parent| format!(" by '{}'", parent.name));
                let what = format!("Conflicts with use{by}: '{}' is being read by somebody else", node.name);
                return Err(Error::new(ErrorKind::Busy, "", None, what));
            }
        }
        Ok(())
    }

    /// Opens the base for writing under the disk, and makes it as long as the layers are; the disk from the topmost layer and from
    /// the base down, and whether the base was open for writing before.
    async fn open_base(
        &self,
        line: &[Rc<GraphNode>],
        top: usize,
        disk: &Rc<Disk>,
    ) -> Result<(Rc<Disk>, Rc<Disk>, bool)> {
        let base = &line[line.len() - 1];
        let was_writable = base.writable.get();
        // A disk of its own that somebody used once.
        let unused = base.disk.borrow_mut().take();
        if let Some(unused) = unused {
            unused.close().await?;
        }
        if !was_writable {
            let mut drained = disk.drain().await?;
            if !disk.read_only() {
                drained.flush().await?;
            }
            base.lifted.set(true);
            let opened = self.open_for_writing(base).await;
            base.lifted.set(opened.is_ok());
            // Whether it was opened for writing or not, it was closed.
            let layers = self.chain(&line[0]).await?;
            let options = drained.options();
            drained.put(layers, options);
            opened?;
        }
        let prepared = async {
            let lost = || wrong("the chain has changed");
            let source = disk.from_layer(&line[top].name).ok_or_else(lost)?;
            let into = disk.from_layer(&base.name).ok_or_else(lost)?;
            disk.set_changes_below(true);
            if into.size() < source.size() {
                into.resize(source.size()).await?;
            }
            Ok((source, into))
        };
        match prepared.await {
            Ok((source, into)) => Ok((source, into, was_writable)),
            Err(error) => {
                disk.set_changes_below(false);
                if !was_writable && let Err(worse) = self.close_base(&line[0], base, disk).await {
                    tracing::error!(node = base.name, error = %worse, "could not be opened again for reading");
                }
                Err(error)
            }
        }
    }

    /// Opens the base for reading again, under the disk of `active`, which is stopped for that moment.
    async fn close_base(&self, active: &Rc<GraphNode>, base: &Rc<GraphNode>, disk: &Rc<Disk>) -> Result<()> {
        let mut drained = disk.drain().await?;
        if !disk.read_only() {
            drained.flush().await?;
        }
        let closed = self.open_for_reading(base).await;
        let layers = self.chain(active).await?;
        let options = drained.options();
        drained.put(layers, options);
        closed
    }

    /// Opens a node that was open for writing for reading; nobody looks.
    pub(super) async fn open_for_reading(&self, node: &Rc<GraphNode>) -> Result<()> {
        node.lifted.set(false);
        self.close_image(node).await?;
        self.open(node, false).await
    }

    /// Stops the disk, durably.
    ///
    /// # Errors
    /// What guests have written cannot be made durable.
    pub async fn quiesce_commit(&self, commit: &Committing) -> Result<()> {
        let drained = commit.disk.drain().await?;
        let flushed = if commit.disk.read_only() { Ok(()) } else { drained.flush().await };
        *commit.drained.borrow_mut() = Some(drained);
        flushed
    }

    /// Lets go of the layers, all that they hold being in the base.
    ///
    /// # Errors
    /// The base cannot be made durable, or the header above the layers cannot be written: the chain is as it was then.
    pub async fn publish_commit(&self, commit: &Committing) -> Result<()> {
        commit.into.flush().await?;
        let _alone = self.changing.lock().await;
        if commit.top == 0 { self.pivot(commit).await } else { self.drop_middle(commit).await }
    }

    /// Those who use the active layer use the base.
    async fn pivot(&self, commit: &Committing) -> Result<()> {
        let (active, base) = (commit.active(), commit.base());
        let drained = commit.drained.borrow_mut().take();
        let mut drained = match drained {
            Some(drained) => drained,
            None => commit.disk.drain().await?,
        };
        commit.into.close().await?;
        commit.source.close().await?;
        let layers = self.chain(base).await?;
        let options = DiskOptions { discard: base.discard.get(), ..drained.options() };
        let above = self.users_above(active);
        self.move_users(active, base, &above);
        base.frozen.set(false);
        commit.published.set(true);
        drained.put(layers, options);
        drop(drained);
        // The old top is nobody's to write any more.
        if active.writable.get()
            && let Err(error) = self.open_for_reading(active).await
        {
            tracing::warn!(node = active.name, %error, "could not be opened again for reading");
        }
        Ok(())
    }

    /// The image above the layers names the base, and lies on it.
    async fn drop_middle(&self, commit: &Committing) -> Result<()> {
        let (active, base, over) = (commit.active(), commit.base(), &commit.line[commit.top - 1]);
        let mut drained = commit.disk.drain().await?;
        if !commit.disk.read_only() {
            drained.flush().await?;
        }
        commit.into.close().await?;
        commit.source.close().await?;
        let was_writable = over.writable.get();
        let named = async {
            if !was_writable {
                over.lifted.set(true);
                self.open_for_writing(over).await?;
            }
            let (above, below) = (self.image_of(over).await?, self.image_of(base).await?);
            let name = match &commit.backing_file {
                Some(name) => name.clone(),
                None => disk::chain::express(below.file().name(), above.file().name()).await,
            };
            above.set_backing(Some(BackingRef { name, format: Some(below.format()) })).await
        };
        let mut named = named.await;
        if !was_writable {
            named = named.and(self.open_for_reading(over).await);
        }
        let mut gone = None;
        if named.is_ok() {
            commit.published.set(true);
            for edge in over.edges.borrow_mut().iter_mut().filter(|edge| edge.role == "backing") {
                gone = Some(std::mem::replace(edge, Edge { role: "backing", node: Rc::clone(base) }).node);
            }
            if !commit.was_writable {
                named = named.and(self.open_for_reading(base).await);
            }
        }
        let layers = self.chain(active).await?;
        let options = drained.options();
        drained.put(layers, options);
        drop(drained);
        if let Some(gone) = gone.filter(|gone| gone.implicit && self.parents(gone).is_empty()) {
            named = named.and(self.dissolve(&gone).await);
        }
        named
    }

    /// The commit is over: the disk goes on, and what was opened for it is closed.
    pub async fn end_commit(&self, commit: &Committing) {
        drop(commit.drained.borrow_mut().take());
        let _alone = self.changing.lock().await;
        commit.disk.set_changes_below(false);
        if !commit.published.get() {
            let ended = async {
                commit.into.close().await?;
                commit.source.close().await?;
                if commit.was_writable {
                    return Ok(());
                }
                self.close_base(commit.active(), commit.base(), &commit.disk).await
            };
            if let Err(error) = ended.await {
                tracing::warn!(node = commit.base().name, %error, "could not be opened again for reading");
            }
        }
        drop(commit.marks.borrow_mut().take());
        drop(commit.claim.borrow_mut().take());
        drop(commit.hold.borrow_mut().take());
        self.tidy().await;
    }
}
