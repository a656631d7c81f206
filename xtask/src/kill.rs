//! `cargo xtask kill`: builds the daemon and the program that kills it, and hands over to the latter.

use clap::Args;

use crate::workspace::{Outcome, Workspace};

/// Everything after `kill` goes to that program, which lists its own options with `--help`.
#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// Arguments of the killing program
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Outcome {
    workspace
        .cargo()
        .args(["build", "--release", "--package", "headwater"])
        .args(["--package", "headwater-tests", "--bin", "headwater", "--bin", "headwater-kill"])
        .run()?;
    workspace
        .program(workspace.target.join("release").join("headwater-kill"))
        .args(&options.args)
        .env("HEADWATER_BIN", workspace.headwater())
        .run()
}
