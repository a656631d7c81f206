//! How many random 4 KiB reads a second one shard thread does at queue depth 32, on each back end.
//!
//! `cargo run --release -p headwater-ring --example randread [FILE [SECONDS]]`. Without a file it makes one of 256 MiB
//! in the current directory and removes it again. The file is opened with `O_DIRECT` where that is possible.

extern crate headwater_ring as ring;

use ring::{Backend, Config, File, Iov, Ring, now, spawn};
use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

const BLOCK: u64 = 4096;
const DEPTH: usize = 32;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let given = arguments.next().map(PathBuf::from);
    let seconds = arguments.next().and_then(|text| text.to_str()?.parse().ok()).unwrap_or(3);
    let path = match &given {
        Some(path) => path.clone(),
        None => make()?,
    };
    let measured = measure(&path, Duration::from_secs(seconds));
    if given.is_none() {
        fs::remove_file(&path)?;
    }
    measured
}

fn make() -> io::Result<PathBuf> {
    let path = PathBuf::from(format!("randread-{}.tmp", std::process::id()));
    let mut file = fs::File::create(&path)?;
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| ((at * 31) >> 3) as u8).collect();
    for _ in 0..256 {
        file.write_all(&bytes)?;
    }
    file.sync_all()?;
    Ok(path)
}

fn measure(path: &Path, span: Duration) -> io::Result<()> {
    for (name, direct) in [("direct", true), ("buffered", false)] {
        for backend in [Backend::Uring, Backend::Threads] {
            let flags = if direct { libc::O_DIRECT } else { 0 };
            let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
                Ok(file) => file,
                Err(error) => {
                    println!("{name:9} {backend:?}: {error}");
                    continue;
                }
            };
            let blocks = file.metadata()?.len() / BLOCK;
            let ring = match Ring::new(Config { backend, ..Config::default() }) {
                Ok(ring) => ring,
                Err(error) => {
                    println!("{name:9} {backend:?}: {error}");
                    continue;
                }
            };
            let file = File::new(file.into());
            let cpu = cpu_time();
            let (count, elapsed) = ring.block_on(run(file, blocks, span))?;
            let cpu = cpu_time().saturating_sub(cpu);
            let iops = count as f64 / elapsed.as_secs_f64();
            println!(
                "{name:9} {backend:?}: {iops:9.0} IOPS, {:5.2} µs of CPU each",
                cpu.as_secs_f64() * 1e6 / count as f64
            );
        }
    }
    Ok(())
}

async fn run(file: File, blocks: u64, span: Duration) -> io::Result<(u64, Duration)> {
    file.register();
    let start = now();
    let count = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..DEPTH as u64)
        .map(|number| {
            let (file, count) = (file.clone(), Rc::clone(&count));
            spawn(async move {
                let mut state = number + 1;
                while now().since(start) < span {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let iov = Iov::alloc(BLOCK as usize);
                    let read = file.read_at(state % blocks * BLOCK, &iov).await?;
                    assert_eq!(read as u64, BLOCK);
                    count.set(count.get() + 1);
                }
                io::Result::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await?;
    }
    Ok((count.get(), now().since(start)))
}

/// Processor time this process has used.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable and of the right type.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
