//! Addresses: a byte in the disk the guest sees is a [`GuestOffset`], a byte in the file that holds an image is a
//! [`HostOffset`]. The two never mix: only an image's tables turn one into the other.
//!
//! Ranges are half-open and never wrap: `start + len` fits in a `u64` (checked where a range is made).

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $offset:ident, $(#[$rdoc:meta])* $range:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $offset(pub u64);

        impl $offset {
            /// The first byte.
            pub const ZERO: Self = Self(0);

            /// The plain number, in bytes.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on; `None` past the end of the address space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(at) => Some(Self(at)),
                    None => None,
                }
            }

            /// Rounded down to a multiple of `unit` (a power of two).
            #[inline]
            pub const fn align_down(self, unit: u64) -> Self {
                Self(self.0 & !(unit - 1))
            }

            /// Rounded up to a multiple of `unit` (a power of two); saturates at the last such multiple.
            #[inline]
            pub const fn align_up(self, unit: u64) -> Self {
                match self.0.checked_add(unit - 1) {
                    Some(at) => Self(at & !(unit - 1)),
                    None => Self(u64::MAX & !(unit - 1)),
                }
            }

            /// Whether this is a multiple of `unit` (a power of two).
            #[inline]
            pub const fn is_aligned(self, unit: u64) -> bool {
                self.0 & (unit - 1) == 0
            }

            /// The range of `len` bytes that starts here. Saturates at the end of the address space.
            #[inline]
            pub const fn range(self, len: u64) -> $range {
                $range::new(self, len)
            }
        }

        impl std::ops::Add<u64> for $offset {
            type Output = Self;
            #[inline]
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl std::ops::Sub for $offset {
            type Output = u64;
            #[inline]
            fn sub(self, earlier: Self) -> u64 {
                self.0 - earlier.0
            }
        }

        impl fmt::Debug for $offset {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $offset {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        $(#[$rdoc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $range {
            start: $offset,
            len: u64,
        }

        impl $range {
            /// `len` bytes from `start`; clipped at the end of the address space.
            #[inline]
            pub const fn new(start: $offset, len: u64) -> Self {
                let room = u64::MAX - start.0;
                Self { start, len: if len < room { len } else { room } }
            }

            /// From `start` up to, not including, `end`; empty when `end` is not past `start`.
            #[inline]
            pub const fn between(start: $offset, end: $offset) -> Self {
                Self { start, len: end.0.saturating_sub(start.0) }
            }

            /// The first byte's address.
            #[inline]
            pub const fn start(self) -> $offset {
                self.start
            }

            /// The address just past the last byte.
            #[inline]
            pub const fn end(self) -> $offset {
                $offset(self.start.0 + self.len)
            }

            /// Length in bytes.
            #[inline]
            pub const fn len(self) -> u64 {
                self.len
            }

            /// Whether there is no byte in it.
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.len == 0
            }

            /// Whether `at` lies inside.
            #[inline]
            pub const fn contains(self, at: $offset) -> bool {
                at.0 >= self.start.0 && at.0 - self.start.0 < self.len
            }

            /// Whether the two share at least one byte.
            #[inline]
            pub const fn overlaps(self, other: Self) -> bool {
                self.start.0 < other.end().0 && other.start.0 < self.end().0 && self.len > 0 && other.len > 0
            }

            /// What both have in common (possibly empty, then at the later start).
            #[inline]
            pub fn intersect(self, other: Self) -> Self {
                Self::between(self.start.max(other.start), self.end().min(other.end()))
            }

            /// The smallest range of whole `unit`s (a power of two) that covers this one.
            #[inline]
            pub const fn align_outward(self, unit: u64) -> Self {
                Self::between(self.start.align_down(unit), self.end().align_up(unit))
            }

            /// The largest range of whole `unit`s (a power of two) inside this one (possibly empty).
            #[inline]
            pub const fn align_inward(self, unit: u64) -> Self {
                Self::between(self.start.align_up(unit), self.end().align_down(unit))
            }

            /// Whether both ends are multiples of `unit` (a power of two).
            #[inline]
            pub const fn is_aligned(self, unit: u64) -> bool {
                self.start.is_aligned(unit) && self.len & (unit - 1) == 0
            }

            /// The first `len` bytes (all of it when shorter).
            #[inline]
            pub const fn first(self, len: u64) -> Self {
                Self { start: self.start, len: if len < self.len { len } else { self.len } }
            }

            /// What is left behind the first `len` bytes (empty when shorter).
            #[inline]
            pub const fn skip(self, len: u64) -> Self {
                let len = if len < self.len { len } else { self.len };
                Self { start: $offset(self.start.0 + len), len: self.len - len }
            }
        }

        impl fmt::Debug for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}+{:#x}", self.start.0, self.len)
            }
        }

        impl fmt::Display for $range {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}+{:#x}", self.start.0, self.len)
            }
        }
    };
}

address! {
    /// A byte address in the disk as the guest sees it.
    GuestOffset,
    /// A run of bytes in the disk as the guest sees it.
    GuestRange
}

address! {
    /// A byte address in the file (or other store) that holds an image.
    HostOffset,
    /// A run of bytes in the file (or other store) that holds an image.
    HostRange
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_wrap() {
        let all = GuestRange::new(GuestOffset(10), u64::MAX);
        assert_eq!(all.end(), GuestOffset(u64::MAX));
        assert_eq!(GuestOffset(u64::MAX - 3).align_up(512), GuestOffset(u64::MAX - 511));
    }

    #[test]
    fn alignment_outward_covers_inward_is_covered() {
        let r = GuestRange::new(GuestOffset(1000), 5000);
        assert_eq!(r.align_outward(4096), GuestRange::new(GuestOffset(0), 8192));
        assert!(r.align_inward(4096).is_empty() || r.contains(r.align_inward(4096).start()));
        assert_eq!(GuestRange::new(GuestOffset(100), 100).align_inward(4096).len(), 0);
    }

    #[test]
    fn intersection_is_shared_bytes() {
        let a = HostRange::new(HostOffset(0), 10);
        let b = HostRange::new(HostOffset(5), 10);
        assert!(a.overlaps(b));
        assert_eq!(a.intersect(b), HostRange::new(HostOffset(5), 5));
        assert!(!a.overlaps(HostRange::new(HostOffset(10), 1)));
        assert!(a.intersect(HostRange::new(HostOffset(20), 1)).is_empty());
    }
}
