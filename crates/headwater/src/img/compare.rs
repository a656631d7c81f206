//! `img compare`: what two images hold, byte for byte. Exit codes as qemu-img has them: 0 the same, 1 not, 2 and more an error.

use super::source::Source;
use crate::exit::Exit;
use crate::images::{Look, Naming, check_cache, on_ring};
use crate::progress::Steps;
use crate::tool;
use ring::Iov;

/// Bytes compared at a time.
const PART: u64 = 2 << 20;

/// The unit in which qemu-img looks for the first difference.
const SECTOR: usize = 512;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the first image, instead of looking
    #[arg(short, long = "a-format", value_name = "FMT")]
    format: Option<String>,
    /// Format of the second image, instead of looking
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    other_format: Option<String>,
    /// How they are read: none, writeback, …
    #[arg(short = 'T', long = "cache", value_name = "CACHE")]
    source_cache: Option<String>,
    /// Also sizes, and what is allocated
    #[arg(short, long = "strict")]
    strict: bool,
    /// Show progress
    #[arg(short, long = "progress")]
    progress: bool,
    /// Print nothing
    #[arg(short, long = "quiet")]
    quiet: bool,
    /// Somebody may be writing to them
    #[arg(short = 'U', long)]
    force_share: bool,
    first: String,
    second: String,
}

pub(crate) fn run(args: &Args) -> Exit {
    let cache = args.source_cache.as_deref().map_or(Ok(()), |mode| check_cache(mode, "source cache"));
    cache.and_then(|()| on_ring(compare(args))).unwrap_or_else(|message| {
        tool::complain(&message);
        Exit::Corrupt
    })
}

async fn compare(args: &Args) -> Result<Exit, String> {
    let look = |format: &Option<String>| {
        let look = args.naming.look(format.as_deref())?;
        Ok::<_, String>(Look { force_share: args.force_share, ..look })
    };
    let first = Source::open(std::slice::from_ref(&args.first), &look(&args.format)?).await?;
    let second = Source::open(std::slice::from_ref(&args.second), &look(&args.other_format)?).await?;
    let compared = contents(args, &first, &second).await;
    first.close().await?;
    second.close().await?;
    let (exit, message) = match compared? {
        None => (Exit::Ok, "Images are identical.".to_owned()),
        Some(message) => (Exit::Failed, message),
    };
    if !args.quiet {
        println!("{message}");
    }
    Ok(exit)
}

/// What differs first, if anything.
async fn contents(args: &Args, first: &Source, second: &Source) -> Result<Option<String>, String> {
    if first.size() != second.size() {
        if args.strict {
            return Ok(Some("Strict mode: Image size mismatch!".to_owned()));
        }
        if !args.quiet {
            println!("Warning: Image size mismatch!");
        }
    }
    let len = first.size().max(second.size());
    let steps = Steps::new(len, args.progress && !args.quiet);
    let mut at = 0;
    while at < len {
        let (a, b) = (first.status(at, len - at).await?, second.status(at, len - at).await?);
        let run = a.len.min(b.len);
        if args.strict && a.allocated != b.allocated {
            return Ok(Some(format!("Strict mode: Offset {at} block status mismatch!")));
        }
        if a.zero && b.zero {
            steps.add(run);
            at += run;
            continue;
        }
        let run = run.min(PART);
        let (left, right) = (Iov::alloc(run as usize), Iov::alloc(run as usize));
        let (read, other) =
            futures_util::future::join(first.read(at, left.clone()), second.read(at, right.clone())).await;
        read.and(other)?;
        let (left, right) = (left.to_vec(), right.to_vec());
        if left != right {
            let sector = left.chunks(SECTOR).zip(right.chunks(SECTOR)).position(|(a, b)| a != b).unwrap_or(0);
            let offset = at + (sector * SECTOR) as u64;
            return Ok(Some(format!("Content mismatch at offset {offset}!")));
        }
        steps.add(run);
        at += run;
    }
    steps.end();
    Ok(None)
}
