//! A part of another store: what lies in it from one place on, at a size that does not change.
//!
//! **Invariant.** Nothing outside of the part is read or written.

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// A part of a store.
pub struct PartStore {
    whole: Rc<dyn Store>,
    start: u64,
    size: u64,
}

impl PartStore {
    /// What lies in `whole` from `start` on: `size` bytes, or all the rest.
    pub fn new(whole: Rc<dyn Store>, start: u64, size: Option<u64>) -> Result<Rc<Self>> {
        let refuse = |what: String| Err(Error::new(ErrorKind::OutOfRange, Operation::Open, whole.name(), None, what));
        let Some(rest) = whole.size().checked_sub(start) else {
            return refuse(format!(
                "Offset ({start}) cannot be greater than size of the containing file ({})",
                whole.size()
            ));
        };
        let size = size.unwrap_or(rest);
        if size > rest {
            let (end, all) = (start.saturating_add(size), whole.size());
            return refuse(format!(
                "The sum of offset ({start}) and size ({size}), {end}, is past the end of the containing file ({all})"
            ));
        }
        Ok(Rc::new(Self { whole, start, size }))
    }

    /// Where that is in the whole; of what lies past the end nothing.
    fn place(&self, range: HostRange) -> HostRange {
        let inside = range.intersect(HostOffset::ZERO.range(self.size));
        HostOffset(self.start + inside.start().get().min(self.size)).range(inside.len())
    }

    /// Fails where `range` is not wholly inside.
    fn check(&self, operation: Operation, range: HostRange) -> Result<()> {
        if range.end().get() <= self.size {
            return Ok(());
        }
        let why = "it is a part of a file, whose size cannot change";
        Err(Error::new(ErrorKind::OutOfRange, operation, self.name(), Some(range), why))
    }
}

impl Store for PartStore {
    fn name(&self) -> &str {
        self.whole.name()
    }

    fn protocol(&self) -> &'static str {
        self.whole.protocol()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        let limits = self.whole.limits();
        // Aligned as its start is.
        let start = if self.start == 0 { u32::MAX } else { 1 << self.start.trailing_zeros().min(31) };
        let offset_align = if start < limits.offset_align { 1 } else { limits.offset_align };
        Limits { offset_align, sparse: false, fixed_size: true, ..limits }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        let place = self.place(at.range(into.len() as u64));
        Box::pin(async move {
            let held = place.len() as usize;
            into.slice(held..into.len()).fill(0);
            if held > 0 { self.whole.read(place.start(), into.slice(0..held)).await } else { Ok(()) }
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check(Operation::Write, at.range(from.len() as u64))?;
            self.whole.write(HostOffset(self.start + at.get()), from, fua).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.whole.flush()
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check(Operation::Zero, range)?;
            self.whole.zero(self.place(range), mode).await
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let same = HostOffset::ZERO.range(if size == self.size { size } else { u64::MAX });
            self.check(Operation::SetSize, same)
        })
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        let place = self.place(range);
        Box::pin(async move { if place.is_empty() { Ok(()) } else { self.whole.allocate(place).await } })
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        let place = self.place(range);
        Box::pin(async move {
            if place.is_empty() {
                return Ok(HostExtent { len: range.len(), backing: Backing::Hole });
            }
            self.whole.extent(place).await
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.whole.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;
    use ring::sim::Sim;

    #[test]
    fn nothing_outside_is_touched() {
        Sim::new(1).block_on(async {
            let whole = MemoryStore::from_bytes("whole", &[7; 4096]);
            let part = PartStore::new(whole.clone(), 1000, Some(512)).unwrap();
            part.write(HostOffset(0), Iov::from_slice(&[1; 512]), false).await.unwrap();
            part.zero(HostOffset(500).range(12), ZeroMode::default()).await.unwrap();
            assert!(part.write(HostOffset(1), Iov::from_slice(&[2; 512]), false).await.is_err());
            assert!(part.zero(HostOffset(500).range(13), ZeroMode::default()).await.is_err());
            assert!(part.set_size(513).await.is_err() && part.set_size(512).await.is_ok());
            let bytes = Iov::alloc(20);
            part.read(HostOffset(496), bytes.clone()).await.unwrap();
            assert_eq!(bytes.to_vec(), [vec![1; 4], vec![0; 16]].concat());
            part.read(HostOffset(u64::MAX - 30), bytes.clone()).await.unwrap();
            assert_eq!(bytes.to_vec(), [0; 20]);
            let all = whole.to_vec();
            assert!(all[..1000].iter().chain(&all[1512..]).all(|byte| *byte == 7));
            assert!(PartStore::new(whole.clone(), 4097, None).is_err());
            assert!(PartStore::new(whole.clone(), 4000, Some(97)).is_err());
            assert_eq!(PartStore::new(whole, 4000, None).unwrap().size(), 96);
        });
    }
}
