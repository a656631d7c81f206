//! `cargo xtask bench`: builds both sides' drivers and hands over to the bench program of the tests' package.

use clap::Args;

use crate::workspace::{Outcome, Workspace};

/// Everything after `bench` goes to the bench program, which lists its own options with `--help`.
#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// Arguments of the bench program
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Outcome {
    workspace
        .cargo()
        .args(["build", "--release", "--package", "headwater"])
        .args(["--package", "headwater-tests", "--bin", "headwater", "--bin", "headwater-bench"])
        .run()?;
    workspace
        .program(workspace.target.join("release").join("headwater-bench"))
        .arg("--dir")
        .arg(workspace.target.join("bench"))
        .args(&options.args)
        .env("HEADWATER_BIN", workspace.headwater())
        .run()
}
