//! Commands on named nodes, and on the objects they refer to.

use super::arguments::Arguments;
use crate::{Engine, Failure, Happening};
use graph::nodes::NodeInfo;
use image::BackingRef;
use serde_json::{Value, json};
use std::rc::Rc;

/// `blockdev-add`.
pub(crate) async fn add(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    let tree = arguments.all();
    engine.on_nodes(move |shard| async move { Ok(shard.graph().add(tree).await?) }).await?;
    Ok(json!({}))
}

/// `blockdev-reopen`.
pub(crate) async fn reopen(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let mut trees = Vec::new();
    for (at, tree) in arguments.list("options")?.into_iter().enumerate() {
        let Value::Object(tree) = tree else {
            return Err(super::arguments::wrong_type(&format!("options[{at}]"), "object"));
        };
        let of = |name: &str| super::arguments::missing(&format!("options[{at}].{name}"));
        let driver = tree.get("driver").and_then(Value::as_str).ok_or_else(|| of("driver"))?;
        let needs_file = image::Format::from_name(driver).is_some() || matches!(driver, "throttle" | "copy-on-read");
        // In parts, as command lines have it, it is there, too.
        if needs_file && !tree.keys().any(|key| key == "file" || key.starts_with("file.")) {
            return Err(of("file"));
        }
        if driver == "file" && !tree.contains_key("filename") {
            return Err(of("filename"));
        }
        trees.push(tree);
    }
    arguments.end()?;
    engine.on_nodes(move |shard| async move { Ok(shard.graph().reopen(trees).await?) }).await?;
    Ok(json!({}))
}

/// `blockdev-del`.
pub(crate) async fn remove(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let name = arguments.needed_string("node-name")?;
    engine.on_nodes(move |shard| async move { Ok(shard.graph().remove(&name).await?) }).await?;
    Ok(json!({}))
}

/// The nodes, for `query-named-block-nodes`.
pub(crate) async fn list(engine: &Engine) -> Result<Vec<Value>, Failure> {
    let nodes = engine.on_nodes(|shard| std::future::ready(Ok(shard.graph().list()))).await?;
    Ok(nodes.into_iter().map(describe).collect())
}

/// `BlockDeviceInfo`.
pub(crate) fn describe(node: NodeInfo) -> Value {
    let mut info = json!({
        "iops_rd": 0, "detect_zeroes": "off", "active": true, "image": node.image, "iops_wr": 0, "ro": node.read_only,
        "node-name": node.name, "backing_file_depth": 0, "drv": node.driver, "iops": 0, "bps_wr": 0, "write_threshold": node.write_threshold,
        "encrypted": false, "bps": 0, "bps_rd": 0,
        "cache": { "no-flush": node.no_flush, "direct": node.direct, "writeback": true }, "file": node.file,
    });
    if let Some(backing) = node.backing {
        info["backing_file"] = json!(backing);
    }
    info
}

/// `object-add`.
pub(crate) async fn add_object(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    let tree = arguments.all();
    engine
        .on_nodes(move |shard| std::future::ready(shard.graph().objects().add_tree(tree).map_err(Failure::from)))
        .await?;
    Ok(json!({}))
}

/// `object-del`.
pub(crate) async fn remove_object(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("id")?;
    engine
        .on_nodes(move |shard| std::future::ready(shard.graph().objects().remove(&id).map_err(Failure::from)))
        .await?;
    Ok(json!({}))
}

/// `block_resize`, of a device or of a node.
pub(crate) async fn resize(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let (device, node) = (arguments.string("device")?, arguments.string("node-name")?);
    let size = arguments.integer("size")?.unwrap_or_default();
    let name = match (device, node) {
        (Some(_), Some(_)) => return Err(Failure::generic("Use either device or node-name but not both")),
        (None, None) => return Err(Failure::no_node("")),
        (Some(device), None) => {
            if engine.devices().contains(&device) {
                let size = to_size(size)?;
                let resize = move |device: Rc<crate::Device>, shard: Rc<crate::ShardState>| async move {
                    device.disk.resize(size).await?;
                    shard.announce_size(&device.disk);
                    Ok(())
                };
                return engine.on_device(&device, resize).await.map(|()| json!({}));
            }
            return Err(Failure::generic(format!("Cannot find device='{device}' nor node-name=''")));
        }
        (None, Some(node)) => node,
    };
    let resized = engine.on_nodes(move |shard| async move {
        if !shard.graph().has(&name) {
            return Err(Failure::no_node(&name));
        }
        if let Some(job) = shard.graph().job_on(&name) {
            let what = format!("Node '{name}' is busy: block device is in use by block job: {job}");
            return Err(Failure::generic(what));
        }
        let size = to_size(size)?;
        let hold = shard.graph().take(&name, true).await?;
        hold.disk().resize(size).await?;
        shard.announce_size(hold.disk());
        Ok(())
    });
    resized.await.map(|()| json!({}))
}

/// `block-set-write-threshold`.
pub(crate) async fn set_threshold(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let node = arguments.needed_string("node-name")?;
    let at = arguments.size("write-threshold")?.unwrap_or_default();
    let set = engine.on_nodes(move |shard| async move {
        let (to, name) = (Rc::downgrade(&shard), node.clone());
        let told = Rc::new(move |threshold, exceeded| {
            if let Some(shard) = to.upgrade() {
                shard.tell(Happening::WriteThreshold { node: name.clone(), threshold, exceeded });
            }
        });
        Ok(shard.graph().set_threshold(&node, at, told)?)
    });
    set.await.map(|()| json!({}))
}

fn to_size(size: i64) -> Result<u64, Failure> {
    u64::try_from(size).map_err(|_| Failure::generic("Parameter 'size' expects a >0 size"))
}

/// `change-backing-file`: what the header of an image says, and nothing else.
pub(crate) async fn change_backing(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let device = arguments.needed_string("device")?;
    let node = arguments.needed_string("image-node-name")?;
    let name = arguments.needed_string("backing-file")?;
    let changed = engine.on_nodes(move |shard| async move {
        if !shard.graph().has(&device) {
            return Err(Failure::no_device(&device));
        }
        if !shard.graph().has(&node) {
            return Err(Failure::no_node(&node));
        }
        let hold = shard.graph().take(&node, true).await?;
        let image = Rc::clone(&hold.disk().chain()[0].image);
        let Some(now) = image.backing() else {
            return Err(Failure::generic("not a backing file operation: the image has no backing file"));
        };
        Ok(image.set_backing(Some(BackingRef { name, ..now })).await?)
    });
    changed.await.map(|()| json!({}))
}
