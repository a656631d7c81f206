//! A store whose bytes are encrypted in another one.
//!
//! **Invariants.**
//! * A sector is numbered by where it is from the beginning of this store.
//! * What is not a whole sector is read, changed and written back, one at a time.
//! * Nothing here is a hole: zeros are encrypted like everything else. What was never written reads as noise, so growing and
//!   allocating write zeros.

use super::{Cipher, SECTOR};
use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use ring::sync::Mutex;
use std::rc::Rc;

/// Bytes encrypted at a time: bounds the memory that a long write takes.
const PIECE: u64 = 1 << 20;

/// See the module.
pub struct CipherStore {
    inner: Rc<dyn Store>,
    /// `None`: nobody gave the key.
    cipher: Option<Cipher>,
    /// Where in the inner store it begins.
    base: HostOffset,
    /// Whoever reads, changes and writes back holds this.
    partial: Mutex<()>,
}

impl CipherStore {
    /// What is in `inner` from `base` on, a multiple of a sector.
    /// Without a cipher everything but reading its length is an error.
    pub fn new(inner: Rc<dyn Store>, cipher: Option<Cipher>, base: HostOffset) -> Rc<Self> {
        Rc::new(Self { inner, cipher, base, partial: Mutex::new(()) })
    }

    fn cipher(&self, operation: Operation, range: HostRange) -> Result<&Cipher> {
        self.cipher.as_ref().ok_or_else(|| {
            let why = "it is encrypted, and its passphrase was not given (--object secret,id=S,file=… and encrypt.key-secret=S)";
            Error::new(ErrorKind::Permission, operation, self.inner.name(), Some(range), why)
        })
    }

    fn outside(&self, at: HostOffset) -> HostOffset {
        self.base + at.get()
    }

    /// Whole sectors, decrypted.
    async fn sectors(&self, range: HostRange) -> Result<Vec<u8>> {
        let cipher = self.cipher(Operation::Read, range)?;
        let bytes = Iov::alloc(range.len() as usize);
        self.inner.read(self.outside(range.start()), bytes.clone()).await?;
        let mut bytes = bytes.to_vec();
        cipher.decrypt(range.start().get() / SECTOR as u64, &mut bytes);
        Ok(bytes)
    }

    async fn write_sectors(&self, at: HostOffset, mut bytes: Vec<u8>, fua: bool) -> Result<()> {
        let cipher = self.cipher(Operation::Write, at.range(bytes.len() as u64))?;
        cipher.encrypt(at.get() / SECTOR as u64, &mut bytes);
        self.inner.write(self.outside(at), Iov::from_slice(&bytes), fua).await
    }

    /// Writes a part of at most [`PIECE`] bytes.
    async fn write_part(&self, at: HostOffset, from: &Iov, fua: bool) -> Result<()> {
        let range = at.range(from.len() as u64);
        let wide = range.align_outward(SECTOR as u64);
        if wide == range {
            return self.write_sectors(at, from.to_vec(), fua).await;
        }
        let _alone = self.partial.lock().await;
        let mut bytes = self.sectors(wide).await?;
        let inside = (at.get() - wide.start().get()) as usize;
        from.read(0, &mut bytes[inside..inside + from.len()]);
        self.write_sectors(wide.start(), bytes, fua).await
    }

    async fn write_zeros(&self, range: HostRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let part = piece(rest);
            self.write_part(part.start(), &Iov::zeroed(part.len() as usize), false).await?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }
}

/// The first part of `range` that is worked on at a time; it ends where a sector does.
fn piece(range: HostRange) -> HostRange {
    range.first(PIECE - range.start().get() % SECTOR as u64)
}

impl Store for CipherStore {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn protocol(&self) -> &'static str {
        self.inner.protocol()
    }

    fn size(&self) -> u64 {
        self.inner.size().saturating_sub(self.base.get())
    }

    fn limits(&self) -> Limits {
        let limits = self.inner.limits();
        Limits { offset_align: limits.offset_align.max(SECTOR as u32), sparse: false, ..limits }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let size = self.size();
            let inside = size.saturating_sub(at.get()).min(into.len() as u64);
            into.slice(inside as usize..into.len()).fill(0);
            let mut rest = at.range(inside);
            while !rest.is_empty() {
                let part = piece(rest);
                let wide = part.align_outward(SECTOR as u64);
                let bytes = self.sectors(wide).await?;
                let skip = (part.start().get() - wide.start().get()) as usize;
                let to = (part.start().get() - at.get()) as usize;
                into.write(to, &bytes[skip..skip + part.len() as usize]);
                rest = rest.skip(part.len());
            }
            Ok(())
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let mut rest = at.range(from.len() as u64);
            while !rest.is_empty() {
                let part = piece(rest);
                let start = (part.start().get() - at.get()) as usize;
                self.write_part(part.start(), &from.slice(start..start + part.len() as usize), fua).await?;
                rest = rest.skip(part.len());
            }
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.inner.flush()
    }

    fn zero(&self, range: HostRange, _: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(self.write_zeros(range))
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let old = self.size();
            self.inner.set_size(self.base.get() + size).await?;
            if size > old {
                self.write_zeros(HostRange::between(HostOffset(old), HostOffset(size))).await
            } else {
                Ok(())
            }
        })
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        Box::pin(self.write_zeros(range))
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            let inside = self.size().saturating_sub(range.start().get()).min(range.len());
            if inside == 0 {
                return Ok(HostExtent { len: range.len(), backing: Backing::Hole });
            }
            Ok(HostExtent { len: inside, backing: Backing::Data })
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;
    use ring::sim::Sim;

    #[test]
    fn any_offset_and_length_reads_back_and_the_medium_holds_none_of_it() {
        Sim::new(1).block_on(async {
            let medium = MemoryStore::new("m", 4 << 20);
            let cipher = Cipher::new("aes", "xts-plain64", &[9; 64]).unwrap();
            let store = CipherStore::new(medium.clone(), Some(cipher), HostOffset(4096));
            assert_eq!(store.size(), (4 << 20) - 4096);
            store.zero(HostOffset::ZERO.range(3 << 20), ZeroMode::default()).await.unwrap();
            let mut model = vec![0_u8; 3 << 20];
            let mut state = 7_u64;
            for _ in 0..60 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (state >> 20) as usize % (2 << 20);
                let len = (state >> 45) as usize % 5000 + 1;
                let bytes: Vec<u8> = (0..len).map(|n| (n as u64 ^ state >> 8) as u8).collect();
                model[at..at + len].copy_from_slice(&bytes);
                store.write(HostOffset(at as u64), Iov::from_slice(&bytes), false).await.unwrap();
            }
            let into = Iov::alloc(model.len() - 100);
            store.read(HostOffset(77), into.clone()).await.unwrap();
            assert!(into.to_vec() == model[77..model.len() - 23]);
            let held = medium.to_vec();
            assert!(held[..4096].iter().all(|b| *b == 0));
            assert!(!held[4096..3 << 20].windows(64).step_by(64).any(|window| window.iter().all(|b| *b == 0)));
            store.set_size(5 << 20).await.unwrap();
            store.read(HostOffset(4 << 20), into.slice(0..1 << 20)).await.unwrap();
            assert!(into.slice(0..1 << 20).is_zero());
        });
    }
}
