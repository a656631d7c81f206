//! QEMU's programs: `qemu-img`, `qemu-io`, and `qemu-storage-daemon` as a server beside Headwater.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::process::{Daemon, Finished, run};
use crate::qmp::Qmp;
use crate::{Result, peer};

/// Runs `qemu-img`.
pub fn qemu_img<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Finished> {
    run("qemu-img", args)
}

/// `qemu-img info` of one image, without its chain, read although a server may hold its lock.
pub fn info(image: &Path) -> Result<Value> {
    let args = ["info", "--force-share", "--output=json"].map(OsStr::new);
    let text = qemu_img(args.into_iter().chain([image.as_os_str()]))?.ok()?;
    Ok(serde_json::from_str(&text)?)
}

/// `qemu-img check` of an image; the exit code is 0 clean, 2 corrupt, 3 leaks.
pub fn check(image: &Path) -> Result<Finished> {
    qemu_img([OsStr::new("check"), image.as_os_str()])
}

/// `qemu-img compare`, which ends well if both images read the same.
pub fn compare(first: &Path, second: &Path) -> Result<Finished> {
    qemu_img([OsStr::new("compare"), first.as_os_str(), second.as_os_str()])
}

/// Runs the `commands` of `qemu-io` on an image of `format`. A command that fails is told by its words, not by the
/// exit code, so the output is checked for them.
pub fn qemu_io(format: &str, image: &Path, commands: &[&str]) -> Result<String> {
    let mut args: Vec<&OsStr> = vec![OsStr::new("-f"), OsStr::new(format)];
    for command in commands {
        args.extend([OsStr::new("-c"), OsStr::new(command)]);
    }
    args.push(image.as_os_str());
    let finished = run("qemu-io", args)?;
    let complaint = |text: &str| text.contains("failed") || text.contains("error");
    if complaint(&finished.stdout) || complaint(&finished.stderr) {
        return Err(crate::error!("{}:\n{}{}", finished.line, finished.stdout, finished.stderr));
    }
    finished.ok()
}

/// How the file below an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Past the page cache (`O_DIRECT`), submitted by io_uring: QEMU's `cache=none`.
    None,
    /// Through the page cache: QEMU's `cache=writeback`.
    Writeback,
}

impl Cache {
    /// What both programs call it.
    pub fn name(self) -> &'static str {
        match self {
            Cache::None => "none",
            Cache::Writeback => "writeback",
        }
    }
}

/// A `file` node for `blockdev-add`.
pub fn file_node(name: &str, path: &Path, cache: Cache, read_only: bool) -> Value {
    let mut node = json!({
        "driver": "file", "node-name": name, "filename": path, "read-only": read_only,
        "cache": { "direct": cache == Cache::None }, "discard": "unmap",
    });
    if cache == Cache::None {
        node["aio"] = json!("io_uring");
    }
    node
}

/// A format node over the node `file`.
pub fn format_node(name: &str, format: &str, file: &str, backing: Option<&str>) -> Value {
    let mut node = json!({
        "driver": format, "node-name": name, "file": file, "discard": "unmap",
        "read-only": false,
    });
    if let Some(backing) = backing {
        node["backing"] = json!(backing);
    }
    node
}

/// A `qemu-storage-daemon` to be started.
#[derive(Debug)]
pub struct QsdBuilder {
    dir: PathBuf,
    args: Vec<String>,
    sockets: Vec<PathBuf>,
}

/// A running `qemu-storage-daemon`.
#[derive(Debug)]
pub struct Qsd {
    /// The process.
    pub daemon: Daemon,
    qmp: PathBuf,
}

impl QsdBuilder {
    /// One whose monitor socket will be in `dir`.
    pub fn new(dir: &Path) -> Self {
        QsdBuilder { dir: dir.to_path_buf(), args: Vec::new(), sockets: Vec::new() }
    }

    /// Adds a block node, as `blockdev-add` takes it.
    #[must_use]
    pub fn node(mut self, node: &Value) -> Self {
        self.args.extend(["--blockdev".to_owned(), node.to_string()]);
        self
    }

    /// Adds any arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Exports `node` over NBD on a unix socket, under the empty name, writable.
    #[must_use]
    pub fn nbd(mut self, node: &str, socket: &Path) -> Self {
        let server = json!({ "addr": { "type": "unix", "path": socket }, "max-connections": 0 });
        let export = json!({ "type": "nbd", "id": "nbd0", "node-name": node, "name": "", "writable": true });
        self.args.extend(["--nbd-server".to_owned(), server.to_string(), "--export".to_owned(), export.to_string()]);
        self.sockets.push(socket.to_path_buf());
        self
    }

    /// Exports `node` over vhost-user-blk, writable.
    #[must_use]
    pub fn vhost_user(mut self, node: &str, socket: &Path, queues: u16) -> Self {
        let export = json!({
            "type": "vhost-user-blk", "id": "vu0", "node-name": node, "writable": true, "num-queues": queues,
            "addr": { "type": "unix", "path": socket },
        });
        self.args.extend(["--export".to_owned(), export.to_string()]);
        self.sockets.push(socket.to_path_buf());
        self
    }

    /// Starts it and waits until all its sockets listen.
    pub fn start(self) -> Result<Qsd> {
        let qmp = self.dir.join("qsd.qmp");
        let mut command = Command::new(peer::find("qemu-storage-daemon")?);
        command
            .arg("--chardev")
            .arg(format!("socket,id=qmp,path={},server=on,wait=off", qmp.display()))
            .args(["--monitor", "chardev=qmp,mode=control"])
            .args(&self.args);
        let pid = self.dir.join("qsd.pid");
        let _ = std::fs::remove_file(&pid);
        command.arg("--pidfile").arg(&pid);
        let mut daemon = Daemon::spawn("qemu-storage-daemon", command)?;
        daemon.listening(&qmp)?;
        daemon.stands(&pid)?;
        for socket in &self.sockets {
            daemon.listening(socket)?;
        }
        Ok(Qsd { daemon, qmp })
    }
}

impl Qsd {
    /// A new connection to its monitor.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
    }

    /// Ends it in good order: by a signal, as its monitor now and then closes a new connection without a word.
    pub fn quit(mut self) -> Result {
        self.daemon.terminate()?;
        Ok(())
    }
}
