//! Encryption of sectors, and a decorator that keeps a store encrypted.
//!
//! [`Cipher`] is AES in the modes that disks use; [`CipherStore`] is a store whose bytes are encrypted in another one, sector by
//! sector, each by its number.

mod decorator;

pub use decorator::CipherStore;

use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{
    BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser, KeyInit, KeyIvInit,
};
use aes::{Aes128, Aes192, Aes256};
use sha2::{Digest, Sha256};
use std::fmt;
use xts_mode::{Xts128, get_tweak_default};

/// What is encrypted at a time, in bytes.
pub const SECTOR: usize = 512;

/// Bytes of a block of AES.
const BLOCK: usize = 16;

/// How a sector's number becomes an initialization vector.
enum Vectors {
    /// Its low 32 bits.
    Plain,
    /// All 64.
    Plain64,
    /// All 64, encrypted under the key's hash.
    Essiv(Box<Aes256>),
}

/// One of the three sizes of AES.
enum Mode {
    Xts128(Box<Xts128<Aes128>>),
    Xts192(Box<Xts128<Aes192>>),
    Xts256(Box<Xts128<Aes256>>),
    Cbc(Vec<u8>),
}

/// A cipher with its key. (The primitives forget their keys when they are dropped, where they can.)
pub struct Cipher {
    mode: Mode,
    vectors: Vectors,
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher")
    }
}

/// Why there is no such cipher.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cipher '{0}' is not known (aes with xts or cbc, and plain, plain64 or essiv:sha256, are)")]
pub struct UnknownCipher(String);

impl Cipher {
    /// `name` and `mode` as LUKS has them: `aes`, `xts-plain64`.
    pub fn new(name: &str, mode: &str, key: &[u8]) -> Result<Self, UnknownCipher> {
        let unknown = || UnknownCipher(format!("{name}-{mode} with {} bits", key.len() * 8));
        let (chaining, vectors) = mode.split_once('-').ok_or_else(unknown)?;
        if name != "aes" {
            return Err(unknown());
        }
        let vectors = match vectors {
            "plain" => Vectors::Plain,
            "plain64" => Vectors::Plain64,
            "essiv:sha256" => {
                let hashed = Sha256::digest(key);
                Vectors::Essiv(Box::new(Aes256::new_from_slice(&hashed).map_err(|_| unknown())?))
            }
            _ => return Err(unknown()),
        };
        let half = key.len() / 2;
        let (first, second) = key.split_at(half);
        let mode = match (chaining, key.len()) {
            ("xts", 32) => Mode::Xts128(Box::new(xts(first, second).ok_or_else(unknown)?)),
            ("xts", 48) => Mode::Xts192(Box::new(xts(first, second).ok_or_else(unknown)?)),
            ("xts", 64) => Mode::Xts256(Box::new(xts(first, second).ok_or_else(unknown)?)),
            ("cbc", 16 | 24 | 32) => Mode::Cbc(key.to_vec()),
            _ => return Err(unknown()),
        };
        Ok(Self { mode, vectors })
    }

    fn vector(&self, sector: u64) -> Array<u8, U16> {
        let number = match self.vectors {
            Vectors::Plain => sector & u64::from(u32::MAX),
            Vectors::Plain64 | Vectors::Essiv(_) => sector,
        };
        let mut vector = get_tweak_default(number.into());
        if let Vectors::Essiv(cipher) = &self.vectors {
            cipher.encrypt_block(&mut vector);
        }
        vector
    }

    /// Encrypts whole sectors, the first of which has this number.
    pub fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let vector = self.vector(sector);
            match &self.mode {
                Mode::Xts128(xts) => xts.encrypt_sector(bytes, vector),
                Mode::Xts192(xts) => xts.encrypt_sector(bytes, vector),
                Mode::Xts256(xts) => xts.encrypt_sector(bytes, vector),
                Mode::Cbc(key) => match key.len() {
                    16 => chain::<cbc::Encryptor<Aes128>>(key, &vector, bytes),
                    24 => chain::<cbc::Encryptor<Aes192>>(key, &vector, bytes),
                    _ => chain::<cbc::Encryptor<Aes256>>(key, &vector, bytes),
                },
            }
        }
    }

    /// Decrypts whole sectors, the first of which has this number.
    pub fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let vector = self.vector(sector);
            match &self.mode {
                Mode::Xts128(xts) => xts.decrypt_sector(bytes, vector),
                Mode::Xts192(xts) => xts.decrypt_sector(bytes, vector),
                Mode::Xts256(xts) => xts.decrypt_sector(bytes, vector),
                Mode::Cbc(key) => match key.len() {
                    16 => unchain::<cbc::Decryptor<Aes128>>(key, &vector, bytes),
                    24 => unchain::<cbc::Decryptor<Aes192>>(key, &vector, bytes),
                    _ => unchain::<cbc::Decryptor<Aes256>>(key, &vector, bytes),
                },
            }
        }
    }
}

