//! What nodes are, as monitors show it (QEMU's `BlockDeviceInfo` and `ImageInfo`).

use super::{Filter, Graph, GraphNode};
use crate::node::Node;
use image::Image;
use image::qcow2::{Compression, Qcow2Info};
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

/// One node, as data that can cross threads.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its driver: `qcow2`, `file`, `throttle`.
    pub driver: String,
    /// Nobody may write to it.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// Flushes are not carried out.
    pub no_flush: bool,
    /// The name of its file.
    pub file: String,
    /// Bytes of the disk it shows.
    pub size: u64,
    /// Whether it lies on another image.
    pub backing: Option<String>,
    /// The node of that image.
    pub below: Option<String>,
    /// The mark that writes may pass.
    pub write_threshold: u64,
    /// QEMU's `ImageInfo`.
    pub image: Value,
}

/// Bytes that a file takes up.
fn actual_size(name: &str) -> Option<u64> {
    std::fs::metadata(name).ok().map(|meta| meta.blocks() * 512)
}

/// QEMU's `ImageInfo` of an image.
pub(super) fn image_info(image: &dyn Image) -> Value {
    let store = image.file();
    let info = image.info();
    let mut shown = Map::new();
    shown.insert("virtual-size".into(), json!(image.size()));
    shown.insert("filename".into(), json!(store.name()));
    shown.insert("format".into(), json!(image.format().name()));
    if let Some(bytes) = info.cluster_size {
        shown.insert("cluster-size".into(), json!(bytes));
    }
    if let Some(bytes) = actual_size(store.name()) {
        shown.insert("actual-size".into(), json!(bytes));
    }
    if let Some(own) = info.qcow2 {
        shown.insert("format-specific".into(), json!({ "type": "qcow2", "data": qcow2_info(own) }));
    }
    if let Some(backing) = image.backing() {
        if let Some(format) = backing.format {
            shown.insert("backing-filename-format".into(), json!(format.name()));
        }
        let full = disk::chain::resolve(&backing.name, store.name());
        shown.insert("full-backing-filename".into(), json!(full));
        shown.insert("backing-filename".into(), json!(backing.name));
    }
    shown.insert("dirty-flag".into(), json!(info.dirty));
    Value::Object(shown)
}

/// QEMU's `ImageInfoSpecificQCow2`.
fn qcow2_info(own: Qcow2Info) -> Value {
    let mut data = Map::new();
    data.insert("compat".into(), json!(if own.version == 2 { "0.10" } else { "1.1" }));
    let packing = match own.compression {
        Compression::Deflate => "zlib",
        Compression::Zstd => "zstd",
    };
    data.insert("compression-type".into(), json!(packing));
    data.insert("refcount-bits".into(), json!(own.refcount_bits));
    if own.version > 2 {
        data.insert("lazy-refcounts".into(), json!(own.lazy_refcounts));
        data.insert("corrupt".into(), json!(own.corrupt));
        data.insert("extended-l2".into(), json!(own.extended_l2));
    }
    Value::Object(data)
}

/// JSON as QEMU writes it into names.
fn spaced(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let members: Vec<String> =
                members.iter().map(|(key, value)| format!("{}: {}", json!(key), spaced(value))).collect();
            format!("{{{}}}", members.join(", "))
        }
        other => other.to_string(),
    }
}

impl Graph {
    /// Every node, the newest first, as QEMU lists them.
    pub fn list(&self) -> Vec<NodeInfo> {
        // Not in the middle of a change: edges lead elsewhere then than the disks that are stopped know.
        if self.changing.try_lock().is_some() {
            self.reconcile();
        }
        let filters = self.filters.borrow();
        let filters = filters.iter().rev().map(|filter| self.describe_filter(filter));
        filters.chain(self.nodes.borrow().iter().rev().map(|node| self.describe(node))).collect()
    }

    /// What somebody who uses the node `name` is shown to use.
    pub fn shown_name(&self, name: String) -> String {
        let filters = self.filters.borrow();
        let filter = filters.iter().find(|filter| filter.in_front && filter.over.name == name);
        filter.map_or(name, |filter| filter.name.clone())
    }

