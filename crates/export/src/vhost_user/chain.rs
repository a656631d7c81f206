//! Descriptor chains: from a head in the available ring to two lists of ranges, every one of them still the guest's word.
//!
//! The guest is not trusted. A walk reads each descriptor once, takes a bounded number of steps, and tells two kinds of
//! wrong apart: [`Malformed`], where the chain has no certain end (so there is no byte to put a status into), and a
//! [`Flaw`], where the chain can be followed to its end but must not be served.
//!
//! Specification: VIRTIO 1.3, 2.7.5 to 2.7.8.

use smallvec::SmallVec;
use std::fmt;
use std::ops::Range;
use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::memory::Memory;

/// Descriptors one request may have, those of an indirect table included.
pub(super) const MAX_DESCRIPTORS: u32 = 1024;

/// Size of a descriptor in bytes.
const DESCRIPTOR: u32 = 16;

/// A run of guest memory, as a descriptor names it. Unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it starts.
    pub at: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// The ranges of one direction, in order.
#[derive(Debug, Default)]
pub(super) struct Span {
    segments: SmallVec<[Segment; 6]>,
    len: u64,
}

impl Span {
    fn push(&mut self, segment: Segment) {
        self.len += u64::from(segment.len);
        self.segments.push(segment);
    }

    /// Total length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The ranges that hold the bytes `range` (clipped to what there is).
    pub(super) fn cut(&self, range: Range<u64>) -> impl Iterator<Item = Segment> + '_ {
        let mut start = 0;
        self.segments.iter().filter_map(move |segment| {
            let here = start..start + u64::from(segment.len);
            start = here.end;
            let (from, to) = (range.start.max(here.start), range.end.min(here.end));
            (from < to).then(|| Segment {
                // An address past the end of the address space is none that memory has; saturating keeps it so.
                at: GuestAddress(segment.at.0.saturating_add(from - here.start)),
                len: (to - from) as u32,
            })
        })
    }
}

/// Why a chain must not be served although it can be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// A descriptor of no bytes.
    Empty,
    /// Memory the device may only read comes after memory it may write.
    Order,
    /// More than 2^32 bytes.
    TooLong,
}

/// Why a chain cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// The head lies outside of the table.
    Head,
    /// A `next` that points outside of the table.
    Next,
    /// More descriptors than there can be: a loop, or too long.
    Loop,
    /// The table is no memory.
    Table,
    /// An indirect table that was not negotiated, is nested, goes on, is empty, or is no whole number of descriptors.
    Indirect,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Head => "a head outside of the descriptor table",
            Self::Next => "a chain that leaves the descriptor table",
            Self::Loop => "a chain without an end",
            Self::Table => "descriptors that are no memory",
            Self::Indirect => "an indirect table that is not allowed",
        })
    }
}

/// A chain followed to its end.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the device may read.
    pub readable: Span,
    /// What the device may write.
    pub writable: Span,
    /// What is wrong with it, if anything.
    pub flaw: Option<Flaw>,
}

