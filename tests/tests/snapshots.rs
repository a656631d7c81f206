//! Overlays on disks in use: `blockdev-snapshot-sync`, `blockdev-snapshot`, `transaction`; the same conversations as with QEMU's
//! storage daemon, and the data that guests have written before, at and after that moment.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use headwater_tests::nbd::{Client, Options};
use headwater_tests::process::finish;
use headwater_tests::qemu::{check, compare, info, qemu_io};
use headwater_tests::random::Random;
use headwater_tests::storage::{Kind, Storage};
use headwater_tests::twins::Say::{self, Do, Hear};
use headwater_tests::twins::{Both, GRAPH, converse};
use headwater_tests::writer::{Writer, holds, shown};
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

/// `snap.qcow2`, which is made to lie on `top.qcow2`.
fn with_an_overlay(both: &Both) -> Result {
    for kind in Kind::ALL {
        let dir = both.at(kind);
        for line in ["create -q -f qcow2 -u -b top.qcow2 -F qcow2 snap.qcow2 4M", "create -q -f raw plain.raw 4M"] {
            finish(Command::new("qemu-img").args(line.split(' ')).current_dir(&dir))?.ok()?;
        }
    }
    Ok(())
}

fn node(driver: &str, name: &str, file: &str, more: &Value) -> Say {
    let mut tree = json!({"driver": driver, "node-name": name, "file": {"driver": "file", "filename": file}});
    for (key, value) in more.as_object().into_iter().flatten() {
        tree[key] = value.clone();
    }
    Do("blockdev-add", tree)
}

fn nodes() -> Say {
    Do("query-named-block-nodes", json!({"flat": true}))
}

fn serve() -> [Say; 2] {
    [
        Do("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})),
        Do("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "fmt", "writable": true, "name": "disk"})),
    ]
}

#[test]
fn files_are_put_on_nodes_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let sync = |more: Value| Do("blockdev-snapshot-sync", more);
    let mut steps = vec![
        sync(json!({})),
        sync(json!({"snapshot-file": "a.qcow2"})),
        sync(json!({"device": "nope", "snapshot-file": "a.qcow2"})),
        sync(json!({"node-name": "nope", "snapshot-file": "a.qcow2"})),
        sync(json!({"device": "fmt", "snapshot-file": "a.qcow2"})),
        sync(json!({"device": "fmt", "node-name": "fmt", "snapshot-file": "a.qcow2"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "a.qcow2"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "mid"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "1x"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "x", "format": "tea"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "a.raw", "snapshot-node-name": "x", "format": "raw"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "no/a", "snapshot-node-name": "x"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "nope", "snapshot-node-name": "x", "mode": "existing"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "base.raw", "snapshot-node-name": "x", "mode": "existing"})),
        sync(json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "x", "mode": "tea"})),
        sync(json!({"node-name": "mid", "snapshot-file": "m.qcow2", "snapshot-node-name": "ms"})),
    ];
    steps.extend(serve());
    steps.extend([
        sync(json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "x"})),
        nodes(),
        Do("query-block-exports", json!({})),
        sync(json!({"node-name": "fmt", "snapshot-file": "b.qcow2", "snapshot-node-name": "y"})),
        sync(json!({"node-name": "x", "snapshot-file": "b.qed", "snapshot-node-name": "y", "format": "qed"})),
        nodes(),
        Do("query-block-exports", json!({})),
        Do("blockdev-del", json!({"node-name": "y"})),
        Do("blockdev-del", json!({"node-name": "fmt"})),
        Do("block-export-add", json!({"type": "nbd", "id": "f", "node-name": "fmt", "writable": true})),
        Do("block-export-add", json!({"type": "nbd", "id": "f", "node-name": "fmt"})),
        Do("block-export-del", json!({"id": "f"})),
        Hear("BLOCK_EXPORT_DELETED"),
        Do("block-export-del", json!({"id": "e"})),
        Hear("BLOCK_EXPORT_DELETED"),
        // The overlays were nobody's but the export's.
        nodes(),
        sync(json!({"node-name": "fmt", "snapshot-file": "c.qcow2", "snapshot-node-name": "z"})),
        nodes(),
        Do("blockdev-del", json!({"node-name": "fmt"})),
    ]);
    converse(&both, &GRAPH, &steps)?;
    for kind in Kind::ALL {
        for image in ["a.qcow2", "b.qed", "c.qcow2"] {
            check(&both.at(kind).join(image))?.ok()?;
        }
    }
    compare(&both.at(Kind::Ours).join("b.qed"), &both.at(Kind::Theirs).join("b.qed"))?.ok()?;
    for image in ["a.qcow2", "b.qed", "c.qcow2"] {
        let (ours, theirs) = (info(&both.at(Kind::Ours).join(image))?, info(&both.at(Kind::Theirs).join(image))?);
        for key in ["backing-filename", "backing-filename-format", "virtual-size", "format"] {
            assert_eq!(ours[key], theirs[key], "{image}: {key}");
        }
    }
    Ok(())
}

