//! Nodes lent to the emulator at our side: each over NBD on a private unix socket of its own, beside the server and the exports that
//! operators start.
//!
//! **Invariant.** A lent node is held, and open as it was asked for, until it is taken back or everything ends.

use crate::{Engine, Failure, ShardState};
use export::nbd::{Address, NbdExport, NbdServer};
use graph::nodes::NodeUse;
use std::path::PathBuf;
use std::rc::Rc;

/// A node that the emulator has.
pub(crate) struct Lent {
    node: String,
    server: Rc<NbdServer>,
    /// Keeps the node as long as it is served.
    hold: NodeUse,
}

impl ShardState {
    /// Serves `node` under its own name at `socket`, which nobody else is to know.
    async fn lend(&self, node: String, socket: PathBuf, writable: bool) -> Result<(), Failure> {
        if self.lent.borrow().iter().any(|lent| lent.node == node) {
            return Err(Failure::generic(format!("Node '{node}' is lent to the guest already")));
        }
        let hold = self.graph().take(&node, writable).await?;
        let disk = Rc::clone(hold.disk());
        let export =
            NbdExport { name: node.clone(), description: None, disk, read_only: !writable, write_through: false };
        let server = Rc::new(NbdServer::start(Address::Unix(socket), vec![export]).await?);
        self.lent.borrow_mut().push(Lent { node, server, hold });
        Ok(())
    }

    /// Serves it no longer; whether it was.
    async fn take_back(&self, node: &str) -> bool {
        let at = self.lent.borrow().iter().position(|lent| lent.node == node);
        let Some(at) = at else { return false };
        let lent = self.lent.borrow_mut().remove(at);
        lent.server.stop().await;
        true
    }

    /// What each lent node's disk has for its top by now: a snapshot puts another node there.
    fn lent_tops(&self) -> Vec<(String, String)> {
        let top = |lent: &Lent| {
            let chain = lent.hold.disk().chain();
            (lent.node.clone(), chain.first().map_or_else(|| lent.node.clone(), |layer| layer.node.clone()))
        };
        self.lent.borrow().iter().map(top).collect()
    }

    /// Ends all of it.
    pub(crate) async fn end_lent(&self) {
        let all = self.lent.take();
        for lent in all {
            lent.server.stop().await;
        }
    }
}

impl Engine {
    /// Lends a named node to the emulator at our side, over NBD at `socket`, under the node's name.
    ///
    /// # Errors
    /// There is no such node, it cannot be opened so, or it is lent already.
    pub async fn lend(&self, node: &str, socket: PathBuf, writable: bool) -> Result<(), Failure> {
        let node = node.to_owned();
        self.on_nodes(move |shard| async move { shard.lend(node, socket, writable).await }).await
    }

    /// Lent nodes, each with the node that is on top of its disk.
    pub(crate) async fn lent_tops(&self) -> Result<Vec<(String, String)>, Failure> {
        self.on_nodes(|shard| std::future::ready(Ok(shard.lent_tops()))).await
    }

    /// Takes a lent node back; whether it was lent.
    pub async fn take_back(&self, node: &str) -> Result<bool, Failure> {
        let node = node.to_owned();
        self.on_nodes(move |shard| async move { Ok(shard.take_back(&node).await) }).await
    }
}
