//! Names that are more than a file's: trees of options, protocols, objects. The same lines for our program and for QEMU's tools.

use std::fs;
use std::path::Path;
use std::process::Command;

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::nbdkit::Nbdkit;
use headwater_tests::process::{Daemon, finish};
use headwater_tests::qemu::{check, compare, qemu_img, qemu_io};
use headwater_tests::random::Random;
use headwater_tests::sides::{Sides, master};
use headwater_tests::{Result, peer};

/// An image and a raw file, on both sides.
fn with_images(tool: &str) -> Result<Sides> {
    let sides = Sides::new(tool)?;
    sides.both(|dir| {
        master(&dir.join("b.raw"), 2 << 20, 5)?;
        let convert = ["convert", "-f", "raw", "-O", "qcow2", "b.raw", "a.qcow2"];
        finish(Command::new("qemu-img").args(convert).current_dir(dir))?.ok()?;
        Ok(())
    })?;
    Ok(sides)
}

const IMAGE: &str = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}"#;
const DOTTED: &str = "json:{'driver':'qcow2','file.filename':'a.qcow2'}";
const OPTIONS: &str = "driver=qcow2,file.filename=a.qcow2";

#[test]
fn trees_of_options_are_names() -> Result {
    peer!("headwater", "qemu-img");
    let sides = with_images("qemu-img")?;
    let probed = "json:{'file':{'driver':'file','filename':'a.qcow2'}}";
    for line in [
        format!("info --image-opts {OPTIONS}"),
        "info --image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2,read-only=on,l2-cache-size=1M"
            .to_owned(),
        "info --image-opts file.filename=a.qcow2".to_owned(),
        format!("info {IMAGE}"),
        format!("info {DOTTED}"),
        format!("info {probed}"),
        format!("info -f raw {DOTTED}"),
        "info json:{'driver':'raw','file':{'driver':'file','filename':'a.qcow2'}}".to_owned(),
        format!("map --image-opts {OPTIONS}"),
        format!("map --output=json {IMAGE}"),
        format!("check --image-opts {OPTIONS}"),
        format!("compare --image-opts {OPTIONS} driver=raw,file.filename=b.raw"),
        format!("compare {IMAGE} b.raw"),
        format!("measure -O qcow2 --image-opts {OPTIONS}"),
        format!("snapshot -l --image-opts {OPTIONS}"),
        format!("convert --image-opts -O raw {OPTIONS} c.raw"),
        format!("convert -n --image-opts --target-image-opts {OPTIONS} driver=raw,file.filename=c.raw"),
        format!("resize --image-opts {OPTIONS} 3M"),
        format!("rebase --image-opts -u -b b.raw -F raw {OPTIONS}"),
        format!("info --backing-chain {IMAGE}"),
    ] {
        sides.same(&line)?;
    }
    sides.hold_the_same("c.raw", "raw")?;
    sides.hold_the_same("a.qcow2", "qcow2")
}

#[test]
fn mistakes_are_told_in_qemus_words() -> Result {
    peer!("headwater", "qemu-img");
    let sides = with_images("qemu-img")?;
    for line in [
        "info --image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2,foo=bar",
        "info --image-opts driver=nonsense,file.filename=a.qcow2",
        "info --image-opts foo",
        "info -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2",
        "info json:{'driver':'qcow2',",
        "info json:[1]",
        "info json:{}",
        "info json:{'driver':'file'}",
        "info json:{'driver':'qcow2','file':'xyz'}",
        "info json:{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2','x':1}}",
        "info json:{'driver':'throttle','throttle-group':'g','file':{'driver':'file','filename':'a.qcow2'}}",
        "info blkdebug:/nope:a.qcow2",
        "info json:{'driver':'nbd'}",
    ] {
        let (ours, theirs) = sides.run(line)?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(said(&ours.stderr), said(&theirs.stderr), "{line}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}");
    }
    for (line, words) in [
        ("info nbd+unix:///?socket=/nope", "Failed to connect to '/nope': No such file or directory"),
        ("info nbd:unix:/nope", "Failed to connect to '/nope': No such file or directory"),
        ("info foo:bar", "Unknown protocol 'foo'"),
        ("info nbd+unix://", "No valid URL specified"),
    ] {
        let (ours, theirs) = sides.run(line)?;
        for output in [&ours, &theirs] {
            assert!(String::from_utf8_lossy(&output.stderr).contains(words), "{line}: {output:?}");
        }
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}");
    }
    Ok(())
}

