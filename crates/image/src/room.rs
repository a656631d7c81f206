//! Room for new clusters: what may be handed out, and growing the store when that is used up.
//!
//! **Invariants.**
//! * What is taken is [`Held`] by a guard that gives it back; only [`Held::keep`] lets go of it, when something refers to it.
//! * Growing, zeroing and cutting off run to their end even if the caller goes away.

use crate::Result;
use crate::space::Space;
use layout::{HostOffset, HostRange};
use ring::sync::Mutex;
use std::cell::RefCell;
use std::rc::Rc;
use store::{Operation, Store, ZeroMode};

/// The store grows ahead by an eighth of what is in use, within these bounds: few changes of its length, little to cut off.
const GROW_AHEAD: std::ops::RangeInclusive<u64> = 1 << 20..=32 << 20;

/// The room in one image's store.
pub(crate) struct Room {
    store: Rc<dyn Store>,
    cluster: u64,
    /// What may be handed out.
    pub(crate) space: RefCell<Space>,
    /// Whoever changes the store's length holds this.
    growing: Mutex<()>,
}

/// What the store is lengthened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Growth {
    /// With space behind it.
    Data,
    /// Without: most of a new table stays empty.
    Table,
}

impl Room {
    /// In `store`, in clusters of `cluster` bytes.
    pub(crate) fn new(store: Rc<dyn Store>, cluster: u64, space: Space) -> Rc<Self> {
        Rc::new(Self { store, cluster, space: RefCell::new(space), growing: Mutex::new(()) })
    }

    /// Whether the store can grow and shrink.
    pub(crate) fn growable(&self) -> bool {
        self.space.borrow().growable()
    }

    /// Takes up to `want` bytes, at least a cluster.
    pub(crate) async fn take(self: &Rc<Self>, want: u64) -> Result<Held> {
        loop {
            let taken = self.space.borrow_mut().take(want);
            if let Some(taken) = taken {
                return Ok(Held { room: self.clone(), range: taken.range, zeroed: taken.zeroed });
            }
            self.grow(want, Growth::Data).await?;
        }
    }

    /// Takes `bytes` side by side. Not necessarily zeros.
    pub(crate) async fn take_whole(self: &Rc<Self>, bytes: u64) -> Result<Held> {
        loop {
            let taken = self.space.borrow_mut().take_whole(bytes);
            if let Some(taken) = taken {
                return Ok(Held { room: self.clone(), range: taken.range, zeroed: taken.zeroed });
            }
            self.grow(bytes, Growth::Table).await?;
        }
    }

    /// Takes `bytes` side by side for a table, and sees to it that they read as zeros. Not to be dropped half way.
    pub(crate) async fn take_zeroed(self: &Rc<Self>, bytes: u64) -> Result<Held> {
        let mut held = self.take_whole(bytes).await?;
        held.zero().await?;
        Ok(held)
    }

    /// Makes the store at least so long that `bytes` more can be handed out, if it can be had; at least one cluster.
    async fn grow(self: &Rc<Self>, bytes: u64, how: Growth) -> Result<()> {
        if !self.growable() {
            return Err(self.no_space());
        }
        let room = self.clone();
        ring::spawn(async move {
            let _growing = room.growing.lock().await;
            let (end, left) = {
                let space = room.space.borrow();
                (space.end(), space.grown() - space.end())
            };
            let (least, most) = match how {
                Growth::Data => {
                    let ahead = (end / 8).clamp(*GROW_AHEAD.start(), *GROW_AHEAD.end());
                    (room.cluster, bytes.max(ahead.next_multiple_of(room.cluster)))
                }
                Growth::Table => (bytes, bytes),
            };
            if left >= least {
                return Ok(());
            }
            let mut failed = None;
            for len in [most, bytes, least] {
                match room.lengthen(end, len, how).await {
                    Ok(()) => {
                        room.space.borrow_mut().grew(end + len);
                        return Ok(());
                    }
                    Err(error) if error.kind() == store::ErrorKind::NoSpace => failed = Some(error),
                    Err(error) => return Err(error.into()),
                }
            }
            Err(failed.map_or_else(|| room.no_space(), Into::into))
        })
        .await
    }

    /// Lengthens the store to `end + len` bytes.
    async fn lengthen(&self, end: u64, len: u64, how: Growth) -> store::Result<()> {
        let Some(target) = end.checked_add(len).filter(|target| i64::try_from(*target).is_ok()) else {
            let range = HostOffset(end).range(len);
            let why = "no file can be that long";
            let (kind, name) = (store::ErrorKind::NoSpace, self.store.name());
            return Err(store::Error::new(kind, Operation::Allocate, name, Some(range), why));
        };
        if how == Growth::Data {
            match self.store.allocate(HostOffset(end).range(len)).await {
                Err(error) if error.kind() == store::ErrorKind::NoSpace => return Err(error),
                // Only a hint.
                Ok(()) | Err(_) => {}
            }
        }
        if self.store.size() < target {
            self.store.set_size(target).await?;
        }
        Ok(())
    }

    fn no_space(&self) -> crate::Error {
        let why = "no free cluster is left, and the store cannot grow";
        store::Error::new(store::ErrorKind::NoSpace, Operation::Allocate, self.store.name(), None, why).into()
    }

    /// Cuts off what lies behind the last cluster in use. Nothing is reserved.
    pub(crate) async fn trim(&self) -> Result<()> {
        let _growing = self.growing.lock().await;
        let length = {
            let mut space = self.space.borrow_mut();
            if !space.growable() {
                return Ok(());
            }
            space.trim()
        };
        if self.store.size() > length {
            self.store.set_size(length).await?;
            self.space.borrow_mut().trimmed();
        }
        Ok(())
    }
}

/// Space taken, and referred to by nothing yet.
pub(crate) struct Held {
    room: Rc<Room>,
    range: HostRange,
    zeroed: bool,
}

impl Held {
    /// Where.
    pub(crate) fn range(&self) -> HostRange {
        self.range
    }

    /// It reads as zeros.
    pub(crate) fn zeroed(&self) -> bool {
        self.zeroed
    }

    /// Makes it read as zeros. Not to be dropped half way.
    pub(crate) async fn zero(&mut self) -> Result<()> {
        if !self.zeroed {
            self.room.store.zero(self.range, ZeroMode { unmap: true }).await?;
            self.zeroed = true;
        }
        Ok(())
    }

    /// Lets go of what lies in front of `end`: something refers to it. Gives the rest back.
    pub(crate) fn keep_front(mut self, end: HostOffset) {
        self.range = HostRange::between(end.clamp(self.range.start(), self.range.end()), self.range.end());
    }

    /// Lets go of it: from now on something refers to it.
    pub(crate) fn keep(mut self) -> HostRange {
        std::mem::take(&mut self.range)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.room.space.borrow_mut().give_back(self.range);
    }
}
