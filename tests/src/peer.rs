//! Which peers are here, and what a test does without one.
//!
//! A test that cannot run says why and passes, except where `CI` is set: there it fails, so that a machine that lost a
//! peer is not taken for one where everything works.

use std::env;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::{Result, error};

/// Begins a test: names the peers it needs, and ends it here if one is missing.
///
/// A peer is a program (`"qemu-img"`), or one of `"headwater"` (the release binary), `"guest"` (QEMU, kernel and user
/// land for [`crate::guest`]) and `"qemu.qmp"` (the Python package).
#[macro_export]
macro_rules! peer {
    ($($name:expr),+ $(,)?) => {
        if let Some(reason) = $crate::peer::missing(&[$($name),+]) {
            $crate::peer::skip(&reason);
            return $crate::peer::Skipped::skipped();
        }
    };
}

/// What a test returns when it skips itself.
pub trait Skipped {
    /// The value that lets the test pass.
    fn skipped() -> Self;
}

impl Skipped for () {
    fn skipped() -> Self {}
}

impl<E> Skipped for std::result::Result<(), E> {
    fn skipped() -> Self {
        Ok(())
    }
}

/// Says that the running test is skipped; fails it where `CI` is set.
///
/// # Panics
/// Where `CI` is set.
pub fn skip(reason: &str) {
    let test = env::var("NEXTEST_TEST_NAME").unwrap_or_else(|_| {
        let thread = std::thread::current();
        thread.name().unwrap_or("a test").to_owned()
    });
    let in_ci = env::var("CI").is_ok_and(|ci| !matches!(ci.as_str(), "" | "0" | "false"));
    assert!(!in_ci, "{test} may not be skipped in CI: {reason}");
    eprintln!("skipped: {reason}");
    // `cargo xtask test` lists these at the end; a run without it has the line above.
    if let Some(path) = env::var_os("HEADWATER_SKIPS")
        && let Ok(mut list) = OpenOptions::new().create(true).append(true).open(path)
    {
        let _ = list.write_all(format!("{test}: {reason}\n").as_bytes());
    }
}

/// Why a test that needs `peers` cannot run here, if it cannot.
pub fn missing(peers: &[&str]) -> Option<String> {
    peers.iter().find_map(|peer| {
        let found = match *peer {
            "headwater" => headwater().map(|_| ()),
            "guest" => crate::guest::available(),
            "qemu.qmp" => python().map(|_| ()),
            program => find(program).map(|_| ()),
        };
        found.err().map(|reason| reason.to_string())
    })
}

/// A program on the search path or in the administrator's directories, which Debian leaves off a user's path.
pub fn find(program: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| error!("{program} is not installed; cargo xtask peers says how to get it"))
}

/// The directories a build's own files may be in: the target directory and those below it that lead to this program.
fn above_this_program() -> Vec<PathBuf> {
    let program = env::current_exe().unwrap_or_default();
    program.ancestors().skip(1).take(4).map(Path::to_path_buf).collect()
}

/// The Headwater binary under test: `HEADWATER_BIN`, or the release build in the target directory.
pub fn headwater() -> Result<PathBuf> {
    if let Some(given) = env::var_os("HEADWATER_BIN") {
        let given = PathBuf::from(given);
        return if given.is_file() {
            Ok(given)
        } else {
            Err(error!("HEADWATER_BIN names {}, which is not there", given.display()))
        };
    }
    above_this_program()
        .iter()
        .map(|directory| directory.join("release").join("headwater"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| error!("headwater is not built: cargo build --release -p headwater"))
}

/// Where `cargo xtask peers` keeps what is not installed system-wide: `HEADWATER_PEERS`, or `peers` in the target
/// directory.
pub fn directory() -> Result<PathBuf> {
    if let Some(given) = env::var_os("HEADWATER_PEERS") {
        return Ok(PathBuf::from(given));
    }
    above_this_program()
        .iter()
        .map(|directory| directory.join("peers"))
        .find(|candidate| candidate.is_dir())
        .ok_or_else(|| error!("no peers are fetched yet: cargo xtask peers"))
}

/// The Python interpreter that has the package `qemu.qmp`.
pub fn python() -> Result<PathBuf> {
    let python = directory()?.join("python").join("bin").join("python3");
    if python.exists() {
        Ok(python)
    } else {
        Err(error!("the Python package qemu.qmp is not there: cargo xtask peers"))
    }
}
