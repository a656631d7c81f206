//! Carrying a plan out: disks, then monitors, then QEMU; and the end of it all.
//!
//! **Invariant.** QEMU runs only while its disks are served: it is started when they stand, and they are closed when it is gone.

use super::drives::Drive;
use super::monitors::Monitor;
use super::plan::{Part, Plan};
use crate::images::Look;
use crate::{background, nbd, tool};
use control::joined::{self, Joined};
use control::{DiskSpec, Engine, EngineConfig, Failure};
use export::nbd::Address;
use image::Format;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use store::ailing::Ailments;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};

/// What a shell adds to a signal's number where a program ended by it.
const BY_SIGNAL: i32 = 128;

/// Where what is written to a snapshot's disk goes; by the drive's index.
type Overlays = Vec<Option<(TempDir, String)>>;

/// Makes the files that take what is written to disks that are to stay as they are.
pub(super) fn overlays(plan: &Plan) -> Result<Overlays, String> {
    let overlay = |drive: &Drive| {
        let look = Look { format: drive.format, ..Look::default() };
        drive.snapshot.then(|| nbd::overlay(&drive.file, &look)).transpose()
    };
    plan.drives.iter().map(overlay).collect()
}

/// Signals that end a process, and what QEMU gets for them.
struct Ends {
    signals: Vec<(Signals, Signal)>,
}

impl Ends {
    fn watch() -> Result<Self, String> {
        let kinds = [
            (SignalKind::interrupt(), Signal::INT),
            (SignalKind::terminate(), Signal::TERM),
            (SignalKind::hangup(), Signal::HUP),
        ];
        let watched = kinds.into_iter().map(|(kind, number)| Ok((signal(kind)?, number)));
        let signals: std::io::Result<Vec<_>> = watched.collect();
        Ok(Self { signals: signals.map_err(|error| format!("could not watch for signals: {error}"))? })
    }

    /// The next one.
    async fn next(&mut self) -> Signal {
        let each = self.signals.iter_mut().map(|(signals, number)| {
            let number = *number;
            Box::pin(async move {
                // It ends with the runtime only.
                let _ = signals.recv().await;
                number
            })
        });
        futures_util::future::select_all(each).await.0
    }
}

/// A private monitor of QEMU's: it listens when QEMU is started.
struct Private {
    listener: UnixListener,
    path: PathBuf,
}

impl Private {
    fn new(dir: &Path, name: &str) -> Result<Self, String> {
        let path = dir.join(format!("{name}.sock"));
        let made = UnixListener::bind(&path).and_then(|listener| {
            // QEMU is to have it.
            fcntl_setfd(&listener, FdFlags::empty())?;
            Ok(listener)
        });
        let listener = made.map_err(|error| format!("could not listen on '{}': {error}", path.display()))?;
        Ok(Self { listener, path })
    }

    /// QEMU's words for the chardev.
    fn chardev(&self, id: &str) -> [OsString; 2] {
        let number = self.listener.as_raw_fd();
        ["-chardev".into(), format!("socket,id={id},fd={number},server=on,wait=off").into()]
    }
}

/// Serves the disks, runs QEMU, and closes everything when it has ended: its exit code.
pub(super) async fn serve(plan: &Plan, program: &Path, overlays: &Overlays) -> Result<u8, String> {
    // Before anything is there to clean up, so that no signal finds the default action.
    let mut ends = Ends::watch()?;
    let dir = private_folder()?;
    let config = EngineConfig { objects: plan.objects.clone(), ..EngineConfig::default() };
    let engine = Engine::start(&config).map_err(|error| format!("could not start: {error}"))?;
    let run = Run { plan, engine: engine.clone(), dir: dir.path() };
    let ended = match run.start(program, overlays, &mut ends).await {
        Ok(mut child) => run.accompany(&mut child, &mut ends).await,
        Err(why) => Err(why),
    };
    let closed = engine.shut_down().await.map_err(|error| error.to_string());
    if let (true, Some(path)) = (ended.is_ok(), &plan.pid_file) {
        // It may be gone already: then there is nothing to do.
        let _ = std::fs::remove_file(path);
    }
    let code = ended?;
    closed?;
    Ok(code)
}