    fn describe_filter(&self, filter: &Filter) -> NodeInfo {
        let below = self.describe(&filter.over);
        let size = below.size;
        // QEMU shows a filter for streams by all that it is made of, the others by the file they lie on.
        let file = if filter.driver == "copy-on-read" {
            let inner = json!({ "driver": below.driver, "file": { "driver": "file", "filename": below.file } });
            format!("json:{}", spaced(&json!({ "driver": filter.driver, "file": inner })))
        } else {
            below.file.clone()
        };
        let mut image = json!({ "virtual-size": size, "filename": file, "format": filter.driver, "dirty-flag": false });
        if let Some(cluster) = below.image.get("cluster-size") {
            image["cluster-size"] = cluster.clone();
        }
        NodeInfo {
            name: filter.name.clone(),
            driver: filter.driver.to_owned(),
            read_only: !filter.in_front,
            file,
            backing: None,
            below: None,
            write_threshold: 0,
            image,
            ..below
        }
    }

    fn describe(&self, node: &Rc<GraphNode>) -> NodeInfo {
        let how = node.how();
        // A node whose bytes another one on top has opened shows what that one has.
        let holder = self.holder(node);
        let image = node.image.borrow().clone();
        let store = node.store.borrow().clone().or_else(|| holder.map(|image| Rc::clone(image.store())));
        let (file, size, shown) = match (&node.meaning, image, store) {
            (Node::Format { .. }, Some(image), _) => {
                (image.file().name().to_owned(), image.size(), image_info(&*image))
            }
            // An image that only a header names.
            (_, Some(image), None) => (image.file().name().to_owned(), image.size(), image_info(&*image)),
            (_, _, Some(store)) => {
                let mut shown = Map::new();
                let size = store.size();
                shown.insert("virtual-size".into(), json!(size.next_multiple_of(512)));
                shown.insert("filename".into(), json!(store.name()));
                shown.insert("format".into(), json!(node.driver));
                if let Some(bytes) = actual_size(store.name()) {
                    shown.insert("actual-size".into(), json!(bytes));
                }
                if node.driver == "file" {
                    shown.insert("format-specific".into(), json!({ "type": "file", "data": {} }));
                }
                shown.insert("dirty-flag".into(), json!(false));
                (store.name().to_owned(), size, Value::Object(shown))
            }
            _ => {
                let below = node.child("file").map(|child| self.describe(&child));
                let (file, size) = below.map_or_else(Default::default, |below| (below.file, below.size));
                let shown = json!({
                    "virtual-size": size, "filename": file, "format": node.driver, "dirty-flag": false,
                });
                (file, size, shown)
            }
        };
        NodeInfo {
            name: node.name.clone(),
            driver: node.driver.clone(),
            read_only: self.shows_read_only(node),
            direct: how.direct.unwrap_or(false),
            no_flush: how.no_flush.unwrap_or(false),
            file,
            size,
            backing: node.child("backing").and_then(|below| {
                let image = below.image.borrow().clone();
                image.map(|image| image.file().name().to_owned())
            }),
            below: node.child("backing").map(|below| below.name.clone()),
            write_threshold: node.threshold.at(),
            image: shown,
        }
    }

    /// Whether a node is read-only, or was made along with one that is.
    fn shows_read_only(&self, node: &Rc<GraphNode>) -> bool {
        let made_along = || {
            let above = self.users_above(node);
            node.implicit && !above.is_empty() && above.iter().all(|parent| self.shows_read_only(parent))
        };
        node.is_read_only() || made_along()
    }

    /// The image on top of a node that has its bytes open.
    fn holder(&self, node: &Rc<GraphNode>) -> Option<Rc<dyn Image>> {
        let parents = self.parents(node);
        parents
            .into_iter()
            .find_map(|(parent, role)| if role == "backing" { None } else { parent.image.borrow().clone() })
    }
}
