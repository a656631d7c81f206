//! Space that nobody sees yet.
//!
//! **Invariant.** Between [`crate::Image::reserve`] and [`Reservation::link`] no table in memory or on disk points to the
//! reserved clusters; linking is one synchronous step, so "look once more, then link" is atomic on the shard.

use layout::{GuestOffset, GuestRange, HostOffset};
use std::cell::Cell;
use std::rc::Rc;

/// What a reservation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Clusters that will hold data.
    Data,
    /// Marks that say "zeros here"; no space is taken.
    Zero,
}

/// Which clusters a link may publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All: a guest's write (which holds the range exclusively). What was mapped before is given back.
    New,
    /// Only where the image is still unallocated at this moment: populate. Elsewhere the reserved cluster is given back.
    Unallocated,
}

/// What [`Reservation::link`] did, in bytes of whole clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Linked {
    /// Published.
    pub linked: u64,
    /// Given back, because somebody else was there first or the caller's veto said no.
    pub dropped: u64,
}

/// Counts the reservations of one image that are handed out or in the making.
#[derive(Default)]
pub(crate) struct Active(Rc<Cell<usize>>);

impl Active {
    /// How many there are.
    pub(crate) fn get(&self) -> usize {
        self.0.get()
    }

    /// One more, until the answer is dropped.
    pub(crate) fn begin(&self) -> Busy {
        self.0.set(self.0.get() + 1);
        Busy(Rc::clone(&self.0))
    }
}

/// One of them.
pub(crate) struct Busy(Rc<Cell<usize>>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// What a format does with a reservation. One implementation a format.
pub trait Reserved {
    /// Publishes in memory, cluster by cluster, those of `range` that `keep` and `veto` (true: leave this cluster alone) allow;
    /// gives the others back. Synchronous.
    fn link(&mut self, range: GuestRange, keep: Keep, veto: &dyn Fn(GuestOffset) -> bool) -> Linked;

    /// Gives everything back.
    fn release(&mut self, range: GuestRange);
}

/// Clusters reserved for a run of the guest's bytes. Dropping it gives them back; do so only when no write to them is in
/// flight any more.
#[must_use = "dropping a reservation gives the space back"]
pub struct Reservation {
    range: GuestRange,
    host: Option<HostOffset>,
    zeroed: bool,
    inner: Option<Box<dyn Reserved>>,
}

impl Reservation {
    /// For formats: `range` is whole clusters; `host` is where the run begins (`None` for [`Purpose::Zero`]).
    pub fn new(range: GuestRange, host: Option<HostOffset>, inner: Box<dyn Reserved>) -> Self {
        Self { range, host, zeroed: false, inner: Some(inner) }
    }

    /// For formats: says that the clusters read as zeros as they are.
    pub fn with_zeroed(mut self, zeroed: bool) -> Self {
        self.zeroed = zeroed;
        self
    }

    /// The whole clusters it covers. May reach past the image's size in the last cluster; those bytes exist in the store
    /// and must be written as zeros.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// Where in the store the run's bytes go; `None` for [`Purpose::Zero`].
    pub fn host(&self) -> Option<HostOffset> {
        self.host
    }

    /// Whether the clusters read as zeros as they are, now and after a crash: where the payload is zeros, nothing needs to be
    /// written.
    pub fn zeroed(&self) -> bool {
        self.zeroed
    }

    /// Publishes in memory what `keep` allows and `veto` does not forbid (it is asked with each cluster's first byte;
    /// true means "leave this cluster alone"); gives the rest back. The data must have been written completely.
    pub fn link(mut self, keep: Keep, veto: impl Fn(GuestOffset) -> bool) -> Linked {
        match self.inner.take() {
            Some(mut inner) => inner.link(self.range, keep, &veto),
            None => Linked::default(),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(mut inner) = self.inner.take() {
            inner.release(self.range);
        }
    }
}
