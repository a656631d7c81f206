//! What sectors hold: bytes from which a reader can tell who wrote them, and where.
//!
//! Every write has a number, its *value*. A sector of it repeats the value and the sector's own number, mixed, so that
//! half a sector, a sector in the wrong place and a mixture of two writes are all recognised. Zeros are the value 0.

use std::fmt;

/// Bytes that a disk writes as one.
pub(crate) const SECTOR: u64 = 512;

/// Who wrote a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Value(pub(crate) u64);

/// Nobody, or somebody who zeroed it.
pub(crate) const ZEROS: Value = Value(0);

/// Values from here on belong to layers of the chain.
const ORIGINAL: u64 = 1 << 48;

impl Value {
    /// What the layer of this number (0 the bottom) held from the beginning.
    pub(crate) fn original(layer: usize) -> Self {
        Self(ORIGINAL + layer as u64)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => write!(f, "zeros"),
            number if number >= ORIGINAL => write!(f, "what layer {} held", number - ORIGINAL),
            number => write!(f, "change {number}"),
        }
    }
}

fn word(value: Value, sector: u64, index: u64) -> u64 {
    value.0.wrapping_mul(2 * index + 0x9e37_79b9_7f4a_7c15) ^ sector.rotate_left(40) ^ 0x5a5a
}

/// The bytes of `count` sectors from `first` on.
pub(crate) fn sectors(value: Value, first: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((count * SECTOR) as usize);
    for sector in first..first + count {
        encode(value, sector, &mut bytes);
    }
    bytes
}

/// Appends one sector.
pub(crate) fn encode(value: Value, sector: u64, bytes: &mut Vec<u8>) {
    if value == ZEROS {
        bytes.resize(bytes.len() + SECTOR as usize, 0);
        return;
    }
    bytes.extend_from_slice(&value.0.to_le_bytes());
    for index in 1..SECTOR / 8 {
        bytes.extend_from_slice(&word(value, sector, index).to_le_bytes());
    }
}

/// Who wrote these bytes, if anybody wrote them as a whole for this sector.
pub(crate) fn decode(bytes: &[u8], sector: u64) -> Option<Value> {
    let at = |index: u64| {
        let start = index as usize * 8;
        u64::from_le_bytes(bytes[start..start + 8].try_into().unwrap_or_default())
    };
    let value = Value(at(0));
    if value == ZEROS {
        return (1..SECTOR / 8).all(|index| at(index) == 0).then_some(ZEROS);
    }
    (1..SECTOR / 8).all(|index| at(index) == word(value, sector, index)).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_who_wrote_it_and_where() {
        let bytes = sectors(Value(7), 3, 2);
        assert_eq!(decode(&bytes[..512], 3), Some(Value(7)));
        assert_eq!(decode(&bytes[512..], 4), Some(Value(7)));
        assert_eq!(decode(&bytes[512..], 3), None, "in the wrong place");
        let mixed = [&bytes[..256], &sectors(Value(8), 3, 1)[256..]].concat();
        assert_eq!(decode(&mixed, 3), None, "half of one, half of another");
        let half = [&bytes[..256], &[0; 256]].concat();
        assert_eq!(decode(&half, 3), None, "half of it");
        assert_eq!(decode(&[0; 512], 9), Some(ZEROS));
    }
}
