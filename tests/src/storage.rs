//! A storage daemon of either kind: ours under the name of QEMU's, or QEMU's own.
//!
//! What a test says of both is QEMU's behaviour for certain; what it says of ours alone is said in so many words.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::process::Daemon;
use crate::qmp::Qmp;
use crate::{Result, error, peer};

/// Whose program it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Headwater's.
    Ours,
    /// QEMU's.
    Theirs,
}

impl Kind {
    /// Both, ours first.
    pub const ALL: [Kind; 2] = [Kind::Ours, Kind::Theirs];

    /// What a folder of its is called.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ours => "ours",
            Kind::Theirs => "theirs",
        }
    }

    /// The program; ours by a link in `dir`.
    ///
    /// # Errors
    /// It is not there.
    pub fn program(self, dir: &Path) -> Result<PathBuf> {
        if self == Kind::Theirs {
            return peer::find("qemu-storage-daemon");
        }
        let bin = dir.join("bin");
        let link = bin.join("qemu-storage-daemon");
        if !link.exists() {
            fs::create_dir_all(&bin)?;
            symlink(fs::canonicalize(peer::headwater()?)?, &link)?;
        }
        Ok(link)
    }
}

/// One that runs, with a monitor connected.
#[derive(Debug)]
pub struct Storage {
    /// The process.
    pub daemon: Daemon,
    /// The connection.
    pub qmp: Qmp,
}

impl Storage {
    /// Starts it in `dir` with these words before those of its monitor.
    ///
    /// # Errors
    /// It does not start, with what it said.
    pub fn start<S: AsRef<str>>(kind: Kind, dir: &Path, words: impl IntoIterator<Item = S>) -> Result<Self> {
        let socket = dir.join("qmp.sock");
        let mut command = Command::new(kind.program(dir)?);
        command.current_dir(dir);
        for word in words {
            command.arg(word.as_ref());
        }
        command.arg("--chardev").arg(format!("socket,id=m,path={},server=on,wait=off", socket.display()));
        let pid = dir.join("daemon.pid");
        let _ = fs::remove_file(&pid);
        command.args(["--monitor", "chardev=m", "--pidfile"]).arg(&pid);
        let mut daemon = Daemon::spawn(&format!("{kind:?}"), command)?;
        daemon.listening(&socket)?;
        daemon.stands(&pid)?;
        let qmp = if kind == Kind::Theirs { Qmp::connect_to_qemus(&socket) } else { Qmp::connect(&socket) };
        Ok(Self { qmp: qmp?, daemon })
    }

    /// A command that succeeds.
    ///
    /// # Errors
    /// It does not.
    pub fn does(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments).map_err(|why| error!("{why}\n{}", self.daemon.log()))
    }

    /// The text of a command that is refused.
    ///
    /// # Errors
    /// It is not.
    pub fn refuses(&mut self, command: &str, arguments: Value) -> Result<String> {
        Ok(self.qmp.refused(command, arguments)?.desc)
    }

    /// The block jobs there are.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn jobs(&mut self) -> Result<Vec<Value>> {
        Ok(self.does("query-block-jobs", json!({}))?.as_array().cloned().unwrap_or_default())
    }

    /// Waits for the end of job `id`, whatever it is; the event's data.
    ///
    /// # Errors
    /// There is none in time.
    pub fn ended(&mut self, id: &str) -> Result<Value> {
        let is_end = |event: &Value| {
            let name = event["event"].as_str().unwrap_or_default();
            matches!(name, "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED") && event["data"]["device"] == id
        };
        let event = self.qmp.event_where(crate::process::PATIENCE, is_end);
        let event = event.map_err(|why| error!("waiting for the end of {id}: {why}\n{}", self.daemon.log()))?;
        let mut data = event["data"].clone();
        data["event"] = event["event"].clone();
        Ok(data)
    }

    /// Waits until job `id` has completed without an error, and is gone.
    ///
    /// # Errors
    /// It failed, or was cancelled.
    pub fn completed(&mut self, id: &str) -> Result<Value> {
        let data = self.ended(id)?;
        if data["event"] != "BLOCK_JOB_COMPLETED" || data.get("error").is_some() {
            return Err(error!("{id} did not complete: {data}"));
        }
        self.gone(id)?;
        Ok(data)
    }

    /// Waits until job `id` is gone.
    ///
    /// # Errors
    /// It stays.
    pub fn gone(&mut self, id: &str) -> Result {
        let is_null = |event: &Value| event["data"]["id"] == id && event["data"]["status"] == "null";
        self.qmp.event_where(crate::process::PATIENCE, is_null)?;
        Ok(())
    }

    /// Ends it in good order.
    ///
    /// # Errors
    /// It did not end well.
    pub fn end(self) -> Result {
        let Self { mut daemon, qmp } = self;
        drop(qmp);
        let status = daemon.terminate()?;
        if status.success() { Ok(()) } else { Err(error!("it ended with {status}\n{}", daemon.log())) }
    }
}
