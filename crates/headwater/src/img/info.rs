//! `headwater info`: qemu-img's fields and texts.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, Output, on_ring};
use crate::size::human;
use disk::chain::{Layer, Opener};
use graph::Sources;
use image::qcow2::{Compression, Qcow2Info};
use image::{Bitmap, Snapshot};
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Also what lies below, each image in turn
    #[arg(short, long)]
    backing_chain: bool,
    /// Even while somebody writes to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let look = Look {
        force_share: args.force_share,
        no_backing: !args.backing_chain,
        ..args.naming.look(args.format.as_deref())?
    };
    let asked = graph::display_name(&args.naming.name(&args.file)?);
    let described = on_ring(async {
        let chain = images::open(&args.file, &look).await?;
        let mut described = Vec::new();
        for (depth, layer) in chain.iter().enumerate() {
            let snapshots = layer.image.snapshots().await.map_err(|error| error.to_string())?;
            let bitmaps = layer.image.bitmaps().await.map_err(|error| error.to_string())?;
            described.push(Described { bitmaps, ..Described::of(layer, depth, &asked, snapshots) });
        }
        images::close(&chain).await?;
        Ok(described)
    })?;
    match args.output {
        Output::Json => {
            let mut values: Vec<Value> = described.iter().map(Described::json).collect();
            let value = if args.backing_chain { Value::Array(values) } else { values.swap_remove(0) };
            println!("{value:#}");
        }
        Output::Human => {
            let texts: Vec<String> = described.iter().map(Described::text).collect();
            print!("{}", texts.join("\n"));
        }
    }
    Ok(Exit::Ok)
}

