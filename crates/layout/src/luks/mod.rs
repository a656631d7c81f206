//! LUKS, version 1 ("LUKS On-Disk Format Specification" 1.2.3): a header with eight key slots, and in each the master key, split and
//! encrypted under a passphrase. All numbers are big-endian; places count sectors of 512 bytes.

use crate::field::{Error, ErrorKind};
use crate::{HostOffset, HostRange};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 592;

/// What it begins with.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// The unit of places, and of what is encrypted at a time.
pub const SECTOR: u64 = 512;

/// Key slots.
pub const SLOTS: usize = 8;

/// Bytes of the digest of the master key.
pub const DIGEST_BYTES: usize = 20;

/// Bytes of a salt.
pub const SALT_BYTES: usize = 32;

/// Pieces of a split key, as everybody has it.
pub const STRIPES: u32 = 4000;

/// Rounds of a key's derivation that are carried out at most: a minute or so.
pub const MAX_ITERATIONS: u32 = 100_000_000;

const ACTIVE: u32 = 0x00ac_71f3;
const DEAD: u32 = 0x0000_dead;

/// One key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// It holds a key.
    pub active: bool,
    /// Rounds of the passphrase's derivation.
    pub iterations: u32,
    /// Its salt.
    pub salt: [u8; SALT_BYTES],
    /// Where the split key is.
    pub material: HostOffset,
    /// In how many pieces.
    pub stripes: u32,
}

impl Slot {
    /// Where the slot of this number stands in the header.
    pub fn place(number: usize) -> u64 {
        208 + number as u64 * 48
    }

    /// Its bytes there. The first four say whether it is active, and lie in one sector whatever the slot.
    pub fn encode(&self) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes[..4].copy_from_slice(&(if self.active { ACTIVE } else { DEAD }).to_be_bytes());
        bytes[4..8].copy_from_slice(&self.iterations.to_be_bytes());
        bytes[8..40].copy_from_slice(&self.salt);
        bytes[40..44].copy_from_slice(&((self.material.get() / SECTOR) as u32).to_be_bytes());
        bytes[44..].copy_from_slice(&self.stripes.to_be_bytes());
        bytes
    }
}

/// A header that makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// `aes`.
    pub cipher: String,
    /// `xts-plain64`.
    pub mode: String,
    /// `sha256`.
    pub hash: String,
    /// Where the data begin.
    pub payload: HostOffset,
    /// Bytes of the master key.
    pub key_bytes: usize,
    /// Tells whether a master key is right.
    pub digest: [u8; DIGEST_BYTES],
    /// Its salt.
    pub digest_salt: [u8; SALT_BYTES],
    /// Its rounds.
    pub digest_iterations: u32,
    /// The volume's name.
    pub uuid: String,
    /// The slots.
    pub slots: [Slot; SLOTS],
}

/// A field of text, up to its first NUL.
fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let field = bytes.get(at..at + len).unwrap_or_default();
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

impl Header {
    /// From the first [`HEADER_BYTES`] of a volume.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail =
            |kind, field, at: usize, value: u64, why: &'static str| Err(Error::new(kind, field, at as u64, value, why));
        let u32_at = |at: usize| u32::from_be_bytes(array(bytes, at));
        if !bytes.starts_with(&MAGIC) || bytes.len() < HEADER_BYTES {
            return fail(ErrorKind::Foreign, "magic", 0, u32_at(0).into(), "not a LUKS volume");
        }
        let version = u16::from_be_bytes(array(bytes, 6));
        if version != 1 {
            return fail(ErrorKind::Unsupported, "version", 6, version.into(), "only version 1 is known");
        }
        let key_bytes = u32_at(108);
        if !matches!(key_bytes, 16 | 24 | 32 | 48 | 64) {
            return fail(ErrorKind::Invalid, "key_bytes", 108, key_bytes.into(), "no length of a key");
        }
        let sound = |iterations: u32| (1..=MAX_ITERATIONS).contains(&iterations);
        let digest_iterations = u32_at(164);
        if !sound(digest_iterations) {
            return fail(ErrorKind::Invalid, "mk_digest_iter", 164, digest_iterations.into(), "no number of rounds");
        }
        let slot = |number: usize| {
            let at = 208 + number * 48;
            Slot {
                active: u32_at(at) == ACTIVE,
                iterations: u32_at(at + 4),
                salt: array(bytes, at + 8),
                material: HostOffset(u64::from(u32_at(at + 40)) * SECTOR),
                stripes: u32_at(at + 44),
            }
        };
        let slots: [Slot; SLOTS] = std::array::from_fn(slot);
        for (number, slot) in slots.iter().enumerate().filter(|(_, slot)| slot.active) {
            let at = 208 + number * 48;
            if !sound(slot.iterations) {
                return fail(ErrorKind::Invalid, "iterations", at + 4, slot.iterations.into(), "no number of rounds");
            }
            if slot.stripes != STRIPES {
                return fail(
                    ErrorKind::Unsupported,
                    "stripes",
                    at + 44,
                    slot.stripes.into(),
                    "only 4000 pieces are known",
                );
            }
        }
        Ok(Self {
            cipher: text(bytes, 8, 32),
            mode: text(bytes, 40, 32),
            hash: text(bytes, 72, 32),
            payload: HostOffset(u64::from(u32_at(104)) * SECTOR),
            key_bytes: key_bytes as usize,
            digest: array(bytes, 112),
            digest_salt: array(bytes, 132),
            digest_iterations,
            uuid: text(bytes, 168, 40),
            slots,
        })
    }

    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        let cut = |text: &str, len: usize| text.as_bytes()[..text.len().min(len - 1)].to_vec();
        put(0, &MAGIC);
        put(6, &1_u16.to_be_bytes());
        put(8, &cut(&self.cipher, 32));
        put(40, &cut(&self.mode, 32));
        put(72, &cut(&self.hash, 32));
        put(104, &((self.payload.get() / SECTOR) as u32).to_be_bytes());
        put(108, &(self.key_bytes as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, &cut(&self.uuid, 40));
        for (number, slot) in self.slots.iter().enumerate() {
            put(Slot::place(number) as usize, &slot.encode());
        }
        bytes
    }

    /// Bytes of a split key.
    pub fn material_bytes(&self) -> u64 {
        self.key_bytes as u64 * u64::from(STRIPES)
    }

    /// Where the split key of a slot is.
    pub fn material(&self, slot: &Slot) -> HostRange {
        slot.material.range(self.material_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_went() {
        let slot = Slot { active: false, iterations: 0, salt: [7; 32], material: HostOffset(4096), stripes: STRIPES };
        let header = Header {
            cipher: "aes".into(),
            mode: "xts-plain64".into(),
            hash: "sha256".into(),
            payload: HostOffset(4040 * 512),
            key_bytes: 64,
            digest: [3; 20],
            digest_salt: [4; 32],
            digest_iterations: 1000,
            uuid: "0123".into(),
            slots: [Slot { active: true, iterations: 5, ..slot }, slot, slot, slot, slot, slot, slot, slot],
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        for (at, value) in [(0, 1), (7, 2), (111, 5), (164, 0xff), (212, 0xff), (255, 1)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(Header::decode(&bad).is_err(), "byte {at}");
        }
        assert!(Header::decode(&bytes[..100]).is_err());
    }
}
