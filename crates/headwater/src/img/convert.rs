//! `img convert`: images into one of another format, with its holes.

use super::bitmap;
use super::copy::{How, copy};
use super::create::{self, Wanted};
use super::option_help;
use super::source::Source;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, check_cache, format_named, on_ring};
use crate::progress::Steps;
use crate::size;
use crate::tool;
use disk::{Disk, DiskOptions};
use image::create::CreateOptions;
use image::qcow2::DataFile;
use image::{BackingRef, Bitmap, Format};
use std::rc::Rc;

/// Largest run of zeros that can be looked for.
const MAX_SPARSE: u64 = 16 << 20;

#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "a command line is made of switches")]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// The target (with -n) is named by a list of options, too
    #[arg(long)]
    target_image_opts: bool,
    /// Format of the source, instead of looking
    #[arg(short, long = "source-format", value_name = "FMT")]
    format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "raw")]
    output_format: String,
    /// Options of the new image as key=value, separated by commas
    #[arg(short, long = "target-options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Backing file of the new image: what lies below the source's top is left to it
    #[arg(short = 'B', long = "backing", value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long = "backing-format", value_name = "FMT")]
    backing_format: Option<String>,
    /// Pack clusters
    #[arg(short, long = "compress")]
    compress: bool,
    /// Do not make the target: it is there
    #[arg(short, long = "no-create")]
    no_create: bool,
    /// The target (with -n) reads as zeros as it is
    #[arg(long)]
    target_is_zero: bool,
    /// Show progress
    #[arg(short, long = "progress")]
    progress: bool,
    /// Print nothing
    #[arg(short, long = "quiet")]
    quiet: bool,
    /// Zeros of this length become holes; 0: everything is written
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE", default_value = "4k", value_parser = size::parse)]
    sparse: u64,
    /// Parts in flight, 1 to 16
    #[arg(short = 'm', long = "parallel", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=16))]
    parallel: u8,
    /// Writes may be done in any order (they begin in order in any case)
    #[arg(short = 'W', long = "oob-writes")]
    any_order: bool,
    /// Copy by the system's own means where it can (accepted; parts are read and written)
    #[arg(short = 'C', long = "copy-range-offloading")]
    offload: bool,
    /// How the target is written to: none, writeback, writethrough, directsync, unsafe
    #[arg(short = 't', long = "target-cache", value_name = "CACHE", default_value = "unsafe")]
    cache: String,
    /// How the source is read: none, writeback, …
    #[arg(short = 'T', long = "source-cache", value_name = "CACHE", default_value = "writeback")]
    source_cache: String,
    /// Bytes a second at most
    #[arg(short, long, value_name = "RATE", value_parser = size::parse)]
    rate: Option<u64>,
    /// What cannot be read is said, and copied as zeros
    #[arg(long)]
    salvage: bool,
    /// Copy the source's persistent bitmaps, too
    #[arg(long)]
    bitmaps: bool,
    /// Leave out bitmaps that are not to be relied upon, rather than fail
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// Read the source as it was in this internal snapshot: its id, its name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long = "source-snapshot", value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// The source may be written to by somebody
    #[arg(short = 'U', long)]
    force_share: bool,
    /// One or more sources, and the target
    #[arg(required = true, num_args = 2.., value_name = "FILE")]
    files: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let _ = (args.any_order, args.offload);
    on_ring(convert(args))?;
    Ok(Exit::Ok)
}

/// Whether the switches go together.
fn check(args: &Args) -> Result<(), String> {
    if !args.sparse.is_multiple_of(512) || args.sparse > MAX_SPARSE {
        return Err(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MAX_SPARSE}. Select 0 to \
             disable sparse detection (fully allocates output)."
        ));
    }
    check_cache(&args.cache, "cache")?;
    check_cache(&args.source_cache, "source cache")?;
    let with_new = [
        (args.target_image_opts, "--target-image-opts requires use of -n flag"),
        (args.target_is_zero, "--target-is-zero requires use of -n flag"),
    ];
    if let Some((_, what)) = with_new.iter().find(|(given, _)| *given && !args.no_create) {
        return Err((*what).to_owned());
    }
    if args.no_create && !args.options.is_empty() {
        return Err("-o has no effect when skipping image creation".into());
    }
    if args.backing_format.is_some() && args.backing.is_none() && args.output_format == "raw" {
        return Err("Backing file format not supported for file format 'raw'".into());
    }
    if args.skip_broken_bitmaps && !args.bitmaps {
        return Err("Use of --skip-broken-bitmaps requires --bitmaps".into());
    }
    Ok(())
}

