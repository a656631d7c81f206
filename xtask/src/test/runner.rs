//! Runs the tests by cargo-nextest where it is installed, else by `cargo test`, and keeps the runner's own summary
//! to close with.

use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::workspace::{Doing, Failure, Outcome, Run, Workspace};

const E2E_PACKAGE: &str = "headwater-tests";

#[derive(Clone, Copy)]
pub(super) enum Scope {
    All,
    Unit,
    EndToEnd,
    /// The tests with libvirt alone.
    Libvirt,
}

impl Scope {
    fn args(self) -> &'static [&'static str] {
        match self {
            Scope::All => &["--workspace"],
            Scope::Unit => &["--workspace", "--exclude", E2E_PACKAGE],
            Scope::EndToEnd => &["--package", E2E_PACKAGE],
            Scope::Libvirt => &["--package", E2E_PACKAGE, "--test", "libvirt"],
        }
    }
}

/// What the runner said last, and how it ended.
pub(super) struct Summary {
    lines: Vec<String>,
    outcome: Outcome,
}

impl Summary {
    /// Prints the runner's summary once more, as the last thing, and passes on how the run ended.
    pub(super) fn finish(self) -> Outcome {
        eprintln!();
        for line in &self.lines {
            eprintln!("{line}");
        }
        self.outcome
    }
}

/// Builds and runs the tests in `scope`. Tests that skip themselves say so in the file `skips`; `timed` gets what
/// building and running took.
pub(super) fn run(
    workspace: &Workspace,
    scope: Scope,
    extra: &[String],
    skips: &Path,
    timed: impl FnOnce(Duration, Duration),
) -> Outcome<Summary> {
    let nextest = workspace.cargo().args(["nextest", "--version"]).succeeds();
    let start = |command: &[&str]| {
        workspace
            .cargo()
            .args(command)
            .args(scope.args())
            .env("HEADWATER_BIN", workspace.headwater())
            .env("HEADWATER_PEERS", workspace.peers())
            .env("HEADWATER_SKIPS", skips)
    };
    eprintln!("\n== test build");
    let clock = Instant::now();
    if nextest {
        start(&["nextest", "run", "--no-run"]).args(runner_config(workspace)).run()?;
    } else {
        let kinds: &[&str] = match scope {
            Scope::Libvirt => &["test", "--no-run"],
            _ => &["test", "--lib", "--bins", "--tests", "--no-run"],
        };
        start(kinds).run()?;
    }
    let built = clock.elapsed();
    eprintln!("\n== tests");
    let clock = Instant::now();
    let summary = if nextest {
        let colour = if std::io::stderr().is_terminal() { "always" } else { "never" };
        let run = start(&["nextest", "run", "--no-tests=pass", "--color", colour]).args(runner_config(workspace));
        let run = run.args(extra);
        // From its last "Summary" line on, nextest repeats what failed; that is the part to close with.
        watch(run, Stream::Errors, |kept, line| {
            if line.contains("Summary [") {
                kept.clear();
            }
            if line.contains("Summary [") || !kept.is_empty() {
                kept.push(line.to_owned());
            }
        })?
    } else {
        let kinds: &[&str] = match scope {
            Scope::Libvirt => &["test", "--no-fail-fast"],
            _ => &["test", "--no-fail-fast", "--lib", "--bins", "--tests"],
        };
        let run = start(kinds).arg("--").args(extra);
        watch(run, Stream::Output, |kept, line| {
            if line.starts_with("test result:") && !line.contains(" 0 passed; 0 failed; 0 ignored") {
                kept.push(line.to_owned());
            }
        })?
    };
    timed(built, clock.elapsed());
    Ok(summary)
}

fn runner_config(workspace: &Workspace) -> [String; 2] {
    let config = workspace.root.join("xtask").join("nextest.toml");
    ["--config-file".to_owned(), config.display().to_string()]
}

#[derive(Clone, Copy)]
enum Stream {
    Output,
    Errors,
}

/// Runs it, passes one of its streams through to our standard error line by line, and keeps what `keep` picks.
fn watch(mut run: Run, stream: Stream, keep: impl Fn(&mut Vec<String>, &str)) -> Outcome<Summary> {
    run.announce();
    let line = run.line();
    match stream {
        Stream::Output => run.command.stdout(Stdio::piped()),
        Stream::Errors => run.command.stderr(Stdio::piped()),
    };
    let mut child = run.command.spawn().doing(format!("starting {line}"))?;
    let output = child.stdout.take().map(|output| Box::new(output) as Box<dyn Read>);
    let errors = child.stderr.take().map(|errors| Box::new(errors) as Box<dyn Read>);
    let mut lines = Vec::new();
    if let Some(piped) = output.or(errors) {
        for text in BufReader::new(piped).split(b'\n') {
            let text = text.doing(format!("reading from {line}"))?;
            let text = String::from_utf8_lossy(&text);
            eprintln!("{text}");
            keep(&mut lines, &text);
        }
    }
    let status = child.wait().doing(format!("waiting for {line}"))?;
    let outcome = if status.success() { Ok(()) } else { Err(Failure::new(format!("tests failed ({status})"))) };
    Ok(Summary { lines, outcome })
}
