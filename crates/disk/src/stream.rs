//! What streaming needs of a disk: what is missing, bring it in, let go of what lies below.
//!
//! **The order in which a stream ends** (a kill between any two steps loses nothing):
//! 1. nobody populates any more, and nothing is missing above the base;
//! 2. everything is durable: data, mappings, pointers to mappings;
//! 3. the top's header names the new base, or nothing, durably;
//! 4. the disk's chain is the shorter one; reads that began with the longer one end with it;
//! 5. the layers in between are closed, once those reads have ended, also those of other disks that show them.

use crate::disk::Inner;
use crate::exchange::LetGo;
use crate::names::{self, Name};
use crate::view::View;
use futures_util::FutureExt;
use image::{BackingRef, ErrorKind, Result};
use layout::{GuestOffset, GuestRange};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

/// How far down a stream reaches: it copies what lies between the top and this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StreamBase {
    /// To the bottom: at the end the image stands alone.
    #[default]
    Nothing,
    /// Down to, not including, this layer (its node name, unique in the chain).
    Node(String),
}

/// A run that a stream has to bring in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Where, clipped to the disk's size; starts and ends on cluster boundaries of the top (or at the disk's end).
    pub range: GuestRange,
    /// It reads as zeros: nothing is to be fetched, only marked.
    pub zero: bool,
}

/// What a populate did, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Fetched and linked.
    pub data: u64,
    /// Found to be zeros: marked.
    pub zero: u64,
    /// Left alone: not missing, or somebody else was there first.
    pub skipped: u64,
}

/// A job's hold on a disk; given back when dropped.
pub struct Claim {
    claim: Rc<RefCell<Option<String>>>,
}

impl Claim {
    pub(crate) fn take(inner: &Rc<Inner>, job: &str) -> Result<Self> {
        let mut claim = inner.kept.claim.borrow_mut();
        if let Some(other) = &*claim {
            return Err(inner.refuse(ErrorKind::Busy, format!("job '{other}' works on disk '{}' already", inner.name)));
        }
        *claim = Some(job.to_owned());
        Ok(Self { claim: Rc::clone(&inner.kept.claim) })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claim.borrow_mut().take();
    }
}

impl Inner {
    /// See [`crate::Disk::find_base`].
    pub(crate) fn find_base(&self, name: &str) -> Option<StreamBase> {
        let bare = |name: &str| match names::parse(name) {
            Name::Local(path) => path.to_owned(),
            Name::Remote(_) => name.to_owned(),
        };
        let wanted = bare(name);
        let view = self.view();
        let found = view.layers[1..].iter().find(|layer| {
            layer.node == name || bare(&layer.name) == wanted || bare(layer.image.file().name()) == wanted
        });
        found.map(|layer| StreamBase::Node(layer.node.clone()))
    }

    /// See [`crate::Disk::finish_stream`].
    pub(crate) async fn finish_stream(self: &Rc<Self>, base: &StreamBase, backing_name: Option<&str>) -> Result<()> {
        let _reshaping = self.reshaping.lock().await;
        let view = self.view();
        let above = view.base_index(base).ok_or_else(|| self.no_such_base(base))?;
        let stopped = self.publishing.stop().await;
        self.check_nothing_missing(&view, above).await?;
        self.commit().await?;
        let backing = self.backing_after(&view, above, backing_name).await;
        if backing != self.top.backing() {
            self.top.set_backing(backing.clone()).await?;
        }
        let mut kept = vec![view.layers[0].clone()];
        kept.extend_from_slice(&view.layers[above..]);
        if let (Some(backing), Some(base)) = (backing, kept.get_mut(1)) {
            base.name = backing.name;
        }
        let let_go: Vec<_> = view.layers[1..above].iter().filter(|layer| !layer.lent).cloned().collect();
        let sharers = self.kept.sharers.borrow().clone();
        let others = sharers.map(|sharers| {
            let name = |layer: &crate::Layer| layer.node.clone();
            sharers(LetGo { top: name(&view.layers[0]), gone: view.layers[1..above].iter().map(name).collect() })
        });
        let old = self.replace_view(View::new(kept));
        drop(stopped);
        drop(view);
        let own = old.gone();
        let gone = async move {
            own.await;
            if let Some(others) = others {
                others.await;
            }
        };
        drop(old);
        let inner = Rc::clone(self);
        let inside = self.gate.enter_behind();
        let close = async move {
            for layer in let_go {
                if let Err(error) = layer.image.close().await {
                    tracing::warn!(disk = inner.name, node = layer.node, %error, "could not close a streamed image");
                }
            }
            drop(inside);
        };
        let mut gone = Box::pin(gone);
        if gone.as_mut().now_or_never().is_some() {
            // The usual case: when the job says it is done, the files below are nobody's any more.
            close.await;
        } else {
            drop(ring::spawn(async move {
                gone.await;
                close.await;
            }));
        }
        Ok(())
    }

    /// Verifies that the top has everything above the base. What a guest is writing right now is waited for; the top only ever
    /// gains from then on, since whatever could show through is masked when it is dropped.
    async fn check_nothing_missing(self: &Rc<Self>, view: &View, above: usize) -> Result<()> {
        let mut from = GuestOffset::ZERO;
        let mut looked_twice = false;
        while let Some(missing) = self.missing_in(view, from, GuestOffset(self.top.size()), above).await? {
            if looked_twice && missing.range.start() == from {
                let what = format!("the stream is not complete: {} is still missing", missing.range);
                return Err(self.refuse(ErrorKind::Busy, what));
            }
            from = missing.range.start();
            looked_twice = true;
            self.locks.until_not_exclusive(missing.range).await;
        }
        Ok(())
    }

    /// What the top's header will say when the stream has ended.
    async fn backing_after(&self, view: &View, above: usize, backing_name: Option<&str>) -> Option<BackingRef> {
        let base = view.layers.get(above)?;
        let now = self.top.backing();
        let name = match (backing_name, now) {
            (Some(name), _) => name.to_owned(),
            // Nothing is let go of: as it stands.
            (None, Some(now)) if above == 1 => return Some(now),
            (None, _) => {
                let (top, above) = (self.top.store().name(), view.image(above - 1).store().name());
                let means_the_same = match names::parse(&base.name) {
                    Name::Remote(_) => true,
                    Name::Local(path) => Path::new(path).is_absolute() || names::same_folder(top, above),
                };
                if means_the_same {
                    base.name.clone()
                } else {
                    let (base, top) = (base.image.file().name().to_owned(), top.to_owned());
                    ring::unblock(move || names::express(&base, &top)).await
                }
            }
        };
        Some(BackingRef { name, format: Some(base.image.format()) })
    }
}
