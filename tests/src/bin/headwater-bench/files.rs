//! The files both sides serve: made once, kept between runs, and the same for both.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use headwater_tests::nbdkit::Nbdkit;
use headwater_tests::process::{Daemon, run};
use headwater_tests::qemu::qemu_img;
use headwater_tests::random::Random;
use headwater_tests::{Result, error, peer};
use tempfile::TempDir;

/// QED's default, on which the allocating workload counts.
pub(crate) const CLUSTER: u64 = 64 << 10;

/// Every read from the slow source takes this much longer.
const SLOW: Duration = Duration::from_millis(10);

pub(crate) struct Files {
    dir: PathBuf,
    size: u64,
    slow_size: u64,
}

/// A local file every read of which is slow: nbdkit's delay behind a FUSE mount, so that both sides open a plain file.
pub(crate) struct SlowFile {
    pub(crate) file: PathBuf,
    mount: PathBuf,
    // In the order in which they must go.
    _fuse: Daemon,
    _server: Daemon,
    _sockets: TempDir,
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        // nbdfuse ends with its mount. If this fails, killing it ends the mount as well.
        let _ = run("fusermount3", [OsStr::new("-u"), OsStr::new("-z"), self.mount.as_os_str()]);
    }
}

impl Files {
    pub(crate) fn prepare(dir: &Path, quick: bool) -> Result<Files> {
        let files = Files {
            dir: dir.join(if quick { "files-quick" } else { "files" }),
            size: if quick { 256 << 20 } else { 1 << 30 },
            slow_size: if quick { 32 << 20 } else { 128 << 20 },
        };
        fs::create_dir_all(&files.dir)?;
        files.random(&files.base(), files.size)?;
        files.random(&files.disk_raw(), files.size)?;
        files.random(&files.slow_base(), files.slow_size)?;
        if !files.disk_qed().exists() {
            eprintln!("bench: making {}", files.disk_qed().display());
            let part = files.dir.join("part.qed");
            convert(&files.disk_raw(), &part)?;
            fs::rename(part, files.disk_qed())?;
        }
        Ok(files)
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// A file of this name among them.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The master: never written.
    pub(crate) fn base(&self) -> PathBuf {
        self.dir.join("base.raw")
    }

    /// A raw disk, allocated, to be written in place.
    pub(crate) fn disk_raw(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// A QED disk without backing file, allocated, to be written in place.
    pub(crate) fn disk_qed(&self) -> PathBuf {
        self.dir.join("disk.qed")
    }

    fn slow_base(&self) -> PathBuf {
        self.dir.join("slow.raw")
    }

    /// An overlay over `base` in which nothing is allocated.
    pub(crate) fn fresh(&self, base: &Path, format: &str) -> Result<PathBuf> {
        let fresh = self.dir.join(format!("fresh.{format}"));
        let _ = fs::remove_file(&fresh);
        let args = ["create", "-q", "-f", format, "-F", "raw", "-b"].map(OsStr::new);
        qemu_img(args.into_iter().chain([base.as_os_str(), fresh.as_os_str()]))?.ok()?;
        Ok(fresh)
    }

    /// Mounts the slow source.
    pub(crate) fn slow(&self) -> Result<SlowFile> {
        let mount = self.dir.join("slow-mount");
        let _ = run("fusermount3", [OsStr::new("-u"), OsStr::new("-z"), mount.as_os_str()]);
        fs::create_dir_all(&mount)?;
        let sockets = tempfile::tempdir()?;
        let socket = sockets.path().join("slow.sock");
        let delay = u64::try_from(SLOW.as_millis())?;
        let server = Nbdkit::new().read_delay(delay).start(&self.slow_base(), &socket)?;
        let file = mount.join("slow.raw");
        let mut command = Command::new(peer::find("nbdfuse")?);
        command.arg("--readonly").arg(&file).arg("--unix").arg(&socket);
        let mut fuse = Daemon::spawn("nbdfuse", command)?;
        let size = self.slow_size;
        fuse.until("mounted file", |_| fs::metadata(&file).ok().filter(|meta| meta.len() == size).map(|_| ()))?;
        Ok(SlowFile { file, mount, _fuse: fuse, _server: server, _sockets: sockets })
    }

    fn random(&self, path: &Path, size: u64) -> Result {
        if fs::metadata(path).is_ok_and(|meta| meta.len() == size) {
            return Ok(());
        }
        eprintln!("bench: making {}", path.display());
        let part = self.dir.join("part.raw");
        let mut file = File::create(&part)?;
        let mut random = Random::new(size);
        let mut bytes = vec![0; 1 << 20];
        for _ in 0..size >> 20 {
            random.fill(&mut bytes);
            file.write_all(&bytes)?;
        }
        file.sync_all()?;
        Ok(fs::rename(part, path)?)
    }
}

fn convert(from: &Path, to: &Path) -> Result {
    let args = ["convert", "-f", "raw", "-O", "qed"].map(OsStr::new);
    let converted = qemu_img(args.into_iter().chain([from.as_os_str(), to.as_os_str()]))?;
    converted.ok().map_err(|why| error!("making the allocated QED disk: {why}"))?;
    File::open(to)?.sync_all()?;
    Ok(())
}
