//! Numbers at a place in bytes. What the bytes do not hold is zeros: a header is checked for its length once.

fn chunk<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(chunk(bytes, at))
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(chunk(bytes, at))
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(chunk(bytes, at))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(chunk(bytes, at))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(chunk(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_zero() {
        let bytes = [1, 2, 3, 4, 5];
        assert_eq!((le16(&bytes, 3), le32(&bytes, 1), be32(&bytes, 1)), (0x504, 0x0504_0302, 0x0203_0405));
        assert_eq!((le32(&bytes, 2), be64(&bytes, 0), le64(&bytes, usize::MAX)), (0, 0, 0));
    }
}
