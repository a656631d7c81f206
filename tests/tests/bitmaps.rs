//! Persistent bitmaps and internal snapshots as they are read: the same lines for our program and for QEMU's.

use std::fs;
use std::path::Path;
use std::process::Command;

use headwater_tests::qemu::{qemu_img, qemu_io};
use headwater_tests::sides::{Sides, master};
use headwater_tests::{Result, peer};

/// What a bitmap of an image says, as QEMU reads it: served over NBD, with the bitmap for a map.
fn says(image: &Path, bitmap: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("nbd");
    let pid = dir.path().join("pid");
    let serve = Command::new("qemu-nbd")
        .args(["-r", "-t", "-f", "qcow2", "--fork", "-B", bitmap])
        .args([Path::new("-k"), &socket, Path::new("--pid-file"), &pid, image])
        .status()?;
    assert!(serve.success(), "{bitmap}");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = qemu_img(["map", "--output=json", "--image-opts", &options])?.ok();
    let number = fs::read_to_string(&pid)?;
    Command::new("kill").arg(number.trim()).status()?;
    map
}

fn words(output: &[u8]) -> String {
    // Lengths of files are each tool's own.
    let text = String::from_utf8_lossy(output);
    let own = |line: &&str| !["disk size", "file length", "offset", "fragmented"].iter().any(|own| line.contains(own));
    text.lines().filter(own).collect::<Vec<_>>().join("\n")
}

#[test]
fn bitmaps_are_added_merged_and_removed_as_qemu_img_does_it() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "qemu-nbd");
    let sides = Sides::new("qemu-img")?;
    sides.same("create -q -f qcow2 a 20M")?;
    sides.same("create -q -f qcow2 -o cluster_size=512 b 20M")?;
    for name in ["a", "b"] {
        sides.same(&format!("bitmap --add {name} plain"))?;
        sides.same(&format!("bitmap --add -g 4k -f qcow2 {name} fine"))?;
        sides.same(&format!("bitmap --add --disable --image-opts driver=qcow2,file.filename={name} resting"))?;
        let writes = ["write 1M 3M", "write 10000k 1k", "write 20479k 1k"];
        sides.both(|dir| qemu_io("qcow2", &dir.join(name), &writes).map(drop))?;
    }
    for line in [
        "bitmap --add -g 64k --merge plain --merge fine a both",
        "bitmap --enable --add a nothing",
        "bitmap --merge fine a plain",
        "bitmap --add -g 512 --disable --merge fine -b a -F qcow2 b other",
        "bitmap --clear --merge other b fine",
        "bitmap --disable a plain",
        "bitmap --enable a resting",
        "bitmap --add --remove a gone",
        "bitmap --add",
        "bitmap",
        "bitmap --add a",
        "bitmap --add a x y",
        "bitmap --add a plain",
        "bitmap --remove a nosuch",
        "bitmap --clear a nosuch",
        "bitmap --merge nosuch a plain",
        "bitmap --merge plain -b nosuch a plain",
        "bitmap --merge plain -b a -F raw b plain",
        "bitmap --add -g 500 a x",
        "bitmap --add -g 256 a x",
        "bitmap --add -g 4G a x",
        "bitmap --remove -g 64k a plain",
        "bitmap --merge plain -F qcow2 a plain",
        "bitmap --clear -b a b plain",
        "bitmap --add -f raw a x",
        "bitmap --add nosuch x",
    ] {
        let (ours, theirs) = sides.run(line)?;
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}: {ours:?}");
    }
    for name in ["a", "b"] {
        for line in [format!("info {name}"), format!("check {name}"), format!("measure -O qcow2 {name}")] {
            let (ours, theirs) = sides.run(&line)?;
            assert_eq!(words(&ours.stdout), words(&theirs.stdout), "{line}");
        }
        sides.hold_the_same(name, "qcow2")?;
    }
    let (ours, theirs) = sides.run("info --output json a")?;
    let specific = |bytes: &[u8]| -> Result<serde_json::Value> {
        Ok(serde_json::from_slice::<serde_json::Value>(bytes)?["format-specific"].take())
    };
    assert_eq!(specific(&ours.stdout)?, specific(&theirs.stdout)?);
    for (name, bitmap) in
        [("a", "plain"), ("a", "fine"), ("a", "both"), ("a", "resting"), ("b", "fine"), ("b", "other"), ("b", "plain")]
    {
        assert_eq!(says(&sides.ours.join(name), bitmap)?, says(&sides.theirs.join(name), bitmap)?, "{name}: {bitmap}");
    }
    Ok(())
}

