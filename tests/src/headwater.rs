//! The binary under test: its subcommands run to their end, and `headwater serve` as a daemon.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::process::{Daemon, Finished, run};
use crate::qmp::Qmp;
use crate::{Result, peer};

/// Runs one subcommand to its end.
pub fn headwater<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Finished> {
    run(peer::headwater()?, args)
}

/// A `headwater serve` to be started.
#[derive(Debug)]
pub struct Serve {
    dir: PathBuf,
    args: Vec<OsString>,
    sockets: Vec<PathBuf>,
}

/// A running `headwater serve`.
#[derive(Debug)]
pub struct Headwater {
    /// The process.
    pub daemon: Daemon,
    qmp: PathBuf,
}

impl Serve {
    /// One whose monitor socket will be in `dir`.
    pub fn new(dir: &Path) -> Self {
        Serve { dir: dir.to_path_buf(), args: Vec::new(), sockets: Vec::new() }
    }

    /// Adds any one argument, such as `--copy-on-read`.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Serves this image under the name of its file's stem.
    #[must_use]
    pub fn image(self, file: &Path) -> Self {
        self.arg(file)
    }

    /// Serves this image under a name of its own.
    #[must_use]
    pub fn device(self, name: &str, file: &Path) -> Self {
        let mut value = OsString::from(name);
        value.push("=");
        value.push(file);
        self.arg("--device").arg(value)
    }

    fn socket(mut self, option: &str, socket: &Path) -> Self {
        self.sockets.push(socket.to_path_buf());
        self.arg(option).arg(socket)
    }

    /// Exports it over vhost-user-blk.
    #[must_use]
    pub fn vhost_user(self, socket: &Path) -> Self {
        self.socket("--vhost-user", socket)
    }

    /// Exports it over NBD on a unix socket.
    #[must_use]
    pub fn nbd(self, socket: &Path) -> Self {
        self.socket("--nbd", socket)
    }

    /// Opens the human monitor.
    #[must_use]
    pub fn hmp(self, socket: &Path) -> Self {
        self.socket("--hmp", socket)
    }

    /// Starts it and waits until all its sockets listen. A QMP socket is always among them.
    pub fn start(self) -> Result<Headwater> {
        let qmp = self.dir.join("headwater.qmp");
        let serve = self.socket("--qmp", &qmp);
        let mut command = Command::new(peer::headwater()?);
        command.arg("serve").args(&serve.args);
        let mut daemon = Daemon::spawn("headwater", command)?;
        for socket in &serve.sockets {
            daemon.listening(socket)?;
        }
        Ok(Headwater { daemon, qmp })
    }

    /// Starts it expecting it to refuse; how it ended and what it said.
    pub fn refused(self) -> Result<Finished> {
        headwater([OsString::from("serve")].into_iter().chain(self.args))
    }
}

impl Headwater {
    /// A `serve` to be started with its sockets in `dir`.
    pub fn serve(dir: &Path) -> Serve {
        Serve::new(dir)
    }

    /// A new connection to its monitor.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
    }

    /// Where its monitor listens.
    pub fn qmp_socket(&self) -> &Path {
        &self.qmp
    }

    /// Ends it in good order.
    pub fn quit(mut self) -> Result {
        self.qmp()?.execute("quit", json!({}))?;
        let status = self.daemon.exits()?;
        if status.success() {
            Ok(())
        } else {
            Err(crate::error!("headwater ended with {status} after quit\n{}", self.daemon.log()))
        }
    }
}
