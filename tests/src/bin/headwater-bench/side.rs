//! The two sides: one disk served by either program, opened alike.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use headwater_tests::Result;
use headwater_tests::headwater::Headwater;
use headwater_tests::process::{CpuTime, Daemon};
use headwater_tests::qemu::{Cache, Qsd, QsdBuilder, file_node, format_node};
use headwater_tests::qmp::Qmp;
use serde_json::json;
use tempfile::TempDir;

/// Whom to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    Headwater,
    Qsd,
}

/// What to serve.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) top: PathBuf,
    pub(crate) format: &'static str,
    /// The raw file behind it.
    pub(crate) base: Option<PathBuf>,
    /// How all of it is opened.
    pub(crate) cache: Cache,
}

/// How the disk is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Export {
    Nbd,
    VhostUser,
}

enum Program {
    Headwater(Headwater),
    Qsd(Qsd),
}

/// A running server of one disk.
pub(crate) struct Server {
    program: Program,
    /// The name its monitor knows the disk by.
    pub(crate) device: String,
    pub(crate) socket: PathBuf,
    _dir: TempDir,
}

impl Side {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Headwater => "headwater",
            Side::Qsd => "qsd",
        }
    }

    pub(crate) fn serve(self, disk: &Disk, export: Export) -> Result<Server> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("disk.sock");
        let program = match self {
            Side::Headwater => headwater(dir.path(), disk, export, &socket)?,
            Side::Qsd => qsd(dir.path(), disk, export, &socket)?,
        };
        let device = match self {
            Side::Headwater => "disk0",
            Side::Qsd => "top",
        };
        Ok(Server { program, device: device.to_owned(), socket, _dir: dir })
    }
}

fn headwater(dir: &Path, disk: &Disk, export: Export, socket: &Path) -> Result<Program> {
    // It finds the base by itself, from the overlay's header.
    let serve = Headwater::serve(dir).arg("--cache").arg(disk.cache.name()).device("disk0", &disk.top);
    let serve = match export {
        Export::Nbd => serve.nbd(socket),
        Export::VhostUser => serve.vhost_user(socket),
    };
    Ok(Program::Headwater(serve.start()?))
}

fn qsd(dir: &Path, disk: &Disk, export: Export, socket: &Path) -> Result<Program> {
    let mut qsd = QsdBuilder::new(dir);
    if let Some(base) = &disk.base {
        qsd = qsd
            .node(&file_node("base-file", base, disk.cache, true))
            .node(&json!({ "driver": "raw", "node-name": "base", "file": "base-file", "read-only": true }));
    }
    let backing = disk.base.as_ref().map(|_| "base");
    qsd = qsd.node(&file_node("top-file", &disk.top, disk.cache, false)).node(&format_node(
        "top",
        disk.format,
        "top-file",
        backing,
    ));
    let qsd = match export {
        Export::Nbd => qsd.nbd("top", socket),
        Export::VhostUser => qsd.vhost_user("top", socket, 1),
    };
    Ok(Program::Qsd(qsd.start()?))
}

impl Server {
    fn daemon(&self) -> &Daemon {
        match &self.program {
            Program::Headwater(headwater) => &headwater.daemon,
            Program::Qsd(qsd) => &qsd.daemon,
        }
    }

    pub(crate) fn cpu(&self) -> Result<CpuTime> {
        self.daemon().cpu()
    }

    pub(crate) fn qmp(&self) -> Result<Qmp> {
        match &self.program {
            Program::Headwater(headwater) => headwater.qmp(),
            Program::Qsd(qsd) => qsd.qmp(),
        }
    }

    /// Ends it in good order, so that the image is clean for the next round.
    pub(crate) fn quit(self) -> Result {
        match self.program {
            Program::Headwater(headwater) => headwater.quit(),
            Program::Qsd(qsd) => qsd.quit(),
        }
    }
}
