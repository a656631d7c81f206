//! `img measure`: how large an image of another format would be.

use super::create::Wanted;
use super::source::Source;
use crate::exit::{Exit, Outcome};
use crate::images::{Look, Naming, Output, format_named, on_ring};
use crate::size;
use image::Format;
use image::create::CreateOptions;
use serde_json::json;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Format of the image, instead of looking
    #[arg(short, value_name = "FMT")]
    format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', value_name = "FMT", default_value = "raw")]
    output_format: String,
    /// Options of the new image
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The size of a new disk, instead of an image
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "file")]
    size: Option<u64>,
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
        (_, size) => (size.unwrap_or(0), 0, false),
    };
    let bitmaps = bitmaps && output == Format::Qcow2;
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
            (full - options.size.next_multiple_of(cluster) + data, full)
        }
        Format::Raw => (options.size, options.size),
        other => return Err(format!("Block driver '{other}' does not support size measurement")),
    };
    match args.output {
        Output::Human => {
            println!("required size: {required}\nfully allocated size: {full}");
            if bitmaps {
                println!("bitmaps size: 0");
            }
        }
        Output::Json => {
            let mut value = json!({ "required": required, "fully-allocated": full });
            if bitmaps {
                value["bitmaps"] = json!(0);
            }
            println!("{value:#}");
        }
    }
    Ok(Exit::Ok)
}

/// The size of the disk, the bytes of the clusters that hold anything, and whether there could be bitmaps (which are not copied).
async fn clusters(args: &Args, file: &String, cluster: u64, output: Format) -> Result<(u64, u64, bool), String> {
    let look = Look { force_share: args.force_share, ..args.naming.look(args.format.as_deref())? };
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
    let bitmaps = source.format() == Format::Qcow2;
    source.close().await?;
    Ok((len, data, bitmaps))
}
