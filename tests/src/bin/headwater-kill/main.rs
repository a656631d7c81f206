//! `cargo xtask kill`: SIGKILLs, by the hundred, of a daemon under load.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use headwater_tests::kill::{Way, run};
use headwater_tests::random::Random;

#[derive(Parser)]
#[command(name = "cargo xtask kill", about = "Kill a daemon under load, again and again, and look for lost bytes")]
struct Options {
    /// Kills with an NBD client
    #[arg(long, value_name = "N", default_value_t = 1000)]
    nbd: u32,
    /// Kills with a vhost-user-blk front end that reconnects
    #[arg(long, value_name = "N", default_value_t = 200)]
    vhost_user: u32,
    /// Choices follow this (instants of kills do so only roughly)
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let seed = options.seed.unwrap_or_else(Random::seed);
    println!("seed {seed}");
    for (way, kills) in [(Way::Nbd, options.nbd), (Way::VhostUser, options.vhost_user)] {
        if kills == 0 {
            continue;
        }
        let began = Instant::now();
        match run(way, kills, seed) {
            Ok(figures) => println!("{way:?}: {figures}, in {:.0} s", began.elapsed().as_secs_f64()),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