#[test]
fn blkdebug_fails_and_stops_what_it_is_told_to() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = with_images("qemu-io")?;
    let rules = "# rules\n[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\nsector = \"16\"\nonce = \"on\"\n\n\
                 [set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n\n\
                 [inject-error]\nevent = \"read_aio\"\nstate = \"2\"\nerrno = \"5\"\n";
    sides.both(|dir| Ok(fs::write(dir.join("rules"), rules)?))?;
    let same = |words: &[&str]| -> Result {
        let (ours, theirs) = sides.run_words(words)?;
        let said = |bytes: &[u8]| -> Vec<String> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            text.lines().filter(|line| !line.contains(" ops; ")).map(str::to_owned).collect()
        };
        assert_eq!(said(&ours.stdout), said(&theirs.stdout), "{words:?}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{words:?}");
        Ok(())
    };
    same(&[
        "-f",
        "raw",
        "-c",
        "read 8k 512",
        "-c",
        "read 8k 512",
        "-c",
        "write 64k 64k",
        "-c",
        "read 0 512",
        "-c",
        "read 64k 512",
        "blkdebug:rules:b.raw",
    ])?;
    let inline = "driver=raw,file.driver=blkdebug,file.image.filename=b.raw,file.inject-error.0.event=write_aio,\
                  file.inject-error.0.errno=5,file.inject-error.0.once=on";
    same(&["--image-opts", "-c", "write 0 512", "-c", "write 0 512", "-c", "read -P 0xcd 0 512", inline])?;
    same(&[
        "-f",
        "raw",
        "-c",
        "break write_aio A",
        "-c",
        "aio_write 0 512",
        "-c",
        "wait_break A",
        "-c",
        "read 512 512",
        "-c",
        "resume A",
        "-c",
        "aio_flush",
        "-c",
        "resume B",
        "-c",
        "remove_break B",
        "-c",
        "break tea_time T",
        "blkdebug::b.raw",
    ])?;
    same(&["-f", "raw", "-c", "length", "null-co://"])?;
    same(&[
        "--image-opts",
        "-c",
        "length",
        "-c",
        "write 0 64k",
        "-c",
        "read -P 0 0 1k",
        "driver=null-co,size=65536,read-zeroes=on",
    ])
}

#[test]
fn an_nbd_server_is_a_source_and_a_target() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "nbdkit");
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let (held, socket) = (at("held.raw"), at("s"));
    master(&held, 9 << 20, 8)?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let tool = |words: &[&str]| headwater(["img"].iter().chain(words));
    for filter in [
        &[][..],
        &["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error"],
    ] {
        let server = Nbdkit::new().writable();
        // Requests that do not keep to its sizes are errors there.
        let _ = fs::remove_file(&socket);
        let server = if filter.is_empty() { server } else { server.filter("blocksize-policy", filter) };
        let _server: Daemon = server.start(&held, &socket)?;
        let copy = at("copy.qcow2");
        tool(&["convert", "-f", "raw", "-O", "qcow2", &uri, &copy.to_string_lossy()])?.ok()?;
        check(&copy)?.ok()?;
        compare(&copy, &held)?.ok()?;
        let dotted = format!("driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={}", socket.display());
        let words =
            ["io", "--image-opts", "-c", "write -P 7 1000 3000", "-c", "write -z 1M 70001", "-c", "flush", &dotted];
        headwater(words)?.ok()?;
        qemu_io("raw", &held, &["read -P 7 1000 3000", "read -P 0 1M 70001"])?;
        qemu_io("qcow2", &copy, &["write -P 7 1000 3000", "write -z 1M 70001"])?;
        compare(&copy, &held)?.ok()?;
        tool(&["compare", "-f", "raw", "-F", "qcow2", &uri, &copy.to_string_lossy()])?.ok()?;
        // And into it.
        let other = at("other.raw");
        master(&other, 9 << 20, Random::new(filter.len() as u64).below(1000))?;
        tool(&["convert", "-n", "-f", "raw", "-O", "raw", &other.to_string_lossy(), &uri])?.ok()?;
        assert!(fs::read(&held)? == fs::read(&other)?, "what arrived is not what was sent");
    }
    Ok(())
}

