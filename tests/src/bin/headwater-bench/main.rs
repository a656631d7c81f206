//! Headwater beside qemu-storage-daemon (and its image tool beside qemu-img), on the same files, in one run.
//!
//! Machines differ and machines are noisy, so no figure of one side means anything alone: every workload is measured
//! A B A B, round by round, each round with a server freshly started, and what counts is the ratio within a round. Both
//! sides open their files alike (`O_DIRECT`, io_uring). Processor time is the server's own, from the kernel's account.
#![forbid(unsafe_code)]

mod files;
mod load;
mod report;
mod side;
mod tool;
mod workload;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use headwater_tests::Result;

use files::Files;
use report::{Report, Row};
use side::Side;
use workload::Workload;

#[derive(Parser)]
#[command(name = "cargo xtask bench", about = "Measure headwater beside qemu-storage-daemon on the same files")]
struct Options {
    /// Small files, short rounds: to see that it runs, not for figures to quote
    #[arg(long)]
    quick: bool,
    /// Rounds of A and B for each workload
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Seconds each side is loaded in a round
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// The two sides; `qsd,qsd` shows how far two equal sides seem apart here
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1..=2, default_values = ["headwater", "qsd"])]
    sides: Vec<Side>,
    /// Only workloads whose name contains this; may be given more than once
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Load over NBD by fio instead of our own client, where the workload allows
    #[arg(long)]
    fio: bool,
    /// Name the workloads and end
    #[arg(long)]
    list: bool,
    /// Exit code 1 unless every workload reaches its goal
    #[arg(long)]
    gate: bool,
    /// Where the files and results go; must be on the file system to be measured
    #[arg(long, default_value = "target/bench", overrides_with = "dir")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("bench: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|text| name.contains(text));
    let workloads: Vec<Workload> = workload::all().into_iter().filter(|workload| wanted(workload.name)).collect();
    if options.list {
        for Workload { name, about, .. } in &workloads {
            println!("{name:<20} {about}");
        }
        return Ok(true);
    }
    let rounds = options.rounds.unwrap_or(if options.quick { 2 } else { 5 });
    let seconds = options.seconds.unwrap_or(if options.quick { 1.0 } else { 4.0 });
    // Overlays name their base by its path, which must not hang on where they lie.
    let dir = std::path::absolute(&options.dir)?;
    let files = Files::prepare(&dir, options.quick)?;
    let (a, b) = (options.sides[0], *options.sides.last().unwrap_or(&Side::Qsd));
    let mut report = Report::new([a, b], rounds, seconds, files.size());
    for workload in workloads {
        let mut row = Row::new(&workload);
        for round in 1..=rounds {
            for (index, side) in [a, b].into_iter().enumerate() {
                progress(&format!("{} round {round}/{rounds} {}", workload.name, side.name()));
                row.add(index, workload.measure(side, &files, seconds, options.fio));
            }
            if row.is_hopeless() {
                break;
            }
        }
        progress("");
        report.add(row);
    }
    println!("{report}");
    let written = report.write(&dir)?;
    println!("\nwritten to {}", written.display());
    Ok(!options.gate || report.reaches_its_goals())
}

/// Overwrites the last line on a terminal; elsewhere says nothing.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
    }
}
