//! `block-commit`: the same conversations as with QEMU's storage daemon and the same images afterwards, under guests at work, and
//! killed at any instant.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use headwater_tests::process::finish;
use headwater_tests::qemu::{check, compare, info, qemu_io};
use headwater_tests::random::Random;
use headwater_tests::storage::{Kind, Storage};
use headwater_tests::twins::Say::{self, Do, Hear, Io};
use headwater_tests::twins::{Both, GRAPH, converse};
use headwater_tests::writer::{BLOCK, Writer, holds, shown};
use headwater_tests::{Result, error, peer};
use serde_json::{Value, json};

fn commit(more: &Value) -> Say {
    let mut arguments = json!({"device": "fmt", "job-id": "j"});
    for (key, value) in more.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    Do("block-commit", arguments)
}

fn nodes() -> Say {
    Do("query-named-block-nodes", json!({"flat": true}))
}

fn verb(name: &'static str) -> Say {
    let key = if name.starts_with("job-") || name.ends_with("dismiss") || name.ends_with("finalize") {
        "id"
    } else {
        "device"
    };
    Do(name, json!({key: "j"}))
}

fn serve() -> [Say; 2] {
    [
        Do("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})),
        Do("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "fmt", "writable": true, "name": "disk"})),
    ]
}

/// Both have the same in the file of this name.
fn same(both: &Both, file: &str) -> Result {
    compare(&both.at(Kind::Ours).join(file), &both.at(Kind::Theirs).join(file))?.ok()?;
    Ok(())
}

#[test]
fn what_makes_no_sense_is_refused_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let mut steps = Vec::from(serve());
    steps.extend([
        Do("block-commit", json!({})),
        Do("block-commit", json!({"device": "fmt"})),
        Do("block-commit", json!({"device": "nope", "job-id": "j"})),
        Do("block-commit", json!({"device": "mid", "job-id": "j"})),
        Do("block-commit", json!({"device": "f0", "job-id": "j"})),
        commit(&json!({"job-id": "1x"})),
        commit(&json!({"base-node": "nope"})),
        commit(&json!({"base-node": "f0"})),
        commit(&json!({"base": "nope"})),
        commit(&json!({"top": "nope"})),
        commit(&json!({"top-node": "nope"})),
        commit(&json!({"top-node": "f0"})),
        commit(&json!({"base": "base.raw", "base-node": "base"})),
        commit(&json!({"top": "mid.qcow2", "top-node": "mid"})),
        commit(&json!({"top-node": "base"})),
        commit(&json!({"top-node": "mid", "base-node": "mid"})),
        commit(&json!({"top-node": "base", "base-node": "mid"})),
        commit(&json!({"speed": -1})),
        commit(&json!({"on-error": "tea"})),
        commit(&json!({"backing-file": "x"})),
        commit(&json!({"filter-node-name": "mid"})),
        commit(&json!({"filter-node-name": "1x"})),
        commit(&json!({"backing-mask-protocol": "x"})),
        commit(&json!({"tea": 1})),
        nodes(),
        Do("query-block-exports", json!({})),
        Do("query-jobs", json!({})),
    ]);
    converse(&both, &GRAPH, &steps)
}

#[test]
fn layers_in_the_middle_go() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    for exported in [true, false] {
        let both = Both::new()?;
        let mut steps = if exported { Vec::from(serve()) } else { Vec::new() };
        steps.extend([
            commit(
                &json!({"top-node": "mid", "auto-finalize": false, "auto-dismiss": false, "filter-node-name": "flt"}),
            ),
            Hear("BLOCK_JOB_PENDING"),
            nodes(),
            Do("query-block-exports", json!({})),
            Do("query-jobs", json!({})),
            Do("query-block-jobs", json!({})),
            commit(&json!({"job-id": "k"})),
            Do("block-stream", json!({"job-id": "k", "device": "fmt"})),
            Do("block_resize", json!({"node-name": "fmt", "size": 8 << 20})),
            Do("blockdev-del", json!({"node-name": "mid"})),
            verb("job-complete"),
            verb("job-finalize"),
            Hear("BLOCK_JOB_COMPLETED"),
            verb("job-dismiss"),
            nodes(),
            Do("blockdev-del", json!({"node-name": "mid"})),
            Do("blockdev-del", json!({"node-name": "base"})),
            commit(&json!({"top-node": "base"})),
        ]);
        converse(&both, &GRAPH, &steps)?;
        for file in ["top.qcow2", "mid.qcow2", "base.raw"] {
            same(&both, file)?;
        }
        for kind in Kind::ALL {
            let top = both.at(kind).join("top.qcow2");
            check(&top)?.ok()?;
            assert_eq!(info(&top)?["backing-filename"], "base.raw", "{kind:?}");
            assert_eq!(info(&top)?["backing-filename-format"], "raw", "{kind:?}");
        }
    }
    Ok(())
}