#[test]
fn a_disk_is_streamed_from_an_nbd_server() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "nbdkit");
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let (held, socket) = (at("held.raw"), at("s"));
    master(&held, 20 << 20, 21)?;
    let mut server = Nbdkit::new().start(&held, &socket)?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    for (format, backing) in [
        ("qcow2", uri.clone()),
        ("qed", uri.clone()),
        ("qcow2", format!(r#"json:{{"driver":"raw","file":{{"driver":"nbd","path":"{}"}}}}"#, socket.display())),
    ] {
        let top = at("top");
        let path = top.to_string_lossy();
        headwater(["img", "create", "-q", "-f", format, "-b", &backing, "-F", "raw", &path])?.ok()?;
        let disk = Headwater::serve(dir.path()).device("disk", &top).start()?;
        let qmp = disk.qmp_socket().to_string_lossy().into_owned();
        headwater(["stream", "--qmp", &qmp, "--wait", "disk"])?.ok()?;
        disk.quit()?;
        check(&top)?.ok()?;
        assert!(headwater_tests::qemu::info(&top)?.get("backing-filename").is_none());
        compare(&top, &held)?.ok()?;
        fs::remove_file(&top)?;
    }
    assert!(server.runs());
    server.kill()
}

#[test]
fn what_a_server_offers_is_listed() -> Result {
    peer!("headwater", "qemu-nbd", "nbdkit");
    let sides = Sides::new("qemu-nbd")?;
    let (held, socket) = (sides.ours.join("held.raw"), sides.ours.join("s"));
    master(&held, 4 << 20, 2)?;
    {
        let _server = Nbdkit::new().start(&held, &socket)?;
        sides.same(&format!("-L -k {}", socket.display()))?;
    }
    // One of QEMU's own, which could do more than we ask for.
    fs::remove_file(&socket)?;
    let mut command = Command::new(peer::find("qemu-nbd")?);
    command.args(["-t", "-r", "-f", "raw", "-x", "the name", "-D", "the text", "-k"]).arg(&socket).arg(&held);
    let mut server = Daemon::spawn("qemu-nbd", command)?;
    server.listening(&socket)?;
    let (ours, theirs) = sides.run(&format!("--list -k {}", socket.display()))?;
    let known = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let beyond = ["flags:", "transaction size:"];
        text.lines().filter(|line| !beyond.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
    };
    assert_eq!(known(&ours.stdout), known(&theirs.stdout));
    sides.fails("-L -k /nope/s", 1)?;
    sides.fails("-L somefile", 1)?;
    Ok(())
}

#[test]
fn filters_lie_between_and_above() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = with_images("qemu-img")?;
    let group = "throttle-group,id=g,x-bps-total=1000000000,x-iops-total=100000";
    let within = "json:{'driver':'qcow2','file':{'driver':'throttle','throttle-group':'g','file':{'driver':'file','filename':'a.qcow2'}}}";
    let above = "json:{'driver':'throttle','throttle-group':'g','file':{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2'}}}";
    for name in [within, above] {
        sides.same(&format!("compare --object {group} {name} b.raw"))?;
    }
    // What is read through copy-on-read is kept.
    let overlay = |dir: &Path| -> Result {
        let create = ["create", "-q", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "o.qcow2"];
        finish(Command::new("qemu-img").args(create).current_dir(dir))?.ok().map(drop)
    };
    sides.both(overlay)?;
    let kept = "json:{'driver':'copy-on-read','file':{'driver':'qcow2','file':{'driver':'file','filename':'o.qcow2'}}}";
    let read = ["io", "-c", "read 0 2M", kept];
    finish(Command::new(peer::headwater()?).args(read).current_dir(&sides.ours))?.ok()?;
    finish(Command::new("qemu-io").args(["-c", "read 0 2M", kept]).current_dir(&sides.theirs))?.ok()?;
    for dir in [&sides.ours, &sides.theirs] {
        qemu_img([
            std::ffi::OsStr::new("rebase"),
            "-u".as_ref(),
            "-b".as_ref(),
            "".as_ref(),
            dir.join("o.qcow2").as_os_str(),
        ])?
        .ok()?;
        compare(&dir.join("o.qcow2"), &dir.join("b.raw"))?.ok()?;
    }
    Ok(())
}

#[test]
fn encrypted_images_are_made_converted_and_opened_with_a_secret() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = with_images("qemu-img")?;
    sides.both(|dir| Ok(fs::write(dir.join("pw"), "open sesame")?))?;
    let object = "--object secret,id=s,file=pw";
    let made = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let image = "driver=qcow2,encrypt.key-secret=s,file.filename=e.qcow2";
    let volume = "driver=luks,key-secret=s,file.filename=e.luks";
    for line in [
        format!("convert {object} -f raw -O qcow2 -o {made} b.raw e.qcow2"),
        format!("compare {object} --image-opts {image} driver=raw,file.filename=b.raw"),
        format!("convert {object} --image-opts -O raw {image} plain.raw"),
        "compare -f raw -F raw plain.raw b.raw".to_owned(),
        format!("create -q {object} -f luks -o key-secret=s,iter-time=10 e.luks 2M"),
        format!("convert {object} -n --target-image-opts --image-opts driver=raw,file.filename=b.raw {volume}"),
        format!("compare {object} --image-opts {volume} driver=raw,file.filename=b.raw"),
        format!("create -q {object} -f qcow2 -o {made} -b b.raw -F raw over.qcow2"),
        format!("check -q {object} --image-opts {image}"),
    ] {
        sides.same(&line)?;
    }
    // Each side reads what the other one made.
    for (from, to) in [(&sides.ours, &sides.theirs), (&sides.theirs, &sides.ours)] {
        for file in ["e.qcow2", "e.luks"] {
            fs::copy(from.join(file), to.join(format!("other-{file}")))?;
        }
    }
    sides.same(&format!(
        "compare {object} --image-opts {} driver=raw,file.filename=b.raw",
        image.replace("=e.", "=other-e.")
    ))?;
    sides.same(&format!(
        "compare {object} --image-opts {} driver=raw,file.filename=b.raw",
        volume.replace("=e.", "=other-e.")
    ))?;
    // No key, no data.
    let wrong = "--object secret,id=s,data=wrong";
    for line in [
        format!("compare {wrong} --image-opts {image} driver=raw,file.filename=b.raw"),
        "compare e.qcow2 b.raw".to_owned(),
    ] {
        sides.fails(&line, 2)?;
    }
    sides.fails(&format!("create -q -f qcow2 -o {made} x.qcow2 1M"), 1)?;
    sides.fails("create -q -f qcow2 -o encrypt.format=luks x.qcow2 1M", 1)?;
    Ok(())
}
