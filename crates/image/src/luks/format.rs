//! Making a header: a new master key, split, and encrypted under a passphrase in the first slot. As QEMU makes them: AES of 256 bits
//! in XTS, plain64, SHA-256.

use super::Passphrase;
use super::unlock::Hash;
use crate::{Error, ErrorKind, Result};
use layout::HostOffset;
use layout::luks::{DIGEST_BYTES, HEADER_BYTES, Header, SALT_BYTES, SECTOR, SLOTS, STRIPES, Slot};
use std::time::{Duration, Instant};
use store::cipher::Cipher;
use zeroize::Zeroizing;

/// Bytes of the master key.
const KEY_BYTES: usize = 64;

/// Alignment of split keys.
const ALIGN: u64 = 4096;

/// How long deriving a key shall take on this machine.
const DERIVING: Duration = Duration::from_millis(500);

/// Rounds that are made in any case, whatever the machine.
const LEAST_ROUNDS: u32 = 1000;

/// A header, ready to be written.
pub(crate) struct Plan {
    /// The header with its split keys: everything in front of the data.
    pub(crate) bytes: Vec<u8>,
    /// Where data begin.
    pub(crate) payload: HostOffset,
    /// For the data.
    pub(crate) cipher: Cipher,
}

/// Bytes of a header with its split keys.
pub(crate) fn header_bytes() -> u64 {
    let material = (KEY_BYTES as u64 * u64::from(STRIPES)).next_multiple_of(ALIGN);
    ALIGN + SLOTS as u64 * material
}

pub(super) fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut *bytes).map_err(no_random)?;
    Ok(bytes)
}

pub(super) fn no_random(error: getrandom::Error) -> Error {
    Error::new(ErrorKind::Unsupported, "", None, format!("the system gives no random numbers: {error}"))
}

/// Rounds that take about `span` (half a second, if nothing is said).
pub(super) fn rounds_in(span: Option<Duration>, hash: Hash) -> u32 {
    let span = span.unwrap_or(DERIVING);
    const TRIED: u32 = 10_000;
    let mut into = [0; 32];
    let began = Instant::now();
    hash.derive(b"measure", b"measure", TRIED, &mut into);
    let each = began.elapsed().as_secs_f64() / f64::from(TRIED);
    ((span.as_secs_f64() / each.max(1e-9)) as u32).clamp(LEAST_ROUNDS, 50_000_000)
}

/// Makes a header under this passphrase.
pub(crate) async fn plan(passphrase: Passphrase, deriving: Option<Duration>) -> Result<Plan> {
    ring::unblock(move || made(&passphrase, rounds_in(deriving, Hash::Sha256))).await
}

fn made(passphrase: &Passphrase, rounds: u32) -> Result<Plan> {
    let key = random::<KEY_BYTES>()?;
    let (salt, digest_salt) = (*random::<SALT_BYTES>()?, *random::<SALT_BYTES>()?);
    let uuid = uuid(&*random::<16>()?);
    let mut digest = [0; DIGEST_BYTES];
    let digest_iterations = (rounds / 8).max(LEAST_ROUNDS);
    Hash::Sha256.derive(&*key, &digest_salt, digest_iterations, &mut digest);
    let step = (KEY_BYTES as u64 * u64::from(STRIPES)).next_multiple_of(ALIGN);
    let slots = std::array::from_fn(|number| Slot {
        active: number == 0,
        iterations: if number == 0 { rounds } else { 0 },
        salt: if number == 0 { salt } else { [0; SALT_BYTES] },
        material: HostOffset(ALIGN + number as u64 * step),
        stripes: STRIPES,
    });
    let header = Header {
        cipher: "aes".into(),
        mode: "xts-plain64".into(),
        hash: "sha256".into(),
        payload: HostOffset(header_bytes().next_multiple_of(SECTOR)),
        key_bytes: KEY_BYTES,
        digest,
        digest_salt,
        digest_iterations,
        uuid,
        slots,
    };
    let mut material = split(&*key, Hash::Sha256)?;
    let mut derived = Zeroizing::new([0; KEY_BYTES]);
    Hash::Sha256.derive(passphrase.bytes(), &salt, rounds, &mut *derived);
    let unknown = |error: store::cipher::UnknownCipher| Error::new(ErrorKind::Unsupported, "", None, error.to_string());
    Cipher::new(&header.cipher, &header.mode, &*derived).map_err(unknown)?.encrypt(0, &mut material);
    let mut bytes = vec![0; header_bytes() as usize];
    bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
    let at = header.slots[0].material.get() as usize;
    bytes[at..at + material.len()].copy_from_slice(&material);
    let cipher = Cipher::new(&header.cipher, &header.mode, &*key).map_err(unknown)?;
    Ok(Plan { bytes, payload: header.payload, cipher })
}

/// Splits a key into pieces all of which are needed.
pub(super) fn split(key: &[u8], hash: Hash) -> Result<Zeroizing<Vec<u8>>> {
    let len = key.len();
    let mut material = Zeroizing::new(vec![0; len * STRIPES as usize]);
    let last = len * (STRIPES as usize - 1);
    getrandom::fill(&mut material[..last]).map_err(no_random)?;
    let mut sum = Zeroizing::new(vec![0_u8; len]);
    for stripe in material[..last].chunks_exact(len) {
        sum.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
        hash.diffuse(&mut sum);
    }
    material[last..].iter_mut().zip(key.iter().zip(&*sum)).for_each(|(piece, (a, b))| *piece = a ^ b);
    Ok(material)
}

/// A random UUID (RFC 9562, version 4).
fn uuid(random: &[u8; 16]) -> String {
    let mut bytes = *random;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::super::unlock::{merge, unlock};
    use super::*;
    use ring::sim::Sim;
    use std::rc::Rc;
    use store::Store;
    use store::memory::MemoryStore;

    #[test]
    fn a_split_key_comes_together_again() {
        let key: Vec<u8> = (0..64).collect();
        assert_eq!(**merge(&split(&key, Hash::Sha256).unwrap(), 64, Hash::Sha256), *key);
    }

    #[test]
    fn the_right_passphrase_unlocks_and_no_other() {
        let plan = made(&Passphrase::new(b"open sesame"), LEAST_ROUNDS).unwrap();
        assert_eq!(plan.payload.get() as usize, plan.bytes.len());
        let mut sector = vec![5; 512];
        plan.cipher.encrypt(9, &mut sector);
        Sim::new(1).block_on(async {
            let store: Rc<dyn Store> = MemoryStore::from_bytes("v", &plan.bytes);
            let unlocked = unlock(&store, HostOffset::ZERO, None, b"open sesame").await.unwrap();
            unlocked.cipher.decrypt(9, &mut sector);
            assert!(sector == [5; 512]);
            let error = unlock(&store, HostOffset::ZERO, None, b"open barley").await.map(drop).unwrap_err();
            assert!(error.to_string().contains("Invalid password"), "{error}");
        });
    }
}
