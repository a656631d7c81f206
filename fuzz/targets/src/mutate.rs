//! Small changes to inputs, by a seed: for runs without a coverage-guided fuzzer.

/// SplitMix64, by its published constants.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Numbers that code likes to stumble over.
const AWKWARD: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];

/// An input of at most `longest` bytes made out of one or two of `corpus` (not empty).
pub fn mutated(corpus: &[Vec<u8>], seed: u64, longest: usize) -> Vec<u8> {
    let mut state = seed;
    let mut below = |bound: usize| if bound == 0 { 0 } else { (next(&mut state) % bound as u64) as usize };
    let mut bytes = corpus[below(corpus.len())].clone();
    for _ in 0..=below(6) {
        let at = below(bytes.len() + 1);
        match below(7) {
            0 => bytes.insert(at, below(256) as u8),
            1 if at < bytes.len() => bytes[at] = below(256) as u8,
            2 if at < bytes.len() => bytes[at] ^= 1 << below(8),
            3 => {
                let end = (at + below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let (value, width) = (AWKWARD[below(AWKWARD.len())], [1, 2, 4, 8][below(4)]);
                let value =
                    if below(2) == 0 { value.to_le_bytes() } else { value.rotate_left(64 - 8 * width).to_be_bytes() };
                for (place, byte) in bytes.iter_mut().skip(at).zip(&value[..width as usize]) {
                    *place = *byte;
                }
            }
            5 => {
                let other = &corpus[below(corpus.len())];
                let from = below(other.len() + 1);
                let part = &other[from..(from + below(64)).min(other.len())];
                bytes.splice(at..at, part.iter().copied());
            }
            _ => {
                let part = bytes[at..(at + below(32)).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
    bytes.truncate(longest);
    bytes
}
