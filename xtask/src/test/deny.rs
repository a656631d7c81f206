//! Licences, bans and sources of the dependencies, by cargo-deny.
//!
//! It takes minutes to build, so it is installed only in CI, once, into a cache outside the target directory.

use std::path::PathBuf;

use crate::workspace::{Outcome, Workspace, find_program, in_ci};

const VERSION: &str = "0.20.2";

pub(super) fn run(workspace: &Workspace) -> Outcome {
    let program = match find_program("cargo-deny").or_else(cached) {
        Some(program) => program,
        None if in_ci() => install(workspace)?,
        None => {
            eprintln!(
                "skipped: cargo-deny is not installed (cargo install --locked cargo-deny@{VERSION}; takes minutes)"
            );
            return Ok(());
        }
    };
    workspace.program(program).args(["--log-level", "error", "check", "licenses", "bans", "sources"]).run()
}

/// Outlives the target directory, so that a clean checkout need not build it again.
fn tools() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"), PathBuf::from);
    cache.join("headwater").join(format!("cargo-deny-{VERSION}"))
}

fn cached() -> Option<PathBuf> {
    let program = tools().join("bin").join("cargo-deny");
    program.is_file().then_some(program)
}

fn install(workspace: &Workspace) -> Outcome<PathBuf> {
    let tools = tools();
    // Speed of the tool is nothing beside the minutes its optimised build takes.
    workspace
        .cargo()
        .args(["install", "--locked", "--debug", "--no-default-features", "--root"])
        .arg(&tools)
        .arg(format!("cargo-deny@{VERSION}"))
        .run()?;
    Ok(tools.join("bin").join("cargo-deny"))
}
