//! The demonstration is the first thing anybody sees: it has to work, and to leave nothing behind.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use headwater_tests::process::finish;
use headwater_tests::{Result, peer};

/// Runs it with its temporary files in a folder of their own; what it said.
fn demo(args: &[&str], folder: &Path) -> Result<String> {
    let mut command = Command::new(peer::headwater()?);
    command.arg("demo").args(args.iter().map(OsStr::new)).env("TMPDIR", folder);
    let said = finish(&mut command)?.ok()?;
    let left = std::fs::read_dir(folder)?.count();
    assert_eq!(left, 0, "{left} files are left behind");
    Ok(said)
}

#[test]
fn it_streams_under_a_guest_and_lets_go() -> Result {
    peer!("headwater");
    let folder = tempfile::tempdir()?;
    let said = demo(&[], folder.path())?;
    assert!(said.contains("the image stands alone"), "{said}");
    Ok(())
}

#[test]
fn it_boots_a_machine_twice() -> Result {
    peer!("headwater", "qemu-system-x86_64");
    let folder = tempfile::tempdir()?;
    let said = demo(&["--boot"], folder.path())?;
    assert!(said.contains("boots from the image alone"), "{said}");
    Ok(())
}
