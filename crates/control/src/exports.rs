//! Exports that come and go (`block-export-add`, `nbd-server-start`), on the shard that has the nodes.
//!
//! **Invariant.** An export holds its node until nobody is served any more; that it is gone is told after that.

use crate::{Failure, Happening, ShardState};
use disk::Disk;
use export::nbd::{Address, NbdExport, NbdServer};
use export::vhost_user::{VhostUserExport, VhostUserServer};
use graph::nodes::NodeUse;
use std::path::PathBuf;
use std::rc::Rc;

/// What to offer, as plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// What operators call it.
    pub id: String,
    /// The node that is offered.
    pub node: String,
    /// Clients may write.
    pub writable: bool,
    /// What they write is durable before they hear of it.
    pub write_through: bool,
    /// By which door.
    pub door: DoorSpec,
}

/// A door.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DoorSpec {
    /// On the NBD server, under this name (the node's by default).
    Nbd {
        /// The name clients ask for.
        name: Option<String>,
        /// For clients' users.
        description: Option<String>,
    },
    /// On a vhost-user-blk socket.
    VhostUser {
        /// Where.
        socket: PathBuf,
        /// Virtqueues.
        queues: u16,
    },
}

/// What is offered.
pub(crate) struct Export {
    id: String,
    hold: NodeUse,
    door: Door,
}

enum Door {
    Nbd(String),
    VhostUser(Rc<VhostUserServer>),
}

/// One export, as `query-block-exports` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// `nbd` or `vhost-user-blk`.
    pub kind: &'static str,
    /// Its node.
    pub node: String,
}

impl ShardState {
    /// Starts the NBD server that exports are offered on, to `most` clients at once (0: any number). With `held` they wait until
    /// [`ShardState::admit_nbd_clients`]. Returns the address in use.
    pub async fn start_nbd_server(&self, address: Address, most: u32, held: bool) -> Result<Address, Failure> {
        if self.nbd_server.borrow().is_some() {
            return Err(Failure::generic("NBD server already running"));
        }
        let server = NbdServer::start(address, Vec::new()).await?;
        server.limit_clients(most);
        server.hold(held);
        let address = server.address().clone();
        *self.nbd_server.borrow_mut() = Some(Rc::new(server));
        Ok(address)
    }

    /// Everything that was to be offered is.
    pub fn admit_nbd_clients(&self) {
        if let Some(server) = &*self.nbd_server.borrow() {
            server.hold(false);
        }
    }

    /// Ends it, and with it what is offered on it.
    pub async fn stop_nbd_server(&self) -> Result<(), Failure> {
        let server = self.nbd_server.take().ok_or_else(no_server)?;
        server.stop().await;
        let (gone, kept) = self.exports.take().into_iter().partition(|export| matches!(export.door, Door::Nbd(_)));
        *self.exports.borrow_mut() = kept;
        self.tell_gone(gone);
        self.graph().sweep().await;
        Ok(())
    }

    fn tell_gone(&self, gone: Vec<Export>) {
        for Export { id, hold, .. } in gone {
            drop(hold);
            self.tell(Happening::ExportDeleted { id });
        }
    }

