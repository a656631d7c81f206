//! `img rebase`: another backing file, so that the disk shows what it showed (or, with `-u`, whatever it then shows).
//!
//! **The order.** First everything that would read differently is kept in the image itself, durably; then its header changes.

use super::source::Source;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, format_named, on_ring};
use crate::progress::Steps;
use crate::tool;
use disk::chain::Opener;
use disk::{Disk, DiskOptions};
use image::{BackingRef, Format};
use layout::GuestOffset;
use ring::Iov;
use std::rc::Rc;

/// Bytes compared at a time.
const PART: u64 = 2 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the image, instead of looking
    #[arg(short, long = "format", value_name = "FMT")]
    format: Option<String>,
    /// The new backing file; an empty name: none
    #[arg(short, long = "backing", value_name = "BACKING", required_unless_present = "unsafe_mode")]
    backing: Option<String>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Only change the header: nothing is compared, no backing file is opened
    #[arg(short, long = "backing-unsafe")]
    unsafe_mode: bool,
    /// How the image is written to
    #[arg(short = 't', long = "cache", value_name = "CACHE")]
    cache: Option<String>,
    /// How backing files are read
    #[arg(short = 'T', long = "backing-cache", value_name = "CACHE")]
    source_cache: Option<String>,
    /// Pack what the image must keep
    #[arg(short, long)]
    compress: bool,
    /// Show progress
    #[arg(short, long = "progress")]
    progress: bool,
    /// Print nothing
    #[arg(short, long = "quiet")]
    quiet: bool,
    /// Backing files may be written to by somebody
    #[arg(short = 'U', long)]
    force_share: bool,
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    args.cache.as_deref().map_or(Ok(()), |mode| images::check_cache(mode, "cache"))?;
    args.source_cache.as_deref().map_or(Ok(()), |mode| images::check_cache(mode, "source cache"))?;
    on_ring(rebase(args))?;
    Ok(Exit::Ok)
}

async fn rebase(args: &Args) -> Result<(), String> {
    let stated = args.backing_format.as_deref().map(format_named).transpose()?;
    let look = Look {
        writable: true,
        no_guest: true,
        no_backing: args.unsafe_mode,
        ..args.naming.look(args.format.as_deref())?
    };
    let chain = images::open(&args.file, &look).await?;
    let image = Rc::clone(&chain[0].image);
    let disk = Disk::new(&args.file, chain, DiskOptions::default());
    if args.compress && image.format() != Format::Qcow2 {
        let _ = disk.close().await;
        return Err("Compression not supported for this file format".into());
    }
    let changed = async {
        let backing = args.backing.clone().filter(|name| !name.is_empty());
        let mut found = stated;
        if !args.unsafe_mode {
            let new = match &backing {
                Some(name) => Some(open_new(args, name, stated).await?),
                None => None,
            };
            found = found.or(new.as_ref().map(Source::format));
            let kept = keep_what_differs(args, &disk, new.as_ref()).await;
            if let Some(new) = new {
                new.close().await?;
            }
            kept?;
            disk.flush().await.map_err(|error| error.to_string())?;
        } else if backing.is_some() && found.is_none() {
            tool::complain("warning: the format of the backing file was not stated (-F); it may be guessed one day");
        }
        let backing = backing.map(|name| BackingRef { name, format: found });
        image.set_backing(backing).await.map_err(|error| error.to_string())
    };
    let changed = changed.await;
    let closed = disk.close().await.map_err(|error| error.to_string());
    changed.and(closed)
}

async fn open_new(args: &Args, name: &str, format: Option<Format>) -> Result<Source, String> {
    let objects = args.naming.objects()?;
    let opener = images::sources(&Look { objects: objects.clone(), ..Look::default() });
    let path = opener.identify(name, Some(&args.naming.name(&args.file)?));
    let look = Look { format, objects, force_share: args.force_share, ..Look::default() };
    let opened = Source::open(&[path], &look).await;
    opened.map_err(|error| format!("Could not open new backing file '{name}': {error}"))
}

/// Writes into the image what it shows of its old backing file and the new one has not.
async fn keep_what_differs(args: &Args, disk: &Rc<Disk>, new: Option<&Source>) -> Result<(), String> {
    let old = Source::of(Rc::clone(disk));
    let len = disk.size();
    let steps = Steps::new(len, args.progress && !args.quiet);
    let unit = disk.chain()[0].image.cluster_size();
    let mut at = 0;
    while at < len {
        let now = old.status(at, len - at).await?;
        let mut run = now.len;
        let own = now.allocated && now.depth == 0;
        let below = match new {
            Some(new) => new.status(at, len - at).await?,
            None => {
                disk::Status { len: len - at, zero: true, allocated: false, depth: 0, compressed: false, host: None }
            }
        };
        run = run.min(below.len);
        let same = now.zero && below.zero;
        if !own && !same {
            run = run.min(PART);
            let (left, right) = (Iov::alloc(run as usize), Iov::zeroed(run as usize));
            old.read(at, left.clone()).await?;
            if let Some(new) = new {
                new.read(at, right.clone()).await?;
            }
            keep(disk, at, &left, &right, (unit as usize, args.compress)).await?;
        }
        steps.add(run);
        at += run;
    }
    steps.end();
    Ok(())
}

/// Writes `old` where it differs from `new`, unit by unit; packed, if that is asked for and can be.
async fn keep(disk: &Disk, at: u64, old: &Iov, new: &Iov, (unit, packed): (usize, bool)) -> Result<(), String> {
    let image = Rc::clone(&disk.chain()[0].image);
    let (before, after) = (old.to_vec(), new.to_vec());
    let mut start = 0;
    while start < before.len() {
        // Up to a cluster's end, so that none is written in two parts.
        let inside = (at as usize + start) % unit;
        let end = (start + unit - inside).min(before.len());
        if before[start..end] != after[start..end] {
            let place = at + start as u64;
            let failed = |error: image::Error| format!("error while writing at byte {place}: {error}");
            let part = old.slice(start..end);
            if !(packed && part.len() == unit && image.pack(GuestOffset(place), part.clone()).await.map_err(failed)?) {
                disk.write(GuestOffset(place), part, false).await.map_err(failed)?;
            }
        }
        start = end;
    }
    Ok(())
}
