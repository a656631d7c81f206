//! The guests' kernel: Debian's cloud kernel, unpacked into the target directory and never installed.
//!
//! `kernel/` holds one unpacked package, or nothing: it is put in place by a rename, so a half unpacked one is never seen.

use std::fs;
use std::path::{Path, PathBuf};

use super::Missing;
use crate::workspace::{Doing, Failure, Outcome, Run, Workspace};

/// Depends on the current kernel image and is otherwise empty.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

fn place(workspace: &Workspace) -> PathBuf {
    workspace.peers().join("kernel")
}

pub(crate) fn look(workspace: &Workspace) -> Option<Missing> {
    let boot = place(workspace).join("boot");
    let there = fs::read_dir(boot).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz-"))
    });
    (!there).then(|| Missing {
        what: "guest kernel".to_owned(),
        why: "boots the guests",
        package: None,
        remedy: format!(
            "unpack the package {META_PACKAGE} depends on into {} with dpkg-deb -x",
            place(workspace).display()
        ),
    })
}

/// Downloads and unpacks the kernel package; needs no root, but apt's package lists.
pub(crate) fn fetch(workspace: &Workspace) -> Outcome {
    let image = Run::new("apt-cache")
        .args(["depends", "--no-recommends", "--no-suggests", META_PACKAGE])
        .env("LC_ALL", "C")
        .read()?
        .lines()
        .find_map(|line| {
            let package = line.trim().strip_prefix("Depends: ")?;
            package.starts_with("linux-image-").then(|| package.to_owned())
        })
        .ok_or_else(|| Failure::new(format!("apt knows no kernel behind {META_PACKAGE}")))?;
    let place = place(workspace);
    let work = workspace.peers().join("kernel.new");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).doing(format!("making {}", work.display()))?;
    // Run as the user we are: apt's own unprivileged user cannot write into the target directory.
    Run::new("apt-get")
        .args(["--quiet=2", "--option", "APT::Sandbox::User=root", "download", &image])
        .dir(&work)
        .run()?;
    let package = only_package(&work)?;
    let unpacked = work.join("unpacked");
    Run::new("dpkg-deb").arg("--extract").arg(&package).arg(&unpacked).run()?;
    let _ = fs::remove_dir_all(&place);
    fs::rename(&unpacked, &place).doing(format!("moving the kernel to {}", place.display()))?;
    fs::remove_dir_all(&work).doing(format!("removing {}", work.display()))?;
    Ok(())
}

fn only_package(dir: &Path) -> Outcome<PathBuf> {
    fs::read_dir(dir)
        .doing(format!("listing {}", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Failure::new("apt-get download left no package"))
}
