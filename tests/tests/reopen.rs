//! What can be changed of nodes in use: marks that writes pass, and `blockdev-reopen`; the same conversations as with QEMU's storage
//! daemon.

use headwater_tests::twins::Say::{self, Do, Hear, Io};
use headwater_tests::twins::{Both, GRAPH, converse};
use headwater_tests::{Result, peer};
use serde_json::json;

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
        Do("block-export-del", json!({"id": "e"})),
        Hear("BLOCK_EXPORT_DELETED"),
    ]);
    converse(&both, &GRAPH, &steps)
}
