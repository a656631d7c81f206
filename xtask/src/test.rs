//! `cargo xtask test`: everything a change must pass, in the order that fails soonest.
//!
//! The stages run one after another and the first failure ends the run. Where `CI` is set nothing may be skipped:
//! a missing peer or tool is installed or is a failure.

mod deny;
mod runner;

use std::fs;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use crate::peers;
use crate::workspace::{Doing, Outcome, Workspace, in_ci};

#[derive(Args)]
pub(crate) struct Options {
    /// Run these stages only
    #[arg(long, value_enum, value_name = "STAGE", value_delimiter = ',')]
    only: Vec<Stage>,
    /// Leave these stages out
    #[arg(long, value_enum, value_name = "STAGE", value_delimiter = ',')]
    skip: Vec<Stage>,
    /// Run the tests with libvirt, and these only
    #[arg(long, conflicts_with_all = ["only", "skip"])]
    libvirt: bool,
    /// Arguments for the test runner, such as names of tests
    #[arg(last = true)]
    runner: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Programs the tests run beside us
    Peers,
    /// Format, lints, documentation, licences
    Lint,
    /// Unit and property tests, and the documentation's examples
    Unit,
    /// End to end, against real peers and real guests
    E2e,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Outcome {
    if options.libvirt {
        return libvirt(workspace, &options.runner);
    }
    let wanted = |stage| (options.only.is_empty() || options.only.contains(&stage)) && !options.skip.contains(&stage);
    let (unit, e2e) = (wanted(Stage::Unit), wanted(Stage::E2e));
    let mut clock = Clock::default();
    if wanted(Stage::Peers) {
        clock.stage("peers", || peers_or_skips(workspace))?;
    }
    if wanted(Stage::Lint) {
        clock.stage("format", || workspace.cargo().args(["fmt", "--all", "--check"]).run())?;
        clock.stage("clippy", || {
            let lint = ["clippy", "--workspace", "--all-targets"];
            workspace.cargo().args(lint).args(["--", "--deny", "warnings"]).run()
        })?;
        clock.stage("doc", || {
            let doc = ["doc", "--workspace", "--no-deps", "--document-private-items"];
            workspace
                .cargo()
                .args(doc)
                // The documentation is the developers', private items included, so links to those lead somewhere.
                .env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private-intra-doc-links")
                .run()
        })?;
        clock.stage("deny", || deny::run(workspace))?;
    }
    if unit {
        clock.stage("examples", || workspace.cargo().args(["test", "--workspace", "--doc", "--quiet"]).run())?;
        clock.stage("models", || {
            // Built apart: the model's locks and atomics take the place of the real ones.
            let models = ["test", "--quiet", "--profile", "sim", "--package", "headwater-ring", "--lib", "model"];
            let apart = workspace.target.join("loom");
            workspace.cargo().args(models).arg("--target-dir").arg(apart).env("RUSTFLAGS", "--cfg loom").run()
        })?;
    }
    if e2e {
        clock.stage("release build", || {
            workspace.cargo().args(["build", "--release", "--package", "headwater"]).run()
        })?;
    }
    if !unit && !e2e {
        clock.print();
        return Ok(());
    }
    let skips = workspace.target.join("skipped-tests.txt");
    let _ = fs::remove_file(&skips);
    let scope = match (unit, e2e) {
        (true, true) => runner::Scope::All,
        (true, false) => runner::Scope::Unit,
        _ => runner::Scope::EndToEnd,
    };
    let summary = runner::run(workspace, scope, &options.runner, &skips, |build, tests| {
        clock.note("test build", build);
        clock.note("tests", tests);
    })?;
    clock.print();
    print_skips(&skips)?;
    summary.finish()
}

/// The tests with libvirt.
fn libvirt(workspace: &Workspace, extra: &[String]) -> Outcome {
    let mut clock = Clock::default();
    clock.stage("peers", || peers_or_skips(workspace))?;
    clock.stage("release build", || workspace.cargo().args(["build", "--release", "--package", "headwater"]).run())?;
    let skips = workspace.target.join("skipped-tests.txt");
    let _ = fs::remove_file(&skips);
    let summary = runner::run(workspace, runner::Scope::Libvirt, extra, &skips, |build, tests| {
        clock.note("test build", build);
        clock.note("tests", tests);
    })?;
    clock.print();
    print_skips(&skips)?;
    summary.finish()
}

/// Missing peers end the run in CI; elsewhere their tests are skipped.
fn peers_or_skips(workspace: &Workspace) -> Outcome {
    match peers::run(workspace, &peers::Options::default()) {
        Err(missing) if !in_ci() => {
            eprintln!("{}", missing.message);
            Ok(())
        }
        looked => looked,
    }
}

/// Tests append a line to this file when they skip themselves.
fn print_skips(skips: &std::path::Path) -> Outcome {
    if !skips.exists() {
        return Ok(());
    }
    let text = fs::read_to_string(skips).doing("reading the list of skipped tests")?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    eprintln!("\n{} tests skipped themselves:", lines.len());
    for line in lines {
        eprintln!("  {line}");
    }
    Ok(())
}

/// How long each stage took.
#[derive(Default)]
struct Clock {
    stages: Vec<(&'static str, Duration)>,
}

impl Clock {
    fn stage(&mut self, name: &'static str, run: impl FnOnce() -> Outcome) -> Outcome {
        eprintln!("\n== {name}");
        let start = Instant::now();
        let outcome = run();
        self.note(name, start.elapsed());
        if outcome.is_err() {
            self.print();
        }
        outcome
    }

    fn note(&mut self, name: &'static str, took: Duration) {
        self.stages.push((name, took));
    }

    fn print(&self) {
        eprintln!();
        for (name, took) in &self.stages {
            eprintln!("{name:>14}  {:>7.1} s", took.as_secs_f64());
        }
        let total: Duration = self.stages.iter().map(|(_, took)| *took).sum();
        eprintln!("{:>14}  {:>7.1} s", "together", total.as_secs_f64());
    }
}
