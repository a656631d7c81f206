//! The chain as it is between two changes: what a read resolves against.
//!
//! **Invariants.** A [`View`] never changes; finishing a stream puts another in its place, and reads in flight keep the one
//! they began with. Layers let go of are closed only once no read holds a view that shows them.
//!
//! **Every layer ends.** What lies past a layer's end is zeros, whatever lies below, however long: so going down, the
//! smallest end so far bounds what deeper layers may show.

use crate::chain::Layer;
use image::{Image, Mapped, Mapping, Result};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::sync::Event;
use std::rc::Rc;
use store::Backing;

/// A chain, top first.
pub(crate) struct View {
    pub(crate) layers: Rc<[Layer]>,
    /// Told when the last holder of this view is gone.
    gone: Event,
}

impl Drop for View {
    fn drop(&mut self) {
        self.gone.notify_all();
    }
}

/// What a run of the guest's bytes is, seen through the layers that were asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Bytes in the store of this layer.
    Data(usize, HostOffset),
    /// Packed bytes in the store of this layer.
    Packed(usize),
    /// This layer says zeros.
    Zero(usize),
    /// Past the end of this layer: zeros, and nothing below shows through.
    PastEnd(usize),
    /// None of the layers asked says anything.
    Nothing,
}

/// The first run of a range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) len: u64,
    pub(crate) found: Found,
}

impl View {
    pub(crate) fn new(layers: Vec<Layer>) -> Rc<Self> {
        Rc::new(Self { layers: layers.into(), gone: Event::new() })
    }

    /// A future that ends when nobody holds this view any more; the caller gives up its own hold first.
    pub(crate) fn gone(&self) -> impl Future<Output = ()> + use<> {
        self.gone.wait()
    }

    /// How many layers there are.
    pub(crate) fn depth(&self) -> usize {
        self.layers.len()
    }

    /// The image at `layer`.
    pub(crate) fn image(&self, layer: usize) -> &Rc<dyn Image> {
        &self.layers[layer].image
    }

    /// Where the layers below the top end, the furthest of them: past it, nothing below can ever show through, whichever
    /// layers a stream may let go of.
    pub(crate) fn below_ends(&self) -> u64 {
        self.layers[1..].iter().map(|layer| layer.image.size()).max().unwrap_or(0)
    }

    /// The first run of `range`, asking layers `first..last` from the top down. Layers below the top never change, so
    /// what one of them answered before an await still holds after it.
    pub(crate) async fn resolve(&self, first: usize, last: usize, range: GuestRange) -> Result<Run> {
        let mut range = range;
        for layer in first..last {
            let image = self.image(layer);
            let end = GuestOffset(image.size());
            if range.start() >= end {
                return Ok(Run { len: range.len(), found: Found::PastEnd(layer) });
            }
            range = range.intersect(GuestRange::between(GuestOffset::ZERO, end));
            let Mapped { len, mapping } = mapped(&**image, range).await?;
            range = range.first(len);
            match mapping {
                Mapping::Data(host) | Mapping::Shared(host) => {
                    return Ok(Run { len, found: Found::Data(layer, host) });
                }
                Mapping::Packed => return Ok(Run { len, found: Found::Packed(layer) }),
                Mapping::Zero => return Ok(Run { len, found: Found::Zero(layer) }),
                Mapping::Unallocated => {}
            }
        }
        Ok(Run { len: range.len(), found: Found::Nothing })
    }

    /// How much of a run of data is alike, and whether it is stored or a hole of the file.
    pub(crate) async fn stored(&self, layer: usize, host: HostOffset, len: u64) -> Result<(u64, Backing)> {
        let image = self.image(layer);
        if !image.lies_plainly() {
            return Ok((len, Backing::Data));
        }
        let extent = image.store().extent(HostRange::new(host, len)).await?;
        Ok((extent.len.clamp(1, len), extent.backing))
    }
}

/// What `image` says about the start of `range` (not empty, within its size), loading tables as needed.
pub(crate) async fn mapped(image: &dyn Image, range: GuestRange) -> Result<Mapped> {
    loop {
        if let Some(mapped) = image.lookup(range)? {
            debug_assert!(mapped.len >= 1 && mapped.len <= range.len(), "{mapped:?} for {range}");
            return Ok(mapped);
        }
        image.load(range).await?;
    }
}
