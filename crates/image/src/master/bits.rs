//! Bitmaps that say which sectors are here: runs of bits that are alike.

/// Which bit of a byte comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The one of the least value (VHDX).
    LeastFirst,
    /// The one of the greatest value (VHD).
    GreatestFirst,
}

/// Whether bit `first` is set, and how many from there on, up to `end`, are like it. What the bytes do not hold is not set.
pub(crate) fn run(bytes: &[u8], first: usize, end: usize, order: Order) -> (bool, usize) {
    let bit = |n: usize| {
        let byte = bytes.get(n / 8).copied().unwrap_or(0);
        let place = if order == Order::LeastFirst { n % 8 } else { 7 - n % 8 };
        byte >> place & 1 == 1
    };
    let set = bit(first);
    let whole = if set { 0xff } else { 0 };
    let mut at = first + 1;
    while at < end {
        // Whole bytes at a time, where that is possible.
        if at.is_multiple_of(8) {
            let rest = bytes.get(at / 8..(end / 8).min(bytes.len())).unwrap_or_default();
            at += 8 * rest.iter().take_while(|byte| **byte == whole).count();
            if at >= end {
                break;
            }
        }
        if bit(at) != set {
            break;
        }
        at += 1;
    }
    (set, at.min(end).max(first + 1) - first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_as_long_as_bits_are_alike(
            bytes in prop::collection::vec(prop_oneof![Just(0_u8), Just(0xff), any::<u8>()], 1..40),
            (first, len) in (0..300_usize, 1..300_usize),
            least in any::<bool>(),
        ) {
            let order = if least { Order::LeastFirst } else { Order::GreatestFirst };
            let mut bits = Vec::new();
            for byte in bytes.iter().copied().chain([0; 80]) {
                let byte = if least { byte } else { byte.reverse_bits() };
                bits.extend((0..8).map(|n| byte >> n & 1 == 1));
            }
            let (set, count) = run(&bytes, first, first + len, order);
            let alike = bits[first..first + len].iter().take_while(|bit| **bit == bits[first]).count();
            prop_assert_eq!((set, count), (bits[first], alike));
        }
    }
}