/// One image as `info` shows it.
struct Described {
    filename: String,
    /// Its file's own name, and what kind of place that is.
    place: (String, &'static str),
    format: &'static str,
    virtual_size: u64,
    disk_size: Option<u64>,
    file_length: u64,
    cluster_size: Option<u64>,
    dirty: bool,
    encrypted: bool,
    backing: Option<(String, Option<&'static str>, String)>,
    warnings: Vec<String>,
    qcow2: Option<Qcow2Info>,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
}

impl Described {
    fn of(layer: &Layer, depth: usize, asked: &str, snapshots: Vec<Snapshot>) -> Self {
        let image = &layer.image;
        let store = image.file();
        let filename = if depth == 0 { asked.to_owned() } else { store.name().to_owned() };
        let info = image.info();
        let opener = Sources::default();
        // What is no more than a file is called as it was asked for.
        let own =
            if filename.starts_with("json:") || filename.starts_with("blkdebug:") { store.name() } else { &filename };
        Self {
            place: (own.to_owned(), store.protocol()),
            format: image.format().name(),
            virtual_size: image.size(),
            disk_size: std::fs::metadata(store.name()).ok().map(|meta| meta.blocks() * 512),
            // In whole sectors, as QEMU counts.
            file_length: store.size().next_multiple_of(512),
            cluster_size: info.cluster_size,
            dirty: info.dirty,
            encrypted: info.encrypted || image.format() == image::Format::Luks,
            backing: image.backing().map(|below| {
                let full = full_name(&opener, &below.name, &filename);
                (below.name, below.format.map(image::Format::name), full)
            }),
            warnings: info.warnings,
            qcow2: info.qcow2,
            snapshots,
            bitmaps: Vec::new(),
            filename,
        }
    }

    fn text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        let disk_size = self.disk_size.map_or_else(|| "unavailable".to_owned(), human);
        let mut line = |line: String| {
            let _ = writeln!(text, "{line}");
        };
        line(format!("image: {}", self.filename));
        line(format!("file format: {}", self.format));
        line(format!("virtual size: {} ({} bytes)", human(self.virtual_size), self.virtual_size));
        line(format!("disk size: {disk_size}"));
        if self.encrypted {
            line("encrypted: yes".into());
        }
        if let Some(bytes) = self.cluster_size {
            line(format!("cluster_size: {bytes}"));
        }
        if self.dirty {
            line("cleanly shut down: no".into());
        }
        if let Some((name, format, full)) = &self.backing {
            if name == full {
                line(format!("backing file: {name}"));
            } else {
                line(format!("backing file: {name} (actual path: {full})"));
            }
            if let Some(format) = format {
                line(format!("backing file format: {format}"));
            }
        }
        for warning in &self.warnings {
            line(format!("warning: {warning}"));
        }
        if !self.snapshots.is_empty() {
            line(super::snapshot::text(&self.snapshots).trim_end().to_owned());
        }
        if let Some(own) = &self.qcow2 {
            specific(own, &self.bitmaps).into_iter().for_each(&mut line);
        }
        line("Child node '/file':".into());
        let (name, protocol) = &self.place;
        line(format!("    filename: {name}"));
        line(format!("    protocol type: {protocol}"));
        line(format!("    file length: {} ({} bytes)", human(self.file_length), self.file_length));
        line(format!("    disk size: {disk_size}"));
        text
    }

    fn json(&self) -> Value {
        let mut file = Map::new();
        file.insert("children".into(), json!([]));
        file.insert("virtual-size".into(), json!(self.file_length));
        let (name, protocol) = &self.place;
        file.insert("filename".into(), json!(name));
        file.insert("format".into(), json!(protocol));
        if let Some(bytes) = self.disk_size {
            file.insert("actual-size".into(), json!(bytes));
        }
        if matches!(*protocol, "file" | "host_device") {
            file.insert("format-specific".into(), json!({ "type": protocol, "data": {} }));
        }
        file.insert("dirty-flag".into(), json!(false));
        let mut top = Map::new();
        top.insert("children".into(), json!([{ "name": "file", "info": file }]));
        if let Some((name, format, full)) = &self.backing {
            if let Some(format) = format {
                top.insert("backing-filename-format".into(), json!(format));
            }
            top.insert("full-backing-filename".into(), json!(full));
            top.insert("backing-filename".into(), json!(name));
        }
        if !self.snapshots.is_empty() {
            let all = self.snapshots.iter().map(|snapshot| {
                json!({
                    "id": snapshot.id,
                    "name": snapshot.name,
                    "vm-state-size": snapshot.vm_state_size,
                    "date-sec": snapshot.date.0,
                    "date-nsec": snapshot.date.1,
                    "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
                    "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
                    "icount": snapshot.icount.unwrap_or(0),
                })
            });
            top.insert("snapshots".into(), all.collect());
        }
        if let Some(own) = &self.qcow2 {
            let mut data = Map::new();
            data.insert("compat".into(), json!(compat(own)));
            data.insert("compression-type".into(), json!(compression(own)));
            data.insert("refcount-bits".into(), json!(own.refcount_bits));
            if own.version > 2 {
                data.insert("lazy-refcounts".into(), json!(own.lazy_refcounts));
                if !self.bitmaps.is_empty() {
                    let bitmap = |bitmap: &Bitmap| json!({ "flags": flags(bitmap), "name": bitmap.name, "granularity": bitmap.granularity });
                    data.insert("bitmaps".into(), self.bitmaps.iter().map(bitmap).collect());
                }
                if let Some(file) = &own.data_file {
                    data.insert("data-file".into(), json!(file.name));
                    data.insert("data-file-raw".into(), json!(file.raw));
                }
                data.insert("corrupt".into(), json!(own.corrupt));
                data.insert("extended-l2".into(), json!(own.extended_l2));
            }
            top.insert("format-specific".into(), json!({ "type": "qcow2", "data": data }));
        }
        top.insert("virtual-size".into(), json!(self.virtual_size));
        top.insert("filename".into(), json!(self.filename));
        if let Some(bytes) = self.cluster_size {
            top.insert("cluster-size".into(), json!(bytes));
        }
        if self.encrypted {
            top.insert("encrypted".into(), json!(true));
        }
        top.insert("format".into(), json!(self.format));
        if let Some(bytes) = self.disk_size {
            top.insert("actual-size".into(), json!(bytes));
        }
        top.insert("dirty-flag".into(), json!(self.dirty));
        Value::Object(top)
    }
}

/// The lines that say what only QCOW2 has.
pub(crate) fn specific(own: &Qcow2Info, bitmaps: &[Bitmap]) -> Vec<String> {
    let mut lines = vec![
        "Format specific information:".to_owned(),
        format!("    compat: {}", compat(own)),
        format!("    compression type: {}", compression(own)),
    ];
    if own.version > 2 {
        lines.push(format!("    lazy refcounts: {}", own.lazy_refcounts));
    }
    if !bitmaps.is_empty() {
        lines.push("    bitmaps:".to_owned());
    }
    for (number, bitmap) in bitmaps.iter().enumerate() {
        lines.push(format!("        [{number}]:\n            flags:"));
        let flags = flags(bitmap).into_iter().enumerate();
        lines.extend(flags.map(|(number, flag)| format!("                [{number}]: {flag}")));
        lines.push(format!("            name: {}\n            granularity: {}", bitmap.name, bitmap.granularity));
    }
    lines.push(format!("    refcount bits: {}", own.refcount_bits));
    if let Some(file) = &own.data_file {
        lines.push(format!("    data file: {}", file.name));
        lines.push(format!("    data file raw: {}", file.raw));
    }
    if own.version > 2 {
        lines.push(format!("    corrupt: {}", own.corrupt));
        lines.push(format!("    extended l2: {}", own.extended_l2));
    }
    lines
}

fn flags(bitmap: &Bitmap) -> Vec<&'static str> {
    [(bitmap.in_use, "in-use"), (bitmap.enabled, "auto")].iter().filter(|flag| flag.0).map(|flag| flag.1).collect()
}

fn compat(own: &Qcow2Info) -> &'static str {
    if own.version == 2 { "0.10" } else { "1.1" }
}

fn compression(own: &Qcow2Info) -> &'static str {
    match own.compression {
        Compression::Deflate => "zlib",
        Compression::Zstd => "zstd",
    }
}

/// The backing file's name as seen from here rather than from the image that names it.
fn full_name(opener: &Sources, name: &str, referrer: &str) -> String {
    let plain = std::path::Path::new(referrer).parent().is_none_or(|folder| folder.as_os_str().is_empty());
    if plain || name.starts_with('/') {
        return name.to_owned();
    }
    match referrer.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/{name}"),
        None => opener.identify(name, Some(referrer)),
    }
}
