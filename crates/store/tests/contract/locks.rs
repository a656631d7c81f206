//! Locks: among ourselves, and with QEMU's programs.

use crate::beds::on_ring;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use store::file::{FileStore, Locking, OpenOptions};
use store::{ErrorKind, Store};
use tempfile::TempDir;

fn reader() -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::default() }
}

fn image(folder: &TempDir) -> std::path::PathBuf {
    let path = folder.path().join("image.raw");
    std::fs::write(&path, vec![0; 65_536]).unwrap();
    path
}

/// Whether `program` is there. In CI it has to be.
fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !there {
        assert!(std::env::var_os("CI").is_none_or(|value| value != "true"), "{program} is missing, and this is CI");
        eprintln!("skipped: {program} is not installed");
    }
    there
}

/// Runs qemu-io with `args`; whether it could, and what it said.
fn qemu_io(args: &[&str], path: &Path, command: &str) -> (bool, String) {
    let output = Command::new("qemu-io").args(args).args(["-f", "raw", "-c", command]).arg(path).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// A qemu-io that has the image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn start(args: &[&str], path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .args(["-f", "raw"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers once it has the image open.
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"length\n").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let answer = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("64 KiB")));
        assert!(answer.is_some(), "qemu-io opens the image");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn one_writer_or_many_readers_in_one_process_too() {
    let folder = TempDir::new().unwrap();
    let path = image(&folder);
    on_ring(async {
        let writer = FileStore::open(&path, OpenOptions::default()).await.unwrap();
        for options in [OpenOptions::default(), reader()] {
            let error = FileStore::open(&path, options).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Locked);
            assert!(error.to_string().contains("is another process using the image?"), "{error}");
        }
        let off = OpenOptions { locking: Locking::Off, ..reader() };
        FileStore::open(&path, off).await.unwrap().close().await.unwrap();
        assert_eq!(FileStore::open(&path, reader()).await.err().unwrap().kind(), ErrorKind::Locked);
        writer.close().await.unwrap();

        let first = FileStore::open(&path, reader()).await.unwrap();
        let second = FileStore::open(&path, reader()).await.unwrap();
        let error = FileStore::open(&path, OpenOptions::default()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Locked);
        drop(first);
        second.close().await.unwrap();
        FileStore::open(&path, OpenOptions::default()).await.unwrap();
    });
}

#[test]
fn qemu_does_not_write_what_we_have_open() {
    if !have("qemu-io") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = image(&folder);
    on_ring(async {
        let writer = FileStore::open(&path, OpenOptions::default()).await.unwrap();
        let (opened, said) = qemu_io(&[], &path, "write 0 512");
        assert!(!opened && said.contains("Failed to get \"write\" lock"), "{said}");
        let (opened, said) = qemu_io(&["-U", "-r"], &path, "read 0 512");
        assert!(opened, "{said}");
        writer.close().await.unwrap();

        let base = FileStore::open(&path, reader()).await.unwrap();
        let (opened, said) = qemu_io(&[], &path, "write 0 512");
        assert!(!opened && said.contains("Failed to get \"write\" lock"), "{said}");
        let (opened, said) = qemu_io(&["-r"], &path, "read 0 512");
        assert!(opened, "a base is shared for reading: {said}");
        base.close().await.unwrap();
        let (opened, said) = qemu_io(&[], &path, "write 0 512");
        assert!(opened, "{said}");
    });
}

#[test]
fn we_do_not_write_what_qemu_has_open() {
    if !have("qemu-io") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = image(&folder);
    let writer = Holder::start(&[], &path);
    on_ring(async {
        let error = FileStore::open(&path, OpenOptions::default()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("is another process using the image?"), "{error}");
        let error = FileStore::open(&path, reader()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("-U"), "{error}");
        FileStore::open(&path, OpenOptions { locking: Locking::Off, ..reader() }).await.unwrap();
    });
    drop(writer);
    let sharing = Holder::start(&["-r"], &path);
    on_ring(async {
        FileStore::open(&path, reader()).await.unwrap();
    });
    drop(sharing);
    on_ring(async {
        FileStore::open(&path, OpenOptions::default()).await.unwrap();
    });
}
