//! Shows that the simulation can fail: known bugs are planted one at a time in a copy of the tree, and it has to find each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use super::BUILD;
use super::bugs::{BUGS, Bug};
use crate::workspace::{Doing, Failure, Outcome, Workspace};

/// A bug that so many seeds do not find is not found.
const RUNS: u64 = 20_000;

pub(super) fn run(workspace: &Workspace, only: Option<&str>) -> Outcome {
    let tree = workspace.target.join("planted");
    let copy = tree.join("tree");
    copy_tree(workspace, &copy)?;
    let target = tree.join("target");
    let mut missed = 0;
    println!("| planted bug | seeds to catch it | how it shows |\n|---|---:|---|");
    for bug in BUGS.iter().filter(|bug| only.is_none_or(|only| bug.name.contains(only))) {
        let sound = plant(bug, &copy)?;
        let caught = build(&copy, &target).and_then(|()| hunt(&target));
        // In reverse, as one file may have been edited twice.
        for (path, text) in sound.into_iter().rev() {
            fs::write(path, text).doing("taking the bug out again")?;
        }
        match caught {
            Ok(Some((seeds, how))) => println!("| {} | {seeds} | {how} |", bug.name),
            Err(error) => {
                missed += 1;
                println!("| {} | **{}** | |", bug.name, error.message);
            }
            Ok(None) => {
                missed += 1;
                println!("| {} | **not in {RUNS}** | |", bug.name);
            }
        }
    }
    if missed == 0 { Ok(()) } else { Err(Failure::new(format!("{missed} planted bugs were not caught"))) }
}

/// Copies what git tracks, as it stands in the work tree.
fn copy_tree(workspace: &Workspace, to: &Path) -> Outcome {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(&workspace.root).output();
    let listed = listed.doing("git ls-files")?;
    let _ = fs::remove_dir_all(to);
    for name in String::from_utf8_lossy(&listed.stdout).split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (workspace.root.join(name), to.join(name));
        if !from.is_file() {
            continue;
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).doing("copying the tree")?;
        }
        fs::copy(from, to).doing("copying the tree")?;
    }
    Ok(())
}

/// Returns what stood in the files before.
fn plant(bug: &Bug, copy: &Path) -> Outcome<Vec<(PathBuf, String)>> {
    let mut sound = Vec::new();
    for edit in bug.edits {
        let path = copy.join(edit.file);
        let text = fs::read_to_string(&path).doing(edit.file)?;
        if text.matches(edit.old).count() != 1 {
            return Err(Failure::new(format!("'{}' cannot be planted: {} has changed", bug.name, edit.file)));
        }
        fs::write(&path, text.replacen(edit.old, edit.new, 1)).doing(edit.file)?;
        sound.push((path, text));
    }
    Ok(sound)
}

fn build(copy: &Path, target: &Path) -> Outcome {
    let built = Command::new("cargo")
        .args(BUILD)
        .arg("--quiet")
        .env("CARGO_TARGET_DIR", target)
        // A planted bug leaves things unused.
        .env("RUSTFLAGS", "--allow warnings")
        .current_dir(copy)
        .status()
        .doing("building with a bug")?;
    if built.success() { Ok(()) } else { Err(Failure::new("with this bug it does not build")) }
}

/// Runs seeds until one fails: how many it took, and what it said.
fn hunt(target: &Path) -> Outcome<Option<(u64, String)>> {
    let began = Instant::now();
    let output = Command::new(target.join("sim").join("headwater-sim"))
        .args(["--runs", &RUNS.to_string(), "--qemu-img", "0", "--threads", "1"])
        .stdin(Stdio::null())
        .output()
        .doing("running the simulation")?;
    if output.status.success() {
        return Ok(None);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().find(|line| line.starts_with("seed ")).unwrap_or("it ended without a word");
    let (seed, how) = line.trim_start_matches("seed ").split_once(": ").unwrap_or(("0", line));
    eprintln!("caught after {:.1} s", began.elapsed().as_secs_f64());
    Ok(Some((seed.parse::<u64>().unwrap_or_default() + 1, how.replace('|', "/"))))
}
