//! The public QMP client `qemu.qmp`, in a virtual environment of our own under the target directory.

use std::fs;
use std::path::PathBuf;

use super::{Missing, apt};
use crate::workspace::{Outcome, Run, Workspace};

/// Name and version, pinned: the tests say what a client of the field does, so that client must not change unseen.
const CLIENT: (&str, &str) = ("qemu.qmp", "0.0.6");

fn place(workspace: &Workspace) -> PathBuf {
    workspace.peers().join("python")
}

pub(crate) fn look(workspace: &Workspace) -> Option<Missing> {
    let (name, version) = CLIENT;
    let installed = format!("{}-{version}.dist-info", name.replace('.', "_"));
    // lib/python3.N/site-packages, with whatever N this machine has.
    let there = fs::read_dir(place(workspace).join("lib")).is_ok_and(|pythons| {
        pythons.flatten().any(|python| python.path().join("site-packages").join(&installed).is_dir())
    });
    (!there).then(|| Missing {
        what: format!("Python package {name} {version}"),
        why: "a QMP client of other hands",
        package: None,
        remedy: format!("python3 -m venv {0} && {0}/bin/pip install {name}=={version}", place(workspace).display()),
    })
}

pub(crate) fn install(workspace: &Workspace) -> Outcome {
    let place = place(workspace);
    let _ = fs::remove_dir_all(&place);
    // Debian splits the module that puts pip into a new environment from its python3.
    if !Run::new("python3").args(["-c", "import ensurepip, venv"]).succeeds() {
        apt::install(&["python3-venv"], None)?;
    }
    Run::new("python3").args(["-m", "venv"]).arg(&place).run()?;
    let (name, version) = CLIENT;
    Run::new(place.join("bin").join("pip"))
        .args(["install", "--quiet", "--disable-pip-version-check", &format!("{name}=={version}")])
        .run()
}