/// A folder that nobody else may enter, with a path that leaves room for sockets' names: there is little.
fn private_folder() -> Result<TempDir, String> {
    const LONGEST: usize = 64;
    let usual = std::env::temp_dir();
    let place = if usual.as_os_str().len() > LONGEST { PathBuf::from("/tmp") } else { usual };
    let made = tempfile::Builder::new().prefix("headwater-").tempdir_in(&place);
    made.map_err(|error| format!("could not make a folder in '{}': {error}", place.display()))
}

/// What is carried out.
struct Run<'a> {
    plan: &'a Plan,
    engine: Engine,
    dir: &'a Path,
}

fn told(failure: Failure) -> String {
    failure.to_string()
}

impl Run<'_> {
    /// Everything up to a running QEMU.
    async fn start(&self, program: &Path, overlays: &Overlays, ends: &mut Ends) -> Result<Child, String> {
        let joined = Joined::new(self.engine.clone(), self.dir);
        for (index, drive) in self.plan.drives.iter().enumerate() {
            self.add_drive(index, drive, overlays.get(index).and_then(Option::as_ref)).await?;
            let seen = match drive.queues {
                None => joined::Seen::Client(drive.client.clone()),
                Some(_) => joined::Seen::Device(drive.device_path()),
            };
            joined.add_drive(joined::Drive { device: drive.id.clone(), seen });
        }
        for tree in &self.plan.trees {
            let name = tree.get("node-name").and_then(Value::as_str).unwrap_or("?");
            joined.add_node(tree.clone()).await.map_err(|failure| format!("-blockdev '{name}': {failure}"))?;
        }
        for (device, node) in &self.plan.used_by {
            joined.add_device(device, node);
        }
        let mut monitors = Vec::new();
        for Monitor { seat, pretty, .. } in &self.plan.monitors {
            monitors.push(joined::Monitor::open(seat.place()?, *pretty).await.map_err(told)?);
        }
        for (monitor, said) in monitors.iter_mut().zip(&self.plan.monitors) {
            if said.wait {
                tokio::select! {
                    waited = monitor.wait() => waited.map_err(told)?,
                    _ = ends.next() => return Err("told to end before a client had come to its monitor".to_owned()),
                }
            }
        }
        let private: Result<Vec<Private>, String> =
            (0..monitors.len()).map(|number| Private::new(self.dir, &format!("monitor-{number}"))).collect();
        let private = private?;
        let watch = Private::new(self.dir, "watch")?;
        let mut words = self.words(&joined, &private).await?;
        words.extend(watch.chardev("headwater-watch"));
        words.extend(["-mon", "chardev=headwater-watch,mode=control"].map(OsString::from));
        for drive in self.plan.drives.iter().filter(|drive| drive.stream) {
            self.stream(drive).await.map_err(told)?;
        }
        let child = spawn(program, words)?;
        for (monitor, private) in monitors.into_iter().zip(&private) {
            joined.serve(monitor, private.path.clone());
        }
        let watch = watch.path;
        let pid_file = self.plan.pid_file.clone();
        tokio::spawn(async move {
            if stands(&watch).await {
                if let Some(path) = pid_file
                    && let Err(error) = std::fs::write(&path, format!("{}\n", std::process::id()))
                {
                    tool::complain(&format!("cannot create PID file: '{}': {error}", path.display()));
                }
                background::stands();
            }
        });
        Ok(child)
    }

    async fn add_drive(&self, index: usize, drive: &Drive, overlay: Option<&(TempDir, String)>) -> Result<(), String> {
        let (file, format) = match overlay {
            Some((_, file)) => (file.clone(), Some(Format::Qcow2)),
            None => (drive.file.clone(), drive.format),
        };
        let spec = DiskSpec {
            description: None,
            name: drive.id.clone(),
            file,
            format,
            cache: drive.cache,
            read_only: drive.read_only,
            copy_on_read: drive.copy_on_read,
            snapshot: None,
            source: Ailments::default(),
        };
        let failed = |failure: Failure| format!("drive '{}': {failure}", drive.id);
        self.engine.add_disk(spec).await.map_err(failed)?;
        let socket = self.drive_socket(index);
        let served = match drive.queues {
            None => self.engine.serve_nbd(Address::Unix(socket), vec![drive.id.clone()]).await.map(drop),
            Some(queues) => self.engine.serve_vhost_user(&drive.id, socket, queues).await,
        };
        served.map_err(failed)
    }

    fn drive_socket(&self, index: usize) -> PathBuf {
        self.dir.join(format!("drive-{index}.sock"))
    }

    /// Starts a drive's stream, if there is something to stream.
    async fn stream(&self, drive: &Drive) -> Result<(), Failure> {
        let below = |device: std::rc::Rc<control::Device>, _| std::future::ready(Ok(device.disk.chain().len() > 1));
        if self.engine.on_device(&drive.id, below).await? {
            let arguments = Map::from_iter([("device".to_owned(), json!(drive.id))]);
            control::qmp::execute(&self.engine, "block-stream", arguments).await?;
        }
        Ok(())
    }

    /// QEMU's line.
    async fn words(&self, joined: &Joined, private: &[Private]) -> Result<Vec<OsString>, String> {
        let mut words: Vec<OsString> = Vec::new();
        for part in &self.plan.parts {
            match part {
                Part::Words(said) => words.extend(said.iter().cloned()),
                Part::Drive(index) => {
                    let (drive, socket) = (&self.plan.drives[*index], self.drive_socket(*index));
                    match drive.queues {
                        None => words.extend(["-drive".into(), drive.option(&socket).into()]),
                        Some(queues) => words.extend(drive.device(&socket, queues).map(OsString::from)),
                    }
                }
                Part::Client(node) => {
                    if let Some(tree) = joined.lend(node).await.map_err(told)? {
                        words.extend(["-blockdev".into(), Value::Object(tree).to_string().into()]);
                    }
                }
                Part::Monitor(index) => match &self.plan.monitors[*index].chardev {
                    Some(id) => words.extend(private[*index].chardev(id)),
                    None => {
                        let id = format!("headwater-monitor-{index}");
                        words.extend(private[*index].chardev(&id));
                        words.extend(["-mon".into(), format!("chardev={id},mode=control").into()]);
                    }
                },
            }
        }
        Ok(words)
    }

    /// Until QEMU has ended. Signals go to it; what it makes of them is its business.
    async fn accompany(&self, child: &mut Child, ends: &mut Ends) -> Result<u8, String> {
        loop {
            tokio::select! {
                status = child.wait() => {
                    return status.map(code).map_err(|error| format!("QEMU cannot be waited for: {error}"));
                }
                number = ends.next() => {
                    // It is not waited for yet, so its number is nobody else's.
                    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
                    if let Some(id) = id {
                        // It may have ended in this moment.
                        let _ = kill_process(id, number);
                    }
                }
            }
        }
    }
}

