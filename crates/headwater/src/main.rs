//! `headwater`: boots virtual machines from disk images that have not arrived yet.
//!
//! The binary holds no logic a library could hold: it reads the command line, calls the libraries, prints, and picks the exit
//! code (see [`exit`]).
#![forbid(unsafe_code)]

mod check;
mod client;
mod create;
mod demo;
mod exit;
mod images;
mod info;
mod jobs;
mod map;
mod progress;
mod serve;
mod size;

use clap::{Parser, Subcommand};
use exit::{Exit, Outcome};

/// A block layer for virtual machine disks: the guest runs at once, its image arrives meanwhile.
#[derive(Parser)]
#[command(name = "headwater", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a new image, empty or over a backing file (the flags of `qemu-img create`)
    Create(create::Args),
    /// Say what an image is
    Info(info::Args),
    /// Say which bytes of an image are where
    Map(map::Args),
    /// Check an image's tables, and repair them if asked
    Check(check::Args),
    /// Serve disks to guests (NBD, vhost-user-blk) and to operators (QMP, HMP)
    Serve(serve::Args),
    /// Start to stream a disk's backing data into its image
    Stream(jobs::StreamArgs),
    /// List block jobs
    Jobs(jobs::ListArgs),
    /// Change a job's speed limit
    Speed(jobs::SpeedArgs),
    /// Pause a job
    Pause(jobs::JobArgs),
    /// Let a paused job go on
    Resume(jobs::JobArgs),
    /// Cancel a job; what has arrived is kept
    Cancel(jobs::JobArgs),
    /// Show the whole of it on a machine with nothing installed
    Demo(demo::Args),
}

fn main() -> std::process::ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HEADWATER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let colour = std::env::var_os("NO_COLOR").is_none() && std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(std::io::stderr).init();
    let outcome: Outcome = match Cli::parse().command {
        Command::Create(args) => create::run(args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Serve(args) => serve::run(args),
        Command::Stream(args) => jobs::stream(args),
        Command::Jobs(args) => jobs::list(&args),
        Command::Speed(args) => jobs::speed(args),
        Command::Pause(args) => jobs::pause(args),
        Command::Resume(args) => jobs::resume(args),
        Command::Cancel(args) => jobs::cancel(args),
        Command::Demo(args) => demo::run(&args),
    };
    match outcome {
        Ok(exit) => exit.into(),
        Err(message) => {
            eprintln!("headwater: {message}");
            Exit::Failed.into()
        }
    }
}
