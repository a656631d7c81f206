//! The program under the name `qemu-storage-daemon`: the same conversations as with QEMU's, and the same images afterwards.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use headwater_tests::process::{Daemon, PATIENCE, finish};
use headwater_tests::qemu::{check, compare, qemu_io};
use headwater_tests::qmp::Qmp;
use headwater_tests::storage::{Kind, Storage};
use headwater_tests::twins::Say::{self, Do, Hear};
use headwater_tests::twins::{Both, GRAPH, converse, sorted};
use headwater_tests::{Result, error, peer};
use serde_json::{Value, json};

fn done() -> [Say; 2] {
    [Hear("JOB_STATUS_CHANGE"), Hear("BLOCK_JOB_COMPLETED")]
}

#[test]
fn nodes_come_and_go_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let node = |driver: &str, name: &str, file: &str| json!({"driver": driver, "node-name": name, "file": {"driver": "file", "filename": file}});
    converse(
        &both,
        &GRAPH,
        &[
            Do("query-named-block-nodes", json!({"flat": true})),
            Do("query-block", json!({})),
            Do("query-blockstats", json!({})),
            Do("query-jobs", json!({})),
            Do("blockdev-del", json!({"node-name": "base"})),
            Do("blockdev-del", json!({"node-name": "mid"})),
            Do("blockdev-del", json!({"node-name": "prot"})),
            Do("blockdev-del", json!({"node-name": "nope"})),
            Do("blockdev-del", json!({})),
            Do("blockdev-add", node("raw", "q", "top.qed")),
            Do("blockdev-add", node("raw", "q", "top.qed")),
            Do("blockdev-add", node("nonsense", "n", "top.qed")),
            Do("blockdev-add", node("raw", "1n", "base.raw")),
            Do("blockdev-add", json!({"driver": "raw", "file": {"driver": "file", "filename": "base.raw"}})),
            Do("blockdev-add", json!({"driver": "raw", "node-name": "n", "file": "nope"})),
            Do("blockdev-add", json!({"driver": "file", "node-name": "n"})),
            Do("blockdev-add", json!({"node-name": "n"})),
            Do("blockdev-del", json!({"node-name": "fmt"})),
            Do("blockdev-del", json!({"node-name": "mid"})),
            Do("blockdev-del", json!({"node-name": "q"})),
            Do("query-named-block-nodes", json!({"flat": true})),
            Do("object-add", json!({"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100}})),
            Do("object-add", json!({"qom-type": "throttle-group", "id": "g"})),
            Do("blockdev-add", json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "prot"})),
            Do(
                "blockdev-add",
                json!({"driver": "throttle", "node-name": "u", "throttle-group": "none", "file": "prot"}),
            ),
            Do("blockdev-del", json!({"node-name": "t"})),
            Do("object-del", json!({"id": "g"})),
            Do("object-del", json!({"id": "nope"})),
            Do("block_resize", json!({"node-name": "nope", "size": 1})),
            Do("block_resize", json!({"size": 1})),
            Do("no-such-command", json!({})),
            Do("query-block-jobs", json!({"x": 1})),
        ],
    )
}

