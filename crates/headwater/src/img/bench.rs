//! `img bench`: how long a number of equal requests take.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, on_ring};
use crate::size;
use disk::{Disk, DiskOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use layout::GuestOffset;
use ring::Iov;
use std::rc::Rc;
use std::time::Instant;

#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "a command line is made of switches")]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How the image is used: none, writeback, writethrough, directsync, unsafe
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// How many requests
    #[arg(short, long, value_name = "COUNT", default_value_t = 75_000, value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    count: u32,
    /// Bytes of each
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4k", value_parser = size::parse)]
    buffer_size: u64,
    /// How many are under way at once
    #[arg(short, long, value_name = "DEPTH", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: u32,
    /// Where the first one begins
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = size::parse)]
    offset: u64,
    /// How much further each next one begins; by default the bytes of one
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = size::parse)]
    step_size: Option<u64>,
    /// io_uring (there is no other), native, threads
    #[arg(short = 'i', long, value_name = "MODE")]
    aio: Option<String>,
    /// Accepted: I/O goes through io_uring
    #[arg(short, long)]
    native: bool,
    /// Write rather than read
    #[arg(short, long)]
    write: bool,
    /// What is written, a byte
    #[arg(long, value_name = "BYTE", default_value_t = 0)]
    pattern: u8,
    /// Flush after so many requests
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    flush_interval: u32,
    /// A flush does not wait for the requests under way
    #[arg(long)]
    no_drain: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Somebody may be writing to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    if !(1..=i32::MAX as u64).contains(&args.buffer_size) {
        return Err(format!("Invalid buffer size specified. Must be between 1 and {}.", i32::MAX));
    }
    if let Some(aio) = args.aio.as_deref().filter(|aio| !["threads", "native", "io_uring"].contains(aio)) {
        return Err(format!("Invalid aio option: {aio}"));
    }
    if !args.write && args.flush_interval > 0 {
        return Err("--flush-interval is only available in write tests".into());
    }
    if args.flush_interval > 0 && args.flush_interval < args.depth {
        return Err("Flush interval can't be smaller than depth".into());
    }
    let cache = args.cache.as_str();
    if !["none", "off", "writeback", "writethrough", "directsync", "unsafe"].contains(&cache) {
        return Err(format!("Invalid cache mode '{cache}'"));
    }
    on_ring(bench(args))?;
    Ok(Exit::Ok)
}

async fn bench(args: &Args) -> Result<(), String> {
    let cache = args.cache.as_str();
    let look = Look {
        writable: args.write,
        force_share: args.force_share,
        direct: ["none", "off", "directsync"].contains(&cache),
        no_flush: cache == "unsafe",
        ..args.naming.look(args.format.as_deref())?
    };
    let chain = images::open(&args.file, &look).await?;
    let write_through = ["writethrough", "directsync"].contains(&cache);
    let disk = Disk::new(&args.file, chain, DiskOptions { write_through, ..DiskOptions::default() });
    let step = args.step_size.filter(|step| *step > 0).unwrap_or(args.buffer_size);
    if !args.quiet {
        println!(
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {step})",
            args.count,
            if args.write { "write" } else { "read" },
            args.buffer_size,
            args.depth,
            args.offset,
        );
        if args.flush_interval > 0 {
            println!("Sending flush every {} requests", args.flush_interval);
        }
    }
    let began = Instant::now();
    let done = requests(args, &disk, step).await;
    let took = began.elapsed();
    let closed = disk.close().await.map_err(|error| error.to_string());
    done.and(closed)?;
    if !args.quiet {
        println!("Run completed in {:.3} seconds.", took.as_secs_f64());
    }
    Ok(())
}

async fn requests(args: &Args, disk: &Rc<Disk>, step: u64) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("Failed request: {error}");
    let len = args.buffer_size as usize;
    let memory: Vec<Iov> = (0..args.depth.min(args.count)).map(|_| Iov::zeroed(len)).collect();
    for iov in &memory {
        iov.fill(args.pattern);
    }
    let mut free = memory;
    let mut under_way = FuturesUnordered::new();
    let (mut at, mut begun) = (args.offset, 0_u32);
    while begun < args.count || !under_way.is_empty() {
        while begun < args.count
            && let Some(iov) = free.pop()
        {
            if at.checked_add(args.buffer_size).is_none_or(|end| end > disk.size()) {
                return Err(failed(&"Input/output error (the request ends past the end of the image)"));
            }
            let (on, place, write) = (Rc::clone(disk), GuestOffset(at), args.write);
            under_way.push(async move {
                let done =
                    if write { on.write(place, iov.clone(), false).await } else { on.read(place, iov.clone()).await };
                done.map(|()| iov)
            });
            begun += 1;
            at = (at + step).checked_rem(disk.size()).unwrap_or(0);
            if args.flush_interval > 0 && begun.is_multiple_of(args.flush_interval) {
                while !args.no_drain
                    && let Some(done) = under_way.next().await
                {
                    free.push(done.map_err(|error| failed(&error))?);
                }
                disk.flush().await.map_err(|error| failed(&error))?;
            }
        }
        if let Some(done) = under_way.next().await {
            free.push(done.map_err(|error| failed(&error))?);
        }
    }
    Ok(())
}
