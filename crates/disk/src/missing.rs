//! What a stream still has to do: a walk over the maps, none over data.
//!
//! A cluster of the top is **missing** above a base when the top has nothing of it and either a layer above the base has some of
//! it (copy), or it reads as zeros that the layers above the base make (an explicit zero, the end of a short layer) while the
//! base has bytes there that would show through once those layers are gone (mask). Without a base nothing can ever show
//! through, so zeros are not missing.
//!
//! The walk costs look-ups, not bytes: one a run of equal mapping, whatever its length.

use crate::disk::Inner;
use crate::view::{Found, View, mapped};
use crate::walk::FirstRun;
use crate::{Missing, StreamBase};
use image::{Error, ErrorKind, Mapping, Result};
use layout::{GuestOffset, GuestRange};
use std::rc::Rc;
use store::Backing;

/// What a run of a layer's bytes below an unallocated part of the top means for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Bytes that are to be copied.
    Copy,
    /// Zeros that hide something.
    Mask,
    /// Zeros that hide nothing.
    Zeros,
    /// The base shows through now and will then.
    Base,
}

impl Class {
    fn is_missing(self) -> bool {
        matches!(self, Self::Copy | Self::Mask)
    }

    /// What a cluster is that holds parts of both.
    fn with(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::Copy, _) | (_, Self::Copy) | (Self::Mask, Self::Base) | (Self::Base, Self::Mask) => Self::Copy,
            (Self::Mask, _) | (_, Self::Mask) => Self::Mask,
            _ => Self::Base,
        }
    }
}

impl View {
    /// The index of the layer a stream stops above; the number of layers for "no base".
    pub(crate) fn base_index(&self, base: &StreamBase) -> Option<usize> {
        match base {
            StreamBase::Nothing => Some(self.depth()),
            StreamBase::Node(node) => (1..self.depth()).find(|&layer| self.layers[layer].node == *node),
        }
    }

    /// The first run of `range`, of which the top has nothing.
    async fn class(&self, range: GuestRange, above: usize) -> Result<(Class, u64)> {
        let run = self.resolve(1, above, range).await?;
        let base_end = if above < self.depth() { self.image(above).size() } else { 0 };
        // How far the base reaches into the run; 0 if it ends before.
        let base_len = base_end.saturating_sub(range.start().get());
        let up_to_base_end =
            |within: Class, len: u64| if base_len > 0 { (within, len.min(base_len)) } else { (Class::Zeros, len) };
        Ok(match run.found {
            Found::Data(layer, host) => match self.stored(layer, host, run.len).await? {
                (len, Backing::Data) => (Class::Copy, len),
                (len, Backing::Hole) => up_to_base_end(Class::Mask, len),
            },
            Found::Packed(_) => (Class::Copy, run.len),
            Found::Zero(_) | Found::PastEnd(_) => up_to_base_end(Class::Mask, run.len),
            Found::Nothing => up_to_base_end(Class::Base, run.len),
        })
    }

    /// The class of the first cluster of `range`, and of those after it that are alike. `range` starts on a cluster boundary and
    /// ends on one (or at the disk's end).
    async fn class_of_clusters(&self, range: GuestRange, unit: u64, above: usize) -> Result<(Class, u64)> {
        let (class, len) = self.class(range, above).await?;
        let whole = if len == range.len() { len } else { len & !(unit - 1) };
        if whole > 0 {
            return Ok((class, whole));
        }
        let cluster = range.first(unit);
        let (mut all, mut at) = (class, len);
        while at < cluster.len() {
            let (class, len) = self.class(cluster.skip(at), above).await?;
            all = all.with(class);
            at += len;
        }
        Ok((all, cluster.len()))
    }
}

impl Inner {
    /// The first missing run that starts at or after the cluster of `from` and before `end` (clipped to the disk).
    pub(crate) async fn missing_in(
        self: &Rc<Self>,
        view: &View,
        from: GuestOffset,
        end: GuestOffset,
        above: usize,
    ) -> Result<Option<Missing>> {
        let end = end.align_up(self.unit).min(GuestOffset(self.top.size()));
        // Behind an end that cuts a cluster there is nothing, not that cluster once more.
        if from >= end {
            return Ok(None);
        }
        let mut rest = GuestRange::between(from.align_down(self.unit), end);
        let mut run = FirstRun::new();
        while !rest.is_empty() && run.goes_on().await {
            let top = mapped(&*self.top, rest).await?;
            let whole = if top.len == rest.len() { top.len } else { top.len & !(self.unit - 1) };
            let (class, len) = match top.mapping {
                _ if whole == 0 => {
                    let cluster = rest.first(self.unit);
                    (self.class_in_parts(view, cluster, above).await?, cluster.len())
                }
                Mapping::Unallocated => view.class_of_clusters(rest.first(whole), self.unit, above).await?,
                _ => (Class::Zeros, whole),
            };
            if !run.take(rest.first(len), class.is_missing().then_some(class)) {
                break;
            }
            rest = rest.skip(len);
        }
        Ok(run.found().map(|(range, class)| Missing { range, zero: class == Class::Mask }))
    }

    /// The class of a cluster of the top that is mapped in parts (subclusters): it is copied as a whole if anything of it is missing.
    async fn class_in_parts(&self, view: &View, cluster: GuestRange, above: usize) -> Result<Class> {
        let mut rest = cluster;
        while !rest.is_empty() {
            let top = mapped(&*self.top, rest).await?;
            let mut run = rest.first(top.len);
            while top.mapping == Mapping::Unallocated && !run.is_empty() {
                let (class, len) = view.class(run, above).await?;
                if class.is_missing() {
                    return Ok(Class::Copy);
                }
                run = run.skip(len);
            }
            rest = rest.skip(top.len);
        }
        Ok(Class::Zeros)
    }

    /// Whether the first cluster of `range`, which begins on its boundary, is mapped in parts.
    pub(crate) async fn is_in_parts(&self, range: GuestRange) -> Result<bool> {
        let cluster = self.clip(range.start().range(self.unit));
        Ok(mapped(&*self.top, cluster).await?.len < cluster.len())
    }

    /// The error for a base that is not in the chain.
    pub(crate) fn no_such_base(&self, base: &StreamBase) -> Error {
        let node = match base {
            StreamBase::Nothing => "",
            StreamBase::Node(node) => node,
        };
        self.refuse(ErrorKind::InvalidArgument, format!("'{node}' is not below it in its chain"))
    }
}