/// A chain that headers name, by the names of files, with a longer top than its base, and a name for the header that is the user's.
#[test]
fn by_the_names_of_files_and_into_a_base_that_grows() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    for kind in Kind::ALL {
        let dir = both.at(kind);
        for line in ["resize -q mid.qcow2 5M", "create -q -f qcow2 -b mid.qcow2 -F qcow2 long.qcow2 6M"] {
            finish(Command::new("qemu-img").args(line.split(' ')).current_dir(&dir))?.ok()?;
        }
        qemu_io("qcow2", &dir.join("mid.qcow2"), &["write -P 9 4500k 100k"])?;
        qemu_io("qcow2", &dir.join("long.qcow2"), &["write -P 3 5500k 100k"])?;
    }
    let words = ["--blockdev", "driver=qcow2,node-name=fmt,file.driver=file,file.filename=long.qcow2"];
    converse(
        &both,
        &words,
        &[
            commit(&json!({"top": "mid.qcow2", "base": "base.raw", "backing-file": "./base.raw"})),
            Hear("BLOCK_JOB_COMPLETED"),
            commit(&json!({})),
            Hear("BLOCK_JOB_READY"),
            verb("block-job-complete"),
            Hear("BLOCK_JOB_COMPLETED"),
            Do("query-jobs", json!({})),
        ],
    )?;
    for kind in Kind::ALL {
        let dir = both.at(kind);
        assert_eq!(info(&dir.join("long.qcow2"))?["backing-filename"], "./base.raw", "{kind:?}");
        assert_eq!(fs::metadata(dir.join("base.raw"))?.len(), 6 << 20, "{kind:?}");
        compare(&dir.join("long.qcow2"), &dir.join("base.raw"))?.ok()?;
    }
    same(&both, "base.raw")
}

#[test]
fn the_active_layer_is_committed_when_it_is_said_so() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let mut steps = Vec::from(serve());
    steps.extend([
        commit(&json!({"base-node": "mid", "filter-node-name": "flt"})),
        Hear("BLOCK_JOB_READY"),
        nodes(),
        Do("query-block-jobs", json!({})),
        Do("query-block-exports", json!({})),
        Do("blockdev-add", json!({"driver": "null-co", "node-name": "flt"})),
        commit(&json!({"job-id": "k"})),
        Do("blockdev-snapshot-sync", json!({"node-name": "fmt", "snapshot-file": "z", "snapshot-node-name": "z"})),
        verb("block-job-pause"),
        verb("block-job-pause"),
        verb("block-job-cancel"),
        verb("block-job-resume"),
        verb("block-job-resume"),
        // Everything is carried and nothing let go of.
        verb("block-job-cancel"),
        Hear("BLOCK_JOB_COMPLETED"),
        nodes(),
        commit(&json!({"base-node": "mid"})),
        Hear("BLOCK_JOB_READY"),
        verb("job-cancel"),
        Hear("BLOCK_JOB_CANCELLED"),
        commit(&json!({"speed": 1})),
        verb("job-complete"),
        Do("block-job-cancel", json!({"device": "j"})),
        Hear("BLOCK_JOB_CANCELLED"),
        nodes(),
        Do("query-block-exports", json!({})),
        commit(&json!({"auto-finalize": false, "auto-dismiss": false})),
        Hear("BLOCK_JOB_READY"),
        verb("block-job-complete"),
        Hear("BLOCK_JOB_PENDING"),
        verb("block-job-finalize"),
        Hear("BLOCK_JOB_COMPLETED"),
        verb("block-job-dismiss"),
        nodes(),
        Do("query-block-exports", json!({})),
        Do("blockdev-del", json!({"node-name": "base"})),
        Do("blockdev-del", json!({"node-name": "fmt"})),
        Do("blockdev-del", json!({"node-name": "mid"})),
        Do("block-export-del", json!({"id": "e"})),
        Hear("BLOCK_EXPORT_DELETED"),
        Do("blockdev-del", json!({"node-name": "base"})),
        nodes(),
    ]);
    converse(&both, &GRAPH, &steps)?;
    for file in ["base.raw", "mid.qcow2", "top.qcow2"] {
        same(&both, file)?;
    }
    compare(&both.at(Kind::Ours).join("base.raw"), &both.at(Kind::Ours).join("top.qcow2"))?.ok()?;
    Ok(())
}

