//! `cargo xtask sim`: builds the simulation and runs it; with `--planted`, shows that it can fail.

mod bugs;
mod planted;

use clap::Args;

use crate::workspace::{Outcome, Workspace};

#[derive(Args)]
pub(crate) struct Options {
    /// Plants known bugs one at a time, in a copy of the tree, and prints how many seeds it took to catch each
    #[arg(long)]
    planted: bool,
    /// With --planted: only bugs whose name contains this
    #[arg(long, value_name = "NAME", requires = "planted")]
    only: Option<String>,
    /// Arguments of the simulation: --runs N, --from SEED, --seed SEED, --states N, --verbose … (--help lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// How the simulation is built: fast, with every assertion.
const BUILD: [&str; 5] = ["build", "--profile", "sim", "--package", "headwater-sim"];

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Outcome {
    if options.planted {
        return planted::run(workspace, options.only.as_deref());
    }
    workspace.cargo().args(BUILD).run()?;
    workspace.program(workspace.target.join("sim").join("headwater-sim")).args(&options.args).run()
}