async fn convert(args: &Args) -> Result<(), String> {
    let Some((target, files)) = args.files.split_last() else { return Err("no file was named".into()) };
    let output = format_named(&args.output_format)?;
    if option_help::is_asked(&args.options) {
        print!("{}", option_help::text(output));
        return Ok(());
    }
    check(args)?;
    if args.compress && output != Format::Qcow2 {
        return Err("Compression not supported for this file format".into());
    }
    if args.backing.is_some() && files.len() > 1 {
        return Err(
            "Having a backing file for the target makes no sense when concatenating multiple input images".into()
        );
    }
    if args.bitmaps && files.len() > 1 {
        return Err("Copying bitmaps only possible with single source".into());
    }
    if args.snapshot.is_some() && files.len() > 1 {
        return Err("No support for concatenating multiple snapshot".into());
    }
    let snapshot = args.snapshot.clone();
    let look = Look { force_share: args.force_share, snapshot, ..args.naming.look(args.format.as_deref())? };
    let source = Rc::new(Source::open(files, &look).await?);
    let done = match bitmaps(args, &source, output).await {
        Ok(bitmaps) => into(args, &source, output, target, &bitmaps).await,
        Err(error) => Err(error),
    };
    let closed = source.close().await;
    done.and(closed)
}

/// The bitmaps to copy.
async fn bitmaps(args: &Args, source: &Source, output: Format) -> Result<Vec<Bitmap>, String> {
    let Some(image) = source.top().filter(|_| args.bitmaps) else { return Ok(Vec::new()) };
    let old = Wanted::gather(&args.options, output)?.qcow2.version < 3;
    if output != Format::Qcow2 || old && !args.no_create {
        return Err(format!("Format driver '{output}' does not support bitmaps"));
    }
    if image.format() != Format::Qcow2 {
        return Err("Source lacks bitmap support".into());
    }
    let mut all = image.bitmaps().await.map_err(|error| error.to_string())?;
    for bitmap in all.iter().filter(|bitmap| bitmap.in_use) {
        if !args.skip_broken_bitmaps {
            return Err(format!(
                "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
                bitmap.name
            ));
        }
        tool::complain(&format!("warning: Skipping inconsistent bitmap '{}'", bitmap.name));
    }
    all.retain(|bitmap| !bitmap.in_use);
    Ok(all)
}

async fn into(
    args: &Args,
    source: &Rc<Source>,
    output: Format,
    target: &str,
    bitmaps: &[Bitmap],
) -> Result<(), String> {
    let mut len = source.size();
    let objects = args.naming.objects()?;
    let mut secret = None;
    if !args.no_create {
        let mut wanted = Wanted::gather(&args.options, output)?;
        wanted.backing = wanted.backing.or_else(|| args.backing.clone());
        wanted.backing_format = wanted.backing_format.or_else(|| args.backing_format.clone());
        wanted.check()?;
        let data_file = wanted.data_file.map(|name| DataFile { name, raw: wanted.data_file_raw });
        if data_file.is_some() && args.compress {
            return Err("Compression not supported for images with a data file".into());
        }
        let size = wanted.size.unwrap_or(len);
        len = len.min(size);
        let backing = match (&wanted.backing, &wanted.backing_format) {
            (None, _) => None,
            (Some(name), Some(format)) => Some(BackingRef { name: name.clone(), format: Some(format_named(format)?) }),
            (Some(name), None) => {
                return Err(format!("backing file '{name}' needs its format: state it with -F"));
            }
        };
        let options = CreateOptions {
            backing,
            cluster_size: wanted.cluster_size,
            table_size: wanted.table_size,
            qcow2: wanted.qcow2,
            passphrase: create::passphrase(wanted.key_secret.as_deref(), &objects)?,
            iteration_time: wanted.iteration_time,
            ..CreateOptions::new(output, size.next_multiple_of(512))
        };
        secret = wanted.key_secret;
        let unlocking = secret.as_deref().map(|id| (id, &objects));
        create::write_all(target, &options, data_file.as_ref(), wanted.preallocation, unlocking).await?;
    }
    let (name, look) = create::named(target, output, secret.as_deref().map(|id| (id, &objects)));
    let writable = Look {
        format: if args.target_image_opts { None } else { look.format },
        image_opts: args.target_image_opts,
        objects,
        writable: true,
        no_flush: args.cache == "unsafe",
        ..Look::default()
    };
    let chain = images::open(&name, &writable).await?;
    let disk = Disk::new("target", chain, DiskOptions::default());
    let has_backing = disk.chain().len() > 1;
    if args.no_create && disk.size() < len {
        let _ = disk.close().await;
        return Err(format!("output file is smaller than input file ({} and {len} bytes)", disk.size()));
    }
    let how = How {
        sparse: args.sparse,
        parallel: args.parallel.into(),
        target_is_zero: !has_backing && (!args.no_create || args.target_is_zero),
        only_top: has_backing && !args.no_create,
        only_allocated: false,
        packed: args.compress,
        rate: args.rate,
        salvage: args.salvage,
    };
    let steps = Steps::new(len, args.progress && !args.quiet);
    let mut copied = copy(source, &disk, len, how, &steps).await;
    if let (Ok(()), Some(from)) = (&copied, source.top()) {
        copied = bitmap::copy_all(&from, &disk.chain()[0].image, bitmaps).await;
    }
    let flushed = disk.flush().await.map_err(|error| error.to_string());
    let closed = disk.close().await.map_err(|error| error.to_string());
    copied.and(flushed).and(closed)?;
    steps.end();
    Ok(())
}
