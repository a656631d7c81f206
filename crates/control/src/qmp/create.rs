//! `blockdev-create`: files, and images in nodes.

use super::arguments::{Arguments, missing, unexpected};
use super::schema::{Kind, Member, check_at, may, needs};
use crate::{Engine, Failure};
use graph::nodes::{MadeIn, make_file};
use image::create::{CreateOptions, Preallocation};
use image::qcow2::Compression;
use image::{BackingRef, Format, Passphrase};
use serde_json::{Map, Value, json};
use std::rc::Rc;
use std::time::Duration;

/// What it takes.
pub(super) const CREATE: &[Member] =
    &[needs("job-id", Kind::Text), needs("options", Kind::Open(&[needs("driver", Kind::Text)]))];

const MODES: Kind = Kind::Word(&["off", "metadata", "falloc", "full"]);

/// What each driver takes. What is known to QEMU and not made here is refused by its name.
const DRIVERS: &[(&str, &[Member])] = &[
    (
        "file",
        &[
            needs("filename", Kind::Text),
            needs("size", Kind::Size),
            may("preallocation", MODES),
            may("nocow", Kind::Flag),
        ],
    ),
    (
        "qcow2",
        &[
            needs("file", Kind::Any),
            needs("size", Kind::Size),
            may("version", Kind::Word(&["v2", "v3"])),
            may("backing-file", Kind::Text),
            may("backing-fmt", Kind::Text),
            may("cluster-size", Kind::Integer),
            may("preallocation", MODES),
            may("lazy-refcounts", Kind::Flag),
            may("refcount-bits", Kind::Integer),
            may("extended-l2", Kind::Flag),
            may("compression-type", Kind::Word(&["zlib", "zstd"])),
        ],
    ),
    (
        "qed",
        &[
            needs("file", Kind::Any),
            needs("size", Kind::Size),
            may("backing-file", Kind::Text),
            may("backing-fmt", Kind::Text),
            may("cluster-size", Kind::Integer),
            may("table-size", Kind::Integer),
        ],
    ),
    (
        "luks",
        &[
            needs("file", Kind::Any),
            needs("size", Kind::Size),
            needs("key-secret", Kind::Text),
            may("iter-time", Kind::Integer),
            may("preallocation", MODES),
        ],
    ),
];

/// Options of these drivers that QEMU has and that are not taken.
const NOT_TAKEN: [&str; 11] = [
    "data-file",
    "data-file-raw",
    "encrypt",
    "extent-size-hint",
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "detached-header",
    "header",
];

/// Drivers that QEMU makes images of and that are only read here, or not known.
const NOT_MADE: [&str; 8] = ["vdi", "vhdx", "vmdk", "vpc", "parallels", "nfs", "rbd", "ssh"];

/// What is to be made, in a form that can cross threads.
enum Make {
    File { file: String, size: u64, preallocation: Preallocation },
    Image { place: MadeIn, options: CreateOptions, key_secret: Option<String>, preallocation: Preallocation },
}

fn preallocation(arguments: &mut Arguments) -> Result<Preallocation, Failure> {
    Ok(arguments.word("preallocation", Preallocation::from_name)?.unwrap_or_default())
}

fn small(arguments: &mut Arguments, name: &str) -> Result<Option<u32>, Failure> {
    let too_large = || Failure::generic(format!("Parameter 'options.{name}' expects uint32"));
    arguments.size(name)?.map(|value| u32::try_from(value).map_err(|_| too_large())).transpose()
}

/// What the options of a driver mean.
fn understand(mut options: Map<String, Value>) -> Result<Make, Failure> {
    let driver = match options.shift_remove("driver") {
        Some(Value::String(driver)) => driver,
        Some(_) => return Err(super::arguments::wrong_type("options.driver", "string")),
        None => return Err(missing("options.driver")),
    };
    if NOT_MADE.contains(&driver.as_str()) {
        return Err(Failure::generic(format!("Images of driver '{driver}' are not made here")));
    }
    let Some((_, members)) = DRIVERS.iter().find(|(name, _)| *name == driver) else {
        let known = Format::from_name(&driver).is_some();
        return Err(match options.keys().next() {
            Some(stray) if known => unexpected(&format!("options.{stray}")),
            _ => Failure::generic(format!("Parameter 'driver' does not accept value '{driver}'")),
        });
    };
    if let Some(name) = options.keys().find(|name| NOT_TAKEN.contains(&name.as_str())) {
        return Err(Failure::generic(format!("Parameter 'options.{name}' is not supported")));
    }
    check_at("options.", members, &options)?;
    let mut arguments = Arguments::new(options);
    if driver == "file" {
        // No file system of ours copies on write behind our back where that were to be turned off.
        arguments.boolean("nocow")?;
        return Ok(Make::File {
            file: arguments.needed_string("filename")?,
            size: arguments.size("size")?.unwrap_or_default(),
            preallocation: preallocation(&mut arguments)?,
        });
    }
    let place = arguments.value("file").and_then(MadeIn::of);
    let place = place.ok_or_else(|| super::arguments::wrong_type("options.file", "BlockdevRef"))?;
    let format = Format::from_name(&driver).ok_or_else(|| Failure::generic(format!("Unknown driver '{driver}'")))?;
    let mut options = CreateOptions::new(format, arguments.size("size")?.unwrap_or_default());
    let backing_format = arguments.string("backing-fmt")?;
    let unknown = |name: &String| Failure::generic(format!("Parameter 'backing-fmt' does not accept value '{name}'"));
    let backing_format =
        backing_format.map(|name| Format::from_name(&name).ok_or_else(|| unknown(&name))).transpose()?;
    options.backing = arguments.string("backing-file")?.map(|name| BackingRef { name, format: backing_format });
    options.cluster_size = arguments.size("cluster-size")?;
    options.table_size = small(&mut arguments, "table-size")?;
    if arguments.string("version")?.is_some_and(|version| version == "v2") {
        options.qcow2.version = 2;
    }
    options.qcow2.lazy_refcounts = arguments.boolean("lazy-refcounts")?.unwrap_or(false);
    options.qcow2.extended_l2 = arguments.boolean("extended-l2")?.unwrap_or(false);
    if let Some(bits) = small(&mut arguments, "refcount-bits")? {
        options.qcow2.refcount_bits = bits;
    }
    if arguments.string("compression-type")?.is_some_and(|kind| kind == "zstd") {
        options.qcow2.compression = Compression::Zstd;
    }
    let key_secret = arguments.string("key-secret")?;
    options.iteration_time = arguments.size("iter-time")?.map(Duration::from_millis);
    let preallocation = preallocation(&mut arguments)?;
    arguments.end()?;
    Ok(Make::Image { place, options, key_secret, preallocation })
}

/// `blockdev-create`.
pub(crate) async fn create(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("job-id")?;
    let make = understand(arguments.object("options")?)?;
    arguments.end()?;
    let started = engine.on_nodes(move |shard| async move {
        let at = Rc::clone(&shard);
        let work = async move {
            let made = match make {
                Make::File { file, size, preallocation } => make_file(&file, size, preallocation).await,
                Make::Image { place, mut options, key_secret, preallocation } => {
                    if let Some(id) = key_secret {
                        let secret = at.graph().objects().secret(&id).map_err(|error| error.to_string())?;
                        options.passphrase = Some(Passphrase::new(&secret));
                    }
                    at.graph().create(place, &options, preallocation).await
                }
            };
            made.map_err(|error| error.to_string())
        };
        Ok(shard.jobs().create(id, Box::pin(work))?)
    });
    started.await.map(|()| json!({}))
}
