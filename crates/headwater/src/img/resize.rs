//! `img resize`: a disk's size, up and (where it is said twice) down.

use super::create::preallocation;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, on_ring};
use crate::size;
use disk::{Disk, DiskOptions};
use image::Format;
use image::create::Preallocation;
use layout::GuestOffset;
use std::rc::Rc;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the image, instead of looking
    #[arg(short, long = "format", value_name = "FMT")]
    format: Option<String>,
    /// What is new is: off (a hole), metadata, falloc, full
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    /// Print nothing
    #[arg(short, long = "quiet")]
    quiet: bool,
    /// Allow to lose what lies behind a smaller size
    #[arg(long)]
    shrink: bool,
    /// The image
    file: String,
    /// The new size, or the change: +1G, -512M
    #[arg(allow_hyphen_values = true)]
    size: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let preallocation = preallocation(&args.preallocation)?;
    on_ring(resize(args, preallocation))?;
    if !args.quiet {
        println!("Image resized.");
    }
    Ok(Exit::Ok)
}

async fn resize(args: &Args, preallocation: Preallocation) -> Result<(), String> {
    let chain =
        images::open(&args.file, &Look { writable: true, no_guest: true, ..args.naming.look(args.format.as_deref())? })
            .await?;
    let image = Rc::clone(&chain[0].image);
    let disk = Disk::new(&args.file, chain, DiskOptions::default());
    let old = disk.size();
    let resized = async {
        let bitmaps = image.bitmaps().await.map_err(|error| error.to_string())?;
        if let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.in_use) {
            return Err(format!(
                "Bitmap '{}' is inconsistent and cannot be used\nTry 'bitmap --remove' to delete it",
                bitmap.name
            ));
        }
        let (sign, number) = match args.size.as_bytes().first() {
            Some(b'+') => (1, &args.size[1..]),
            Some(b'-') => (-1, &args.size[1..]),
            _ => (0, args.size.as_str()),
        };
        let number = size::parse(number)?;
        let wanted = match sign {
            1 => old.checked_add(number),
            -1 => old.checked_sub(number).filter(|size| *size > 0),
            _ => Some(number).filter(|size| *size > 0),
        };
        let wanted = wanted.ok_or("New image size must be positive")?;
        if image.format() != Format::Raw && !wanted.is_multiple_of(512) {
            return Err("The new size must be a multiple of 512".to_owned());
        }
        let wanted = wanted.next_multiple_of(512);
        if wanted >= old {
            // Version 2 hides what a longer backing file has by clusters of zeros: those have their places already.
            let old_version = image.info().qcow2.is_some_and(|own| own.version < 3);
            if preallocation != Preallocation::Off && disk.chain().len() > 1 && old_version {
                return Err("a version 2 image over a backing file cannot be preallocated".to_owned());
            }
            // What cannot be done is told before the size is another one.
            let cannot = match image.format() {
                Format::Qcow2 => false,
                Format::Raw => preallocation == Preallocation::Metadata,
                _ => preallocation != Preallocation::Off,
            };
            if cannot {
                return Err(format!("Unsupported preallocation mode '{}'", args.preallocation));
            }
            disk.resize(wanted).await.map_err(|error| error.to_string())?;
            let done = image.preallocate(GuestOffset(old), preallocation).await;
            return done.map_err(|error| error.to_string());
        }
        if preallocation != Preallocation::Off {
            return Err("Preallocation can't be used for shrinking an image".to_owned());
        }
        if !args.shrink {
            return Err("Use the --shrink option to perform a shrink operation.\n\
                 Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an \
                 operation, make sure there is no important data there."
                .to_owned());
        }
        image.resize(wanted).await.map_err(|error| error.to_string())
    };
    let resized = resized.await;
    let closed = disk.close().await.map_err(|error| error.to_string());
    resized.and(closed)
}
