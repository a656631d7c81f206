//! `headwater`: boots virtual machines from disk images that have not arrived yet.
//!
//! The binary holds no logic a library could hold: it reads the command line, calls the libraries, prints, and picks the exit
//! code (see [`exit`]).
#![forbid(unsafe_code)]

mod background;
mod client;
mod demo;
mod exit;
mod images;
mod img;
mod io;
mod jobs;
mod nbd;
mod progress;
mod qemu;
mod serve;
mod size;
mod storage_daemon;
mod tool;
mod trace;
mod usage;

use clap::{Parser, Subcommand};
use exit::{Exit, Outcome};
use img::{check, create, info, map};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::FilterExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

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
    /// The commands of `qemu-img`
    #[command(subcommand)]
    Img(img::Command),
    /// Read and write a disk by commands (the commands of `qemu-io`)
    Io(io::Args),
    /// Serve one disk over NBD until its clients have left (the command line of `qemu-nbd`)
    Nbd(nbd::Args),
    /// Serve disks to guests (NBD, vhost-user-blk) and to operators (QMP, HMP)
    Serve(serve::Args),
    /// Serve named nodes, steered by QMP (the command line of `qemu-storage-daemon`)
    #[command(disable_help_flag = true)]
    StorageDaemon {
        /// Its options; see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Run QEMU with its disks served by Headwater (the command line of `qemu-system-…`)
    #[command(disable_help_flag = true)]
    Qemu {
        /// QEMU's options; --with PROGRAM names another QEMU
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<std::ffi::OsString>,
    },
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

/// What the program is when it is called `qemu-img`.
#[derive(Parser)]
#[command(name = "qemu-img", version, max_term_width = 100, arg_required_else_help = true)]
struct Img {
    #[command(subcommand)]
    command: img::Command,
}

/// What the program is when it is called `qemu-io`.
#[derive(Parser)]
#[command(name = "qemu-io", version, max_term_width = 100)]
struct Io {
    #[command(flatten)]
    args: io::Args,
}

/// What the program is when it is called `qemu-nbd`.
#[derive(Parser)]
#[command(name = "qemu-nbd", version, max_term_width = 100, arg_required_else_help = true)]
struct Nbd {
    #[command(flatten)]
    args: nbd::Args,
}

/// The command line, as the name says that the program was called by.
fn command() -> Result<Command, Exit> {
    let called = std::env::args_os().next().unwrap_or_default();
    let called = std::path::Path::new(&called).file_name().and_then(std::ffi::OsStr::to_str).unwrap_or_default();
    if called == "qemu-img" {
        tool::set_name(called);
        return usage::tool::<Img>().map(|img| Command::Img(img.command));
    }
    if called == "qemu-io" {
        tool::set_name(called);
        return usage::tool::<Io>().map(|io| Command::Io(io.args));
    }
    if called == "qemu-nbd" {
        tool::set_name(called);
        return usage::tool::<Nbd>().map(|nbd| Command::Nbd(nbd.args));
    }
    if called == "qemu-storage-daemon" {
        tool::set_name(called);
        let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
        return Ok(Command::StorageDaemon { words });
    }
    if called == "headwater-qemu" {
        tool::set_name(called);
        return Ok(Command::Qemu { words: std::env::args_os().skip(1).collect() });
    }
    usage::own::<Cli>().map(|cli| cli.command)
}

fn main() -> std::process::ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HEADWATER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let colour = std::env::var_os("NO_COLOR").is_none() && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt::layer().with_ansi(colour).with_writer(|| control::trace::Output);
    tracing_subscriber::registry().with(log.with_filter(filter.or(control::trace::Points))).init();
    let command = match command() {
        Ok(command) => command,
        Err(exit) => return exit.into(),
    };
    let outcome: Outcome = match command {
        Command::Create(args) => create::run(args, create::Guess::Once),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Img(command) => img::run(command),
        Command::Io(args) => io::run(&args),
        Command::Nbd(args) => nbd::run(&args),
        Command::Serve(args) => serve::run(args),
        Command::StorageDaemon { words } => storage_daemon::run(&words),
        Command::Qemu { words } => qemu::run(words),
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
            tool::complain(&message);
            Exit::Failed.into()
        }
    }
}
