//! Several stores as one, read only: the files of an image that is made of more than one.
//!
//! Each store has a stretch of the addresses for itself, one behind the other. Each begins at a multiple of [`APART`], so that what is
//! aligned in a store is aligned in the whole, too, and there is a gap between any two: no run of bytes goes on in the next store.
//!
//! **Invariants.**
//! * The order and the lengths of the stores are what they were when they were joined: a file that grows later shows no more.
//! * What lies between two stores, and past the last, is a hole.
//! * An error names the store it came from, and the place in that store.

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use futures_util::future::try_join_all;
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Stores begin at multiples of this.
pub const APART: u64 = 1 << 20;

/// The furthest that addresses go: what a file's length can say.
const END: u64 = i64::MAX as u64;

/// Several stores as one.
pub struct JoinedStore {
    name: String,
    /// In the order of their places.
    parts: Vec<Part>,
    limits: Limits,
}

struct Part {
    place: HostRange,
    store: Rc<dyn Store>,
}

/// A piece of a range that lies in one store.
struct Piece<'a> {
    store: &'a Rc<dyn Store>,
    /// Where it is in that store.
    at: HostOffset,
    /// Where it is in the range.
    inside: usize,
    len: usize,
}

impl JoinedStore {
    /// Joins `stores` (not none) to one that messages call `name`.
    pub fn new(name: &str, stores: Vec<Rc<dyn Store>>) -> Result<Rc<Self>> {
        let mut limits = Limits { offset_align: 1, memory_align: 1, read_only: true, sparse: false, fixed_size: true };
        let mut start = HostOffset::ZERO;
        let mut parts = Vec::with_capacity(stores.len());
        for store in stores {
            let place = start.range(store.size());
            let next = HostOffset(place.end().get().saturating_add(1)).align_up(APART);
            if next.get() > END {
                let why = "together with the files before it, it is longer than any file can be";
                return Err(Error::new(ErrorKind::OutOfRange, Operation::Open, store.name(), None, why));
            }
            limits.offset_align = limits.offset_align.max(store.limits().offset_align);
            limits.memory_align = limits.memory_align.max(store.limits().memory_align);
            parts.push(Part { place, store });
            start = next;
        }
        Ok(Rc::new(Self { name: name.to_owned(), parts, limits }))
    }

    /// Where store `part` is.
    pub fn place(&self, part: usize) -> HostRange {
        self.parts.get(part).map_or(HostOffset(self.size()).range(0), |part| part.place)
    }

    /// The pieces of `range` that lie in a store.
    fn pieces(&self, range: HostRange) -> impl Iterator<Item = Piece<'_>> {
        let first = self.parts.partition_point(|part| part.place.end() <= range.start());
        self.parts[first..].iter().take_while(move |part| part.place.start() < range.end()).filter_map(move |part| {
            let piece = part.place.intersect(range);
            (!piece.is_empty()).then(|| Piece {
                store: &part.store,
                at: HostOffset(piece.start() - part.place.start()),
                inside: (piece.start() - range.start()) as usize,
                len: piece.len() as usize,
            })
        })
    }

    fn refuse(&self, operation: Operation, range: Option<HostRange>) -> IoFuture<'_, ()> {
        let error =
            Error::new(ErrorKind::ReadOnly, operation, &self.name, range, "files that are joined are only read");
        Box::pin(async { Err(error) })
    }
}

