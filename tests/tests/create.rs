//! `blockdev-create`: the same conversations as with QEMU's storage daemon, and images that both take for what they are.

use headwater_tests::qemu::{check, info};
use headwater_tests::storage::{Kind, Storage};
use headwater_tests::twins::Say::{self, Do};
use headwater_tests::twins::{Both, GRAPH, converse};
use headwater_tests::{Result, error, peer};
use serde_json::{Value, json};

fn create(options: &Value) -> Say {
    Do("blockdev-create", json!({"job-id": "j", "options": options}))
}

/// Waits until the job has concluded, and what it says then. (Its events are those of every job.)
fn concluded(storage: &mut Storage) -> Result<Value> {
    for _ in 0..500 {
        let jobs = storage.qmp.execute("query-jobs", json!({}))?;
        if jobs[0]["status"] == "concluded" {
            storage.qmp.execute("job-dismiss", json!({"id": "j"}))?;
            return Ok(jobs[0]["error"].clone());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(error!("the job does not end"))
}

#[test]
fn what_makes_no_sense_is_refused_in_the_same_words() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let file = json!({"driver": "file", "filename": "new.img", "size": 0});
    converse(
        &both,
        &GRAPH,
        &[
            Do("blockdev-create", json!({})),
            Do("blockdev-create", json!({"job-id": "j"})),
            Do("blockdev-create", json!({"job-id": "1x", "options": file})),
            create(&json!({})),
            create(&json!({"driver": "tea"})),
            create(&json!({"driver": "file"})),
            create(&json!({"driver": "file", "filename": "x", "size": 0, "tea": 1})),
            create(&json!({"driver": "qcow2"})),
            create(&json!({"driver": "qcow2", "file": "f0"})),
            create(&json!({"driver": "qcow2", "file": "f0", "size": 1, "version": "v4"})),
            Do("query-jobs", json!({})),
        ],
    )
}

#[test]
fn images_are_made_and_what_cannot_be_is_said_by_the_job() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let chain = json!({"size": 4 << 20, "backing-file": "top.qcow2", "backing-fmt": "qcow2"});
    let with = |driver: &str, file: Value, more: &Value| {
        let mut options = json!({"driver": driver, "file": file});
        for (key, value) in more.as_object().into_iter().flatten() {
            options[key] = value.clone();
        }
        options
    };
    let node = |name: &str| json!({"driver": "file", "node-name": name, "filename": format!("{name}.img")});
    let file = |name: &str, more: &Value| {
        let mut options = json!({"driver": "file", "filename": format!("{name}.img"), "size": 0});
        for (key, value) in more.as_object().into_iter().flatten() {
            options[key] = value.clone();
        }
        options
    };
    let qcow2 = json!({
        "size": 4 << 20, "version": "v3", "cluster-size": 4096, "lazy-refcounts": true, "refcount-bits": 8,
        "extended-l2": false, "compression-type": "zlib", "preallocation": "metadata",
    });
    let steps: Vec<(&str, Value)> = vec![
        ("blockdev-create", file("a", &json!({}))),
        ("blockdev-create", file("b", &json!({"size": 1 << 20, "preallocation": "falloc"}))),
        ("blockdev-create", file("c", &json!({"size": 1 << 20, "preallocation": "full"}))),
        ("blockdev-create", file("d", &json!({"size": 1 << 20, "preallocation": "metadata"}))),
        ("blockdev-create", file("no/e", &json!({}))),
        ("blockdev-add", node("a")),
        ("blockdev-add", node("b")),
        ("blockdev-add", node("c")),
        ("blockdev-create", with("qcow2", json!("a"), &chain)),
        ("blockdev-create", with("qcow2", json!("b"), &qcow2)),
        ("blockdev-create", with("qed", json!("c"), &json!({"size": 4 << 20, "cluster-size": 4096, "table-size": 2}))),
        ("blockdev-create", with("qcow2", json!("nope"), &chain)),
        ("blockdev-create", with("qcow2", json!({"driver": "file", "filename": "none.img"}), &chain)),
        ("blockdev-add", json!({"driver": "file", "node-name": "ro", "filename": "a.img", "read-only": true})),
        ("blockdev-del", json!({"node-name": "a"})),
        ("blockdev-create", with("qcow2", json!("ro"), &chain)),
        ("blockdev-del", json!({"node-name": "ro"})),
        // What was made is put on a disk in use, as libvirt does it.
        ("blockdev-add", node("a")),
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "over", "file": "a", "backing": null})),
        ("blockdev-snapshot", json!({"node": "fmt", "overlay": "over"})),
        ("query-named-block-nodes", json!({"flat": true})),
    ];
    let mut said = Vec::new();
    for kind in Kind::ALL {
        let mut storage = both.start(kind, &GRAPH)?;
        let mut answers = Vec::new();
        for (command, arguments) in &steps {
            let made = *command == "blockdev-create";
            let arguments = if made { json!({"job-id": "j", "options": arguments}) } else { arguments.clone() };
            let answer = match storage.qmp.command(command, arguments)? {
                Ok(value) => headwater_tests::twins::sorted(&headwater_tests::twins::plain(&value)),
                Err(refused) => refused.to_string(),
            };
            answers.push(format!("{command}: {answer}"));
            if made {
                let block_jobs = storage.qmp.execute("query-block-jobs", json!({}))?;
                answers.push(format!("{block_jobs} {}", concluded(&mut storage)?));
            }
        }
        storage.daemon.terminate()?;
        said.push(answers);
    }
    for (ours, theirs) in said[0].iter().zip(&said[1]) {
        assert_eq!(ours, theirs);
    }
    for image in ["a.img", "b.img", "c.img"] {
        let (ours, theirs) = (info(&both.at(Kind::Ours).join(image))?, info(&both.at(Kind::Theirs).join(image))?);
        for key in
            ["format", "virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "format-specific"]
        {
            assert_eq!(ours[key], theirs[key], "{image}: {key}");
        }
        check(&both.at(Kind::Ours).join(image))?.ok()?;
    }
    Ok(())
}

/// An encrypted one, which QEMU opens with the same secret.
#[test]
fn an_encrypted_image_is_made_for_a_secret() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let both = Both::new()?;
    let mut storage = both.start(Kind::Ours, &["--object", "secret,id=s0,data=hello"])?;
    for options in [
        json!({"driver": "file", "filename": "l.img", "size": 0}),
        json!({"driver": "luks", "file": {"driver": "file", "filename": "l.img"}, "size": 1 << 20, "key-secret": "s0",
               "iter-time": 10}),
    ] {
        storage.qmp.execute("blockdev-create", json!({"job-id": "j", "options": options}))?;
        assert_eq!(concluded(&mut storage)?, Value::Null);
    }
    let options =
        json!({"driver": "luks", "file": {"driver": "file", "filename": "l.img"}, "size": 1, "key-secret": "x"});
    storage.qmp.execute("blockdev-create", json!({"job-id": "j", "options": options}))?;
    assert_eq!(concluded(&mut storage)?, json!("No secret with id 'x'"));
    storage.daemon.terminate()?;
    let image = both.at(Kind::Ours).join("l.img");
    let options = format!("driver=luks,key-secret=s0,file.driver=file,file.filename={}", image.display());
    let plain = both.at(Kind::Ours).join("plain.raw");
    let to = plain.to_str().ok_or("a name")?;
    let line = ["convert", "--object", "secret,id=s0,data=hello", "--image-opts", &options, "-O", "raw", to];
    headwater_tests::qemu::qemu_img(line)?.ok()?;
    assert_eq!(std::fs::metadata(&plain)?.len(), 1 << 20);
    Ok(())
}