#[test]
fn bitmaps_are_copied_and_follow_the_size() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "qemu-nbd");
    let sides = Sides::new("qemu-img")?;
    sides.same("create -q -f qcow2 a 20M")?;
    sides.same("bitmap --add a one")?;
    sides.same("bitmap --add -g 4k a two")?;
    sides.both(|dir| qemu_io("qcow2", &dir.join("a"), &["write 1M 3M", "write 10000k 1k"]).map(drop))?;
    sides.same("bitmap --disable a one")?;
    sides.same("convert --bitmaps -O qcow2 -o cluster_size=4k a copy")?;
    for line in [
        "convert --bitmaps -O raw a x",
        "convert --bitmaps -O qed a x",
        "convert --bitmaps -O qcow2 -o compat=0.10 a x",
        "convert --bitmaps -f raw -O qcow2 a x",
        "convert --bitmaps -O qcow2 a a x",
        "convert --skip-broken-bitmaps -O qcow2 a x",
    ] {
        sides.fails(line, 1)?;
    }
    let same = |name: &str| -> Result {
        for bitmap in ["one", "two"] {
            let (ours, theirs) = (sides.ours.join(name), sides.theirs.join(name));
            assert_eq!(says(&ours, bitmap)?, says(&theirs, bitmap)?, "{name}: {bitmap}");
        }
        let (ours, theirs) = sides.run(&format!("info {name}"))?;
        assert_eq!(words(&ours.stdout), words(&theirs.stdout));
        sides.hold_the_same(name, "qcow2")
    };
    same("copy")?;
    for line in ["snapshot -c now a", "snapshot -d now a", "resize -q a 400M", "resize -q --shrink a 3M"] {
        sides.same(line)?;
        same("a")?;
    }
    // A writer that does not come to its end leaves bitmaps that are in use: on both sides the same image of QEMU's making.
    let image = sides.theirs.join("a");
    let mut io = Command::new("qemu-io");
    let killed = io.args(["-f", "qcow2", "-c", "write 0 1k", "-c", "flush", "-c", "abort"]).arg(&image).output()?;
    assert!(!killed.status.success());
    sides.both(|dir| {
        if dir == sides.ours { fs::copy(&image, dir.join("a")).map(drop).map_err(Into::into) } else { Ok(()) }
    })?;
    for line in ["bitmap --enable a two", "bitmap --merge two a one", "resize a 8M", "convert --bitmaps -O qcow2 a x"] {
        let said = sides.fails(line, 1)?;
        assert!(said.contains("inconsistent") && said.contains("Try "), "{line}: {said}");
    }
    let (ours, theirs) = sides.run("info a")?;
    assert_eq!(words(&ours.stdout), words(&theirs.stdout));
    sides.same("convert --bitmaps --skip-broken-bitmaps -O qcow2 a x")?;
    sides.same("bitmap --remove a two")?;
    sides.hold_the_same("a", "qcow2")
}

#[test]
fn a_snapshot_is_read_as_it_was() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "qemu-nbd");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), 5 << 20, 8))?;
    sides.same("convert -f raw -O qcow2 m.raw a")?;
    sides.same("snapshot -c one a")?;
    sides.both(|dir| qemu_io("qcow2", &dir.join("a"), &["write -P 3 1M 3M"]).map(drop))?;
    sides.same("resize -q a 300M")?;
    sides.same("snapshot -c two a")?;
    sides.both(|dir| qemu_io("qcow2", &dir.join("a"), &["write -P 4 2M 290M"]).map(drop))?;
    for name in ["one", "2", "snapshot.id=1", "snapshot.name=two", "snapshot.id=2,snapshot.name=two"] {
        sides.same(&format!("convert -l {name} -O qcow2 a copy"))?;
        sides.hold_the_same("copy", "qcow2")?;
    }
    // The disk was smaller then; QEMU's shows the old state at the present size.
    let (ours, theirs) = sides.run("measure -l one -O qcow2 a")?;
    let first = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().next().map(str::to_owned);
    assert_eq!(first(&ours.stdout), first(&theirs.stdout));
    sides.same("measure -l two -O qcow2 a")?;
    sides.same("convert -l one -O raw a copy.raw")?;
    assert!(fs::read(sides.ours.join("copy.raw"))? == fs::read(sides.ours.join("m.raw"))?);
    for line in [
        "convert -l nosuch -O raw a x",
        "convert -l snapshot.id=1,snapshot.name=two -O raw a x",
        "convert -l snapshot.size=1 -O raw a x",
        "convert -l one -O raw m.raw x",
        "convert -l one -O raw a a x",
        "measure -l nosuch -O qcow2 a",
    ] {
        sides.fails(line, 1)?;
    }
    // Served to clients, who may not write.
    let dir = tempfile::tempdir()?;
    let (socket, tool) = (dir.path().join("nbd"), dir.path().join("qemu-nbd"));
    std::os::unix::fs::symlink(fs::canonicalize(peer::headwater()?)?, &tool)?;
    let image = sides.ours.join("a");
    let mut serve = Command::new(&tool);
    serve.args(["-l", "one", "-t", "-f", "qcow2", "--fork", "-k"]).arg(&socket);
    let serve = serve.arg("--pid-file").arg(dir.path().join("pid")).arg(&image).status()?;
    assert!(serve.success());
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let compared =
        qemu_img(["compare", "-f", "raw", "-F", "raw", &url, &sides.ours.join("m.raw").to_string_lossy()])?.ok();
    let written = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 1k", &url]).output()?;
    Command::new("kill").arg(fs::read_to_string(dir.path().join("pid"))?.trim()).status()?;
    compared?;
    assert!(!written.status.success());
    let missing = Command::new(&tool).args(["-l", "nosuch", "-k"]).args([&socket, &image]).output()?;
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(!missing.status.success() && said.contains("Failed to load snapshot"), "{said}");
    Ok(())
}