#[test]
fn exports_come_and_go_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let export = |id: &str, node: &str, more: &Value| {
        let mut spec = json!({"type": "nbd", "id": id, "node-name": node});
        for (key, value) in more.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        spec
    };
    converse(
        &both,
        &GRAPH,
        &[
            Do("block-export-add", export("e", "fmt", &json!({}))),
            Do("nbd-server-stop", json!({})),
            Do("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})),
            Do("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})),
            Do("block-export-add", export("e", "fmt", &json!({"writable": true, "name": "disk"}))),
            Do("block-export-add", export("e", "fmt", &json!({}))),
            Do("block-export-add", export("1", "fmt", &json!({}))),
            Do("block-export-add", export("e2", "nope", &json!({}))),
            Do("block-export-add", export("e2", "fmt", &json!({"name": "disk"}))),
            Do("block-export-add", json!({"type": "tea", "id": "x", "node-name": "fmt"})),
            Do("block-export-add", json!({"type": "nbd", "node-name": "fmt"})),
            Do("query-block-exports", json!({})),
            Do("blockdev-del", json!({"node-name": "fmt"})),
            Do("block-export-del", json!({"id": "nope"})),
            Do("block-export-del", json!({"id": "e"})),
            Hear("BLOCK_EXPORT_DELETED"),
            Do("query-block-exports", json!({})),
            Do("nbd-server-add", json!({"device": "mid"})),
            Do("nbd-server-add", json!({"device": "nope"})),
            Do("nbd-server-remove", json!({"name": "nope"})),
            Do("nbd-server-remove", json!({"name": "mid"})),
            Hear("BLOCK_EXPORT_DELETED"),
            Do("nbd-server-stop", json!({})),
            Do("nbd-server-remove", json!({"name": "mid"})),
            Do("blockdev-del", json!({"node-name": "fmt"})),
        ],
    )
}

#[test]
fn streams_are_started_refused_and_end_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let stream = |more: &Value| {
        let mut arguments = json!({"device": "fmt", "job-id": "j"});
        for (key, value) in more.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        Do("block-stream", arguments)
    };
    // What makes no sense; then with a base, to the bottom, step by step.
    let both = Both::new()?;
    let mut steps = vec![
        Do("block-stream", json!({"device": "fmt"})),
        Do("block-stream", json!({"job-id": "j"})),
        Do("block-stream", json!({"device": "nope", "job-id": "j"})),
        stream(&json!({"base-node": "f0"})),
        stream(&json!({"base-node": "nope"})),
        stream(&json!({"base-node": "base", "base": "base.raw"})),
        stream(&json!({"bottom": "mid", "base-node": "base"})),
        stream(&json!({"base": "nope"})),
        stream(&json!({"speed": -1})),
        stream(&json!({"speed": "x"})),
        stream(&json!({"on-error": "tea"})),
        stream(&json!({"backing-file": "x"})),
        stream(&json!({"tea": 1})),
        Do("block-job-cancel", json!({"device": "j"})),
        Do("job-pause", json!({"id": "j"})),
        stream(&json!({"base-node": "base", "auto-finalize": false, "auto-dismiss": false})),
        Hear("BLOCK_JOB_PENDING"),
        stream(&json!({})),
        Do("job-finalize", json!({"id": "nope"})),
        Do("job-dismiss", json!({"id": "j"})),
        Do("job-pause", json!({"id": "j"})),
        Do("job-finalize", json!({"id": "j"})),
        Hear("BLOCK_JOB_COMPLETED"),
        Do("job-finalize", json!({"id": "j"})),
        Do("job-dismiss", json!({"id": "j"})),
        Do("query-jobs", json!({})),
        Do("query-named-block-nodes", json!({"flat": true})),
        Do("blockdev-del", json!({"node-name": "mid"})),
        stream(&json!({})),
    ];
    steps.extend(done());
    steps.push(Do("query-block-jobs", json!({})));
    converse(&both, &GRAPH, &steps)?;
    for kind in Kind::ALL {
        let top = both.at(kind).join("top.qcow2");
        check(&top)?.ok()?;
        assert!(headwater_tests::qemu::info(&top)?.get("backing-filename").is_none(), "{kind:?}");
    }
    compare(&both.at(Kind::Ours).join("top.qcow2"), &both.at(Kind::Theirs).join("top.qcow2"))?.ok()?;
    // By the names of files; and into QED, whose chain nobody but headers name.
    for (format, name) in [("qcow2", "top.qcow2"), ("qed", "top.qed")] {
        let both = Both::new()?;
        let node = format!("driver={format},node-name=fmt,file.driver=file,file.filename={name}");
        let words = ["--blockdev", node.as_str()];
        let mut steps = vec![stream(&json!({"base": "base.raw"}))];
        steps.extend(done());
        steps.push(Do("query-named-block-nodes", json!({"flat": true})));
        steps.push(stream(&json!({"speed": 1 << 30})));
        steps.push(Hear("BLOCK_JOB_COMPLETED"));
        converse(&both, &words, &steps)?;
        compare(&both.at(Kind::Ours).join(name), &both.at(Kind::Theirs).join(name))?.ok()?;
        assert!(headwater_tests::qemu::info(&both.at(Kind::Ours).join(name))?.get("backing-filename").is_none());
    }
    Ok(())
}

