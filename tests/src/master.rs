//! Master images: raw disks with a real ext4 file system full of files whose checksums are known, made without
//! mounting anything.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Finished, finish, run};
use crate::random::Random;
use crate::{Result, error, peer};

/// What to put on a master image.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The disk's size in bytes.
    pub size: u64,
    /// How many files.
    pub files: usize,
    /// The largest of the ordinary files, in bytes; one in fifty is sixteen times as large.
    pub file_size: u64,
    /// Gives other contents.
    pub seed: u64,
}

impl Default for Spec {
    /// About 15 MiB in 300 files on a disk of 256 MiB: much hole, some data, as on a fresh installation.
    fn default() -> Self {
        Spec { size: 256 << 20, files: 300, file_size: 64 << 10, seed: 1 }
    }
}

/// A raw image with an ext4 file system on the whole disk.
#[derive(Debug)]
pub struct Master {
    /// The image file.
    pub image: PathBuf,
    /// The files' checksums, as `sha256sum` writes and reads them, with paths from the root such as `./data/0/17`.
    pub manifest: String,
}

impl Master {
    /// Makes `dir/master.raw`. The disk can be booted from by [`crate::guest`]: it holds busybox, too.
    pub fn build(dir: &Path, spec: &Spec) -> Result<Master> {
        let tree = tempfile::tempdir_in(dir)?;
        let root = tree.path();
        for name in ["bin", "dev", "proc", "sys", "run", "tmp", "data"] {
            fs::create_dir(root.join(name))?;
        }
        fs::copy(peer::find("busybox")?, root.join("bin/busybox"))?;
        symlink("busybox", root.join("bin/sh"))?;
        write_files(&root.join("data"), spec)?;
        let image = dir.join("master.raw");
        fs::File::create(&image)?.set_len(spec.size)?;
        let mut make = Command::new(peer::find("mke2fs")?);
        make.args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"]);
        finish(make.arg(root).arg(&image))?.ok()?;
        Ok(Master { manifest: manifest(root)?, image })
    }
}

/// Every fourth file is half zeroes, so that there is something to detect.
fn write_files(data: &Path, spec: &Spec) -> Result {
    let mut random = Random::new(spec.seed);
    for number in 0..spec.files {
        let dir = data.join((number % 10).to_string());
        if number < 10 {
            fs::create_dir(&dir)?;
        }
        let largest = if number % 50 == 49 { spec.file_size * 16 } else { spec.file_size };
        let mut bytes = vec![0; random.below(largest + 1) as usize];
        let filled = if number % 4 == 3 { bytes.len() / 2 } else { bytes.len() };
        random.fill(&mut bytes[..filled]);
        fs::write(dir.join(number.to_string()), bytes)?;
    }
    Ok(())
}

fn manifest(root: &Path) -> Result<String> {
    let mut find = Command::new("sh");
    find.current_dir(root).args(["-c", "find . -type f -print0 | sort -z | xargs -0 sha256sum"]);
    finish(&mut find)?.ok()
}

/// Checks the ext4 file system on a raw image, changing nothing.
pub fn e2fsck(image: &Path) -> Result<Finished> {
    run("e2fsck", ["-f".as_ref(), "-n".as_ref(), image.as_os_str()])
}

/// The content of a file within the ext4 file system on a raw image.
pub fn file_in(image: &Path, path: &str) -> Result<String> {
    let cat = format!("cat {path}");
    let finished = run("debugfs", ["-R".as_ref(), cat.as_ref(), image.as_os_str()])?;
    // debugfs ends well whatever happens; its first line of errors is its banner.
    let complaints: Vec<&str> = finished.stderr.lines().skip(1).collect();
    if complaints.is_empty() {
        Ok(finished.stdout)
    } else {
        let mut text = String::new();
        for line in complaints {
            writeln!(text, "{line}")?;
        }
        Err(error!("{path} in {}: {text}", image.display()))
    }
}