#[test]
fn nodes_are_put_on_nodes_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    with_an_overlay(&both)?;
    let snapshot = |node: &str, overlay: &str| Do("blockdev-snapshot", json!({"node": node, "overlay": overlay}));
    let read_only = json!({"backing": null, "read-only": true});
    let mut steps = Vec::from(serve());
    steps.extend([
        Do("blockdev-snapshot", json!({"node": "fmt"})),
        Do("blockdev-snapshot", json!({"overlay": "fmt"})),
        snapshot("nope", "x"),
        snapshot("fmt", "nope"),
        snapshot("fmt", "fmt"),
        snapshot("fmt", "mid"),
        snapshot("fmt", "base"),
        snapshot("mid", "base"),
        node("raw", "plain", "plain.raw", &json!({})),
        snapshot("fmt", "plain"),
        node("qcow2", "snap", "snap.qcow2", &read_only),
        snapshot("fmt", "snap"),
        Do("blockdev-del", json!({"node-name": "snap"})),
        node("qcow2", "snap", "snap.qcow2", &json!({"backing": null})),
        Do("block-export-add", json!({"type": "nbd", "id": "o", "node-name": "snap", "writable": true})),
        snapshot("fmt", "snap"),
        Do("block-export-del", json!({"id": "o"})),
        Hear("BLOCK_EXPORT_DELETED"),
        Do("block-stream", json!({"device": "fmt", "job-id": "j", "speed": 1, "base-node": "base"})),
        snapshot("fmt", "snap"),
        Do("block-job-cancel", json!({"device": "j"})),
        Hear("BLOCK_JOB_CANCELLED"),
        snapshot("fmt", "snap"),
        nodes(),
        Do("query-block-exports", json!({})),
        snapshot("fmt", "snap"),
        snapshot("snap", "fmt"),
        Do("blockdev-del", json!({"node-name": "snap"})),
        Do("blockdev-del", json!({"node-name": "fmt"})),
        Do("block-export-del", json!({"id": "e"})),
        Hear("BLOCK_EXPORT_DELETED"),
        nodes(),
        Do("block-export-add", json!({"type": "nbd", "id": "f", "node-name": "fmt", "writable": true})),
        Do("blockdev-del", json!({"node-name": "snap"})),
        Do("blockdev-del", json!({"node-name": "fmt"})),
    ]);
    converse(&both, &GRAPH, &steps)
}

#[test]
fn transactions_are_carried_out_or_not_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    with_an_overlay(&both)?;
    let all = |actions: Value| Do("transaction", json!({"actions": actions}));
    let abort = json!({"type": "abort", "data": {}});
    let put = json!({"type": "blockdev-snapshot", "data": {"node": "fmt", "overlay": "snap"}});
    let file = |node: &str, file: &str, name: &str| {
        let data = json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": name});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let mut steps = Vec::from(serve());
    steps.extend([
        Do("transaction", json!({})),
        all(json!([])),
        all(json!({})),
        all(json!([{}])),
        all(json!([{"type": "tea", "data": {}}])),
        all(json!([{"type": "abort"}])),
        all(json!([abort])),
        all(json!([{"type": "abort", "data": {"x": 1}}])),
        all(json!([{"type": "blockdev-snapshot", "data": {"node": "fmt"}}])),
        node("qcow2", "snap", "snap.qcow2", &json!({"backing": null})),
        all(json!([put, abort])),
        all(json!([file("fmt", "t.qcow2", "x"), abort])),
        all(json!([file("fmt", "t.qcow2", "x"), file("fmt", "t2.qcow2", "y")])),
        all(json!([file("fmt", "t.qcow2", "x"), file("nope", "t2.qcow2", "y")])),
        all(json!([put, file("snap", "t.qcow2", "mid")])),
        Do("query-block-exports", json!({})),
        Do("transaction", json!({"actions": [put], "properties": {"completion-mode": "grouped"}})),
        Do("transaction", json!({"actions": [put], "properties": {"completion-mode": "tea"}})),
        Do("blockdev-del", json!({"node-name": "x"})),
        all(json!([put, file("snap", "t3.qcow2", "z")])),
        nodes(),
        Do("query-block-exports", json!({})),
    ]);
    converse(&both, &GRAPH, &steps)?;
    compare(&both.at(Kind::Ours).join("t3.qcow2"), &both.at(Kind::Theirs).join("t3.qcow2"))?.ok()?;
    Ok(())
}

