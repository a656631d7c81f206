//! Passphrases come and go: each has a slot with the master key in it.
//!
//! **The order.** A new one: its split key, durably; then the slot, inactive; then that it is active, which is one sector. One that
//! goes: that it is inactive, durably; then its split key is written over. So at every instant each passphrase that was there
//! before and is there afterwards opens the volume.

use super::Passphrase;
use super::format::{no_random, random, rounds_in, split};
use super::unlock::{Hash, find_key};
use crate::{Error, ErrorKind, Result};
use layout::HostOffset;
use layout::luks::{HEADER_BYTES, Header, SALT_BYTES, SECTOR, SLOTS, STRIPES, Slot};
use ring::Iov;
use std::rc::Rc;
use std::time::Duration;
use store::Store;
use store::cipher::Cipher;
use zeroize::Zeroizing;

/// What becomes of slots.
#[derive(Clone, Debug)]
pub enum SlotChange {
    /// Another passphrase opens the volume, too.
    Add {
        /// In this slot; else in the first that is free.
        slot: Option<usize>,
        /// The new passphrase.
        passphrase: Passphrase,
        /// How long deriving its key shall take.
        deriving: Option<Duration>,
    },
    /// This slot opens it no more; where a passphrase is given, only if it is that one's.
    Erase(usize, Option<Passphrase>),
    /// This passphrase opens it no more, in no slot.
    Forget(Passphrase),
}

/// The slots of a volume that is unlocked.
#[derive(Clone)]
pub struct KeySlots {
    /// The header is in this store, as it is.
    pub(super) store: Rc<dyn Store>,
    /// From here on.
    pub(super) at: HostOffset,
    /// So many bytes are its own.
    pub(super) room: u64,
    /// What every slot that is active holds.
    pub(super) key: Rc<Zeroizing<Vec<u8>>>,
}

impl KeySlots {
    /// Carries `change` out. With `force` also where nothing would open the volume afterwards, or another passphrase would go.
    /// Dropped halfway, it leaves what a power cut would.
    ///
    /// # Errors
    /// In QEMU's words, where it is refused; nothing is changed then.
    pub async fn change(&self, change: &SlotChange, force: bool) -> Result<()> {
        match change {
            SlotChange::Add { slot, passphrase, deriving } => {
                self.add(*slot, passphrase.clone(), *deriving, force).await
            }
            SlotChange::Erase(slot, old) => {
                let header = self.header().await?;
                self.check_slot(&header, *slot)?;
                if let Some(old) = old
                    && !self.slots_of(old).await?.contains(slot)
                {
                    let what =
                        format!("Given keyslot {slot} doesn't contain the given old password for erase operation");
                    return Err(self.refused(what));
                }
                if !force && !header.slots[*slot].active {
                    return Err(self.refused(format!("Given keyslot {slot} is already erased (inactive)")));
                }
                let others = header.slots.iter().enumerate().any(|(number, other)| number != *slot && other.active);
                if !force && !others {
                    return Err(self.refused(format!(
                        "Attempt to erase the only active keyslot {slot} which will erase all the data in the image \
                         irreversibly - refusing operation"
                    )));
                }
                self.erase(&header, *slot).await
            }
            SlotChange::Forget(old) => {
                let found = self.slots_of(old).await?;
                if found.is_empty() {
                    return Err(self.refused("No keyslots match given (old) password for erase operation"));
                }
                let header = self.header().await?;
                let active = header.slots.iter().filter(|slot| slot.active).count();
                if !force && found.len() == active {
                    return Err(self.refused(
                        "All the active keyslots match the (old) password that was given and erasing them will erase all the \
                         data in the image irreversibly - refusing operation",
                    ));
                }
                for slot in &found {
                    self.check_slot(&header, *slot)?;
                }
                for slot in found {
                    self.erase(&header, slot).await?;
                }
                Ok(())
            }
        }
    }

    /// Those that a passphrase unlocks.
    async fn slots_of(&self, passphrase: &Passphrase) -> Result<Vec<usize>> {
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(key) = find_key(&self.store, self.at, passphrase.bytes(), from).await? {
            from = key.slot + 1;
            found.push(key.slot);
        }
        Ok(found)
    }