impl Chain {
    /// Follows the chain that starts at `head` of the table at `table` (`size` descriptors).
    pub(super) fn follow(
        memory: &Memory,
        table: GuestAddress,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<Self, Malformed> {
        if head >= size {
            return Err(Malformed::Head);
        }
        let mut chain = Self::default();
        let mut table = table;
        let mut size = u32::from(size);
        let mut next = u32::from(head);
        // Steps left in this table: one more than it has descriptors is a loop.
        let mut steps = size;
        let mut total = 0;
        let mut inside = false;
        loop {
            if steps == 0 || total == MAX_DESCRIPTORS {
                return Err(Malformed::Loop);
            }
            let at = table.checked_add(u64::from(next * DESCRIPTOR)).ok_or(Malformed::Table)?;
            let descriptor: Descriptor = memory.read_obj(at).map_err(|_| Malformed::Table)?;
            if descriptor.refers_to_indirect_table() {
                let entries = descriptor.len() / DESCRIPTOR;
                let whole = descriptor.len().is_multiple_of(DESCRIPTOR) && (1..=MAX_DESCRIPTORS).contains(&entries);
                if !indirect || inside || descriptor.has_next() || !whole {
                    return Err(Malformed::Indirect);
                }
                (table, size, next, steps, inside) = (descriptor.addr(), entries, 0, entries, true);
                continue;
            }
            (steps, total) = (steps - 1, total + 1);
            chain.push(&descriptor);
            if descriptor.flags() & VRING_DESC_F_NEXT as u16 == 0 {
                return Ok(chain);
            }
            next = u32::from(descriptor.next());
            if next >= size {
                return Err(Malformed::Next);
            }
        }
    }

    fn push(&mut self, descriptor: &Descriptor) {
        let segment = Segment { at: descriptor.addr(), len: descriptor.len() };
        if segment.len == 0 {
            self.flaw = Some(Flaw::Empty);
        } else if descriptor.is_write_only() {
            self.writable.push(segment);
        } else {
            if self.writable.len() > 0 {
                self.flaw = Some(Flaw::Order);
            }
            self.readable.push(segment);
        }
        if self.readable.len() + self.writable.len() > u64::from(u32::MAX) {
            self.flaw = Some(Flaw::TooLong);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::memory::GuestMap;
    use proptest::prelude::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const TABLE: GuestAddress = GuestAddress(0x1000);
    const SECOND: u64 = 0x4000;
    const SIZE: u16 = 16;

    /// Address, length, flags, next.
    type Parts = (u64, u32, u16, u16);

    fn memory(descriptors: &[Parts], second: &[Parts]) -> std::rc::Rc<GuestMap> {
        let map = GuestMap::anonymous(&[(0, 0x8000)]);
        for (base, list) in [(TABLE.0, descriptors), (SECOND, second)] {
            for (i, &(at, len, flags, next)) in list.iter().enumerate() {
                let place = GuestAddress(base + 16 * i as u64);
                map.memory().write_obj(Descriptor::new(at, len, flags, next), place).unwrap();
            }
        }
        map
    }

    fn follow(descriptors: &[Parts], second: &[Parts]) -> Result<Chain, Malformed> {
        Chain::follow(memory(descriptors, second).memory(), TABLE, SIZE, 0, true)
    }

    fn segments(span: &Span) -> Vec<(u64, u32)> {
        span.cut(0..u64::MAX).map(|s| (s.at.0, s.len)).collect()
    }

    #[test]
    fn a_plain_chain_is_split_by_direction() {
        let chain = follow(&[(0x10, 16, NEXT, 3), (0, 0, 0, 0), (0, 0, 0, 0), (0x20, 512, NEXT | WRITE, 1)], &[]);
        assert_eq!(chain.unwrap().flaw, Some(Flaw::Empty), "descriptor 1 is empty");
        let chain = follow(&[(0x10, 16, NEXT, 2), (0x30, 1, WRITE, 9), (0x20, 512, NEXT | WRITE, 1)], &[]).unwrap();
        assert_eq!(chain.flaw, None);
        assert_eq!(segments(&chain.readable), [(0x10, 16)]);
        assert_eq!(segments(&chain.writable), [(0x20, 512), (0x30, 1)]);
        assert_eq!((chain.readable.len(), chain.writable.len()), (16, 513));
    }

    #[test]
    fn a_cut_crosses_segments() {
        let chain = follow(&[(100, 10, NEXT, 1), (200, 10, NEXT, 2), (300, 10, 0, 0)], &[]).unwrap();
        let cut = |range| chain.readable.cut(range).map(|s| (s.at.0, s.len)).collect::<Vec<_>>();
        assert_eq!(cut(0..10), [(100, 10)]);
        assert_eq!(cut(5..25), [(105, 5), (200, 10), (300, 5)]);
        assert_eq!(cut(10..11), [(200, 1)]);
        assert_eq!(cut(30..90), []);
        assert_eq!(cut(29..90), [(309, 1)]);
    }

    #[test]
    fn an_indirect_table_is_followed_after_plain_descriptors() {
        let second = [(0x20, 512, NEXT | WRITE, 2), (0, 0, 0, 0), (0x30, 1, WRITE, 0)];
        let chain = follow(&[(0x10, 16, NEXT, 1), (SECOND, 48, INDIRECT, 0)], &second).unwrap();
        assert_eq!(segments(&chain.readable), [(0x10, 16)]);
        assert_eq!(segments(&chain.writable), [(0x20, 512), (0x30, 1)]);
        assert_eq!(chain.flaw, None);
    }

    #[test]
    fn chains_without_a_certain_end_are_malformed() {
        let cases: &[(Malformed, &[Parts], &[Parts])] = &[
            (Malformed::Loop, &[(0, 1, NEXT, 0)], &[]),
            (Malformed::Loop, &[(0, 1, NEXT, 1), (0, 1, NEXT, 0)], &[]),
            (Malformed::Next, &[(0, 1, NEXT, SIZE)], &[]),
            (Malformed::Indirect, &[(SECOND, 16, INDIRECT | NEXT, 1), (0, 1, 0, 0)], &[(0, 1, 0, 0)]),
            (Malformed::Indirect, &[(SECOND, 0, INDIRECT, 0)], &[]),
            (Malformed::Indirect, &[(SECOND, 24, INDIRECT, 0)], &[(0, 1, 0, 0)]),
            (Malformed::Indirect, &[(SECOND, 16 * 1025, INDIRECT, 0)], &[(0, 1, 0, 0)]),
            (Malformed::Indirect, &[(SECOND, 16, INDIRECT, 0)], &[(SECOND, 16, INDIRECT, 0)]),
            (Malformed::Next, &[(SECOND, 16, INDIRECT, 0)], &[(0, 1, NEXT, 1)]),
            (Malformed::Loop, &[(SECOND, 32, INDIRECT, 0)], &[(0, 1, NEXT, 1), (0, 1, NEXT, 0)]),
            (Malformed::Table, &[(0x7ff8, 32, INDIRECT, 0)], &[]),
            (Malformed::Table, &[(u64::MAX - 15, 32, INDIRECT, 0)], &[]),
        ];
        for (want, descriptors, second) in cases {
            assert_eq!(follow(descriptors, second).unwrap_err(), *want, "{descriptors:?} {second:?}");
        }
        let map = memory(&[(0, 1, 0, 0)], &[]);
        assert_eq!(Chain::follow(map.memory(), TABLE, SIZE, SIZE, true).unwrap_err(), Malformed::Head);
        assert_eq!(Chain::follow(map.memory(), GuestAddress(0x9000), SIZE, 0, true).unwrap_err(), Malformed::Table);
        let map = memory(&[(SECOND, 16, INDIRECT, 0)], &[(0, 1, 0, 0)]);
        assert_eq!(Chain::follow(map.memory(), TABLE, SIZE, 0, false).unwrap_err(), Malformed::Indirect);
    }

    #[test]
    fn flaws_leave_the_writable_end_known() {
        let chain = follow(&[(0x10, 16, NEXT, 1), (0x30, 1, WRITE | NEXT, 2), (0x40, 4, 0, 0)], &[]).unwrap();
        assert_eq!(chain.flaw, Some(Flaw::Order));
        assert_eq!(segments(&chain.writable), [(0x30, 1)]);
        let long = [(0, u32::MAX, NEXT, 1), (0, 16, NEXT, 2), (0x30, 1, WRITE, 0)];
        assert_eq!(follow(&long, &[]).unwrap().flaw, Some(Flaw::TooLong));
    }

    proptest! {
        /// Whatever the guest writes, a walk ends, within its bounds, and does not panic.
        #[test]
        fn any_garbage_ends(
            descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, 0u16..20), 16),
            second in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, 0u16..20), 16),
            tables in prop::collection::vec((0usize..16, 0u32..300), 0..3),
            head in 0u16..20,
        ) {
            let mut descriptors = descriptors;
            for (i, len) in tables {
                descriptors[i] = (SECOND, len, INDIRECT, 0);
            }
            let map = memory(&descriptors, &second);
            if let Ok(chain) = Chain::follow(map.memory(), TABLE, SIZE, head, true) {
                let count = segments(&chain.readable).len() + segments(&chain.writable).len();
                prop_assert!(count <= 32);
                prop_assert!(chain.readable.len() + chain.writable.len() > 0 || chain.flaw.is_some());
                let _ = map.buffer(chain.readable.cut(0..u64::MAX));
                let _ = map.buffer(chain.writable.cut(3..1000));
            }
        }
    }
}
