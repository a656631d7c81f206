//! The program under the name `qemu-nbd`: real clients find what they look for, and it goes when they do.

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use headwater_tests::process::PATIENCE;
use headwater_tests::qemu::{check, compare, qemu_io};
use headwater_tests::sides::{Sides, master};
use headwater_tests::{Result, error, peer};

fn until(what: &str, mut ready: impl FnMut() -> bool) -> Result {
    let began = Instant::now();
    while !ready() {
        if began.elapsed() > PATIENCE {
            return Err(error!("{what}: not within {PATIENCE:?}"));
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn alive(pid: &str) -> bool {
    Path::new("/proc").join(pid.trim()).exists()
}

#[test]
fn a_disk_is_served_until_its_client_has_left() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let sides = Sides::new("qemu-nbd")?;
    let dir = &sides.ours;
    master(&dir.join("m.raw"), 8 << 20, 3)?;
    let image = dir.join("a.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "m.raw", "a.qcow2"];
    assert!(Command::new("qemu-img").args(convert).current_dir(dir).status()?.success());
    let (socket, pid_file) = (dir.join("nbd.sock"), dir.join("pid"));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let start = |more: &[&str]| -> Result<String> {
        let mut command = Command::new(&sides.tool);
        command.args(["--fork", "-f", "qcow2", "-x", "disk", "--pid-file"]).arg(&pid_file).arg("-k").arg(&socket);
        let status = command.args(more).arg("a.qcow2").current_dir(dir).status()?;
        assert!(status.success(), "{more:?}");
        Ok(std::fs::read_to_string(&pid_file)?)
    };
    // It goes with its last client, durable and clean.
    let pid = start(&[])?;
    qemu_io("raw", Path::new(&uri), &["write -P 7 1M 300k", "read -P 7 1M 300k"])?;
    until("the end", || !alive(&pid))?;
    assert!(!socket.exists() && !pid_file.exists());
    check(&image)?.ok()?;
    qemu_io("qcow2", &image, &["read -P 7 1M 300k"])?;
    // It stays, if told so; and read-only it is.
    let pid = start(&["-t", "-r", "-e", "0"])?;
    let said = Command::new("nbdinfo").arg(&uri).output()?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.status.success() && text.contains("is_read_only: true"), "{text}");
    compare(&image, Path::new(&uri))?.ok()?;
    assert!(alive(&pid));
    assert!(Command::new("kill").arg(pid.trim()).status()?.success());
    until("the end", || !alive(&pid))?;
    // What is written to a snapshot is gone afterwards.
    let pid = start(&["--snapshot"])?;
    qemu_io("raw", Path::new(&uri), &["write -P 9 2M 300k", "read -P 9 2M 300k", "read -P 7 1M 300k"])?;
    until("the end", || !alive(&pid))?;
    let kept = qemu_io("qcow2", &image, &["read -P 9 2M 300k"]);
    assert!(kept.is_err(), "it was written through");
    // A part of the disk, of any format.
    let pid = start(&["-o", "1M"])?;
    qemu_io("raw", Path::new(&uri), &["read -P 7 0 300k", "write -P 8 300k 4k"])?;
    until("the end", || !alive(&pid))?;
    qemu_io("qcow2", &image, &["read -P 7 1M 300k", "read -P 8 1324k 4k"])?;
    // What cannot be served is said at once.
    let refused = Command::new(&sides.tool).args(["--fork", "-k", "s.sock", "nosuchfile"]).current_dir(dir).output()?;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).starts_with("qemu-nbd: "), "{refused:?}");
    Ok(())
}

/// Scripts read what the command says up to its end: a server in the background does not hold that up.
#[test]
fn a_server_in_the_background_holds_nobody_up() -> Result {
    peer!("headwater");
    let dir = tempfile::tempdir()?;
    let (image, socket, pid) = (dir.path().join("a.raw"), dir.path().join("nbd"), dir.path().join("pid"));
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let mut serve = Command::new(headwater_tests::peer::headwater()?);
    serve.args(["nbd", "-t", "-f", "raw", "--fork", "-k"]).arg(&socket).arg("--pid-file").arg(&pid).arg(&image);
    let (told, tells) = std::sync::mpsc::channel();
    let asked = std::thread::spawn(move || told.send(serve.output()));
    let output = tells.recv_timeout(Duration::from_secs(20));
    Command::new("kill").arg(std::fs::read_to_string(&pid)?.trim()).status()?;
    assert!(output.is_ok_and(|output| output.is_ok_and(|output| output.status.success())));
    asked.join().map_err(|_| "a thread failed")??;
    Ok(())
}
