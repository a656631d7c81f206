//! Which program the real QEMU is, and becoming it where there is nothing to do for us.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names it: a program's name or its path.
const VARIABLE: &str = "HEADWATER_QEMU";

/// Where distributions put it that keep it off the path.
const OFF_THE_PATH: [&str; 2] = ["/usr/libexec/qemu-kvm", "/usr/lib/qemu/qemu-kvm"];

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    // One of our own names is no QEMU.
    let own = std::env::current_exe().and_then(std::fs::canonicalize).ok();
    let meta = path.metadata();
    meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        && (own.is_none() || std::fs::canonicalize(path).ok() != own)
}

fn on_path(name: &OsStr) -> Option<PathBuf> {
    if Path::new(name).components().count() > 1 {
        return is_program(Path::new(name)).then(|| PathBuf::from(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| is_program(path))
}

/// The real QEMU: the one given, the one that the environment names, or the host's own.
pub(super) fn find(given: Option<&OsStr>) -> Result<PathBuf, String> {
    let named = given.map(OsStr::to_owned).or_else(|| std::env::var_os(VARIABLE).filter(|name| !name.is_empty()));
    if let Some(name) = named {
        return on_path(&name).ok_or_else(|| format!("there is no program '{}'", name.display()));
    }
    let host = format!("qemu-system-{}", std::env::consts::ARCH);
    let names = [OsString::from(&host), OsString::from("qemu-system-x86_64"), OsString::from("qemu-kvm")];
    let found = names.iter().find_map(|name| on_path(name));
    found.or_else(|| OFF_THE_PATH.map(PathBuf::from).into_iter().find(|path| is_program(path))).ok_or_else(|| {
        format!("no QEMU is found ({host}, qemu-kvm): name it by --with PROGRAM, as the first option, or by {VARIABLE}")
    })
}

/// Becomes QEMU, with these words: same process, same descriptors.
pub(super) fn become_it<'a>(program: &Path, words: impl Iterator<Item = &'a OsString>) -> String {
    let error = Command::new(program).args(words).exec();
    format!("could not start {}: {error}", program.display())
}