/// What libvirt does all day: an overlay on a disk in use, and back again.
#[test]
fn an_overlay_comes_and_is_committed_back() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let put = |file: &str, name: &str| {
        let data = json!({"node-name": "fmt", "snapshot-file": file, "snapshot-node-name": name});
        Do("blockdev-snapshot-sync", data)
    };
    let back = |device: &str| Do("block-commit", json!({"device": device, "job-id": "j", "base-node": "fmt"}));
    let mut steps = Vec::from(serve());
    for (file, name) in [("a.qcow2", "a"), ("b.qcow2", "b")] {
        steps.extend([
            put(file, name),
            Do("query-block-exports", json!({})),
            back(name),
            Hear("BLOCK_JOB_READY"),
            verb("job-complete"),
            Hear("BLOCK_JOB_COMPLETED"),
            nodes(),
            Do("query-block-exports", json!({})),
        ]);
    }
    converse(&both, &GRAPH, &steps)?;
    same(&both, "top.qcow2")
}

/// Below a snapshot: the image above the layers that go is one that nobody writes to any more.
#[test]
fn layers_go_from_below_a_frozen_image() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let on = |more: &Value| {
        let mut arguments = json!({"device": "x", "job-id": "j"});
        for (key, value) in more.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        Do("block-commit", arguments)
    };
    let mut steps = Vec::from(serve());
    steps.extend([
        Do(
            "blockdev-snapshot-sync",
            json!({"node-name": "fmt", "snapshot-file": "a.qcow2", "snapshot-node-name": "x"}),
        ),
        Io("write -P 3 512k 64k"),
        on(&json!({"top-node": "mid"})),
        Hear("BLOCK_JOB_COMPLETED"),
        nodes(),
        Do("blockdev-del", json!({"node-name": "mid"})),
        Io("read -P 5 1M 300k"),
        on(&json!({})),
        Hear("BLOCK_JOB_READY"),
        Io("write -P 4 3M 64k"),
        verb("job-complete"),
        Hear("BLOCK_JOB_COMPLETED"),
        nodes(),
        Do("query-block-exports", json!({})),
        Io("read -P 4 3M 64k"),
        Io("read -P 3 512k 64k"),
    ]);
    converse(&both, &GRAPH, &steps)?;
    for file in ["base.raw", "top.qcow2"] {
        same(&both, file)?;
    }
    for kind in Kind::ALL {
        assert_eq!(info(&both.at(kind).join("top.qcow2"))?["backing-filename"], "base.raw", "{kind:?}");
    }
    Ok(())
}

/// A stream shows itself by a node, too.
#[test]
fn streams_are_shown_by_the_node_that_is_named_for_them() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let stream = |more: &Value| {
        let mut arguments = json!({"device": "fmt", "job-id": "j"});
        for (key, value) in more.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        Do("block-stream", arguments)
    };
    let mut steps = Vec::from(serve());
    steps.extend([
        stream(&json!({"filter-node-name": "mid"})),
        stream(&json!({"filter-node-name": "1x"})),
        stream(&json!({"base-node": "base", "filter-node-name": "flt", "auto-finalize": false})),
        Hear("BLOCK_JOB_PENDING"),
        nodes(),
        Do("query-block-exports", json!({})),
        Do("blockdev-del", json!({"node-name": "flt"})),
        Do("blockdev-add", json!({"driver": "null-co", "node-name": "flt"})),
        commit(&json!({"job-id": "k"})),
        verb("job-finalize"),
        Hear("BLOCK_JOB_COMPLETED"),
        nodes(),
        Do("query-block-exports", json!({})),
    ]);
    converse(&both, &GRAPH, &steps)
}

/// The line of a daemon with the chain, served.
fn served() -> Vec<&'static str> {
    let mut words = GRAPH.to_vec();
    words.extend(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    words.extend(["--export", "nbd,id=e,node-name=fmt,writable=on,name=disk"]);
    words
}

