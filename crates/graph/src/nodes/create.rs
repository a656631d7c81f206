//! Making files, and images in nodes that hold bytes.
//!
//! **Invariant.** Nothing is written to a node that somebody uses; what was made is durable when it is said to be there.

use super::Graph;
use crate::node::no_node;
use crate::wrong;
use image::create::{CreateOptions, Preallocation};
use image::{Error, ErrorKind, Format, Result, Surroundings};
use layout::GuestOffset;
use serde_json::{Map, Value};
use std::path::Path;
use std::rc::Rc;
use store::Store;
use store::file::{FileStore, OpenOptions};

/// Where an image is made.
#[derive(Clone, Debug, PartialEq)]
pub enum MadeIn {
    /// In a node that is there.
    Node(String),
    /// In what this tree stands for.
    Tree(Map<String, Value>),
}

/// Makes a file (or empties one), and opens it.
async fn new_file(file: &str) -> Result<Rc<dyn Store>> {
    let cannot = |error: store::Error| match error.os_text() {
        Some(text) => wrong(format!("Could not create '{file}': {text}")),
        None => Error::from(error),
    };
    Ok(FileStore::create(Path::new(file), OpenOptions::default()).await.map_err(cannot)?)
}

/// Makes an image in a file of its own, durably.
pub(super) async fn overlay(file: &str, options: &CreateOptions) -> Result<()> {
    let existed = Path::new(file).exists();
    let store = new_file(file).await?;
    let made = image::create::create(Rc::clone(&store), options).await;
    let closed = store.close().await;
    if made.is_err() && !existed {
        // Half an image helps nobody; the failure itself is what gets reported.
        let _ = std::fs::remove_file(file);
    }
    made?;
    Ok(closed?)
}

/// Makes a file of `size` bytes, durably.
///
/// # Errors
/// In QEMU's words, where it cannot be made.
pub async fn make_file(file: &str, size: u64, preallocation: Preallocation) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        return Err(wrong("Unsupported preallocation mode: metadata"));
    }
    let store = new_file(file).await?;
    let made = async {
        image::create::create(Rc::clone(&store), &CreateOptions::new(Format::Raw, size)).await?;
        preallocate(&store, Format::Raw, preallocation, None).await?;
        Ok(store.flush().await?)
    };
    let made: Result<()> = made.await;
    let closed = store.close().await;
    made?;
    Ok(closed?)
}

/// Gives a new image its places, if any are asked for.
async fn preallocate(
    store: &Rc<dyn Store>,
    format: Format,
    how: Preallocation,
    passphrase: Option<&[u8]>,
) -> Result<()> {
    if how == Preallocation::Off {
        return Ok(());
    }
    let surroundings = Surroundings { passphrase, ..Surroundings::default() };
    let image = image::open_in(Rc::clone(store), format, image::OpenOptions::default(), surroundings).await?;
    image.preallocate(GuestOffset::ZERO, how).await?;
    // The store stays open: it is its node's.
    image.settle().await
}

impl Graph {
    /// Makes an image where `place` says, durably (`blockdev-create`).
    ///
    /// # Errors
    /// In QEMU's words, where there is no such node, it cannot be written to, or the options make no sense.
    pub async fn create(&self, place: MadeIn, options: &CreateOptions, preallocation: Preallocation) -> Result<()> {
        image::create::validate(options)?;
        let _alone = self.changing.lock().await;
        self.tidy().await;
        let (node, own) = match place {
            MadeIn::Node(name) => (self.find(&name).ok_or_else(|| no_node(&name))?, false),
            MadeIn::Tree(tree) => {
                let name = tree.get("filename").and_then(Value::as_str).unwrap_or_default().to_owned();
                let made = self.make_as(tree, true, false).await;
                let said = |error: Error| match error.store_error().and_then(store::Error::os_text) {
                    Some(text) => wrong(format!("Could not open '{name}': {text}")),
                    None => error,
                };
                (made.map_err(said)?, true)
            }
        };
        let made = async {
            if node.in_use() || self.is_committed(&node.name) || !self.parents(&node).is_empty() {
                return Err(Error::new(ErrorKind::Busy, "", None, format!("Node {} is in use", node.name)));
            }
            self.make_writable(&node).await?;
            let store = node.store.borrow().clone();
            let store = store.ok_or_else(|| wrong(format!("Node '{}' holds no bytes of its own", node.name)))?;
            let made = async {
                if !store.limits().fixed_size {
                    // Nothing of what was there is to be taken for a part of it.
                    store.set_size(0).await?;
                }
                image::create::create(Rc::clone(&store), options).await?;
                let passphrase = options.passphrase.as_ref().map(image::Passphrase::bytes);
                preallocate(&store, options.format, preallocation, passphrase).await?;
                Ok(store.flush().await?)
            };
            // Others may open it as soon as it is there.
            let made: Result<()> = made.await;
            made.and(self.open_for_reading(&node).await)
        };
        let made = made.await;
        if own { made.and(self.dissolve(&node).await) } else { made }
    }
}

impl MadeIn {
    /// From what a user wrote: a node's name, or a tree; `None` where it is neither.
    pub fn of(value: Value) -> Option<Self> {
        match value {
            Value::String(name) => Some(Self::Node(name)),
            Value::Object(tree) => Some(Self::Tree(tree)),
            _ => None,
        }
    }
}
