//! LUKS, version 1: a volume whose key a passphrase unlocks. By itself it is raw bytes behind a header; QCOW2 keeps such a header for
//! its clusters. `unlock` finds the key, `format` makes a header, `slots` gives the key to
//! other passphrases.
//!
//! **Invariants.**
//! * Keys and passphrases are in no message and no `Debug` output, and are wiped.
//! * What is derived takes as many rounds as the header says, which is bounded; it is done beside the shard.
//! * Nothing is read as plain that is encrypted: without the key reads and writes are errors.

mod format;
mod slots;
mod unlock;

pub(crate) use format::{Plan, header_bytes, plan};
pub use slots::{KeySlots, SlotChange};
pub(crate) use unlock::{Unlocked, unlock};

use crate::create::CreateOptions;
use crate::{Error, ErrorKind, Format, Image, OpenOptions, Result, Surroundings};
use layout::HostOffset;
use std::rc::Rc;
use store::Store;
use store::cipher::CipherStore;
use zeroize::Zeroizing;

/// A passphrase: no message shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// These bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(bytes.to_vec()))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase")
    }
}

/// What is said where a passphrase is missing.
pub(crate) fn no_passphrase(store: &dyn Store, parameter: &str) -> Error {
    let what = format!(
        "Parameter '{parameter}' is required for cipher: it is encrypted; give its passphrase (--object secret,id=S,file=… and \
         --image-opts …,{parameter}=S)"
    );
    Error::new(ErrorKind::InvalidArgument, store.name(), None, what)
}

/// Opens the volume in `store`.
pub(crate) async fn open(
    store: Rc<dyn Store>,
    options: OpenOptions,
    surroundings: Surroundings<'_>,
) -> Result<Rc<dyn Image>> {
    let Some(passphrase) = surroundings.passphrase else {
        return Err(no_passphrase(&*store, "key-secret"));
    };
    let Unlocked { cipher, payload, slots } = unlock(&store, HostOffset::ZERO, None, passphrase).await?;
    if payload.get() > store.size() {
        let what = "its data begin past the end of the file";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(payload), what));
    }
    crate::raw::open_as(CipherStore::new(store, Some(cipher), payload), options, Format::Luks, Some(slots))
}

/// Writes a new, empty volume of `size` bytes into `store`.
pub(crate) async fn create(store: Rc<dyn Store>, options: &CreateOptions, passphrase: &Passphrase) -> Result<()> {
    let size = options.size;
    let Plan { bytes, payload, cipher } = plan(passphrase.clone(), options.iteration_time).await?;
    store.set_size(0).await?;
    let end = payload.get().checked_add(size).filter(|end| i64::try_from(*end).is_ok());
    let end = end.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "", None, "no volume can be that large"))?;
    store.write(HostOffset::ZERO, ring::Iov::from_slice(&bytes), false).await?;
    // What was never written would read as noise.
    let volume = CipherStore::new(Rc::clone(&store), Some(cipher), payload);
    volume.set_size(end - payload.get()).await?;
    store.flush().await?;
    Ok(())
}
