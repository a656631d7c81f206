//! `cargo xtask sim`: runs seeds, prints what they did, and on the first failure the seed that shows it.
#![forbid(unsafe_code)]

use clap::Parser;
use headwater_sim::{Options, Tally, run};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A run that takes longer than this on the wall's clock goes in circles.
const PATIENCE: Duration = Duration::from_mins(2);

/// Simulates the whole stack below the exports: one seed, one run
#[derive(Parser)]
#[command(name = "headwater-sim", version)]
struct Cli {
    /// Runs this one seed
    #[arg(long)]
    seed: Option<u64>,
    /// How many seeds
    #[arg(long, default_value_t = 1000)]
    runs: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// States looked at for every power cut
    #[arg(long, default_value_t = Options::default().states)]
    states: usize,
    /// Of 100,000 states so many are shown to qemu-img check
    #[arg(long, default_value_t = 20, value_name = "N")]
    qemu_img: u64,
    /// Runs side by side
    #[arg(long, default_value_t = 2)]
    threads: u64,
    /// Prints the plan and every operation on every store
    #[arg(short, long)]
    verbose: bool,
    /// Goes on after a failure
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = Options { states: cli.states, qemu_img: cli.qemu_img, verbose: cli.verbose };
    // What a panic says is part of the failure that is printed.
    if !cli.verbose {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let (from, runs) = cli.seed.map_or((cli.from, cli.runs), |seed| (seed, 1));
    let began = Instant::now();
    let shared = Arc::new(Shared::default());
    shared.next.store(from, Ordering::Relaxed);
    let threads = cli.threads.clamp(1, 64).min(runs.max(1));
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || work(&shared, from + runs, options, cli.keep_going))
        })
        .collect();
    for worker in workers {
        // A worker catches what its runs throw.
        let _ = worker.join();
    }
    let tally = *shared.tally.lock().unwrap_or_else(PoisonError::into_inner);
    let failed = shared.failures.load(Ordering::Relaxed);
    let done = shared.done.load(Ordering::Relaxed);
    println!(
        "{done} runs in {:.1} s: {} requests ({} failed as they should), {} streams to their end, {} power cuts, {} states, \
         {} shown to qemu-img, {} times dark; hash {:016x}",
        began.elapsed().as_secs_f64(),
        tally.requests,
        tally.errors,
        tally.streams,
        tally.cuts,
        tally.states,
        tally.qemu_checks,
        tally.power_offs,
        tally.hash,
    );
    println!("{} passed, {failed} failed", done - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(Default)]
struct Shared {
    next: AtomicU64,
    done: AtomicU64,
    failures: AtomicU64,
    stop: AtomicBool,
    tally: Mutex<Tally>,
}

fn work(shared: &Arc<Shared>, end: u64, options: Options, keep_going: bool) {
    while !shared.stop.load(Ordering::Relaxed) {
        let seed = shared.next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return;
        }
        let alarm = Alarm::set(seed);
        let done = run(seed, options);
        drop(alarm);
        shared.done.fetch_add(1, Ordering::Relaxed);
        match done {
            Ok(tally) => {
                let mut sum = shared.tally.lock().unwrap_or_else(PoisonError::into_inner);
                *sum = sum.and(tally);
            }
            Err(what) => {
                shared.failures.fetch_add(1, Ordering::Relaxed);
                eprintln!("seed {seed}: {what}\n  again: cargo xtask sim --seed {seed} --verbose\n");
                if !keep_going {
                    shared.stop.store(true, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Ends the process, naming the seed, when a run goes in circles: it cannot be stopped from outside.
struct Alarm {
    off: std::sync::mpsc::Sender<()>,
}

impl Alarm {
    fn set(seed: u64) -> Self {
        let (off, waits) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if waits.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("seed {seed}: it goes in circles: no end after {PATIENCE:?}");
                std::process::exit(2);
            }
        });
        Self { off }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // The other end may have gone already.
        let _ = self.off.send(());
    }
}
