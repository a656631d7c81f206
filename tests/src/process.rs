//! Programs run to their end, and daemons that live as long as their handle.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use crate::{Result, error, peer};

/// How long a daemon may take to do what it was asked. Generous: machines under test are loaded.
pub const PATIENCE: Duration = Duration::from_mins(1);

const POLL: Duration = Duration::from_millis(5);

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Finished {
    /// The command, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to its standard output.
    pub stdout: String,
    /// All it wrote to its standard error.
    pub stderr: String,
}

impl Finished {
    /// Its standard output if it ended well, else an error with all it said.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        let mut text = format!("{} failed ({})", self.line, self.status);
        for said in [&self.stdout, &self.stderr] {
            if !said.trim().is_empty() {
                // Writing to a String cannot fail.
                let _ = write!(text, "\n{}", said.trim());
            }
        }
        Err(text.into())
    }

    /// The exit code; an error if a signal ended it.
    pub fn code(&self) -> Result<i32> {
        self.status.code().ok_or_else(|| {
            let signal = self.status.signal().unwrap_or(0);
            error!("{} died of signal {signal}: {}", self.line, self.stderr.trim())
        })
    }
}

/// Runs `program`, found as [`peer::find`] finds it or given as a path, to its end.
pub fn run<S: AsRef<OsStr>>(program: impl AsRef<Path>, args: impl IntoIterator<Item = S>) -> Result<Finished> {
    let program = program.as_ref();
    let found = match program.to_str() {
        Some(name) if !name.contains('/') => peer::find(name)?,
        _ => program.to_path_buf(),
    };
    finish(Command::new(found).args(args))
}

/// Runs a prepared command to its end with no input.
pub fn finish(command: &mut Command) -> Result<Finished> {
    let line = line(command);
    let output = command.stdin(Stdio::null()).output().map_err(|why| error!("starting {line}: {why}"))?;
    Ok(Finished {
        line,
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// The command as a shell would be given it.
pub fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Processor time a process has used, in user and in kernel mode.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CpuTime {
    /// Time in its own code.
    pub user: Duration,
    /// Time in the kernel on its behalf, that of its io_uring workers included.
    pub system: Duration,
}

impl CpuTime {
    /// Both together.
    pub fn total(self) -> Duration {
        self.user + self.system
    }

    /// What was used since `earlier`.
    #[must_use]
    pub fn since(self, earlier: CpuTime) -> CpuTime {
        CpuTime { user: self.user.saturating_sub(earlier.user), system: self.system.saturating_sub(earlier.system) }
    }
}

/// A process in the background. Dropping it kills it; if that happens while a test fails, what it said is printed.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    line: String,
    child: Child,
    log: NamedTempFile,
}

impl Daemon {
    /// Starts `command`; its standard output and error go to a log kept for [`Daemon::log`].
    pub fn spawn(name: &str, mut command: Command) -> Result<Daemon> {
        let line = line(&command);
        let log = NamedTempFile::new()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.reopen()?)
            .stderr(log.reopen()?)
            .spawn()
            .map_err(|why| error!("starting {line}: {why}"))?;
        Ok(Daemon { name: name.to_owned(), line, child, log })
    }

    /// Everything it has said so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log.path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn gone(&self, status: ExitStatus, waiting_for: &str) -> crate::Error {
        let Daemon { name, line, .. } = self;
        error!("{name} ended ({status}) before {waiting_for}\n{line}\n{}", self.log())
    }

    /// Waits until `ready` gives a value; an error if the daemon ends or [`PATIENCE`] does first.
    pub fn until<T>(&mut self, what: &str, mut ready: impl FnMut(&Self) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = ready(self) {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(self.gone(status, what));
            }
            if Instant::now() > deadline {
                return Err(error!("{}: no {what} in {PATIENCE:?}\n{}", self.name, self.log()));
            }
            sleep(POLL);
        }
    }

    /// Waits until a unix socket listens at `path`. It is not connected to: some servers take one client only.
    pub fn listening(&mut self, path: &Path) -> Result {
        self.until(&format!("socket {}", path.display()), |_| listens(path).then_some(()))
    }

    /// Waits until the file at `path` is there: a storage daemon writes its number down when its whole line is carried out.
    pub fn stands(&mut self, path: &Path) -> Result {
        self.until(&format!("file {}", path.display()), |_| path.exists().then_some(()))
    }

    /// Waits until it has said `text`.
    pub fn says(&mut self, text: &str) -> Result {
        self.until(&format!("\"{text}\""), |daemon| daemon.log().contains(text).then_some(()))
    }

    /// True while it runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it as a power cut would: SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> Result {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and returns how it did.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.exits()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result {
        // The child is not waited for yet, so its id cannot have gone to another process.
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or("a process id of zero")?, signal)?;
        Ok(())
    }

    /// Waits until it ends by itself; an error after [`PATIENCE`].
    pub fn exits(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(error!("{} has not ended in {PATIENCE:?}\n{}", self.name, self.log()));
            }
            sleep(POLL);
        }
    }

    /// Processor time used so far by all its threads.
    pub fn cpu(&self) -> Result<CpuTime> {
        cpu_of(self.id())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}--- end of {}", self.line, self.log(), self.name);
        }
    }
}

fn cpu_of(id: u32) -> Result<CpuTime> {
    /// Linux counts in hundredths of a second for user space, whatever its own clock.
    const TICK: Duration = Duration::from_millis(10);
    let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The second field, the name, is in brackets and may hold anything; utime and stime are fields 14 and 15.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let ticks = |field: usize| -> Result<Duration> {
        let text = fields.get(field - 3).ok_or("a short /proc stat line")?;
        Ok(TICK * text.parse::<u32>()?)
    };
    Ok(CpuTime { user: ticks(14)?, system: ticks(15)? })
}

/// True if some process listens on the unix socket at `path`, by the kernel's own table.
pub fn listens(path: &Path) -> bool {
    /// `__SO_ACCEPTCON`: listen() was called.
    const LISTENING: &str = "00010000";
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    table.lines().any(|line| {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(LISTENING) && fields.nth(3).map(Path::new) == Some(path)
    })
}

/// A TCP port of the loopback interface that nobody used a moment ago.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_listens_only_while_it_does() -> Result {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("s");
        assert!(!listens(&path));
        let listener = UnixListener::bind(&path)?;
        assert!(listens(&path));
        drop(listener);
        assert!(path.exists() && !listens(&path));
        Ok(())
    }

    #[test]
    fn a_daemon_that_dies_early_is_an_error_with_its_words() -> Result {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo no such disk >&2; exit 3"]);
        let mut daemon = Daemon::spawn("shell", command)?;
        let error = daemon.says("ready").expect_err("it never says so");
        assert!(error.to_string().contains("no such disk"), "{error}");
        Ok(())
    }

    #[test]
    fn processor_time_is_counted() -> Result {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "while :; do :; done"]);
        let mut daemon = Daemon::spawn("shell", command)?;
        daemon.until("processor time", |daemon| {
            daemon.cpu().ok().filter(|cpu| cpu.total() > Duration::from_millis(50))
        })?;
        daemon.kill()
    }
}