#[test]
fn a_guest_writes_on_while_everything_goes_down_and_up() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &served())?;
    let writer = Writer::start(&dir.join("nbd.sock"), "disk", 1024, Random::seed())?;
    let mut top = "fmt".to_owned();
    for round in 0..8 {
        // Two overlays; the lower one goes into what it lies on, then the upper one.
        let mut line = vec![top.clone()];
        for layer in 0..2 {
            let (below, name) = (line[layer].clone(), format!("s{round}-{layer}"));
            let format = if (round + layer) % 2 == 0 { "qcow2" } else { "qed" };
            let file = format!("{name}.{format}");
            let data = json!({"node-name": below, "snapshot-file": file, "snapshot-node-name": name, "format": format});
            qmp.execute("blockdev-snapshot-sync", data)?;
            line.push(name);
            sleep(Duration::from_millis(30));
        }
        let middle = json!({"device": line[2], "job-id": "m", "top-node": line[1], "base-node": line[0]});
        qmp.execute("block-commit", middle)?;
        let done = qmp.event("BLOCK_JOB_COMPLETED")?;
        assert!(done["error"].is_null(), "{done}");
        let base = if round == 7 { "base" } else { line[0].as_str() };
        qmp.execute("block-commit", json!({"device": line[2], "job-id": "a", "base-node": base}))?;
        qmp.event("BLOCK_JOB_READY")?;
        sleep(Duration::from_millis(if round % 2 == 0 { 0 } else { 80 }));
        if round % 3 == 2 {
            // Everything is below, and it stays as it is; once more then.
            qmp.execute("block-job-cancel", json!({"device": "a"}))?;
            let done = qmp.event("BLOCK_JOB_COMPLETED")?;
            assert!(done["error"].is_null(), "{done}");
            qmp.execute("block-commit", json!({"device": line[2], "job-id": "a", "base-node": base}))?;
            qmp.event("BLOCK_JOB_READY")?;
        }
        qmp.execute("job-complete", json!({"id": "a"}))?;
        let done = qmp.event("BLOCK_JOB_COMPLETED")?;
        assert!(done["error"].is_null(), "{done}");
        top = base.to_owned();
        let exports = qmp.execute("query-block-exports", json!({}))?;
        assert_eq!(exports[0]["node-name"], json!(top));
    }
    let last = writer.stop()?;
    qmp.execute("quit", json!({}))?;
    daemon.exits()?;
    assert_eq!(top, "base");
    holds(&fs::read(dir.join("base.raw"))?, &last)
}

/// Clusters that are stored packed are replaced by the commit while the guest reads them through the layers above.
#[test]
fn packed_clusters_are_replaced_under_a_guest_at_work() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    for line in [
        "convert -c -f raw -O qcow2 base.raw packed.qcow2",
        "create -q -f qcow2 -b packed.qcow2 -F qcow2 -o cluster_size=4k over.qcow2",
    ] {
        finish(Command::new("qemu-img").args(line.split(' ')).current_dir(&dir))?.ok()?;
    }
    let words = [
        "--blockdev",
        "driver=qcow2,node-name=packed,file.driver=file,file.filename=packed.qcow2",
        "--blockdev",
        "driver=qcow2,node-name=fmt,file.driver=file,file.filename=over.qcow2,backing=packed",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=fmt,writable=on,name=disk",
    ];
    let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &words)?;
    let writer = Writer::start(&dir.join("nbd.sock"), "disk", 1024, Random::seed())?;
    for _ in 0..3 {
        qmp.execute("block-commit", json!({"device": "fmt", "job-id": "j"}))?;
        qmp.event("BLOCK_JOB_READY")?;
        sleep(Duration::from_millis(100));
        qmp.execute("block-job-cancel", json!({"device": "j"}))?;
        let done = qmp.event("BLOCK_JOB_COMPLETED")?;
        assert!(done["error"].is_null(), "{done}");
        check(&dir.join("packed.qcow2"))?.ok()?;
    }
    qmp.execute("block-commit", json!({"device": "fmt", "job-id": "j"}))?;
    qmp.event("BLOCK_JOB_READY")?;
    qmp.execute("job-complete", json!({"id": "j"}))?;
    qmp.event("BLOCK_JOB_COMPLETED")?;
    let last = writer.stop()?;
    qmp.execute("quit", json!({}))?;
    daemon.exits()?;
    let (now, was) = (shown(&dir.join("packed.qcow2"))?, fs::read(dir.join("base.raw"))?);
    holds(&now, &last)?;
    for (block, number) in last.iter().enumerate().filter(|(_, number)| **number == 0) {
        let range = block * BLOCK as usize..(block + 1) * BLOCK as usize;
        assert!(now[range.clone()] == was[range], "block {block}, never written ({number}), is another one");
    }
    check(&dir.join("packed.qcow2"))?.ok()?;
    Ok(())
}