    /// Offers a node.
    pub async fn add_export(&self, spec: ExportSpec) -> Result<(), Failure> {
        if self.exports.borrow().iter().any(|export| export.id == spec.id) {
            return Err(Failure::generic(format!("Block export id '{}' is already in use", spec.id)));
        }
        if !self.graph().has(&spec.node) {
            return Err(Failure::no_node(&spec.node));
        }
        let server = self.nbd_server.borrow().clone();
        if matches!(spec.door, DoorSpec::Nbd { .. }) && server.is_none() {
            return Err(no_server());
        }
        if spec.writable && self.graph().is_read_only(&spec.node) {
            return Err(Failure::generic("Cannot export read-only node as writable"));
        }
        let hold = self.graph().take(&spec.node, spec.writable).await?;
        let disk: Rc<Disk> = Rc::clone(hold.disk());
        let door = match (spec.door, server) {
            (DoorSpec::Nbd { name, description }, Some(server)) => {
                let name = name.unwrap_or_else(|| spec.node.clone());
                let taken = |export: &Export| matches!(&export.door, Door::Nbd(other) if *other == name);
                if self.exports.borrow().iter().any(taken) {
                    return Err(Failure::generic(format!("NBD server already has export named '{name}'")));
                }
                let (read_only, write_through) = (!spec.writable, spec.write_through);
                server.add(NbdExport { name: name.clone(), description, disk, read_only, write_through })?;
                Door::Nbd(name)
            }
            (DoorSpec::Nbd { .. }, None) => return Err(no_server()),
            (DoorSpec::VhostUser { socket, queues }, _) => {
                let serial = spec.node.chars().filter(char::is_ascii).take(20).collect();
                let (read_only, write_through) = (!spec.writable, spec.write_through);
                let export = VhostUserExport { socket, disk, read_only, write_through, queues, serial };
                Door::VhostUser(Rc::new(VhostUserServer::start(export).await?))
            }
        };
        self.exports.borrow_mut().push(Export { id: spec.id, hold, door });
        Ok(())
    }

    /// Offers it no longer. Without `hard` an export that has clients stays.
    pub async fn remove_export(&self, id: &str, hard: bool) -> Result<(), Failure> {
        let missing = || Failure::generic(format!("Export '{id}' is not found"));
        let server = self.nbd_server.borrow().clone();
        {
            let exports = self.exports.borrow();
            let export = exports.iter().find(|export| export.id == id).ok_or_else(missing)?;
            if let (Door::Nbd(name), Some(server)) = (&export.door, &server)
                && !hard
                && server.clients_of(name) > 0
            {
                return Err(Failure::generic(format!("export '{id}' still in use")));
            }
        }
        let at = self.exports.borrow().iter().position(|export| export.id == id).ok_or_else(missing)?;
        let export = self.exports.borrow_mut().remove(at);
        match (&export.door, server) {
            (Door::Nbd(name), Some(server)) => server.remove(name).await,
            (Door::Nbd(_), None) => {}
            (Door::VhostUser(server), _) => server.stop().await,
        }
        self.tell_gone(vec![export]);
        self.graph().sweep().await;
        Ok(())
    }

    /// The NBD export of this name, by its id (`nbd-server-remove`).
    pub fn nbd_export(&self, name: &str) -> Option<String> {
        let exports = self.exports.borrow();
        let found = exports.iter().find(|export| matches!(&export.door, Door::Nbd(other) if other == name));
        found.map(|export| export.id.clone())
    }

    /// Whether there is an NBD server to offer things on.
    pub fn has_nbd_server(&self) -> bool {
        self.nbd_server.borrow().is_some()
    }

    /// What is offered, the newest first.
    pub fn list_exports(&self) -> Vec<ExportInfo> {
        let exports = self.exports.borrow();
        let info = |export: &Export| ExportInfo {
            id: export.id.clone(),
            kind: match export.door {
                Door::Nbd(_) => "nbd",
                Door::VhostUser(_) => "vhost-user-blk",
            },
            node: self.graph().shown_name(export.hold.node()),
        };
        exports.iter().rev().map(info).collect()
    }

    /// A disk has another size: guests hear of it.
    pub fn announce_size(&self, disk: &Rc<Disk>) {
        for export in self.exports.borrow().iter() {
            if let Door::VhostUser(server) = &export.door
                && Rc::ptr_eq(export.hold.disk(), disk)
            {
                server.resized();
            }
        }
        self.announce_device_size(disk);
    }

    /// Ends all of them.
    pub(crate) async fn end_exports(&self) {
        if self.has_nbd_server() {
            // It is there: this cannot fail.
            let _ = self.stop_nbd_server().await;
        }
        let rest = self.exports.take();
        for export in &rest {
            if let Door::VhostUser(server) = &export.door {
                server.stop().await;
            }
        }
        self.tell_gone(rest);
    }
}

fn no_server() -> Failure {
    Failure::generic("NBD server not running")
}
