//! `img amend`: what an image says of itself, changed where it is.

use super::create::{split_options, switch};
use super::key_slots::KeyOptions;
use super::option_help;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, format_named, on_ring};
use crate::size;
use disk::{Disk, DiskOptions};
use image::Format;
use image::amend::Amendment;
use std::rc::Rc;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// What is to be changed: key=value,…; help lists the keys
    #[arg(short, long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Show progress (there is little to see: it is over soon)
    #[arg(short, long)]
    progress: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Cache mode; accepted
    #[arg(short = 't', value_name = "CACHE")]
    cache: Option<String>,
    /// Also what may make the data unreadable for good: erasing the last key slot
    #[arg(long)]
    force: bool,
    /// The image
    #[arg(required_unless_present = "options")]
    file: Option<String>,
}

/// What the options ask for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    change: Amendment,
    size: Option<u64>,
    keys: KeyOptions,
}

/// Options that new images have and that are there for good.
const FOR_NEW_IMAGES: [&str; 4] = ["cluster_size", "compression_type", "extended_l2", "preallocation"];

/// The same, of what encrypts: after `encrypt.` in QCOW2, by themselves in LUKS.
const FOR_NEW_KEYS: [&str; 7] =
    ["format", "key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg"];

fn only_for_new(key: &str) -> String {
    format!("Invalid parameter '{key}'\nThis option is only supported for image creation")
}

impl Wanted {
    fn gather(lists: &[String], format: Format) -> Result<Self, String> {
        let mut wanted = Self::default();
        for pair in lists.iter().flat_map(|list| split_options(list)) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| format!("Invalid parameter '{pair}': key=value is expected"))?;
            let of_key = if format == Format::Luks { Some(key) } else { key.strip_prefix("encrypt.") };
            if let Some(part) = of_key {
                if !wanted.keys.take(part, key, value)? {
                    let known = FOR_NEW_KEYS.contains(&part) || format == Format::Luks && part == "size";
                    return Err(if known { only_for_new(key) } else { format!("Invalid parameter '{key}'") });
                }
                continue;
            }
            wanted.take(key, value)?;
        }
        Ok(wanted)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), String> {
        let change = &mut self.change;
        match key {
            "size" => self.size = Some(size::parse(value)?),
            "compat" => {
                change.version = Some(match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => return Err(format!("Unknown compatibility level {value}")),
                });
            }
            "lazy_refcounts" => change.lazy_refcounts = Some(switch(key, value)?),
            "refcount_bits" => {
                let bits = value.parse().map_err(|_| "Parameter 'refcount_bits' expects a number".to_owned())?;
                change.refcount_bits = Some(bits);
            }
            "data_file" => change.data_file = Some(value.to_owned()),
            "data_file_raw" => change.data_file_raw = Some(switch(key, value)?),
            "backing_file" | "backing_fmt" => {
                return Err("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.".to_owned());
            }
            _ if FOR_NEW_IMAGES.contains(&key) => return Err(only_for_new(key)),
            _ => return Err(format!("Invalid parameter '{key}'")),
        }
        Ok(())
    }
}

/// Where the data file has moved to: it is opened there.
fn moved(lists: &[String]) -> Option<String> {
    let pairs = lists.iter().flat_map(|list| split_options(list));
    pairs.filter_map(|pair| pair.strip_prefix("data_file=").map(str::to_owned)).next_back()
}

pub(crate) fn run(args: &Args) -> Outcome {
    if args.options.is_empty() {
        return Err("Must specify options (-o)\nTry 'qemu-img amend --help' for more info".to_owned());
    }
    if option_help::is_asked(&args.options) {
        let format = args.format.as_deref().map_or(Ok(Format::Qcow2), format_named)?;
        let text = option_help::amending(format)
            .ok_or_else(|| format!("Format driver '{format}' does not support option amendment"))?;
        print!("{text}");
        return Ok(Exit::Ok);
    }
    let file = args.file.as_deref().ok_or("Expecting one image file name")?;
    on_ring(amend(args, file))?;
    Ok(Exit::Ok)
}

async fn amend(args: &Args, file: &str) -> Result<(), String> {
    let look = Look { writable: true, no_guest: true, ..args.naming.look(args.format.as_deref())? };
    let sources = images::sources(&look).with_data_file(moved(&args.options));
    let chain = images::open_from(&sources, file, &look).await?;
    let image = Rc::clone(&chain[0].image);
    let disk = Disk::new(file, chain, DiskOptions::default());
    let changed = async {
        let format = image.format();
        if !matches!(format, Format::Qcow2 | Format::Luks) {
            return Err(format!("Format driver '{format}' does not support option amendment"));
        }
        let Wanted { change, size, keys } = Wanted::gather(&args.options, format)?;
        // Everything that can be refused without doing anything is, first.
        let keys = keys.change(&look.objects)?;
        if let Some(size) = size {
            if !size.is_multiple_of(512) {
                return Err("The new size must be a multiple of 512".to_owned());
            }
            let resized = if size < disk.size() { image.resize(size).await } else { Ok(()) };
            resized.map_err(|error| error.to_string())?;
            disk.resize(size).await.map_err(|error| error.to_string())?;
        }
        if format == Format::Qcow2 {
            image.amend(&change).await.map_err(|error| error.to_string())?;
        }
        if let Some(keys) = keys {
            let slots = image.key_slots().ok_or("Can't amend encryption options - encryption not present")?;
            slots.change(&keys, args.force).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    };
    let changed = changed.await;
    let closed = disk.close().await.map_err(|error| error.to_string());
    changed.and(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_changed_is_told() {
        let gather = |list: &str| Wanted::gather(&[list.to_owned()], Format::Qcow2);
        let change = Amendment { version: Some(2), lazy_refcounts: Some(false), ..Amendment::default() };
        assert_eq!(gather("compat=0.10,lazy_refcounts=off"), Ok(Wanted { change, ..Wanted::default() }));
        for (list, text) in [
            ("compat=0.11", "Unknown compatibility level 0.11"),
            ("cluster_size=4k", "Invalid parameter 'cluster_size'\nThis option is only supported for image creation"),
            ("backing_file=x", "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead."),
            ("foo=1", "Invalid parameter 'foo'"),
        ] {
            assert_eq!(gather(list).unwrap_err(), text);
        }
    }
}
