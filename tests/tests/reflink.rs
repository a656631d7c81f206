//! A master and its overlay on one file system that can share extents: the stream takes the master's over instead of copying, and
//! takes no space. (XFS on a loop device: root, and `mkfs.xfs`.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use headwater_tests::headwater::Headwater;
use headwater_tests::process::run;
use headwater_tests::qemu::{check, compare, info, qemu_img};
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use serde_json::json;

/// A file system of its own, until dropped.
struct Xfs {
    dir: tempfile::TempDir,
}

impl Xfs {
    /// `None`, with the reason, where none can be mounted.
    fn mount() -> Result<std::result::Result<Self, String>> {
        let dir = tempfile::tempdir()?;
        let (image, place) = (dir.path().join("xfs.img"), dir.path().join("mnt"));
        fs::File::create(&image)?.set_len(2 << 30)?;
        fs::create_dir(&place)?;
        run("mkfs.xfs", ["-q".as_ref(), image.as_os_str()])?.ok()?;
        let mounted = run("mount", ["-o".as_ref(), "loop".as_ref(), image.as_os_str(), place.as_os_str()])?;
        Ok(if mounted.status.success() { Ok(Self { dir }) } else { Err(mounted.stderr) })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Bytes in use.
    fn used(&self) -> Result<u64> {
        run("sync", [] as [&str; 0])?.ok()?;
        let said = run("df", ["--output=used".as_ref(), "-B1".as_ref(), self.path().as_os_str()])?.ok()?;
        Ok(said.lines().nth(1).unwrap_or_default().trim().parse()?)
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // A failure shows in the test's own result, if it matters.
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

const SIZE: usize = 256 << 20;

fn stream(dir: &Path, top: &Path) -> Result<u64> {
    let server = Headwater::serve(dir).image(top).start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "job-id": "s", "device": "my" }))?;
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert!(done["error"].is_null() && done["len"] == done["offset"], "{done}");
    let stats = qmp.execute("query-blockstats", json!({}))?;
    let shared = stats[0]["stats"]["x-headwater-shared-bytes"].as_u64().ok_or("no count of shared bytes")?;
    drop(qmp);
    server.quit()?;
    Ok(shared)
}

#[test]
fn a_stream_shares_what_it_need_not_copy() -> Result {
    peer!("headwater", "qemu-img", "mkfs.xfs");
    let xfs = match Xfs::mount()? {
        Ok(xfs) => xfs,
        Err(reason) => {
            headwater_tests::peer::skip(&format!("XFS cannot be mounted here: {}", reason.trim()));
            return Ok(());
        }
    };
    let mut bytes = vec![0; SIZE];
    Random::new(5).fill(&mut bytes[..SIZE / 2]);
    Random::new(6).fill(&mut bytes[SIZE - (40 << 20) - 1536..]);
    let master = xfs.path().join("master.raw");
    for format in ["qcow2", "qed"] {
        fs::write(&master, &bytes)?;
        let top = xfs.path().join(format!("my.{format}"));
        let create = ["create", "-q", "-f", format, "-F", "raw", "-b"].map(std::ffi::OsStr::new);
        qemu_img(create.into_iter().chain([master.as_os_str(), top.as_os_str()]))?.ok()?;
        let before = xfs.used()?;
        let shared = stream(&xfs.path(), &top)?;
        let taken = xfs.used()?.saturating_sub(before);
        assert!(shared as usize >= SIZE / 2, "{format}: {shared} bytes were shared");
        assert!((taken as usize) < 20 << 20, "{format}: {taken} bytes were taken");
        assert_eq!(info(&top)?.get("backing-filename"), None);
        check(&top)?.ok()?;
        compare(&master, &top)?.ok()?;
        // Neither sees what becomes of the other.
        fs::write(&master, vec![0x55; SIZE])?;
        let kept = xfs.path().join("kept.raw");
        let convert = ["convert", "-q", "-f", format, "-O", "raw"].map(std::ffi::OsStr::new);
        qemu_img(convert.into_iter().chain([top.as_os_str(), kept.as_os_str()]))?.ok()?;
        assert!(fs::read(&kept)? == bytes, "{format}");
        fs::remove_file(&top)?;
    }
    Ok(())
}
