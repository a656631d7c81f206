//! Answers that QEMU and we both have a part in. QEMU has a device with an NBD client for its disk; what is really there, we know.
//!
//! **Invariant.** A disk of ours is shown once: QEMU's rows for the NBD clients in between are replaced or left out.

use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// What is ours, as answers need it.
#[derive(Debug, Default)]
pub(super) struct Ours {
    /// What lies behind a name that QEMU knows (a drive's, an NBD client's): its `BlockDeviceInfo`, with the images below.
    pub(super) inserted: HashMap<String, Value>,
    /// QEMU's NBD clients, by their node names.
    pub(super) clients: Vec<String>,
    /// Drives of which QEMU has only a device: their names, and the devices' paths.
    pub(super) apart: Vec<(String, String)>,
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn rows(answer: Value) -> Vec<Value> {
    match answer {
        Value::Array(rows) => rows,
        _ => Vec::new(),
    }
}

/// `query-block`: QEMU's devices, with our images in those that have one.
pub(super) fn devices(emulator: Value, ours: &Ours) -> Value {
    let mut merged = rows(emulator);
    for row in &mut merged {
        let client = row.get("inserted").map(|inserted| text(inserted, "node-name").to_owned()).unwrap_or_default();
        let found = ours.inserted.get(text(row, "device")).or_else(|| ours.inserted.get(&client));
        if let Some(inserted) = found.filter(|_| !client.is_empty()) {
            let mut inserted = inserted.clone();
            // What QEMU does on its side of the disk stays what it says.
            for key in ["detect_zeroes", "bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "group"] {
                if let Some(value) = row["inserted"].get(key) {
                    inserted[key] = value.clone();
                }
            }
            row["inserted"] = inserted;
        }
    }
    for (name, path) in &ours.apart {
        merged.push(json!({
            "io-status": "ok", "device": name, "locked": false, "removable": false, "qdev": path, "type": "unknown",
            "inserted": ours.inserted.get(name),
        }));
    }
    Value::Array(merged)
}

/// `query-named-block-nodes`: QEMU's nodes without the clients, and ours.
pub(super) fn nodes(emulator: Value, own: Value, ours: &Ours) -> Value {
    let mut merged = rows(own);
    let others = rows(emulator).into_iter();
    merged.extend(others.filter(|row| !ours.clients.iter().any(|client| client == text(row, "node-name"))));
    Value::Array(merged)
}

/// `query-blockstats`: what went through QEMU's devices, with our nodes' names; or, by nodes, QEMU's and ours.
pub(super) fn stats(emulator: Value, own: Value, ours: &Ours, by_node: bool) -> Value {
    if by_node {
        return nodes(emulator, own, ours);
    }
    let own = rows(own);
    let mut merged = rows(emulator);
    for row in &mut merged {
        let client = text(row, "node-name").to_owned();
        let found = ours.inserted.get(text(row, "device")).or_else(|| ours.inserted.get(&client));
        let Some(inserted) = found.filter(|_| !client.is_empty()) else { continue };
        let node = inserted["node-name"].clone();
        if let Some(mine) = own.iter().find(|mine| mine["node-name"] == node) {
            let counters = mine["stats"].as_object();
            for (key, value) in counters.into_iter().flatten() {
                if key == "wr_highest_offset" || key.starts_with("x-headwater-") {
                    row["stats"][key] = value.clone();
                }
            }
            if let Some(parent) = mine.get("parent") {
                row["parent"] = parent.clone();
            }
        }
        row["node-name"] = node;
    }
    for (name, path) in &ours.apart {
        // What went through it, only we have seen.
        if let Some(mine) = own.iter().find(|mine| text(mine, "device") == name) {
            let mut row = mine.clone();
            row["qdev"] = json!(path);
            merged.push(row);
        }
    }
    Value::Array(merged)
}

/// `query-commands`.
pub(super) fn commands(emulator: Value, own: Value) -> Value {
    let mut merged = rows(emulator);
    for command in rows(own) {
        if !merged.iter().any(|other| text(other, "name") == text(&command, "name")) {
            merged.push(command);
        }
    }
    Value::Array(merged)
}

/// `query-qmp-schema`: QEMU's, and of ours what QEMU has not; our types are told from QEMU's by their names.
pub(super) fn schema(emulator: Value, own: Value) -> Value {
    let mut merged = rows(emulator);
    let is_top = |entry: &Value| matches!(text(entry, "meta-type"), "command" | "event");
    let there: Vec<String> = merged.iter().map(|entry| text(entry, "name").to_owned()).collect();
    let own = rows(own);
    let mut types: HashMap<String, Value> = HashMap::new();
    let mut wanted = Vec::new();
    for entry in own {
        if !is_top(&entry) {
            types.insert(text(&entry, "name").to_owned(), entry);
        } else if !there.iter().any(|name| name == text(&entry, "name")) {
            wanted.push(entry);
        }
    }
    while let Some(mut entry) = wanted.pop() {
        let top = is_top(&entry);
        rename(&mut entry, &mut |name| {
            // What is taken once is renamed everywhere and never taken again.
            wanted.extend(types.remove(name));
            own_name(name)
        });
        if !top {
            entry["name"] = json!(own_name(text(&entry, "name")));
        }
        merged.push(entry);
    }
    Value::Array(merged)
}

fn own_name(name: &str) -> String {
    format!("headwater-{name}")
}

/// Renames the types that an entry refers to.
fn rename(entry: &mut Value, to: &mut impl FnMut(&str) -> String) {
    for key in ["arg-type", "ret-type", "element-type"] {
        if let Some(Value::String(name)) = entry.get_mut(key) {
            *name = to(name);
        }
    }
    if let Some(Value::Array(members)) = entry.get_mut("members") {
        for member in members {
            if let Some(Value::String(name)) = member.get_mut("type") {
                *name = to(name);
            }
        }
    }
}

/// One list after the other.
pub(super) fn lists(emulator: Value, own: Value) -> Value {
    let mut merged = rows(own);
    merged.extend(rows(emulator));
    Value::Array(merged)
}

/// `BlockDeviceInfo` with the images below it, which `below` has by the names of their nodes.
pub(super) fn nested(mut info: Value, mut below: Vec<Value>) -> Value {
    info["backing_file_depth"] = json!(below.len());
    let mut image: Option<Value> = None;
    while let Some(lower) = below.pop() {
        let mut shown = lower.get("image").cloned().unwrap_or_default();
        if let (Some(backing), Value::Object(members)) = (image.take(), &mut shown) {
            put_below(members, backing);
        }
        image = Some(shown);
    }
    if let (Some(backing), Some(Value::Object(members))) = (image, info.get_mut("image")) {
        put_below(members, backing);
    }
    info
}

fn put_below(image: &mut Map<String, Value>, backing: Value) {
    image.insert("backing-image".to_owned(), backing);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Ours {
        let image = |node: &str| json!({"node-name": node, "drv": "qed", "image": {"filename": "my.qed"}});
        Ours {
            inserted: [("virtio0".to_owned(), image("#block1")), ("fmt".to_owned(), image("fmt"))].into(),
            clients: vec!["headwater-0".into(), "fmt".into()],
            apart: Vec::new(),
        }
    }

    #[test]
    fn our_images_stand_where_qemu_has_clients() {
        let emulator = json!([
            {"device": "virtio0", "inserted": {"node-name": "headwater-0", "drv": "nbd", "bps": 7}},
            {"device": "", "qdev": "/d/x", "inserted": {"node-name": "fmt", "drv": "nbd"}},
            {"device": "cd", "inserted": {"node-name": "#block9", "drv": "raw"}},
            {"device": "floppy0"},
        ]);
        let merged = devices(emulator, &ours());
        assert_eq!(merged[0]["inserted"]["drv"], "qed");
        assert_eq!(merged[0]["inserted"]["bps"], 7);
        assert_eq!(merged[1]["inserted"]["image"]["filename"], "my.qed");
        assert_eq!(merged[2]["inserted"]["drv"], "raw");
        assert!(merged[3].get("inserted").is_none());
    }

    #[test]
    fn a_disk_that_qemu_has_no_client_for_is_shown_too() {
        let apart = vec![("virtio0".to_owned(), "/d/y".to_owned())];
        let ours = Ours { clients: Vec::new(), apart, ..ours() };
        let merged = devices(json!([]), &ours);
        assert_eq!((&merged[0]["qdev"], &merged[0]["inserted"]["drv"]), (&json!("/d/y"), &json!("qed")));
        let own = json!([{"device": "virtio0", "node-name": "#block1", "stats": {"rd_bytes": 9}}]);
        let merged = stats(json!([]), own, &ours, false);
        assert_eq!((&merged[0]["qdev"], &merged[0]["stats"]["rd_bytes"]), (&json!("/d/y"), &json!(9)));
    }

    #[test]
    fn a_disk_is_shown_once() {
        let emulator = json!([{"node-name": "headwater-0"}, {"node-name": "fmt"}, {"node-name": "cd"}]);
        let merged = nodes(emulator, json!([{"node-name": "fmt", "drv": "qed"}]), &ours());
        assert_eq!(merged, json!([{"node-name": "fmt", "drv": "qed"}, {"node-name": "cd"}]));
    }

    #[test]
    fn statistics_are_qemus_with_our_names() {
        let emulator = json!([{"device": "virtio0", "node-name": "headwater-0", "stats": {"rd_bytes": 5}}]);
        let own = json!([{"node-name": "#block1", "stats": {"rd_bytes": 9, "x-headwater-fetched-bytes": 3}}]);
        let merged = stats(emulator, own, &ours(), false);
        let expected = json!({"rd_bytes": 5, "x-headwater-fetched-bytes": 3});
        assert_eq!(merged[0], json!({"device": "virtio0", "node-name": "#block1", "stats": expected}));
    }

    #[test]
    fn the_schema_has_what_both_have_with_types_told_apart() {
        let emulator = json!([{"name": "stop", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
                              {"name": "0", "meta-type": "object", "members": []}]);
        let own = json!([
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "0", "meta-type": "object", "members": [{"name": "device", "type": "str"}]},
            {"name": "unused", "meta-type": "object", "members": []},
            {"name": "block_stream", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
            {"name": "stop", "meta-type": "command", "arg-type": "unused", "ret-type": "0"},
        ]);
        let merged = rows(schema(emulator, own));
        let names: Vec<&str> = merged.iter().map(|entry| text(entry, "name")).collect();
        assert_eq!(names, ["stop", "0", "block_stream", "headwater-0", "headwater-str"]);
        assert_eq!(merged[2]["arg-type"], "headwater-0");
        assert_eq!(merged[3]["members"][0]["type"], "headwater-str");
    }

    #[test]
    fn images_below_are_within_each_other() {
        let info = json!({"node-name": "a", "image": {"filename": "a"}});
        let below = vec![json!({"image": {"filename": "b"}}), json!({"image": {"filename": "c"}})];
        let shown = nested(info, below);
        assert_eq!(shown["backing_file_depth"], 2);
        assert_eq!(shown["image"]["backing-image"]["backing-image"]["filename"], "c");
    }
}
