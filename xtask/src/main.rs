//! Headwater's development commands.
//!
//! Nothing here is needed to build or to run Headwater. Each subcommand prints what it runs, changes only the target
//! directory (`peers --install` also the system's packages), and ends with the exit code of what it ran.
#![forbid(unsafe_code)]

mod driver;
mod fuzz;
mod peers;
mod sim;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::{Failure, Workspace};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Look for the programs the tests run beside us; as root on Debian, install what is missing
    Peers(peers::Options),
    /// Peers, format, lints, unit, property and end-to-end tests
    Test(test::Options),
    /// Measure headwater beside qemu-storage-daemon on the same files
    Bench(driver::Options),
    /// Feed parsers, servers and images with what nobody would send
    Fuzz(fuzz::Options),
    /// Kill a daemon under load, again and again, and look for lost bytes
    Kill(driver::Options),
    /// Simulate the stack below the exports: seeds, faults, power cuts
    Sim(sim::Options),
    /// `headwater demo` from a release build; further arguments go to it
    Demo {
        /// Arguments of `headwater demo`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = Workspace::find().and_then(|workspace| match cli.command {
        Command::Peers(options) => peers::run(&workspace, &options),
        Command::Test(options) => test::run(&workspace, &options),
        Command::Bench(options) => driver::bench(&workspace, &options),
        Command::Fuzz(options) => fuzz::run(&workspace, &options),
        Command::Kill(options) => driver::kill(&workspace, &options),
        Command::Sim(options) => sim::run(&workspace, &options),
        Command::Demo { args } => {
            workspace.cargo().args(["run", "--release", "--package", "headwater", "--", "demo"]).args(args).run()
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { message, code }) => {
            eprintln!("xtask: {message}");
            ExitCode::from(code)
        }
    }
}
