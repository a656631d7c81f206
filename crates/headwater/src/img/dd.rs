//! `img dd`: a part of one image becomes another image.

use super::create;
use super::source::Source;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, format_named, on_ring};
use crate::size;
use disk::{Disk, DiskOptions};
use image::create::CreateOptions;
use layout::GuestOffset;
use ring::Iov;

/// Bytes copied at a time.
const PART: u64 = 2 << 20;

/// Largest block.
const MAX_BLOCK: u64 = i32::MAX as u64;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the source, instead of looking
    #[arg(short, long = "format", value_name = "FMT")]
    format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long = "output-format", value_name = "FMT", default_value = "raw")]
    output_format: String,
    /// Somebody may be writing to the source
    #[arg(short = 'U', long)]
    force_share: bool,
    /// bs=SIZE (512), count=BLOCKS, skip=BLOCKS, if=FILE, of=FILE
    #[arg(required = true, value_name = "KEY=VALUE")]
    operands: Vec<String>,
}

#[derive(Default)]
struct Operands {
    block: Option<u64>,
    count: Option<u64>,
    skip: u64,
    input: Option<String>,
    output: Option<String>,
}

impl Operands {
    fn parse(words: &[String]) -> Result<Self, String> {
        let mut operands = Self::default();
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("unrecognized operand {word}"))?;
            let number = || size::parse(value).map_err(|_| format!("invalid number: '{value}'"));
            match key {
                "bs" => {
                    let bytes = number()?;
                    if !(1..=MAX_BLOCK).contains(&bytes) {
                        return Err(format!("Invalid bs specified. Must be between 1 and {MAX_BLOCK}."));
                    }
                    operands.block = Some(bytes);
                }
                "count" => operands.count = Some(number()?),
                "skip" => operands.skip = number()?,
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                _ => return Err(format!("unrecognized operand {key}")),
            }
        }
        Ok(operands)
    }
}

pub(crate) fn run(args: &Args) -> Outcome {
    let operands = Operands::parse(&args.operands)?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err("Must specify both input and output file names".into());
    };
    on_ring(dd(args, &operands, input, output))?;
    Ok(Exit::Ok)
}

async fn dd(args: &Args, operands: &Operands, input: &String, output: &str) -> Result<(), String> {
    let wanted = format_named(&args.output_format)?;
    let look = Look { force_share: args.force_share, ..args.naming.look(args.format.as_deref())? };
    let source = Source::open(std::slice::from_ref(input), &look).await?;
    let block = operands.block.unwrap_or(512);
    let end = operands
        .count
        .map_or(source.size(), |count| operands.skip.saturating_add(count).saturating_mul(block).min(source.size()));
    let start = operands.skip.saturating_mul(block).min(end);
    let copied = async {
        let size = (end - start).next_multiple_of(512);
        create::write(output, &CreateOptions::new(wanted, size)).await?;
        let chain = images::open(output, &Look { format: Some(wanted), writable: true, ..Look::default() }).await?;
        let disk = Disk::new(output, chain, DiskOptions::default());
        let mut at = start;
        let mut outcome = Ok(());
        while at < end && outcome.is_ok() {
            let status = source.status(at, (end - at).min(PART)).await?;
            if !status.zero {
                let bytes = Iov::alloc(status.len as usize);
                source.read(at, bytes.clone()).await?;
                outcome = disk.write(GuestOffset(at - start), bytes, false).await.map_err(|error| error.to_string());
            }
            at += status.len;
        }
        let closed = disk.close().await.map_err(|error| error.to_string());
        outcome.and(closed)
    };
    let copied = copied.await;
    source.close().await.and(copied)
}
