//! Refcounts: numbers of 1 to 64 bits, packed into blocks.
//!
//! Numbers of less than a byte begin at a byte's least significant bit; larger ones are big-endian.

/// Where a block lies, as the refcount table says; the low bits are reserved.
pub const BLOCK_OFFSET: u64 = !511;

/// The largest refcount of `1 << order` bits.
pub const fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1 << order))
}

/// The refcount at `index` of a block; 0 past its end. `order` is at most 6.
#[inline]
pub fn get(block: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    if order < 3 {
        let bits = 1 << order;
        let bit = index * bits;
        let byte = block.get(bit / 8).copied().unwrap_or(0);
        return u64::from(byte >> (bit % 8)) & ((1 << bits) - 1);
    }
    let bytes = 1 << (order - 3);
    let number = block.get(index * bytes..(index + 1) * bytes).unwrap_or_default();
    number.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// All refcounts of a block.
pub fn all(block: &[u8], order: u32) -> Vec<u64> {
    match order {
        // What nearly every image has.
        4 => block.as_chunks().0.iter().map(|number| u64::from(u16::from_be_bytes(*number))).collect(),
        _ => (0..((block.len() as u64) * 8) >> order).map(|index| get(block, order, index)).collect(),
    }
}

/// Sets the refcount at `index`, which is in the block, to `value`, which fits.
pub fn set(block: &mut [u8], order: u32, index: u64, value: u64) {
    let index = index as usize;
    if order < 3 {
        let bits = 1 << order;
        let bit = index * bits;
        if let Some(byte) = block.get_mut(bit / 8) {
            let mask = ((1_u16 << bits) - 1) as u8;
            *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        }
        return;
    }
    let bytes = 1 << (order - 3);
    if let Some(number) = block.get_mut(index * bytes..(index + 1) * bytes) {
        number.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_holds_its_numbers_and_leaves_its_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let entries = (512 * 8) >> order;
            let value = |index: u64| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 3) & max(order);
            for index in 0..entries {
                set(&mut block, order, index, value(index));
            }
            for index in 0..entries {
                assert_eq!(get(&block, order, index), value(index), "order {order}, {index}");
            }
            assert_eq!(all(&block, order), (0..entries).map(value).collect::<Vec<_>>());
            set(&mut block, order, 3, 0);
            assert_eq!((get(&block, order, 2), get(&block, order, 3), get(&block, order, 4)), (value(2), 0, value(4)));
            assert_eq!(get(&block, order, entries), 0, "past the end");
        }
        assert_eq!((max(0), max(4), max(6)), (1, 65535, u64::MAX));
    }

    #[test]
    fn bits_lie_as_the_specification_has_them() {
        let mut block = [0; 8];
        set(&mut block, 0, 1, 1);
        set(&mut block, 0, 8, 1);
        assert_eq!(block[..2], [2, 1]);
        let mut block = [0; 8];
        set(&mut block, 4, 1, 0x1234);
        assert_eq!(block[..4], [0, 0, 0x12, 0x34]);
    }
}