#[test]
fn a_guest_writes_on_while_overlays_are_put_under_it() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    let mut words = GRAPH.to_vec();
    words.extend(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    words.extend(["--export", "nbd,id=e,node-name=fmt,writable=on,name=disk"]);
    let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &words)?;
    let writer = Writer::start(&dir.join("nbd.sock"), "disk", 1024, Random::seed())?;
    let mut images: Vec<PathBuf> = vec![dir.join("top.qcow2")];
    let mut top = "fmt".to_owned();
    for round in 0..6 {
        let (name, format) = (format!("s{round}"), if round % 2 == 0 { "qcow2" } else { "qed" });
        let file = format!("s{round}.{format}");
        let data = json!({"node-name": top, "snapshot-file": file, "snapshot-node-name": name, "format": format});
        if round % 3 == 2 {
            // One that is taken back right before.
            let actions = json!([{"type": "blockdev-snapshot-sync", "data": data}, {"type": "abort", "data": {}}]);
            qmp.refused("transaction", json!({"actions": actions}))?;
        }
        qmp.execute("blockdev-snapshot-sync", data)?;
        // The old top is nobody's to write any more, and everybody's to read.
        let old = fs::read(&images[round])?;
        check(&images[round])?.ok()?;
        thread::sleep(std::time::Duration::from_millis(60));
        assert!(old == fs::read(&images[round])?, "{:?} was written to after the snapshot", images[round]);
        images.push(dir.join(file));
        top = name;
    }
    let last = writer.stop()?;
    // The server may not have heard yet that its client is gone.
    qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"}))?;
    // Nothing holds the overlays any more, while the daemon runs on.
    for image in &images {
        check(image)?.ok()?;
    }
    holds(&shown(&images[6])?, &last)?;
    qmp.execute("quit", json!({}))?;
    daemon.exits()?;
    Ok(())
}

/// Of two disks that are stopped at one moment neither shows a write that the other, written first, does not.
#[test]
fn a_transaction_is_one_moment_of_several_disks() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    for name in ["p.qcow2", "q.qcow2"] {
        let line = format!("create -q -f qcow2 {name} 1M");
        finish(Command::new("qemu-img").args(line.split(' ')).current_dir(&dir))?.ok()?;
    }
    let words = [
        "--blockdev",
        "driver=qcow2,node-name=p,file.driver=file,file.filename=p.qcow2",
        "--blockdev",
        "driver=qcow2,node-name=q,file.driver=file,file.filename=q.qcow2",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=ep,node-name=p,writable=on,name=p",
        "--export",
        "nbd,id=eq,node-name=q,writable=on,name=q",
    ];
    let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &words)?;
    let stop = Arc::new(AtomicBool::new(false));
    let connect = |name: &str| {
        let options = Options { name: name.to_owned(), ..Options::default() };
        Client::connect_with(&dir.join("nbd.sock"), &options)
    };
    let (mut p, mut q) = (connect("p")?, connect("q")?);
    let stopped = Arc::clone(&stop);
    let writer = thread::spawn(move || -> Result {
        let mut number = 0_u64;
        while !stopped.load(Ordering::Relaxed) {
            number += 1;
            // Always to the one first, then to the other.
            p.write(0, &number.to_le_bytes())?;
            q.write(0, &number.to_le_bytes())?;
        }
        Ok(())
    });
    let (mut below_p, mut below_q) = ("p".to_owned(), "q".to_owned());
    for round in 0..8 {
        thread::sleep(std::time::Duration::from_millis(20));
        let put = |node: &str, name: &str| {
            let data = json!({"node-name": node, "snapshot-file": format!("{name}.qcow2"), "snapshot-node-name": name});
            json!({"type": "blockdev-snapshot-sync", "data": data})
        };
        let (over_p, over_q) = (format!("p{round}"), format!("q{round}"));
        qmp.execute("transaction", json!({"actions": [put(&below_p, &over_p), put(&below_q, &over_q)]}))?;
        let number = |name: &str| -> Result<u64> {
            Ok(u64::from_le_bytes(shown(&dir.join(format!("{name}.qcow2")))?[..8].try_into()?))
        };
        let (first, second) = (number(&below_p)?, number(&below_q)?);
        assert!(first == second || first == second + 1, "round {round}: {first} and {second}");
        (below_p, below_q) = (over_p, over_q);
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().map_err(|_| "the writer panicked")??;
    qmp.execute("quit", json!({}))?;
    daemon.exits()?;
    Ok(())
}

