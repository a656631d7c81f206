//! `headwater img`, which is also what the program is when it is called `qemu-img`: the same commands, flags, texts and exit codes.

mod amend;
mod bench;
mod bitmap;
pub(crate) mod check;
mod commit;
mod compare;
mod convert;
mod copy;
pub(crate) mod create;
mod data_file;
mod dd;
pub(crate) mod info;
mod key_slots;
pub(crate) mod map;
mod measure;
mod option_help;
mod rebase;
mod resize;
mod snapshot;
mod source;

use crate::exit::Outcome;
use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Change what an image says of itself
    Amend(amend::Args),
    /// Time equal requests
    Bench(bench::Args),
    /// Change persistent bitmaps: which parts of a disk were written
    Bitmap(bitmap::Args),
    /// Check an image's tables, and repair them if asked
    Check(check::Args),
    /// Write what an image holds into its backing file
    Commit(commit::Args),
    /// Compare what two images hold
    Compare(compare::Args),
    /// Copy images into one of another format
    Convert(convert::Args),
    /// Make a new image, empty or over a backing file
    Create(create::Args),
    /// Copy a part of an image, as dd does
    Dd(dd::Args),
    /// Say what an image is
    Info(info::Args),
    /// Say which bytes of an image are where
    Map(map::Args),
    /// Say how large an image of another format would be
    Measure(measure::Args),
    /// Change what an image says its backing file is
    Rebase(rebase::Args),
    /// Change the size of a disk
    Resize(resize::Args),
    /// List, take, apply or delete internal snapshots
    Snapshot(snapshot::Args),
}

pub(crate) fn run(command: Command) -> Outcome {
    match command {
        Command::Amend(args) => amend::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Bitmap(args) => bitmap::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Commit(args) => commit::run(&args),
        Command::Compare(args) => Ok(compare::run(&args)),
        Command::Convert(args) => convert::run(&args),
        Command::Create(args) => create::run(args, create::Guess::Never),
        Command::Dd(args) => dd::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Rebase(args) => rebase::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
    }
}
