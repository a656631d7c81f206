//! From a passphrase to the master key.

use super::slots::KeySlots;
use crate::{Error, ErrorKind, Result};
use hmac::digest::{Digest, FixedOutputReset};
use layout::HostOffset;
use layout::luks::{DIGEST_BYTES, HEADER_BYTES, Header, SECTOR};
use ring::Iov;
use std::rc::Rc;
use store::Store;
use store::cipher::Cipher;
use zeroize::Zeroizing;

/// The hashes that LUKS may be made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "sha1" => Some(Self::Sha1),
            "sha256" => Some(Self::Sha256),
            "sha512" => Some(Self::Sha512),
            _ => None,
        }
    }

    /// The one that a header states.
    pub(super) fn of(header: &Header, store: &dyn Store, at: HostOffset) -> Result<Self> {
        Self::from_name(&header.hash).ok_or_else(|| {
            let what = format!("its hash '{}' is not known (sha1, sha256, sha512 are)", header.hash);
            Error::new(ErrorKind::Unsupported, store.name(), Some(at), what)
        })
    }

    /// PBKDF2 (RFC 8018) with HMAC of this hash.
    pub(crate) fn derive(self, secret: &[u8], salt: &[u8], rounds: u32, into: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>(secret, salt, rounds, into),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(secret, salt, rounds, into),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>(secret, salt, rounds, into),
        }
    }

    /// Spreads what each bit says over all of `bytes` (the specification's H1).
    pub(crate) fn diffuse(self, bytes: &mut [u8]) {
        match self {
            Self::Sha1 => diffuse::<sha1::Sha1>(bytes),
            Self::Sha256 => diffuse::<sha2::Sha256>(bytes),
            Self::Sha512 => diffuse::<sha2::Sha512>(bytes),
        }
    }
}

fn diffuse<D: Digest + FixedOutputReset>(bytes: &mut [u8]) {
    let mut hasher = D::new();
    for (number, part) in (0_u32..).zip(bytes.chunks_mut(<D as Digest>::output_size())) {
        Digest::update(&mut hasher, number.to_be_bytes());
        Digest::update(&mut hasher, &part);
        let hashed = hasher.finalize_reset();
        part.copy_from_slice(&hashed[..part.len()]);
    }
}

/// Puts a split key of `len` bytes together.
pub(crate) fn merge(material: &[u8], len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0_u8; len]);
    let count = material.len() / len;
    for (number, stripe) in material.chunks_exact(len).enumerate() {
        key.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
        if number + 1 < count {
            hash.diffuse(&mut key);
        }
    }
    key
}

/// What a passphrase has unlocked.
pub(crate) struct Unlocked {
    pub(crate) cipher: Cipher,
    /// Where the data begin, in a volume by itself.
    pub(crate) payload: HostOffset,
    pub(crate) slots: KeySlots,
}

/// The master key, and where it was found.
pub(super) struct Key {
    pub(super) header: Header,
    pub(super) slot: usize,
    pub(super) bytes: Zeroizing<Vec<u8>>,
}

/// Finds the master key in the header at `at`, which has `room` bytes for itself and its slots, or as much as it says.
pub(crate) async fn unlock(
    store: &Rc<dyn Store>,
    at: HostOffset,
    room: Option<u64>,
    passphrase: &[u8],
) -> Result<Unlocked> {
    let Some(Key { header, bytes, .. }) = find_key(store, at, passphrase, 0).await? else {
        let what = "Invalid password, cannot unlock any keyslot";
        return Err(Error::new(ErrorKind::InvalidArgument, store.name(), None, what));
    };
    let unsupported = |what: String| Error::new(ErrorKind::Unsupported, store.name(), Some(at), what);
    let cipher = Cipher::new(&header.cipher, &header.mode, &bytes).map_err(|e| unsupported(e.to_string()))?;
    let room = room.unwrap_or(u64::MAX).min(header.payload.get());
    let slots = KeySlots { store: Rc::clone(store), at, room, key: Rc::new(bytes) };
    Ok(Unlocked { cipher, payload: header.payload, slots })
}

/// The first slot from `from` on that the passphrase unlocks.
pub(super) async fn find_key(
    store: &Rc<dyn Store>,
    at: HostOffset,
    passphrase: &[u8],
    from: usize,
) -> Result<Option<Key>> {
    let head = crate::master::read(&**store, at.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&head).map_err(|error| crate::master::damaged(store.name(), &error))?;
    let hash = Hash::of(&header, &**store, at)?;
    let unsupported = |what: String| Error::new(ErrorKind::Unsupported, store.name(), Some(at), what);
    // Found out before minutes are spent on a key that nothing can be done with.
    Cipher::new(&header.cipher, &header.mode, &vec![0; header.key_bytes]).map_err(|e| unsupported(e.to_string()))?;
    for (number, slot) in header.slots.iter().enumerate().skip(from).filter(|(_, slot)| slot.active) {
        let place = header.material(slot);
        let material = Iov::alloc(place.len().next_multiple_of(SECTOR) as usize);
        store.read(at + place.start().get(), material.clone()).await?;
        let material = Zeroizing::new(material.to_vec());
        let (secret, slot, of) = (Zeroizing::new(passphrase.to_vec()), *slot, header.clone());
        let found = ring::unblock(move || try_slot(&secret, &slot, &of, hash, material)).await;
        if let Some(bytes) = found {
            return Ok(Some(Key { slot: number, bytes, header }));
        }
    }
    Ok(None)
}

/// The master key, if the passphrase is this slot's.
fn try_slot(
    secret: &[u8],
    slot: &layout::luks::Slot,
    header: &Header,
    hash: Hash,
    mut material: Zeroizing<Vec<u8>>,
) -> Option<Zeroizing<Vec<u8>>> {
    let mut derived = Zeroizing::new(vec![0; header.key_bytes]);
    hash.derive(secret, &slot.salt, slot.iterations, &mut derived);
    Cipher::new(&header.cipher, &header.mode, &derived).ok()?.decrypt(0, &mut material);
    let key = merge(&material[..header.material_bytes() as usize], header.key_bytes, hash);
    let mut digest = [0; DIGEST_BYTES];
    hash.derive(&key, &header.digest_salt, header.digest_iterations, &mut digest);
    // Which bytes differ is nobody's to learn by the clock, though a local file tells little.
    let differs = digest.iter().zip(&header.digest).fold(0, |differs, (a, b)| differs | (a ^ b));
    (differs == 0).then_some(key)
}
