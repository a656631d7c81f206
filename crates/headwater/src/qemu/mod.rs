//! `headwater qemu`, which is also what the program is when it is called `headwater-qemu`: the real QEMU with its disks served by us.
//!
//! `line` cuts QEMU's command line into options; `drives`, `nodes` and `monitors` say what is ours of it; `plan` puts that together;
//! `start` carries it out; `program` finds QEMU.
//!
//! # Invariants
//! * Without a disk of ours the process becomes QEMU, with the very same words.
//! * What QEMU's line says of anything but disks and QMP monitors reaches QEMU as it was written, in its order.
//! * We end with QEMU, by its code, when everything is written and closed. Signals that would end us end QEMU first.

mod drives;
mod line;
mod monitors;
mod nodes;
mod plan;
mod program;
mod start;

use crate::background;
use crate::exit::{Exit, Outcome};
use crate::tool;
use line::Line;
use plan::Plan;
use std::ffi::OsString;

/// Runs with these words.
pub(crate) fn run(words: Vec<OsString>) -> Outcome {
    let line = Line::read(words)?;
    let program = program::find(line.with.as_deref())?;
    if line.only_asks() {
        return Err(program::become_it(&program, line.words()));
    }
    let plan = Plan::of(&line, &program);
    for note in &plan.notes {
        tool::complain(note);
    }
    if plan.is_empty() {
        return Err(program::become_it(&program, line.words()));
    }
    if let Some(option) = ["incoming", "loadvm"].into_iter().find(|option| line.has(option)) {
        return Err(format!(
            "-{option} is not there for a machine whose disks Headwater serves: no state of a machine is moved or kept with them"
        ));
    }
    if plan.daemonize && !background::is_detached() {
        return background::start("-daemonize", "-pidfile", plan.pid_file.as_deref(), "qemu");
    }
    for option in line.values(&["trace"]).filter(|option| !option.contains("file=") && !option.contains("events=")) {
        // What is no point of ours is QEMU's, which says so if it is not.
        let _ = control::trace::from_option(option);
    }
    plan.hand_over();
    let overlays = start::overlays(&plan)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("could not set up the control thread: {error}"))?;
    let code = runtime.block_on(start::serve(&plan, &program, &overlays));
    // Somebody may still sit at a monitor on standard input, and is not waited for.
    runtime.shutdown_background();
    Ok(Exit::Code(code?))
}
