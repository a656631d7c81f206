//! Going into the background: the same once more, detached, which says by a file that it stands.

use crate::exit::{Exit, Outcome};
use crate::tool;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a daemon may take to stand.
const PATIENCE: Duration = Duration::from_secs(30);

/// Set for a server that runs in the background.
pub(crate) const DETACHED: &str = "HEADWATER_DETACHED";

/// Starts this program with its own words, but for `without`, and waits until it has written its number into the file that
/// `option` names (one of our own, if the user named none).
pub(crate) fn start(without: &str, option: &str, named: Option<&Path>, subcommand: &str) -> Outcome {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let pid_file: PathBuf = named.map_or_else(|| dir.path().join("pid"), Path::to_owned);
    let mut words: Vec<OsString> = std::env::args_os().skip(1).filter(|word| word != without).collect();
    if named.is_none() {
        let at = usize::from(words.first().is_some_and(|word| word == subcommand));
        words.insert(at, pid_file.clone().into());
        words.insert(at, option.into());
    }
    let _ = std::fs::remove_file(&pid_file);
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    std::os::unix::process::CommandExt::arg0(&mut command, std::env::args_os().next().unwrap_or_default());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.env(DETACHED, "1").args(words).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let mut child = child.map_err(|error| format!("could not start: {error}"))?;
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if std::fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n')) {
            return Ok(Exit::Ok);
        }
        if child.try_wait().map_err(|error| error.to_string())?.is_some() {
            // It said why itself.
            return Ok(Exit::Failed);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    tool::complain("the server does not stand yet; it is left running");
    Ok(Exit::Failed)
}

/// Whether this is the one that runs in the background.
pub(crate) fn is_detached() -> bool {
    std::env::var_os(DETACHED).is_some()
}

/// A server that was started so stands: it lets go of its starter's standard error. Whoever reads what the command says is done
/// when it is; the server's own descriptor would keep them waiting.
pub(crate) fn stands() {
    if is_detached() {
        let nothing = std::fs::OpenOptions::new().write(true).open("/dev/null");
        let _ = nothing.map(|nothing| rustix::stdio::dup2_stderr(&nothing));
    }
}