#[test]
fn a_line_that_makes_no_sense_is_refused_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    for words in [
        &["--blockdev", "driver=nonsense,node-name=x"][..],
        &["--blockdev", "file,filename=base.raw"],
        &["--blockdev", "file,node-name=1x,filename=base.raw"],
        &["--nope"],
        &["--blockdev"],
        &["--blockdev", "file,node-name=x,filename=base.raw", "foo"],
        &["--blockdev", r#"{"driver":"file""#],
        &["--export", "nbd,id=e,node-name=x"],
        &["--nbd-server", "addr.type=unix"],
        &["--monitor", "chardev=m"],
        &["--monitor", "foo=bar"],
        &["--chardev", "socket,path=x,server=on,wait=off"],
        &["--chardev", "socket,id=m,path=x,wait=off"],
        &["--chardev", "socket,id=m,path=nowhere"],
        &["--chardev", "socket,id=m,path=x,server=on,wait=off,reconnect=1"],
        &["--chardev", "socket,id=m,path=x,server=maybe"],
        &["--chardev", "socket,id=m,path=x,host=h,port=1"],
        &["--chardev", "socket,id=m,host=h"],
        &["--chardev", "socket,id=m"],
        &["--chardev", "socket,id=1,path=x,server=on,wait=off"],
        &["--chardev", "socket,id=m,fd=77,server=on,wait=off"],
        &["--chardev", "tea,id=m"],
        &["--chardev", "socket,id=m,path=m1,server=on,wait=off", "--chardev", "socket,id=m,path=m2,server=on,wait=off"],
        &["--pidfile", "/nope/x", "--blockdev", "file,node-name=x,filename=base.raw"],
        &["--nbd-server", "addr.type=unix,addr.path=a.sock", "--nbd-server", "addr.type=unix,addr.path=b.sock"],
        &["--blockdev", "file,node-name=x,filename=base.raw", "--export", "vhost-user-blk,id=e,node-name=x"],
    ] {
        both.refused(words)?;
    }
    Ok(())
}

/// A place that waits (as it does where nothing is said) holds up what comes after it on the line, until somebody comes.
#[test]
fn a_monitor_is_waited_for() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    for (kind, wait) in Kind::ALL.into_iter().flat_map(|kind| ["", ",wait=on"].map(|wait| (kind, wait))) {
        let dir = both.at(kind);
        let (socket, pid) = (dir.join("m.sock"), dir.join("pid"));
        let _ = fs::remove_file(&socket);
        let place = format!("socket,id=m,path={},server=on{wait}", socket.display());
        let pid_file = pid.display().to_string();
        let words = ["--chardev", &place, "--monitor", "m", "--pidfile", &pid_file];
        let mut daemon = Daemon::spawn(kind.name(), both.command(kind, &words)?)?;
        daemon.listening(&socket)?;
        daemon.says(&format!("--chardev {place}: info: QEMU waiting for connection on: disconnected:unix:"))?;
        sleep(Duration::from_millis(200));
        assert!(!pid.exists(), "{kind:?}: it did not wait");
        let mut qmp = Qmp::connect(&socket)?;
        qmp.execute("query-version", json!({}))?;
        daemon.until("pidfile", |_| pid.exists().then_some(()))?;
        drop(qmp);
        // The place is there for the next one.
        Qmp::connect(&socket)?.execute("quit", json!({}))?;
        assert!(daemon.exits()?.success());
        assert!(!pid.exists());
    }
    // Ours can be told to end meanwhile.
    let place = "socket,id=m,path=m.sock,server=on";
    let mut daemon = Daemon::spawn(Kind::Ours.name(), both.command(Kind::Ours, &["--chardev", place])?)?;
    daemon.says("waiting for connection")?;
    assert!(daemon.terminate()?.success());
    Ok(())
}

/// A monitor that goes to its client goes again where it is told to.
#[test]
fn a_client_that_listens_is_sought_again() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    for kind in Kind::ALL {
        let socket = both.at(kind).join("client.sock");
        let place = format!("socket,id=m,path={},reconnect=1", socket.display());
        let mut daemon = Daemon::spawn(kind.name(), both.command(kind, &["--chardev", &place, "--monitor", "m"])?)?;
        sleep(Duration::from_millis(100));
        let listener = std::os::unix::net::UnixListener::bind(&socket)?;
        for _ in 0..2 {
            let (client, _) = listener.accept()?;
            let mut greeting = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(client), &mut greeting)?;
            assert!(greeting.contains("QMP"), "{kind:?}: {greeting}");
        }
        daemon.terminate()?;
    }
    Ok(())
}

