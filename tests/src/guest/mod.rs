//! Real guests: Debian's cloud kernel under QEMU's emulation, with the disk under test as its only disk.
//!
//! A test gives a shell script. It runs in the guest with the helpers of `guest/lib.sh`: `report KEY VALUE…` tells the
//! test something, `say` is read from the test by `read`. When the script ends, the disk is synced and made read-only,
//! and the guest is powered off. Everything on the console is kept for the error message.
//!
//! Tests that boot guests have `guest` in their names: `cargo xtask test` runs those one at a time, since each wants
//! more than one processor.

mod initramfs;
mod kernel;

use std::collections::VecDeque;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::NamedTempFile;

use crate::{Result, error, peer};

/// Booting takes five seconds on an idle machine of two cores and many times that on a loaded one.
pub const BOOT_PATIENCE: Duration = Duration::from_mins(3);

/// Lines of the console that tell the test something begin with this.
const REPORT: &str = "@@";

/// Mitigations cost an emulated processor much and protect it from nothing.
const KERNEL_LINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off";

/// Whether guests can run here.
pub fn available() -> Result {
    peer::find("qemu-system-x86_64")?;
    peer::find("busybox")?;
    kernel::Kernel::find()?;
    Ok(())
}

/// How the guest's disk is reached.
#[derive(Clone, Debug)]
pub enum Disk {
    /// A vhost-user-blk server's socket. QEMU comes back to it when the server does.
    VhostUser(PathBuf),
    /// An NBD server's unix socket, and the export's name.
    Nbd(PathBuf, String),
    /// An image file, opened by QEMU itself in this format.
    File(PathBuf, &'static str),
    /// Words of the emulator's own command line.
    Words(Vec<String>),
}

/// A guest to be booted.
#[derive(Clone, Debug)]
pub struct Guest {
    disk: Disk,
    script: String,
    manifest: String,
    memory_mib: u32,
    processors: u32,
    boots_from_disk: bool,
    emulator: Option<PathBuf>,
}

/// A guest that was started. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    input: ChildStdin,
    console: Arc<Console>,
    _initramfs: NamedTempFile,
}

/// What a guest's script reported by the time it ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Keys and values in the order they were reported.
    pub reports: Vec<(String, String)>,
    /// The script's exit code.
    pub exit: i32,
    /// All that was on the console.
    pub console: String,
}

impl Finished {
    /// The last value reported under `key`.
    pub fn get(&self, key: &str) -> Result<&str> {
        let mut values = self.reports.iter().rev();
        let found = values.find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str()).ok_or_else(|| error!("the guest reported no {key}\n{}", self.console))
    }

    /// Itself if the script's exit code was zero.
    pub fn ok(self) -> Result<Finished> {
        if self.exit == 0 {
            Ok(self)
        } else {
            Err(error!("the guest's script ended with {}\n{}", self.exit, self.console))
        }
    }
}

impl Guest {
    /// A guest whose script runs from the initramfs, with the disk at `/dev/vda`, not mounted.
    pub fn new(disk: Disk, script: &str) -> Self {
        Guest {
            disk,
            script: script.to_owned(),
            manifest: String::new(),
            memory_mib: 256,
            processors: 1,
            boots_from_disk: false,
            emulator: None,
        }
    }

    /// Boots from the disk: it becomes the root, and the shell that runs the script is read from it. The disk must be
    /// one that [`crate::master`] made.
    #[must_use]
    pub fn boot_from_disk(mut self) -> Self {
        self.boots_from_disk = true;
        self
    }

    /// Gives `verify DIR` the checksums to check, as [`crate::master::Master::manifest`] has them.
    #[must_use]
    pub fn manifest(mut self, manifest: &str) -> Self {
        manifest.clone_into(&mut self.manifest);
        self
    }

    /// Runs under this program, which takes QEMU's command line.
    #[must_use]
    pub fn emulator(mut self, program: &Path) -> Self {
        self.emulator = Some(program.to_path_buf());
        self
    }

    /// Memory in MiB.
    #[must_use]
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Virtual processors; a vhost-user disk gets a queue for each.
    #[must_use]
    pub fn processors(mut self, processors: u32) -> Self {
        self.processors = processors;
        self
    }

    /// Boots, waits for the end of the script, and returns what it reported.
    pub fn run(&self, within: Duration) -> Result<Finished> {
        self.start()?.finish(within)
    }