/// A filter that lies on the node lies on the overlay, and so does what it keeps.
#[test]
fn filters_follow_to_the_overlay() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    let mut words = GRAPH.to_vec();
    words.extend(["--blockdev", "copy-on-read,node-name=cor,file=fmt"]);
    words.extend(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    words.extend(["--export", "nbd,id=e,node-name=cor,writable=on,name=disk"]);
    let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &words)?;
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd.sock").display());
    let uri = Path::new(&uri);
    qemu_io("raw", uri, &["write -P 7 0 64k"])?;
    let data = json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "a"});
    qmp.execute("blockdev-snapshot-sync", data)?;
    qemu_io("raw", uri, &["read -P 7 0 64k", "write -P 8 64k 64k", "read -P 5 1M 300k"])?;
    qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"}))?;
    for node in ["cor", "fmt", "prot"] {
        qmp.execute("blockdev-del", json!({"node-name": node}))?;
    }
    let (image, old) = (dir.join("a.qcow2"), dir.join("top.qcow2"));
    check(&image)?.ok()?;
    qemu_io("qcow2", &old, &["read -P 7 0 64k"])?;
    assert!(qemu_io("qcow2", &old, &["read -P 8 64k 64k"]).is_err(), "it went into the old top");
    qemu_io("qcow2", &image, &["read -P 7 0 64k", "read -P 8 64k 64k", "read -P 5 1M 300k"])?;
    // What was read through the filter is kept, in the overlay.
    let map = finish(Command::new("qemu-img").args(["map", "--output=json"]).arg(&image))?.ok()?;
    let map: Vec<Value> = serde_json::from_str(&map)?;
    let kept = map.iter().any(|run| run["depth"] == 0 && run["start"] == 1 << 20 && run["present"] == true);
    assert!(kept, "{map:?}");
    qmp.execute("quit", json!({}))?;
    daemon.exits()?;
    Ok(())
}

/// A filter with a lowest layer keeps what comes from there and above, and nothing of what comes from below.
#[test]
fn a_filter_copies_down_to_its_bottom_only() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let mut maps = Vec::new();
    for kind in Kind::ALL {
        let dir = both.at(kind);
        let mut words = GRAPH.to_vec();
        words.extend(["--blockdev", "copy-on-read,node-name=cor,file=fmt,bottom=mid"]);
        words.extend(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
        words.extend(["--export", "nbd,id=e,node-name=cor,writable=on,name=disk"]);
        let Storage { mut daemon, mut qmp } = both.start(kind, &words)?;
        let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd.sock").display());
        qemu_io("raw", Path::new(&uri), &["read 0 512k", "read -P 5 1M 300k", "read 3M 1M"])?;
        let none = qmp.refused(
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "c", "file": "fmt", "bottom": "nope"}),
        )?;
        daemon.terminate()?;
        let image = dir.join("top.qcow2");
        check(&image)?.ok()?;
        let map = finish(Command::new("qemu-img").args(["map", "--output=json"]).arg(&image))?.ok()?;
        let map: Vec<Value> = serde_json::from_str(&map)?;
        let own =
            map.into_iter().filter(|run| run["depth"] == 0).map(|run| (run["start"].clone(), run["length"].clone()));
        maps.push((none, own.collect::<Vec<_>>()));
    }
    assert_eq!(maps[0], maps[1]);
    Ok(())
}
