//! Queries on devices and nodes: what is served, from which chain, and how much went through it.

use super::arguments::Arguments;
use crate::{Device, Engine, Failure};
use disk::{Layer, Stats};
use image::BackingRef;
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;

/// What a device's answer is made of, taken on its shard.
struct Seen {
    name: String,
    read_only: bool,
    direct: bool,
    write_back: bool,
    no_flush: bool,
    layers: Vec<SeenLayer>,
    stats: Stats,
}

/// One layer, top first.
struct SeenLayer {
    node: String,
    file: String,
    format: &'static str,
    size: u64,
    file_size: u64,
    cluster_size: Option<u64>,
    dirty: bool,
    read_only: bool,
    backing: Option<BackingRef>,
}

impl SeenLayer {
    fn of(layer: &Layer) -> Self {
        let image = &layer.image;
        let info = image.info();
        Self {
            node: layer.node.clone(),
            file: image.file().name().to_owned(),
            format: image.format().name(),
            size: image.size(),
            file_size: image.file().size(),
            cluster_size: info.cluster_size,
            dirty: info.dirty,
            read_only: image.read_only(),
            backing: image.backing(),
        }
    }

    /// `ImageInfo`, without what lies below.
    fn image_info(&self) -> Map<String, Value> {
        let mut info = Map::new();
        info.insert("filename".into(), json!(self.file));
        info.insert("format".into(), json!(self.format));
        info.insert("virtual-size".into(), json!(self.size));
        if let Ok(meta) = std::fs::metadata(&self.file) {
            info.insert("actual-size".into(), json!(meta.blocks() * 512));
        }
        if let Some(bytes) = self.cluster_size {
            info.insert("cluster-size".into(), json!(bytes));
        }
        info.insert("dirty-flag".into(), json!(self.dirty));
        if let Some(backing) = &self.backing {
            info.insert("backing-filename".into(), json!(backing.name));
            if let Some(format) = backing.format {
                info.insert("backing-filename-format".into(), json!(format.name()));
            }
        }
        info
    }
}

impl Seen {
    fn of(device: &Device) -> Self {
        let chain = device.disk.chain();
        Self {
            name: device.spec.name.clone(),
            read_only: device.disk.read_only(),
            direct: device.spec.cache.direct(),
            write_back: !device.spec.cache.write_through(),
            no_flush: device.spec.cache == crate::CacheMode::Unsafe,
            layers: chain.iter().map(SeenLayer::of).collect(),
            stats: device.disk.stats(),
        }
    }

    /// `BlockDeviceInfo` of the layer at `depth`, with the images below it.
    fn device_info(&self, depth: usize) -> Value {
        let Some(layer) = self.layers.get(depth) else { return Value::Null };
        let below = &self.layers[depth..];
        let mut image: Option<Map<String, Value>> = None;
        for lower in below.iter().rev() {
            let mut info = lower.image_info();
            if let Some(backing) = image.take() {
                info.insert("full-backing-filename".into(), backing.get("filename").cloned().unwrap_or_default());
                info.insert("backing-image".into(), Value::Object(backing));
            }
            image = Some(info);
        }
        let mut info = json!({
            "file": layer.file, "node-name": layer.node, "ro": layer.read_only, "drv": layer.format, "active": true,
            "backing_file_depth": below.len() - 1, "encrypted": false, "detect_zeroes": "off", "write_threshold": 0,
            "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "cache": { "writeback": self.write_back, "direct": self.direct, "no-flush": self.no_flush },
            "image": image,
        });
        if let Some(backing) = &layer.backing {
            info["backing_file"] = json!(backing.name);
        }
        info
    }
}

async fn devices(engine: &Engine) -> Result<Vec<Seen>, Failure> {
    let shards = engine
        .on_every_shard(|shard| {
            let seen: Vec<Seen> = shard.devices().iter().map(|device| Seen::of(device)).collect();
            std::future::ready(Ok(seen))
        })
        .await?;
    let mut seen: Vec<Seen> = shards.into_iter().flatten().collect();
    let order = engine.devices();
    seen.sort_by_key(|device| order.iter().position(|name| *name == device.name));
    Ok(seen)
}

/// `query-block`.
pub(crate) async fn block(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    arguments.end()?;
    let answer = devices(engine).await?.into_iter().map(|device| {
        json!({
            "device": device.name, "type": "unknown", "removable": false, "locked": false, "io-status": "ok",
            "inserted": device.device_info(0),
        })
    });
    Ok(answer.collect())
}

/// `query-named-block-nodes`.
pub(crate) async fn named_nodes(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let flat = arguments.boolean("flat")?.unwrap_or(false);
    arguments.end()?;
    let mut answer = Vec::new();
    for device in devices(engine).await? {
        for depth in 0..device.layers.len() {
            let mut info = device.device_info(depth);
            if flat && let Some(image) = info["image"].as_object_mut() {
                image.shift_remove("backing-image");
            }
            answer.push(info);
        }
    }
    answer.extend(super::nodes::list(engine).await?);
    Ok(Value::Array(answer))
}