    /// Boots.
    pub fn start(&self) -> Result<Running> {
        let kernel = kernel::Kernel::find()?;
        let mut initramfs = NamedTempFile::new()?;
        let archive = initramfs::build(&kernel, &self.script, &self.manifest, self.boots_from_disk)?;
        initramfs.write_all(&archive)?;
        let mut command = self.command(&kernel, initramfs.path())?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|why| error!("starting QEMU: {why}"))?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(input), Some(output), Some(errors)) = pipes else {
            return Err("QEMU was started without pipes".into());
        };
        let console = Arc::new(Console::default());
        console.follow(output, true);
        console.follow(errors, false);
        Ok(Running { child, input, console, _initramfs: initramfs })
    }

    /// What somebody else boots it with: the kernel, the initramfs (made in `dir`), and the kernel's own line.
    pub fn parts(&self, dir: &Path) -> Result<(PathBuf, PathBuf, &'static str)> {
        let kernel = kernel::Kernel::find()?;
        let archive = initramfs::build(&kernel, &self.script, &self.manifest, self.boots_from_disk)?;
        let path = dir.join("initramfs");
        std::fs::write(&path, archive)?;
        Ok((kernel.image, path, KERNEL_LINE))
    }

    fn command(&self, kernel: &kernel::Kernel, initramfs: &Path) -> Result<Command> {
        let mut qemu = match &self.emulator {
            Some(program) => Command::new(program),
            None => Command::new(peer::find("qemu-system-x86_64")?),
        };
        let memory = format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory_mib);
        qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .args(["-accel", "tcg,thread=multi", "-machine", "q35,memory-backend=mem"])
            .args(["-object", &memory, "-m", &format!("{}M", self.memory_mib)])
            .args(["-smp", &self.processors.to_string()])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", KERNEL_LINE]);
        match &self.disk {
            Disk::VhostUser(socket) => {
                let path = socket.display();
                qemu.args(["-chardev", &format!("socket,id=disk,path={path},reconnect-ms=100")])
                    .args(["-device", &format!("vhost-user-blk-pci,chardev=disk,num-queues={}", self.processors)]);
            }
            Disk::Nbd(socket, export) => {
                let node = json!({
                    "driver": "nbd", "node-name": "disk", "export": export, "reconnect-delay": 60,
                    "server": { "type": "unix", "path": socket },
                });
                virtio_blk(&mut qemu, &node);
            }
            Disk::File(path, format) => {
                let file = json!({ "driver": "file", "filename": path });
                let node = json!({ "driver": format, "node-name": "disk", "file": file });
                virtio_blk(&mut qemu, &node);
            }
            Disk::Words(words) => {
                qemu.args(words);
            }
        }
        Ok(qemu)
    }
}

fn virtio_blk(qemu: &mut Command, node: &serde_json::Value) {
    qemu.args(["-blockdev", &node.to_string(), "-device", "virtio-blk-pci,drive=disk"]);
}

impl Running {
    /// Waits until the script reports `key`; its value. Reports are taken in order, each once.
    pub fn reported(&mut self, key: &str, within: Duration) -> Result<String> {
        self.console.wait(within, &format!("report of {key}"), |state| {
            state.reports.iter().position(|(name, _)| name == key).map(|at| {
                let (_, value) = state.reports.drain(..=at).next_back().unwrap_or_default();
                value
            })
        })
    }

    /// Types a line on the guest's console, for its script to `read`.
    pub fn say(&mut self, line: &str) -> Result {
        self.input.write_all(line.as_bytes())?;
        self.input.write_all(b"\n")?;
        self.input.flush()?;
        Ok(())
    }

    /// Waits until the script has ended and the guest is off.
    pub fn finish(mut self, within: Duration) -> Result<Finished> {
        self.console.wait(within, "power-off", |state| state.closed.then_some(()))?;
        self.child.wait()?;
        let state = self.console.state();
        let text = String::from_utf8_lossy(&state.text).into_owned();
        let exit = state.all.iter().rev().find(|(key, _)| key == "exit");
        match exit.map(|(_, code)| code.parse()) {
            Some(Ok(exit)) => Ok(Finished { reports: state.all.clone(), exit, console: text }),
            _ => Err(error!("the guest ended before its script\n{text}")),
        }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as pulling the plug would.
    pub fn kill(mut self) -> Result {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug, Default)]
struct Console {
    state: Mutex<ConsoleState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ConsoleState {
    text: Vec<u8>,
    /// How much of `text` was searched for reports.
    searched: usize,
    /// Reports not taken yet.
    reports: VecDeque<(String, String)>,
    all: Vec<(String, String)>,
    closed: bool,
}

impl Console {
    /// A poisoned lock only says that another thread of the test failed; the text is still good for its message.
    fn state(&self) -> std::sync::MutexGuard<'_, ConsoleState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gathers one of QEMU's streams; ends with it.
    fn follow(self: &Arc<Self>, mut stream: impl Read + Send + 'static, is_console: bool) {
        let console = Arc::clone(self);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                let mut state = console.state();
                state.text.extend(&buffer[..read]);
                state.search();
                console.changed.notify_all();
            }
            if is_console {
                console.state().closed = true;
                console.changed.notify_all();
            }
        });
    }

    fn wait<T>(
        &self,
        within: Duration,
        what: &str,
        mut ready: impl FnMut(&mut ConsoleState) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        let mut state = self.state();
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                let why = if state.closed { "the guest ended" } else { "time ran out" };
                let text = String::from_utf8_lossy(&state.text);
                return Err(error!("no {what} from the guest: {why}\n{text}"));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }
}

impl ConsoleState {
    /// Picks the reports from the lines that are whole by now.
    fn search(&mut self) {
        while let Some(length) = self.text[self.searched..].iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&self.text[self.searched..self.searched + length]);
            if let Some((_, report)) = line.trim_end().split_once(REPORT) {
                let (key, value) = report.split_once(' ').unwrap_or((report, ""));
                let report = (key.to_owned(), value.to_owned());
                self.all.push(report.clone());
                self.reports.push_back(report);
            }
            self.searched += length + 1;
        }
    }
}