impl Store for JoinedStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.place.end().get())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = at.range(into.len() as u64);
            let mut pieces: Vec<_> = self.pieces(range).collect();
            if let [Piece { store, at, len, .. }] = pieces[..]
                && len == into.len()
            {
                return store.read(at, into).await;
            }
            let covered: usize = pieces.iter().map(|piece| piece.len).sum();
            if covered < into.len() {
                into.fill(0);
            }
            let parts = pieces.drain(..).map(|piece| {
                let into = into.slice(piece.inside..piece.inside + piece.len);
                piece.store.read(piece.at, into)
            });
            try_join_all(parts).await.map(drop)
        })
    }

    fn write(&self, at: HostOffset, from: Iov, _: bool) -> IoFuture<'_, ()> {
        self.refuse(Operation::Write, Some(at.range(from.len() as u64)))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn zero(&self, range: HostRange, _: ZeroMode) -> IoFuture<'_, ()> {
        self.refuse(Operation::Zero, Some(range))
    }

    fn set_size(&self, _: u64) -> IoFuture<'_, ()> {
        self.refuse(Operation::SetSize, None)
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.refuse(Operation::Allocate, Some(range))
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            match self.pieces(range).next() {
                None => Ok(HostExtent { len: range.len(), backing: Backing::Hole }),
                Some(Piece { inside, .. }) if inside > 0 => {
                    Ok(HostExtent { len: inside as u64, backing: Backing::Hole })
                }
                Some(Piece { store, at, len, .. }) => store.extent(at.range(len as u64)).await,
            }
        })
    }

    fn locate(&self, at: HostOffset) -> (&str, HostOffset) {
        match self.pieces(at.range(1)).next() {
            Some(piece) => (piece.store.name(), piece.at),
            None => (&self.name, at),
        }
    }

    fn files(&self) -> Vec<(&str, u64)> {
        self.parts.iter().flat_map(|part| part.store.files()).collect()
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            let mut outcome = Ok(());
            for part in &self.parts {
                outcome = outcome.and(part.store.close().await);
            }
            outcome
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Action, Failure, FaultStore, Match};
    use crate::memory::MemoryStore;
    use ring::sim::Sim;

    fn joined(lens: &[usize]) -> (Rc<JoinedStore>, Vec<u8>) {
        let mut whole = Vec::new();
        let stores = lens.iter().enumerate().map(|(n, len)| {
            let bytes: Vec<u8> = (0..*len).map(|at| (at * 7 + n + 1) as u8 | 1).collect();
            if n > 0 {
                whole.resize((whole.len() + 1).next_multiple_of(APART as usize), 0);
            }
            whole.extend(&bytes);
            MemoryStore::from_bytes(&format!("part{n}"), &bytes) as Rc<dyn Store>
        });
        let stores: Vec<_> = stores.collect();
        (JoinedStore::new("whole", stores).unwrap(), whole)
    }

    #[test]
    fn it_reads_as_the_stores_one_behind_the_other() {
        let (store, mut whole) = joined(&[1000, 0, 3 << 20, 512]);
        assert_eq!((store.size(), store.place(2)), (whole.len() as u64, HostOffset(2 << 20).range(3 << 20)));
        assert_eq!(store.place(1).len(), 0);
        whole.resize(whole.len() + 2000, 0);
        Sim::new(1).block_on(async {
            let borders = [((2 << 20) - 5, 10), ((5 << 20) - 5, 10), ((6 << 20) - 5, 700)];
            for (at, len) in [(0, 10), (990, 20), (0, whole.len()), (2000, 3000)].into_iter().chain(borders) {
                let into = Iov::from_slice(&vec![0xee; len]);
                store.read(HostOffset(at as u64), into.clone()).await.unwrap();
                assert!(into.to_vec() == whole[at..at + len], "{at} {len}");
            }
            let far = Iov::from_slice(&[9; 10]);
            store.read(HostOffset(u64::MAX - 20), far.clone()).await.unwrap();
            assert!(far.is_zero());
        });
    }

    #[test]
    fn gaps_are_holes() {
        let (store, _) = joined(&[1000, 4096]);
        Sim::new(1).block_on(async {
            let extent = |at, len| store.extent(HostOffset(at).range(len));
            let is = |len, backing| Ok(HostExtent { len, backing });
            assert_eq!(extent(0, 5000).await.map_err(drop), is(1000, Backing::Data));
            assert_eq!(extent(1000, 2 << 20).await.map_err(drop), is((1 << 20) - 1000, Backing::Hole));
            assert_eq!(extent((1 << 20) + 6, 10).await.map_err(drop), is(10, Backing::Data));
            assert_eq!(extent(1 << 30, 10).await.map_err(drop), is(10, Backing::Hole));
            assert_eq!(store.locate(HostOffset((1 << 20) + 6)), ("part1", HostOffset(6)));
            assert_eq!(store.locate(HostOffset(1000)), ("whole", HostOffset(1000)));
            assert_eq!(store.files(), [("part0", 1000), ("part1", 4096)]);
        });
    }

    #[test]
    fn nothing_is_written_and_errors_name_their_store() {
        let (store, _) = joined(&[1000]);
        Sim::new(1).block_on(async {
            let range = HostOffset(0).range(1);
            for refused in [
                store.write(HostOffset(0), Iov::zeroed(1), false).await,
                store.zero(range, ZeroMode::default()).await,
                store.set_size(7).await,
                store.allocate(range).await,
            ] {
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
            }
            store.flush().await.unwrap();
            store.close().await.unwrap();
            let bad = FaultStore::new(MemoryStore::new("bad", 100), 1);
            bad.rule(Match::on(Operation::Read), Action::Fail(Failure::EIO));
            let whole = JoinedStore::new("whole", vec![MemoryStore::new("good", 100), bad]).unwrap();
            whole.read(HostOffset(90), Iov::alloc(20)).await.unwrap();
            let error = whole.read(HostOffset(90), Iov::alloc(APART as usize)).await.unwrap_err();
            assert!(error.store() == "bad" && error.range() == Some(HostOffset(0).range(90)), "{error}");
        });
    }

    #[test]
    fn too_much_is_refused() {
        let long = || MemoryStore::new("long", END - 10) as Rc<dyn Store>;
        assert!(JoinedStore::new("whole", vec![long()]).is_err());
        let half = || MemoryStore::new("half", 1 << 62) as Rc<dyn Store>;
        let error = JoinedStore::new("whole", vec![half(), half()]).err().unwrap();
        assert!(error.to_string().contains("half"), "{error}");
    }
}
