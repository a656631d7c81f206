//! What is ours at this moment, gathered from the shards: for routing and for answers that both have a part in.

use super::merge::{Ours, nested};
use super::{Drive, Joined, Seen, locked};
use crate::Failure;
use crate::qmp::{self, counters, describe_node};
use disk::Stats;
use graph::nodes::NodeInfo;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};
use std::future::ready;

impl Joined {
    /// Every name of ours: devices, their images' nodes, and the nodes that users named.
    pub(super) async fn names(&self) -> Result<HashSet<String>, Failure> {
        let found = self.engine().on_every_shard(|shard| {
            let mut names = Vec::new();
            for device in shard.devices() {
                names.push(device.spec.name.clone());
                names.extend(device.disk.chain().iter().map(|layer| layer.node.clone()));
            }
            names.extend(shard.graph().list().into_iter().map(|node| node.name));
            ready(Ok(names))
        });
        let mut names: HashSet<String> = found.await?.into_iter().flatten().collect();
        names.extend(locked(&self.inner.drives).iter().filter_map(Drive::client).map(str::to_owned));
        Ok(names)
    }

    /// Whether users have named a node so.
    pub(super) async fn has_node(&self, name: &str) -> bool {
        let name = name.to_owned();
        let has = self.engine().on_nodes(move |shard| ready(Ok(shard.graph().has(&name))));
        // Past the end there are none.
        has.await.unwrap_or(false)
    }

    /// Whether there is a job of ours with this id.
    pub(super) async fn has_job(&self, id: &str) -> Result<bool, Failure> {
        Ok(qmp::all_jobs(self.engine()).await?.iter().any(|job| job.id == id))
    }

    /// Whether there is an export of ours with this id, or for clients with this name.
    pub(super) async fn has_export(&self, name: &str) -> Result<bool, Failure> {
        let name = name.to_owned();
        let found = self.engine().on_nodes(move |shard| {
            let by_id = shard.list_exports().iter().any(|export| export.id == name);
            ready(Ok(by_id || shard.nbd_export(&name).is_some()))
        });
        found.await
    }

    /// Names that QEMU has for what is ours become our own.
    pub(super) fn translated(&self, mut arguments: Map<String, Value>) -> Map<String, Value> {
        let drives = locked(&self.inner.drives);
        for key in ["device", "node-name", "node"] {
            if let Some(Value::String(name)) = arguments.get_mut(key)
                && let Some(drive) = drives.iter().find(|drive| drive.client() == Some(name.as_str()))
            {
                name.clone_from(&drive.device);
            }
        }
        arguments
    }

    /// What our answers have for QEMU's rows.
    pub(super) async fn ours(&self) -> Result<Ours, Failure> {
        let mut ours = Ours::default();
        let devices = qmp::execute(self.engine(), "query-block", Map::new()).await?;
        let drives = locked(&self.inner.drives).clone();
        for row in devices.as_array().into_iter().flatten() {
            let Some(device) = row["device"].as_str() else { continue };
            ours.inserted.insert(device.to_owned(), row["inserted"].clone());
            match drives.iter().find(|drive| drive.device == device).map(|drive| &drive.seen) {
                Some(Seen::Client(client)) => {
                    // A drive that a device of the guest has is known by its node alone.
                    ours.inserted.insert(client.clone(), row["inserted"].clone());
                    ours.clients.push(client.clone());
                }
                Some(Seen::Device(path)) => ours.apart.push((device.to_owned(), path.clone())),
                None => {}
            }
        }
        let lent = self.engine().lent_tops().await?;
        if !lent.is_empty() {
            let nodes = self.engine().on_nodes(|shard| ready(Ok(shard.graph().list()))).await?;
            let by_name: HashMap<&str, &NodeInfo> = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
            for (name, top) in lent {
                // A filter is shown as what it is.
                let shown = by_name.get(name.as_str()).filter(|node| node.driver == "copy-on-read");
                if let Some(node) = shown.or_else(|| by_name.get(top.as_str())).or_else(|| by_name.get(name.as_str())) {
                    let below = chain_below(node, &by_name);
                    ours.inserted.insert(name.clone(), nested(describe_node((*node).clone()), below));
                }
                ours.clients.push(name);
            }
        }
        Ok(ours)
    }

    /// `query-blockstats` of our side: the devices', and, of those that have a disk, the named nodes'.
    pub(super) async fn own_stats(&self, arguments: Map<String, Value>) -> Result<Value, Failure> {
        let own = qmp::execute(self.engine(), "query-blockstats", arguments).await?;
        let mut rows = match own {
            Value::Array(rows) => rows,
            _ => Vec::new(),
        };
        let nodes = self.engine().on_nodes(|shard| {
            let disks = shard.graph().disks();
            let row = |node: NodeInfo| {
                let disk = disks.iter().find(|(name, _)| *name == node.name);
                let stats = disk.map_or_else(Stats::default, |(_, disk)| disk.stats());
                let highest = json!({ "stats": { "wr_highest_offset": stats.wr_highest_offset } });
                json!({ "node-name": node.name, "stats": counters(&stats, disk.is_some()), "parent": highest })
            };
            let rows: Vec<Value> = shard.graph().list().into_iter().map(row).collect();
            ready(Ok(rows))
        });
        for row in nodes.await? {
            if !rows.iter().any(|other| other["node-name"] == row["node-name"]) {
                rows.push(row);
            }
        }
        Ok(Value::Array(rows))
    }
}

/// The nodes below `node`, from its backing file down, as answers show them.
fn chain_below(node: &NodeInfo, by_name: &HashMap<&str, &NodeInfo>) -> Vec<Value> {
    let mut below = Vec::new();
    let mut at = node;
    // A chain has no circle, and is no longer than there are nodes.
    while let Some(next) =
        at.below.as_deref().and_then(|name| by_name.get(name)).filter(|_| below.len() < by_name.len())
    {
        below.push(describe_node((*next).clone()));
        at = next;
    }
    below
}
