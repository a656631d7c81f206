//! Monitors joined with an emulator's: clients of the guest see one QMP monitor, in which disks, block jobs and their events are ours
//! and everything else is QEMU's.
//!
//! Each monitor of the user's has a private one of QEMU's behind it, so that what a monitor keeps (negotiation, descriptors that
//! `getfd` left there) stays with it. `door` lets clients in, `wire` carries messages and descriptors, `route` says whose business a command
//! is, `session` carries one client's commands out, `merge` puts answers together that both have a part in.
//!
//! # Invariants
//! * Commands are carried out one at a time, in the order they came: answers never overtake each other. `oob` is not offered.
//! * A client harms only itself: what it sends is bounded, it is read only while its last command is answered, and one that does
//!   not read what it is sent is cut off rather than served with gaps.
//! * What a command of ours caused is told before the command's own answer.
//! * A node is lent before QEMU hears of a device that uses it, and taken back only when QEMU has let go of it.

mod door;
mod merge;
mod route;
mod session;
mod view;
mod wire;

pub use session::can_pause;

use crate::qmp::{self, Place};
use crate::{Engine, Failure};
use door::Door;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;

/// How long QEMU keeps requests when we are gone, in seconds, before it tells the guest's device, which then pauses the guest.
pub const RECONNECT_DELAY: u32 = 5;

/// A disk that QEMU knows as a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Its name, for QEMU and for us.
    pub device: String,
    /// What QEMU has of it.
    pub seen: Seen,
}

/// What QEMU has of a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// An NBD client, by its node name.
    Client(String),
    /// Only a device of the guest's, by its path in QEMU: it reaches the disk over vhost-user.
    Device(String),
}

impl Drive {
    /// The NBD client's node, if there is one.
    fn client(&self) -> Option<&str> {
        match &self.seen {
            Seen::Client(client) => Some(client),
            Seen::Device(_) => None,
        }
    }
}

/// How a node is to be used, which its user said when it was added.
#[derive(Clone, Debug, Default)]
struct Manners {
    read_only: bool,
    /// What QEMU's client is to have, too.
    handed_on: Map<String, Value>,
}

/// What the two have in common.
#[derive(Clone)]
pub struct Joined {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    /// For sockets of nodes.
    dir: PathBuf,
    sockets: AtomicUsize,
    drives: Mutex<Vec<Drive>>,
    /// Of every node that a user named.
    manners: Mutex<HashMap<String, Manners>>,
    /// Nodes that QEMU has a client for.
    lent: Mutex<Vec<String>>,
    /// Which node a device of the guest came with, by the device's id.
    devices: Mutex<HashMap<String, String>>,
}

/// A monitor whose place is taken, and whose clients wait.
pub struct Monitor {
    door: Door,
    first: Option<wire::Link>,
    pretty: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data, valid at every step: a panic elsewhere leaves nothing half done in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor {
    /// Takes a place for a monitor.
    ///
    /// # Errors
    /// It is taken, or cannot be reached.
    pub async fn open(place: Place, pretty: bool) -> Result<Self, Failure> {
        Ok(Self { door: Door::open(place).await?, first: None, pretty })
    }

    /// Waits until a client has come (`wait=on`).
    ///
    /// # Errors
    /// None can come.
    pub async fn wait(&mut self) -> Result<(), Failure> {
        if self.first.is_none() {
            let client = self.door.client().await.map_err(|error| Failure::generic(error.to_string()))?;
            self.first = client;
        }
        Ok(())
    }
}

impl Joined {
    /// Without disks yet. Sockets of nodes are made in `dir`, which nobody else may enter.
    pub fn new(engine: Engine, dir: &Path) -> Self {
        Self {
            inner: Arc::new(Inner {
                engine,
                dir: dir.to_owned(),
                sockets: AtomicUsize::new(0),
                drives: Mutex::default(),
                manners: Mutex::default(),
                lent: Mutex::default(),
                devices: Mutex::default(),
            }),
        }
    }

    fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    /// A drive of QEMU's has a device of ours behind it.
    pub fn add_drive(&self, drive: Drive) {
        locked(&self.inner.drives).push(drive);
    }

    /// Adds a node, and keeps in mind how it is to be used.
    ///
    /// # Errors
    /// As `blockdev-add`'s.
    pub async fn add_node(&self, tree: Map<String, Value>) -> Result<(), Failure> {
        qmp::blockdev_add(self.engine(), tree.clone()).await?;
        let mut manners = locked(&self.inner.manners);
        keep_manners(&tree, &mut manners);
        Ok(())
    }

    /// Takes a node away.
    ///
    /// # Errors
    /// As `blockdev-del`'s.
    async fn remove_node(&self, node: &str) -> Result<(), Failure> {
        let mut arguments = Map::new();
        arguments.insert("node-name".to_owned(), json!(node));
        qmp::execute(self.engine(), "blockdev-del", arguments).await?;
        locked(&self.inner.manners).remove(node);
        Ok(())
    }

