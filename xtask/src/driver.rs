//! Programs of the tests' package that drive a release build: `cargo xtask bench` and `cargo xtask kill`.

use clap::Args;

use crate::workspace::{Outcome, Workspace};

/// Everything goes to the program, which lists its own options with `--help`.
#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// Arguments of the program
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Measures: files and results go to the target directory, which lies on a real file system.
pub(crate) fn bench(workspace: &Workspace, options: &Options) -> Outcome {
    let dir = workspace.target.join("bench").to_string_lossy().into_owned();
    hand_over(workspace, "headwater-bench", &["--dir".to_owned(), dir], options)
}

/// Kills.
pub(crate) fn kill(workspace: &Workspace, options: &Options) -> Outcome {
    hand_over(workspace, "headwater-kill", &[], options)
}

/// Builds the daemon and the program, and hands over to the latter.
fn hand_over(workspace: &Workspace, program: &str, first: &[String], options: &Options) -> Outcome {
    workspace
        .cargo()
        .args(["build", "--release", "--package", "headwater"])
        .args(["--package", "headwater-tests", "--bin", "headwater", "--bin", program])
        .run()?;
    workspace
        .program(workspace.target.join("release").join(program))
        .args(first)
        .args(&options.args)
        .env("HEADWATER_BIN", workspace.headwater())
        .run()
}
