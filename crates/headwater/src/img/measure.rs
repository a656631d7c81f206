//! `img measure`: how large an image of another format would be.

use super::create::Wanted;
use super::source::Source;
use crate::exit::{Exit, Outcome};
use crate::images::{Look, Naming, Output, format_named, on_ring};
use crate::size;
use image::create::{CreateOptions, Preallocation};
use image::{Bitmap, Format};
use serde_json::json;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Format of the image, instead of looking
    #[arg(short, long = "format", value_name = "FMT")]
    format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "raw")]
    output_format: String,
    /// Options of the new image
    #[arg(short, long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// The size of a new disk, instead of an image
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "file")]
    size: Option<u64>,
    /// Look at the image as it was in this internal snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Somebody may be writing to it
    #[arg(short = 'U', long)]
    force_share: bool,
    #[arg(required_unless_present = "size")]
    file: Option<String>,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let output = format_named(&args.output_format)?;
    let wanted = Wanted::gather(&args.options, output)?;
    let cluster = wanted.cluster_size.unwrap_or(64 << 10);
    let (size, data, bitmaps) = match (&args.file, args.size) {
        (Some(file), None) => on_ring(clusters(args, file, cluster, output))?,
        (_, size) => (size.unwrap_or(0), 0, None),
    };
    let bitmaps = bitmaps.filter(|_| output == Format::Qcow2).map(|all| bitmap_bytes(&all, size, cluster));
    let options = CreateOptions {
        cluster_size: wanted.cluster_size,
        table_size: wanted.table_size,
        qcow2: wanted.qcow2,
        ..CreateOptions::new(output, size.next_multiple_of(512))
    };
    let (required, full) = match output {
        Format::Qcow2 => {
            let full = image::qcow2::measure(&options).map_err(|error| error.to_string())?;
            // Tables are counted as if data lay everywhere: as qemu-img has it.
            let all = matches!(wanted.preallocation, Preallocation::Falloc | Preallocation::Full);
            (if all { full } else { full - options.size.next_multiple_of(cluster) + data }, full)
        }
        Format::Raw => (options.size, options.size),
        other => return Err(format!("Block driver '{other}' does not support size measurement")),
    };
    match args.output {
        Output::Human => {
            println!("required size: {required}\nfully allocated size: {full}");
            if let Some(bitmaps) = bitmaps {
                println!("bitmaps size: {bitmaps}");
            }
        }
        Output::Json => {
            let mut value = json!({ "required": required, "fully-allocated": full });
            if let Some(bitmaps) = bitmaps {
                value["bitmaps"] = json!(bitmaps);
            }
            println!("{value:#}");
        }
    }
    Ok(Exit::Ok)
}

/// What copies of these bitmaps would take: data, tables, and a directory. Those that are in use count, as qemu-img has it.
fn bitmap_bytes(all: &[Bitmap], size: u64, cluster: u64) -> u64 {
    let (mut bytes, mut directory) = (0, 0);
    for bitmap in all {
        let data = size.div_ceil(bitmap.granularity.max(1)).div_ceil(8).next_multiple_of(cluster);
        bytes += data + (data / cluster * 8).next_multiple_of(cluster);
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    bytes + directory.next_multiple_of(cluster)
}

/// The size of the disk, the bytes of the clusters that hold anything, and the bitmaps, where there could be any.
async fn clusters(
    args: &Args,
    file: &String,
    cluster: u64,
    output: Format,
) -> Result<(u64, u64, Option<Vec<Bitmap>>), String> {
    let look = Look {
        force_share: args.force_share,
        snapshot: args.snapshot.clone(),
        ..args.naming.look(args.format.as_deref())?
    };
    let source = Source::open(std::slice::from_ref(file), &look).await?;
    let len = source.size();
    let (mut at, mut data, mut counted) = (0, 0, 0);
    while output == Format::Qcow2 && at < len {
        let status = source.status(at, len - at).await?;
        if !status.zero {
            let (first, end) = ((at / cluster * cluster).max(counted), (at + status.len).next_multiple_of(cluster));
            data += end.saturating_sub(first);
            counted = end;
        }
        at += status.len;
    }
    let bitmaps = match source.top().filter(|image| image.format() == Format::Qcow2) {
        Some(image) => Some(image.bitmaps().await.map_err(|error| error.to_string())?),
        None => None,
    };
    source.close().await?;
    Ok((len, data, bitmaps))
}