/// `query-blockstats`. What has no counterpart in QEMU begins with `x-headwater-`.
pub(crate) async fn block_stats(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let by_node = arguments.boolean("query-nodes")?.unwrap_or(false);
    arguments.end()?;
    let mut answer = Vec::new();
    for device in devices(engine).await? {
        for (depth, layer) in device.layers.iter().enumerate() {
            let top = depth == 0;
            let stats = if top { device.stats } else { Stats::default() };
            let mut entry = json!({ "node-name": layer.node, "stats": counters(&stats, top) });
            if !by_node {
                entry["device"] = json!(device.name);
            }
            if by_node || top {
                entry["parent"] = json!({ "stats": { "wr_highest_offset": if top { layer.file_size } else { 0 } } });
                answer.push(entry);
            }
        }
    }
    Ok(Value::Array(answer))
}

/// `BlockDeviceStats`.
pub(crate) fn counters(stats: &Stats, top: bool) -> Value {
    let mut counters = json!({
        "rd_bytes": stats.rd_bytes, "wr_bytes": stats.wr_bytes, "unmap_bytes": stats.unmap_bytes, "zone_append_bytes": 0,
        "rd_operations": stats.rd_operations, "wr_operations": stats.wr_operations,
        "flush_operations": stats.flush_operations, "unmap_operations": stats.unmap_operations, "zone_append_operations": 0,
        "rd_total_time_ns": stats.rd_total_time_ns, "wr_total_time_ns": stats.wr_total_time_ns,
        "flush_total_time_ns": stats.flush_total_time_ns, "unmap_total_time_ns": stats.unmap_total_time_ns,
        "zone_append_total_time_ns": 0, "wr_highest_offset": stats.wr_highest_offset,
        "rd_merged": 0, "wr_merged": 0, "unmap_merged": 0, "zone_append_merged": 0,
        "failed_rd_operations": stats.failed_rd_operations, "failed_wr_operations": stats.failed_wr_operations,
        "failed_flush_operations": stats.failed_flush_operations,
        "failed_unmap_operations": stats.failed_unmap_operations, "failed_zone_append_operations": 0,
        "invalid_rd_operations": 0, "invalid_wr_operations": 0, "invalid_flush_operations": 0,
        "invalid_unmap_operations": 0, "invalid_zone_append_operations": 0,
        "account_invalid": false, "account_failed": true, "timed_stats": [],
    });
    if top {
        counters["x-headwater-fetched-bytes"] = json!(stats.fetched_bytes);
        counters["x-headwater-shared-bytes"] = json!(stats.shared_bytes);
        counters["x-headwater-copy-on-read-bytes"] = json!(stats.copy_on_read_bytes);
    }
    counters
}

/// A line a device, for people.
pub(crate) async fn block_text(engine: &Engine, device: Option<&str>) -> Result<String, Failure> {
    use std::fmt::Write;
    let seen = devices(engine).await?;
    if let Some(name) = device
        && !seen.iter().any(|device| device.name == name)
    {
        return Err(Failure::generic(format!("Device '{name}' not found")));
    }
    let mut text = String::new();
    for device in seen.iter().filter(|seen| device.is_none_or(|name| seen.name == name)) {
        let Some(top) = device.layers.first() else { continue };
        let read_only = if device.read_only { ", read-only" } else { "" };
        let cache = match (device.write_back, device.direct, device.no_flush) {
            (_, _, true) => "writeback, ignore flushes",
            (true, true, _) => "writeback, direct",
            (true, false, _) => "writeback",
            (false, true, _) => "writethrough, direct",
            (false, false, _) => "writethrough",
        };
        let _ = writeln!(text, "{} ({}): {} ({}{read_only})", device.name, top.node, top.file, top.format);
        let _ = writeln!(text, "    Cache mode:       {cache}");
        if let Some(backing) = &top.backing {
            let depth = device.layers.len() - 1;
            let _ = writeln!(text, "    Backing file:     {} (chain depth: {depth})", backing.name);
        }
    }
    Ok(text)
}

/// A line of counters a device, for people.
pub(crate) async fn stats_text(engine: &Engine) -> Result<String, Failure> {
    let lines = devices(engine).await?.into_iter().map(|device| {
        let s = device.stats;
        format!(
            "{}: rd_bytes={} wr_bytes={} rd_operations={} wr_operations={} flush_operations={} wr_total_time_ns={} \
             rd_total_time_ns={} flush_total_time_ns={} rd_merged=0 wr_merged=0\n",
            device.name,
            s.rd_bytes,
            s.wr_bytes,
            s.rd_operations,
            s.wr_operations,
            s.flush_operations,
            s.wr_total_time_ns,
            s.rd_total_time_ns,
            s.flush_total_time_ns
        )
    });
    Ok(lines.collect())
}
