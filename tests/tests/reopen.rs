//! What can be changed of nodes in use: marks that writes pass, and `blockdev-reopen`; the same conversations as with QEMU's storage
//! daemon.

use headwater_tests::storage::Kind;
use headwater_tests::twins::Say::{self, Do, Hear, Io};
use headwater_tests::twins::{Both, GRAPH, converse};
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

fn serve() -> [Say; 2] {
    [
        Do("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})),
        Do("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "fmt", "writable": true, "name": "disk"})),
    ]
}

#[test]
fn marks_are_told_of_when_writes_pass_them() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let set = |node: &str, at: u64| Do("block-set-write-threshold", json!({"node-name": node, "write-threshold": at}));
    let mut steps = Vec::from(serve());
    steps.extend([
        Do("block-set-write-threshold", json!({})),
        Do("block-set-write-threshold", json!({"node-name": "fmt"})),
        Do("block-set-write-threshold", json!({"node-name": "fmt", "write-threshold": "x"})),
        Do("block-set-write-threshold", json!({"node-name": "fmt", "write-threshold": -1})),
        set("nope", 1),
        set("fmt", 2 << 20),
        set("prot", 1 << 20),
        Do("query-named-block-nodes", json!({"flat": true})),
        Io("write 1M 1M"),
        // Where the file's data reach.
        Hear("BLOCK_WRITE_THRESHOLD"),
        Io("write 1M 1088k"),
        Hear("BLOCK_WRITE_THRESHOLD"),
        Io("write 3M 64k"),
        Do("query-named-block-nodes", json!({"flat": true})),
        set("fmt", 1 << 20),
        Io("read 2M 64k"),
        Io("write -z 3M 64k"),
        Hear("BLOCK_WRITE_THRESHOLD"),
        set("fmt", 1 << 20),
        set("fmt", 0),
        Io("write 3M 64k"),
        Do("block-export-del", json!({"id": "e", "mode": "hard"})),
        Hear("BLOCK_EXPORT_DELETED"),
    ]);
    converse(&both, &GRAPH, &steps)
}

fn reopen(trees: &Value) -> Say {
    Do("blockdev-reopen", json!({"options": trees}))
}

/// The tree of `fmt`, and what is different.
fn fmt(more: &Value) -> Value {
    let mut tree = json!({"driver": "qcow2", "node-name": "fmt", "file": "prot", "backing": "mid"});
    for (key, value) in more.as_object().into_iter().flatten() {
        tree[key] = value.clone();
    }
    tree
}

#[test]
fn nodes_in_use_are_changed_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let bare = json!({"driver": "qcow2", "node-name": "fmt", "file": "prot"});
    let prot = |file: &str| json!({"driver": "file", "node-name": "prot", "filename": file});
    let throttle =
        |group: &str| json!({"driver": "throttle", "node-name": "t", "throttle-group": group, "file": "base"});
    let limits = json!({"iops-total": 100_000});
    let mut steps = Vec::from(serve());
    steps.extend([
        Do("blockdev-reopen", json!({})),
        reopen(&json!({})),
        reopen(&json!([{}])),
        reopen(&json!([{"driver": "qcow2"}])),
        reopen(&json!([{"driver": "file", "node-name": "prot"}])),
        reopen(&json!([{"driver": "qcow2", "node-name": "nope", "file": "prot"}])),
        reopen(&json!([{"driver": "qcow2", "node-name": "fmt"}])),
        reopen(&json!([bare])),
        reopen(&json!([fmt(&json!({"backing": "nope"}))])),
        reopen(&json!([fmt(&json!({"read-only": true}))])),
        reopen(&json!([prot("mid.qcow2")])),
        // All of it or nothing.
        reopen(&json!([fmt(&json!({"backing": null})), prot("mid.qcow2")])),
        Io("read -P 5 1M 300k"),
        reopen(&json!([fmt(&json!({}))])),
        reopen(&json!([prot("top.qcow2")])),
        reopen(&json!([fmt(&json!({"cache": {"no-flush": true}, "lazy-refcounts": true}))])),
        Do("query-named-block-nodes", json!({"flat": true})),
        Io("write -P 7 0 64k"),
        reopen(&json!([fmt(&json!({}))])),
        // What lies below is another one, under a guest at work.
        reopen(&json!([fmt(&json!({"backing": null}))])),
        Io("read -P 0 1M 300k"),
        Io("read -P 6 2M 100k"),
        Io("write -P 8 64k 64k"),
        reopen(&json!([fmt(&json!({"backing": "mid"}))])),
        Io("read -P 5 1M 300k"),
        Io("read -P 7 0 64k"),
        Io("read -P 8 64k 64k"),
        Do("query-named-block-nodes", json!({"flat": true})),
        Do("block-export-del", json!({"id": "e", "mode": "hard"})),
        Hear("BLOCK_EXPORT_DELETED"),
        reopen(&json!([fmt(&json!({"read-only": true}))])),
        Do("query-named-block-nodes", json!({"flat": true})),
        Do("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "fmt", "writable": true, "name": "disk"})),
        Do("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "fmt", "name": "disk"})),
        Do("block-export-del", json!({"id": "e", "mode": "hard"})),
        Hear("BLOCK_EXPORT_DELETED"),
        reopen(&json!([fmt(&json!({}))])),
        Do("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "fmt", "writable": true, "name": "disk"})),
        Io("write -P 9 128k 64k"),
        Do("block-export-del", json!({"id": "e", "mode": "hard"})),
        Hear("BLOCK_EXPORT_DELETED"),
        Do("object-add", json!({"qom-type": "throttle-group", "id": "g1", "limits": limits})),
        Do("object-add", json!({"qom-type": "throttle-group", "id": "g2", "limits": limits})),
        Do("blockdev-add", throttle("g1")),
        reopen(&json!([throttle("g2")])),
        reopen(&json!([throttle("nope")])),
    ]);
    converse(&both, &GRAPH, &steps)?;
    let [ours, theirs] = Kind::ALL.map(|kind| both.at(kind).join("top.qcow2"));
    headwater_tests::qemu::compare(&ours, &theirs)?.ok()?;
    headwater_tests::qemu::check(&ours)?.ok()?;
    Ok(())
}