    /// Lends a node to QEMU: what to `blockdev-add` there. `None` if QEMU has it already.
    ///
    /// # Errors
    /// There is no such node, or it cannot be used as its user said.
    pub async fn lend(&self, node: &str) -> Result<Option<Map<String, Value>>, Failure> {
        if locked(&self.inner.lent).iter().any(|lent| lent == node) {
            return Ok(None);
        }
        let Manners { read_only, handed_on } = locked(&self.inner.manners).get(node).cloned().unwrap_or_default();
        let number = self.inner.sockets.fetch_add(1, Ordering::Relaxed);
        let socket = self.inner.dir.join(format!("node-{number}.sock"));
        self.engine().lend(node, socket.clone(), !read_only).await?;
        locked(&self.inner.lent).push(node.to_owned());
        let mut tree = client(node, &socket, node);
        tree.insert("read-only".to_owned(), json!(read_only));
        tree.extend(handed_on);
        Ok(Some(tree))
    }

    /// A device of the guest has a node for its drive.
    pub fn add_device(&self, id: &str, node: &str) {
        locked(&self.inner.devices).insert(id.to_owned(), node.to_owned());
    }

    /// A device of the guest is gone: the node that nobody in the guest has any more.
    fn device_gone(&self, id: &str) -> Option<String> {
        let mut devices = locked(&self.inner.devices);
        let node = devices.remove(id)?;
        (!devices.values().any(|other| *other == node)).then_some(node)
    }

    /// Takes a node back that QEMU has let go of.
    async fn take_back(&self, node: &str) -> Result<(), Failure> {
        locked(&self.inner.lent).retain(|lent| lent != node);
        self.engine().take_back(node).await.map(drop)
    }

    fn is_lent(&self, node: &str) -> bool {
        locked(&self.inner.lent).iter().any(|lent| lent == node)
    }

    /// Serves a monitor, with QEMU's own behind it at `emulator`, until the runtime ends.
    pub fn serve(&self, mut monitor: Monitor, emulator: PathBuf) {
        let joined = self.clone();
        tokio::spawn(async move {
            loop {
                let client = match monitor.first.take() {
                    Some(client) => Ok(Some(client)),
                    None => tokio::select! {
                        client = monitor.door.client() => client,
                        // From here on nobody could do anything any more.
                        _ = joined.engine().ending() => return,
                    },
                };
                match client {
                    Ok(Some(client)) => joined.talk(client, &emulator, monitor.pretty).await,
                    Ok(None) => return,
                    Err(error) => {
                        // Out of descriptors, most likely: this one may come again.
                        tracing::warn!(%error, "could not accept a QMP client");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
    }

    async fn talk(&self, client: wire::Link, emulator: &Path, pretty: bool) {
        let _at_monitor = self.engine().at_monitor();
        let behind = match UnixStream::connect(emulator).await {
            Ok(behind) => behind,
            Err(error) => {
                // It has ended: so does all of this in a moment.
                tracing::debug!(%error, "the emulator's monitor cannot be reached");
                return;
            }
        };
        let client = wire::Wire::new(client, pretty);
        let behind = wire::Wire::new(wire::Link::Unix(behind), false);
        if let Err(error) = session::Session::new(self.clone(), client, behind).run().await {
            tracing::debug!(%error, "a QMP client is gone");
        }
    }
}

/// QEMU's node for an export of ours.
pub fn client(node: &str, socket: &Path, export: &str) -> Map<String, Value> {
    let tree = json!({
        "driver": "nbd", "node-name": node, "export": export, "reconnect-delay": RECONNECT_DELAY,
        "server": { "type": "unix", "path": socket.to_string_lossy() },
    });
    match tree {
        Value::Object(tree) => tree,
        _ => Map::new(),
    }
}

/// Notes how the nodes that `tree` names are to be used; those within it, too.
fn keep_manners(tree: &Map<String, Value>, manners: &mut HashMap<String, Manners>) {
    if let Some(Value::String(node)) = tree.get("node-name") {
        let on = |value: &Value| value.as_bool().unwrap_or_else(|| value.as_str() == Some("on"));
        let mut handed_on = Map::new();
        for key in ["discard", "detect-zeroes"] {
            if let Some(value) = tree.get(key) {
                handed_on.insert(key.to_owned(), value.clone());
            }
        }
        let read_only = tree.get("read-only").is_some_and(on);
        manners.insert(node.clone(), Manners { read_only, handed_on });
    }
    for value in tree.values() {
        if let Value::Object(inner) = value {
            keep_manners(inner, manners);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_said_of_a_node_is_kept() {
        let Value::Object(tree) = json!({
            "driver": "qcow2", "node-name": "f", "discard": "unmap",
            "file": {"driver": "file", "filename": "x", "node-name": "s", "read-only": true},
        }) else {
            panic!("no object")
        };
        let mut manners = HashMap::new();
        keep_manners(&tree, &mut manners);
        assert!(!manners["f"].read_only);
        assert_eq!(manners["f"].handed_on["discard"], "unmap");
        assert!(manners["s"].read_only);
    }
}