/// Killed at random instants of commits, of layers in the middle and of the active one, under a guest that writes and flushes: what was
/// flushed is there, by whichever name the disk is opened then.
#[test]
fn killed_at_any_instant_nothing_is_lost() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let mut random = Random::new(Random::seed());
    let (mut completed, mut pivots) = (0, 0);
    for round in 0..16 {
        let both = Both::new()?;
        let dir = both.at(Kind::Ours);
        // More to carry.
        qemu_io("qcow2", &dir.join("mid.qcow2"), &["write -P 5 0 4M"])?;
        let before = shown(&dir.join("top.qcow2"))?;
        let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &served())?;
        let mut guest = headwater_tests::nbd::Client::connect_with(
            &dir.join("nbd.sock"),
            &headwater_tests::nbd::Options { name: "disk".to_owned(), ..Default::default() },
        )?;
        let active = round % 2 == 0;
        let wish = if active { json!({}) } else { json!({"top-node": "mid"}) };
        let mut arguments = json!({"device": "fmt", "job-id": "j"});
        for (key, value) in wish.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        // What each block may hold: what was flushed last, and what was written since.
        let mut legal: Vec<Vec<Vec<u8>>> = before.chunks(BLOCK as usize).map(|block| vec![block.to_vec()]).collect();
        let mut write = |guest: &mut headwater_tests::nbd::Client, random: &mut Random| -> Result {
            let block = random.below(1024);
            let at = usize::try_from(block)?;
            let number = random.below(255) as u8;
            guest.write(block * BLOCK, &[number; BLOCK as usize])?;
            legal[at].push(vec![number; BLOCK as usize]);
            if random.below(3) == 0 {
                guest.flush()?;
                for values in &mut legal {
                    values.drain(..values.len() - 1);
                }
            }
            Ok(())
        };
        for _ in 0..20 {
            write(&mut guest, &mut random)?;
        }
        qmp.execute("block-commit", arguments)?;
        for _ in 0..random.below(12) {
            write(&mut guest, &mut random)?;
        }
        let mut pivot = false;
        if random.below(3) > 0 {
            if active {
                qmp.event("BLOCK_JOB_READY")?;
                for _ in 0..random.below(6) {
                    write(&mut guest, &mut random)?;
                }
                qmp.execute("job-complete", json!({"id": "j"}))?;
            }
            if random.below(2) > 0 {
                qmp.event("BLOCK_JOB_COMPLETED")?;
                completed += 1;
                pivot = active;
                pivots += u32::from(active);
                for _ in 0..random.below(6) {
                    write(&mut guest, &mut random)?;
                }
            } else {
                sleep(Duration::from_micros(random.below(4000)));
            }
        }
        daemon.kill()?;
        let (top, base) = (dir.join("top.qcow2"), dir.join("base.raw"));
        headwater_tests::kill::released(&top)?;
        for image in [&top, &dir.join("mid.qcow2")] {
            // Leaks are no loss.
            let said = finish(Command::new("qemu-img").args(["check", "-q"]).arg(image))?;
            assert!([0, 3].contains(&said.code()?), "round {round}: {said:?}");
        }
        // After the pivot the base alone is the disk; before it, and where nobody was told, the top is whole.
        let image = if pivot { &base } else { &top };
        // Whoever only looks at a raw file is not kept out by a writer that is still dying; whoever reads it is.
        let mut now = shown(image);
        for _ in 0..500 {
            if now.is_ok() {
                break;
            }
            sleep(Duration::from_millis(10));
            now = shown(image);
        }
        let now = now?;
        for (block, (is, legal)) in now.chunks(BLOCK as usize).zip(&legal).enumerate() {
            if !legal.iter().any(|value| value == is) {
                let first = legal.iter().map(|value| value[0]).collect::<Vec<_>>();
                return Err(error!("round {round}, {active} {pivot}: block {block}: {:?} and not {first:?}", &is[..4]));
            }
        }
    }
    println!("{completed} ended before the kill, {pivots} of them by a pivot");
    assert!(completed > 0);
    Ok(())
}