/// Starts QEMU.
fn spawn(program: &Path, words: Vec<OsString>) -> Result<Child, String> {
    tracing::info!(program = %program.display(), ?words, "QEMU is started");
    let mut command = Command::new(program);
    command.args(words).env_remove(background::DETACHED);
    if background::is_detached() {
        command.stderr(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|error| format!("could not start {}: {error}", program.display()))?;
    if let Some(said) = child.stderr.take() {
        // Our own standard error goes to nobody once everything stands; QEMU's would keep whoever started us waiting.
        tokio::spawn(async move {
            let mut lines = BufReader::new(said).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = tokio::io::stderr().write_all(format!("{line}\n").as_bytes()).await;
            }
        });
    }
    Ok(child)
}

/// Whether QEMU has come so far that it greets whoever comes to its monitor: its disks are open and its machine is there.
async fn stands(watch: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(watch).await else { return false };
    let mut greeting = String::new();
    let read = BufReader::new(stream).read_line(&mut greeting).await;
    matches!(read, Ok(1..))
}

/// The code that says how QEMU ended.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|number| BY_SIGNAL + number));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_qemus() {
        assert_eq!(code(ExitStatus::from_raw(0)), 0);
        assert_eq!(code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code(ExitStatus::from_raw(9)), 137);
    }
}