    fn refused(&self, what: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, self.store.name(), None, what)
    }

    /// That the slot is one, and that what would be written of it lies on nothing else.
    fn check_slot(&self, header: &Header, number: usize) -> Result<()> {
        let Some(slot) = header.slots.get(number) else {
            let what = format!("Invalid keyslot {number} specified, must be between 0 and {}", SLOTS - 1);
            return Err(self.refused(what));
        };
        let whole = |slot: &Slot| slot.material.range(header.material_bytes().next_multiple_of(SECTOR));
        let place = whole(slot);
        let begins = (HEADER_BYTES as u64).next_multiple_of(SECTOR);
        let meets = |(other, its): (usize, &Slot)| other != number && whole(its).overlaps(place);
        if place.start().get() < begins || place.end().get() > self.room || header.slots.iter().enumerate().any(meets) {
            let what =
                format!("key slot {number} would lie at {place}, where something else is; nothing is written there");
            return Err(Error::new(ErrorKind::Corrupt, self.store.name(), Some(self.at), what));
        }
        Ok(())
    }

    async fn header(&self) -> Result<Header> {
        let head = crate::master::read(&*self.store, self.at.range(HEADER_BYTES as u64)).await?;
        Header::decode(&head).map_err(|error| crate::master::damaged(self.store.name(), &error))
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.store.write(self.at + at, Iov::from_slice(bytes), false).await?;
        Ok(self.store.flush().await?)
    }

    async fn add(&self, slot: Option<usize>, new: Passphrase, deriving: Option<Duration>, force: bool) -> Result<()> {
        let header = self.header().await?;
        let hash = Hash::of(&header, &*self.store, self.at)?;
        let number = match slot {
            Some(number) => number,
            None => {
                let free = header.slots.iter().position(|slot| !slot.active);
                free.ok_or_else(|| self.refused("Can't add a keyslot - all keyslots are in use"))?
            }
        };
        self.check_slot(&header, number)?;
        let old = header.slots[number];
        if old.active && !force {
            return Err(self.refused(format!("Refusing to overwrite active keyslot {number} - please erase it first")));
        }
        let unknown =
            |error: store::cipher::UnknownCipher| Error::new(ErrorKind::Unsupported, "", None, error.to_string());
        let (cipher, mode, key) = (header.cipher.clone(), header.mode.clone(), Zeroizing::new(self.key.to_vec()));
        let made = ring::unblock(move || {
            let salt = *random::<SALT_BYTES>()?;
            let rounds = rounds_in(deriving, hash);
            let mut material = split(&key, hash)?;
            let mut derived = Zeroizing::new(vec![0; key.len()]);
            hash.derive(new.bytes(), &salt, rounds, &mut derived);
            let whole = material.len().next_multiple_of(SECTOR as usize);
            material.resize(whole, 0);
            Cipher::new(&cipher, &mode, &derived).map_err(unknown)?.encrypt(0, &mut material);
            Ok::<_, Error>((salt, rounds, material))
        });
        let (salt, rounds, material) = made.await?;
        if old.active {
            self.erase(&header, number).await?;
        }
        let slot = Slot { active: false, iterations: rounds, salt, material: old.material, stripes: STRIPES };
        self.write(old.material.get(), &material).await?;
        self.write(Slot::place(number), &slot.encode()).await?;
        let active = Slot { active: true, ..slot }.encode();
        self.write(Slot::place(number), &active[..4]).await
    }

    async fn erase(&self, header: &Header, number: usize) -> Result<()> {
        let gone = Slot { active: false, iterations: 0, salt: [0; SALT_BYTES], ..header.slots[number] };
        self.write(Slot::place(number), &gone.encode()[..4]).await?;
        let mut noise = vec![0; header.material_bytes().next_multiple_of(SECTOR) as usize];
        getrandom::fill(&mut noise).map_err(no_random)?;
        self.write(gone.material.get(), &noise).await?;
        self.write(Slot::place(number), &gone.encode()).await
    }
}
