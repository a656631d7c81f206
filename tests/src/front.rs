//! `headwater-qemu` as a daemon: QEMU's line, with the emulator's name exchanged.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::process::{Daemon, PATIENCE};
use crate::qmp::Qmp;
use crate::{Result, error, peer};

/// The program under the name by which it is QEMU.
pub fn program(dir: &Path) -> Result<PathBuf> {
    let link = dir.join("headwater-qemu");
    if !link.exists() {
        symlink(peer::headwater()?.canonicalize()?, &link)?;
    }
    Ok(link)
}

/// A QEMU to be started behind Headwater, with its files in one folder. It has no display and no default devices.
#[derive(Debug)]
pub struct Builder {
    dir: PathBuf,
    words: Vec<OsString>,
    monitors: Vec<PathBuf>,
}

/// One that runs.
#[derive(Debug)]
pub struct Front {
    /// Headwater's process.
    pub daemon: Daemon,
    qmp: PathBuf,
}

impl Builder {
    /// In this folder.
    pub fn new(dir: &Path) -> Self {
        Builder { dir: dir.to_path_buf(), words: Vec::new(), monitors: Vec::new() }
    }

    /// Adds words of QEMU's line.
    #[must_use]
    pub fn words<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// Adds a monitor for people at this socket.
    #[must_use]
    pub fn people(mut self, socket: &Path) -> Self {
        self.monitors.push(socket.to_path_buf());
        self.words(["-monitor".to_owned(), format!("unix:{},server=on,wait=off", socket.display())])
    }

    /// The whole command, without a QMP monitor.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new(program(&self.dir)?);
        command.current_dir(&self.dir).args(["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "128"]);
        command.args(&self.words);
        Ok(command)
    }

    /// Starts it with a QMP monitor, and waits until its monitors listen.
    pub fn start(self) -> Result<Front> {
        let qmp = self.dir.join("front.qmp");
        let mut command = self.command()?;
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let mut daemon = Daemon::spawn("headwater-qemu", command)?;
        for socket in self.monitors.iter().chain([&qmp]) {
            daemon.listening(socket)?;
        }
        Ok(Front { daemon, qmp })
    }
}

impl Front {
    /// To be started in `dir`.
    pub fn in_dir(dir: &Path) -> Builder {
        Builder::new(dir)
    }

    /// A connection to its monitor.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
    }

    /// Where its monitor listens.
    pub fn qmp_socket(&self) -> &Path {
        &self.qmp
    }

    /// QEMU's process.
    pub fn emulator(&self) -> Result<Pid> {
        emulator_of(self.daemon.id())
    }
}

/// The process that QEMU is, below Headwater's.
pub fn emulator_of(headwater: u32) -> Result<Pid> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let children = std::fs::read_to_string(format!("/proc/{headwater}/task/{headwater}/children"))?;
        let first = children.split_whitespace().next().and_then(|number| number.parse().ok());
        if let Some(pid) = first.and_then(Pid::from_raw) {
            return Ok(pid);
        }
        if Instant::now() > deadline {
            return Err(error!("QEMU was not started below process {headwater}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends a process that is nobody's child any more, and waits until it is gone.
pub fn end(pid: Pid) -> Result {
    kill_process(pid, Signal::KILL)?;
    let deadline = Instant::now() + PATIENCE;
    while runs(pid) {
        if Instant::now() > deadline {
            return Err(error!("process {pid:?} does not end"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether a process is there and has not ended.
pub fn runs(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z")
}
