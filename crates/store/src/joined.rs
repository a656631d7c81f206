//! Several stores, one behind the other in one address space: an image that is made of several files. Read, never written.
//!
//! **Invariant.** Every part begins where its place is, whatever the parts before it hold; between two parts are zeros.

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Where parts begin: a multiple of what any store wants.
const ALIGN: u64 = 1 << 20;

/// See the module.
pub struct JoinedStore {
    name: String,
    parts: Vec<(HostOffset, Rc<dyn Store>)>,
    end: HostOffset,
}

impl JoinedStore {
    /// `parts`, in this order; each place it is given to is in the second value. [`ErrorKind::OutOfRange`] if all of them are longer
    /// than any file.
    pub fn new(name: &str, parts: Vec<Rc<dyn Store>>) -> crate::Result<(Rc<Self>, Vec<HostOffset>)> {
        let mut placed = Vec::with_capacity(parts.len());
        let mut end = HostOffset::ZERO;
        for part in parts {
            let size = part.size();
            placed.push((end, part));
            let next = end.get().checked_add(size).and_then(|end| end.checked_next_multiple_of(ALIGN));
            end = match next.filter(|next| i64::try_from(*next).is_ok()) {
                Some(next) => HostOffset(next),
                None => {
                    let why = "its files are longer than any disk";
                    return Err(Error::new(ErrorKind::OutOfRange, Operation::Open, name, None, why));
                }
            };
        }
        let places = placed.iter().map(|(at, _)| *at).collect();
        Ok((Rc::new(Self { name: name.to_owned(), parts: placed, end }), places))
    }

    /// The part that has the byte at `at`, where in it that is, and how far the part's place goes.
    fn find(&self, at: HostOffset) -> Option<(&Rc<dyn Store>, HostOffset, u64)> {
        let number = self.parts.partition_point(|(start, _)| *start <= at).checked_sub(1)?;
        let (start, part) = self.parts.get(number)?;
        let next = self.parts.get(number + 1).map_or(self.end.max(at), |(next, _)| *next);
        Some((part, HostOffset(at.get() - start.get()), next.get() - at.get()))
    }

    fn refused(&self, operation: Operation) -> IoFuture<'_, ()> {
        let why = "an image of several files is read, not written";
        let error = Error::new(ErrorKind::ReadOnly, operation, &self.name, None, why);
        Box::pin(async { Err(error) })
    }
}

impl Store for JoinedStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.end.get()
    }

    fn limits(&self) -> Limits {
        let of = |limit: fn(Limits) -> u32| self.parts.iter().map(|(_, part)| limit(part.limits())).max().unwrap_or(1);
        Limits {
            offset_align: of(|limits| limits.offset_align),
            memory_align: of(|limits| limits.memory_align),
            read_only: true,
            sparse: true,
            fixed_size: true,
        }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let mut done = 0;
            while done < into.len() {
                let rest = into.len() - done;
                match self.find(at + done as u64) {
                    Some((part, inside, left)) if left > 0 => {
                        let len = left.min(rest as u64) as usize;
                        part.read(inside, into.slice(done..done + len)).await?;
                        done += len;
                    }
                    _ => {
                        into.slice(done..into.len()).fill(0);
                        done = into.len();
                    }
                }
            }
            Ok(())
        })
    }

    fn write(&self, _: HostOffset, _: Iov, _: bool) -> IoFuture<'_, ()> {
        self.refused(Operation::Write)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn zero(&self, _: HostRange, _: ZeroMode) -> IoFuture<'_, ()> {
        self.refused(Operation::Zero)
    }

    fn set_size(&self, _: u64) -> IoFuture<'_, ()> {
        self.refused(Operation::SetSize)
    }

    fn allocate(&self, _: HostRange) -> IoFuture<'_, ()> {
        self.refused(Operation::Allocate)
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            match self.find(range.start()) {
                Some((part, inside, left)) if left > 0 => part.extent(inside.range(left.min(range.len()))).await,
                _ => Ok(HostExtent { len: range.len(), backing: Backing::Hole }),
            }
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let mut outcome = Ok(());
            for (_, part) in &self.parts {
                outcome = outcome.and(part.close().await);
            }
            outcome
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;
    use ring::sim::Sim;

    #[test]
    fn reads_go_over_the_borders_and_between_parts_are_zeros() {
        Sim::new(1).block_on(async {
            let whole = MemoryStore::from_bytes("a", &vec![1; ALIGN as usize]);
            let short = MemoryStore::from_bytes("b", &[2; 10]);
            let last = MemoryStore::from_bytes("c", &[3; 10]);
            let (joined, places) = JoinedStore::new("all", vec![whole, short, last]).unwrap();
            assert_eq!(places, [HostOffset(0), HostOffset(ALIGN), HostOffset(2 * ALIGN)]);
            let into = Iov::alloc(ALIGN as usize + 40);
            joined.read(HostOffset(ALIGN - 5), into.clone()).await.unwrap();
            let bytes = into.to_vec();
            assert!(
                bytes[..5] == [1; 5] && bytes[5..15] == [2; 10] && bytes[15..ALIGN as usize].iter().all(|b| *b == 0)
            );
            assert!(bytes[ALIGN as usize + 5..ALIGN as usize + 15] == [3; 10]);
            joined.read(HostOffset(100 * ALIGN), into.clone()).await.unwrap();
            assert!(into.is_zero());
            assert_eq!(
                joined.write(HostOffset(0), Iov::zeroed(1), false).await.unwrap_err().kind(),
                ErrorKind::ReadOnly
            );
            joined.close().await.unwrap();
        });
    }
}