fn xts<C>(first: &[u8], second: &[u8]) -> Option<Xts128<C>>
where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>,
{
    Some(Xts128::new(C::new_from_slice(first).ok()?, C::new_from_slice(second).ok()?))
}

/// Encrypts in a chain; the key was found to fit when the cipher was made.
fn chain<M>(key: &[u8], vector: &[u8], bytes: &mut [u8])
where
    M: KeyIvInit + BlockModeEncrypt + BlockSizeUser<BlockSize = U16>,
{
    let Ok(mut mode) = M::new_from_slices(key, vector) else { return };
    for block in bytes.chunks_exact_mut(BLOCK) {
        if let Ok(block) = <&mut Array<u8, U16>>::try_from(block) {
            mode.encrypt_block(block);
        }
    }
}

/// The reverse.
fn unchain<M>(key: &[u8], vector: &[u8], bytes: &mut [u8])
where
    M: KeyIvInit + BlockModeDecrypt + BlockSizeUser<BlockSize = U16>,
{
    let Ok(mut mode) = M::new_from_slices(key, vector) else { return };
    for block in bytes.chunks_exact_mut(BLOCK) {
        if let Ok(block) = <&mut Array<u8, U16>>::try_from(block) {
            mode.decrypt_block(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encrypted_is_decrypted_and_sectors_differ() {
        for (mode, len) in [
            ("xts-plain64", 32),
            ("xts-plain64", 48),
            ("xts-plain64", 64),
            ("xts-plain", 64),
            ("cbc-plain64", 16),
            ("cbc-plain", 24),
            ("cbc-essiv:sha256", 32),
        ] {
            let key: Vec<u8> = (0..len).collect();
            let cipher = Cipher::new("aes", mode, &key).unwrap();
            let mut bytes = vec![7_u8; 2 * SECTOR];
            cipher.encrypt(5, &mut bytes);
            assert!(bytes[..SECTOR] != bytes[SECTOR..] && bytes[..16] != [7; 16], "{mode}");
            let mut second = bytes[SECTOR..].to_vec();
            cipher.decrypt(6, &mut second);
            assert!(second == [7; SECTOR], "{mode}");
            cipher.decrypt(5, &mut bytes);
            assert!(bytes == [7; 2 * SECTOR], "{mode}");
        }
    }

    #[test]
    fn the_published_vector_of_xts_comes_out() {
        // IEEE 1619-2007, vector 4 has a whole sector of 512 bytes; its first block.
        let key: Vec<u8> =
            [0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71, 0x35, 0x26]
                .into_iter()
                .chain([0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64, 0x33, 0x83, 0x27, 0x95])
                .collect();
        let mut sector: Vec<u8> = (0..SECTOR).map(|n| n as u8).collect();
        Cipher::new("aes", "xts-plain64", &key).unwrap().encrypt(0, &mut sector);
        let expected = [0x27, 0xa7, 0x47, 0x9b, 0xef, 0xa1, 0xd4, 0x76, 0x48, 0x9f, 0x30, 0x8c, 0xd4, 0xcf, 0xa6, 0xe2];
        assert_eq!(sector[..16], expected);
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (name, mode, len) in
            [("twofish", "xts-plain64", 64), ("aes", "xts-plain64", 16), ("aes", "ctr-plain", 32), ("aes", "xts", 64)]
        {
            let error = Cipher::new(name, mode, &vec![0; len]).unwrap_err();
            assert!(error.to_string().contains(mode), "{error}");
        }
    }
}