#[test]
fn clients_read_and_write_while_a_stream_runs() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    let before = dir.join("before.raw");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "before.raw"];
    finish(Command::new("qemu-img").args(convert).current_dir(&dir))?.ok()?;
    let mut words = GRAPH.to_vec();
    words.extend([
        "--blockdev",
        "copy-on-read,node-name=cor,file=fmt",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=cor,writable=on,name=disk",
    ]);
    let Storage { mut daemon, mut qmp } = both.start(Kind::Ours, &words)?;
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd.sock").display());
    let uri = Path::new(&uri);
    qemu_io("raw", uri, &["write -P 9 3M 64k", "read -P 5 1M 64k"])?;
    qmp.execute("block-stream", json!({"device": "fmt", "job-id": "j", "speed": 100_000}))?;
    qemu_io("raw", uri, &["write -P 8 100k 50k", "read -P 9 3M 64k", "read -P 5 1M 100k"])?;
    let busy = qmp.refused("blockdev-del", json!({"node-name": "cor"}))?;
    assert_eq!(busy.desc, "Node cor is in use");
    if let Err(gone) = qmp.execute("block-job-set-speed", json!({"device": "j", "speed": 0})) {
        return Err(error!("{gone}: {:?}", qmp.event("BLOCK_JOB_COMPLETED")));
    }
    let ended = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert!(ended.get("error").is_none(), "{ended}");
    qmp.execute("block-export-del", json!({"id": "e"}))?;
    for node in ["cor", "fmt", "prot", "mid", "base", "f0"] {
        qmp.execute("blockdev-del", json!({"node-name": node}))?;
    }
    // Nothing holds the files any more, while the daemon runs on.
    qemu_io("raw", &before, &["write -P 9 3M 64k", "write -P 8 100k 50k"])?;
    compare(&before, &dir.join("top.qcow2"))?.ok()?;
    check(&dir.join("top.qcow2"))?.ok()?;
    qemu_io("raw", &dir.join("base.raw"), &["write 0 512"])?;
    qmp.execute("quit", json!({}))?;
    daemon.exits()?;
    Ok(())
}

#[test]
fn it_goes_into_the_background_and_ends_by_a_signal() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "nbdinfo");
    let both = Both::new()?;
    let dir = both.at(Kind::Ours);
    let mut words = GRAPH.to_vec();
    words.extend(["--daemonize", "--pidfile", "pid", "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    words.extend(["--export", "nbd,id=e,node-name=fmt,description=the disk"]);
    let status = both.command(Kind::Ours, &words)?.status()?;
    assert!(status.success());
    let pid = fs::read_to_string(dir.join("pid"))?;
    let uri = format!("nbd+unix:///fmt?socket={}", dir.join("nbd.sock").display());
    let said = Command::new("nbdinfo").arg(&uri).output()?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(text.contains("is_read_only: true") && text.contains("the disk"), "{text} {said:?}");
    // A second one may read the same files, since this one only reads.
    let mut second = both.start(Kind::Ours, &GRAPH)?;
    second.daemon.terminate()?;
    assert!(Command::new("kill").args(["-HUP", pid.trim()]).status()?.success());
    let began = Instant::now();
    while Path::new("/proc").join(pid.trim()).exists() {
        if began.elapsed() > PATIENCE {
            return Err(error!("it does not end"));
        }
        sleep(Duration::from_millis(20));
    }
    assert!(!dir.join("pid").exists() && !dir.join("nbd.sock").exists());
    Ok(())
}

/// Commands out of band: offered, and which are refused how.
#[test]
fn out_of_band_is_offered_and_refused_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let mut said = Vec::new();
    for kind in Kind::ALL {
        let Storage { mut daemon, qmp } = both.start(kind, &GRAPH)?;
        drop(qmp);
        let mut qmp = Qmp::greeted(&both.at(kind).join("qmp.sock"))?;
        let mut lines = vec![qmp.greeting["capabilities"].to_string()];
        for line in [
            r#"{"exec-oob": "qmp_capabilities"}"#,
            r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["tea"]}}"#,
            r#"{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}"#,
            r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "oob"]}}"#,
            r#"{"exec-oob": "query-version", "id": 1}"#,
            r#"{"exec-oob": "query-version"}"#,
            r#"{"exec-oob": "query-version", "execute": "query-version", "id": 2}"#,
            r#"{"exec-oob": "qmp_capabilities", "id": 3}"#,
            r#"{"execute": "qmp_capabilities", "id": 4}"#,
            r#"{"exec-oob": "nonsense", "id": 5}"#,
            r#"{"exec-oob": 7, "id": "x"}"#,
            r#"{"exec-oob": "query-version", "tea": 1, "id": "x"}"#,
            r#"{"exec-oob": "migrate-pause", "id": {"a": 1}}"#,
            "[1]",
        ] {
            qmp.send_raw(line)?;
            lines.push(format!("{line}: {}", sorted(&qmp.answer()?)));
        }
        said.push(lines);
        drop(qmp);
        // Without it there is no such thing.
        let mut qmp = Qmp::connect(&both.at(kind).join("qmp.sock"))?;
        qmp.send_raw(r#"{"exec-oob": "query-version", "id": 1}"#)?;
        let answer = qmp.answer()?;
        assert_eq!(answer["error"]["desc"], "QMP input member 'exec-oob' is unexpected", "{kind:?}");
        drop(qmp);
        daemon.terminate()?;
    }
    for (ours, theirs) in said[0].iter().zip(&said[1]) {
        assert_eq!(ours, theirs);
    }
    Ok(())
}
