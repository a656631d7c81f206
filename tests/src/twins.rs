//! One conversation with our storage daemon and QEMU's, and the images that both leave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::Result;
use crate::process::finish;
use crate::qemu::qemu_io;
use crate::sides::master;
use crate::storage::{Kind, Storage};

/// Both kinds, and a folder for each.
pub struct Both {
    dir: TempDir,
}

impl Both {
    /// With a chain in each folder: `base.raw`, `mid.qcow2` on it, `top.qcow2` and `top.qed` on that.
    ///
    /// # Errors
    /// Where the images cannot be made.
    pub fn new() -> Result<Self> {
        let both = Self { dir: tempfile::tempdir()? };
        for kind in Kind::ALL {
            let dir = both.at(kind);
            fs::create_dir(&dir)?;
            master(&dir.join("base.raw"), 4 << 20, 9)?;
            for line in [
                "create -q -f qcow2 -b base.raw -F raw mid.qcow2",
                "create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
                "create -q -f qed -b mid.qcow2 -F qcow2 top.qed",
            ] {
                finish(Command::new("qemu-img").args(line.split(' ')).current_dir(&dir))?.ok()?;
            }
            qemu_io("qcow2", &dir.join("mid.qcow2"), &["write -P 5 1M 300k"])?;
            qemu_io("qcow2", &dir.join("top.qcow2"), &["write -P 6 2M 100k"])?;
        }
        Ok(both)
    }

    /// The folder of one of them.
    pub fn at(&self, kind: Kind) -> PathBuf {
        self.dir.path().join(kind.name())
    }

    /// One of them with these words, not run yet.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn command(&self, kind: Kind, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(kind.program(&self.at(kind))?);
        command.args(words).current_dir(self.at(kind));
        Ok(command)
    }

    /// Starts one of them with a monitor.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn start(&self, kind: Kind, words: &[&str]) -> Result<Storage> {
        Storage::start(kind, &self.at(kind), words)
    }

    /// Ends both with the same words: exit code and what is said on standard error.
    ///
    /// # Errors
    /// Where they cannot be run.
    pub fn refused(&self, words: &[&str]) -> Result {
        let mut said = Vec::new();
        for kind in Kind::ALL {
            let output = self.command(kind, words)?.output()?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            // Some begin with the program's whole path.
            let text = text.find("qemu-storage-daemon: ").map_or_else(|| text.clone(), |at| text[at..].to_owned());
            said.push((output.status.code(), text));
        }
        assert_eq!(said[0], said[1], "{words:?}");
        Ok(())
    }
}

/// What of an answer is nobody's affair: numbers of nodes, moments, what a file takes up.
pub fn plain(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut kept = Map::new();
            let is_file = members.get("format").is_some_and(|format| format == "file");
            for (key, value) in members {
                match key.as_str() {
                    // How long a file is, is up to who writes it.
                    "virtual-size" if is_file => {}
                    // Progress counts what must be copied, here; the whole disk, there.
                    // The marks of a job that follows a guest are shown there as a bitmap without a name.
                    "dirty-bitmaps" if members.get("drv").is_some_and(|driver| driver == "mirror_top") => {}
                    "timestamp" | "actual-size" | "id" | "len" | "offset" | "busy" => {}
                    "current-progress" | "total-progress" => {}
                    _ => {
                        kept.insert(key.clone(), plain(value));
                    }
                }
            }
            Value::Object(kept)
        }
        Value::Array(items) => items.iter().map(plain).collect(),
        Value::String(text) if text.starts_with("#block") => json!("#block"),
        other => other.clone(),
    }
}

/// One step of a conversation.
pub enum Say {
    /// A command, whose answer is the same.
    Do(&'static str, Value),
    /// An event of this name comes.
    Hear(&'static str),
    /// `qemu-io` does this to the export `disk` at `nbd.sock`.
    Io(&'static str),
}
use Say::{Do, Hear, Io};

/// Holds the conversation with both; they answer alike.
///
/// # Errors
/// Where one of them cannot be spoken to.
pub fn converse(both: &Both, words: &[&str], steps: &[Say]) -> Result {
    let mut transcripts = Vec::new();
    for kind in Kind::ALL {
        let Storage { mut daemon, mut qmp } = both.start(kind, words)?;
        let mut transcript = Vec::new();
        for step in steps {
            transcript.push(match step {
                Do(command, arguments) => match qmp.command(command, arguments.clone())? {
                    Ok(value) => format!("{command}: {}", sorted(&plain(&value))),
                    Err(refused) => format!("{command}: {refused}"),
                },
                Io(command) => {
                    let uri = format!("nbd+unix:///disk?socket={}", both.at(kind).join("nbd.sock").display());
                    qemu_io("raw", Path::new(&uri), &[command])?;
                    (*command).to_owned()
                }
                Hear(event) => format!("{event}: {}", sorted(&plain(&qmp.event(event)?))),
            });
        }
        drop(qmp);
        daemon.terminate()?;
        transcripts.push(transcript);
    }
    for (ours, theirs) in transcripts[0].iter().zip(&transcripts[1]) {
        assert_eq!(ours, theirs, "{words:?}");
    }
    Ok(())
}

/// With members in an order of their own.
pub fn sorted(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let mut keys: Vec<&String> = members.keys().collect();
            keys.sort();
            let parts: Vec<String> = keys.into_iter().map(|key| format!("{key}={}", sorted(&members[key]))).collect();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(sorted).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

/// A chain of named nodes: `fmt` (in the file node `prot`) on `mid` on `base` (in `f0`).
pub const GRAPH: [&str; 12] = [
    "--blockdev",
    "file,node-name=f0,filename=base.raw",
    "--blockdev",
    "raw,node-name=base,file=f0",
    "--blockdev",
    "driver=qcow2,node-name=mid,file.driver=file,file.filename=mid.qcow2,backing=base",
    "--blockdev",
    "driver=file,node-name=prot,filename=top.qcow2",
    "--blockdev",
    r#"{"driver":"qcow2","node-name":"fmt","file":"prot","backing":"mid"}"#,
    "--object",
    "iothread,id=t0",
];
