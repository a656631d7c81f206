//! `headwater info`: qemu-img's fields and texts.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, Output, on_ring};
use crate::size::human;
use disk::chain::{Layer, Opener};
use graph::Sources;
use image::qcow2::{Compression, Qcow2Info};
use image::vmdk::VmdkInfo;
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
    format: &'static str,
    virtual_size: u64,
    /// Of all its files.
    disk_size: Option<u64>,
    /// The file that the image is named by, and then others.
    files: Vec<File>,
    cluster_size: Option<u64>,
    dirty: bool,
    encrypted: bool,
    backing: Option<(String, Option<&'static str>, String)>,
    warnings: Vec<String>,
    qcow2: Option<Qcow2Info>,
    vmdk: Option<VmdkInfo>,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
}

/// A file that an image is made of.
struct File {
    name: String,
    /// What kind of place it is.
    protocol: &'static str,
    length: u64,
    disk_size: Option<u64>,
}

impl File {
    /// What QEMU calls it.
    fn child(number: usize) -> String {
        if number == 0 { "file".to_owned() } else { format!("extents.{}", number - 1) }
    }

    fn json(&self) -> Value {
        let mut file = Map::new();
        file.insert("children".into(), json!([]));
        file.insert("virtual-size".into(), json!(self.length));
        file.insert("filename".into(), json!(self.name));
        file.insert("format".into(), json!(self.protocol));
        if let Some(bytes) = self.disk_size {
            file.insert("actual-size".into(), json!(bytes));
        }
        if matches!(self.protocol, "file" | "host_device") {
            file.insert("format-specific".into(), json!({ "type": self.protocol, "data": {} }));
        }
        file.insert("dirty-flag".into(), json!(false));
        Value::Object(file)
    }
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
        let files = store.files().into_iter().enumerate().map(|(number, (name, length))| File {
            name: if number == 0 { own.to_owned() } else { name.to_owned() },
            protocol: if number == 0 { store.protocol() } else { "file" },
            // In whole sectors, as QEMU counts.
            length: length.next_multiple_of(512),
            disk_size: std::fs::metadata(name).ok().map(|meta| meta.blocks() * 512),
        });
        let files: Vec<File> = files.collect();
        Self {
            format: image.format().name(),
            virtual_size: image.size(),
            disk_size: files.iter().map(|file| file.disk_size).sum(),
            files,
            cluster_size: info.cluster_size,
            dirty: info.dirty,
            encrypted: info.encrypted || image.format() == image::Format::Luks,
            backing: image.backing().map(|below| {
                let full = full_name(&opener, &below.name, &filename);
                (below.name, below.format.map(image::Format::name), full)
            }),
            warnings: info.warnings,
            qcow2: info.qcow2,
            vmdk: info.vmdk,
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
        if let Some(own) = &self.vmdk {
            specific_vmdk(own).into_iter().for_each(&mut line);
        }
        // As QEMU has them: by their names.
        let files = self.files.iter().enumerate();
        for (number, file) in files.clone().skip(1).chain(files.take(1)) {
            line(format!("Child node '/{}':", File::child(number)));
            line(format!("    filename: {}", file.name));
            line(format!("    protocol type: {}", file.protocol));
            line(format!("    file length: {} ({} bytes)", human(file.length), file.length));
            line(format!("    disk size: {}", file.disk_size.map_or_else(|| "unavailable".to_owned(), human)));
        }
        text
    }

    fn json(&self) -> Value {
        let files = self.files.iter().enumerate();
        let children = files.clone().skip(1).chain(files.take(1));
        let children = children.map(|(number, file)| json!({ "name": File::child(number), "info": file.json() }));
        let mut top = Map::new();
        top.insert("children".into(), children.collect());
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
        if let Some(own) = &self.vmdk {
            let extents = own.extents.iter().map(|extent| {
                let mut fields = Map::new();
                if extent.packed {
                    fields.insert("compressed".into(), json!(true));
                }
                fields.insert("virtual-size".into(), json!(extent.size));
                fields.insert("filename".into(), json!(extent.file));
                if let Some(bytes) = extent.grain {
                    fields.insert("cluster-size".into(), json!(bytes));
                }
                fields.insert("format".into(), json!(extent.kind));
                Value::Object(fields)
            });
            let data = json!({
                "cid": own.cid,
                "parent-cid": own.parent_cid,
                "create-type": own.create_type,
                "extents": extents.collect::<Value>(),
            });
            top.insert("format-specific".into(), json!({ "type": "vmdk", "data": data }));
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

/// The lines that say what only VMDK has.
fn specific_vmdk(own: &VmdkInfo) -> Vec<String> {
    let mut lines = vec![
        "Format specific information:".to_owned(),
        format!("    cid: {}", own.cid),
        format!("    parent cid: {}", own.parent_cid),
        format!("    create type: {}", own.create_type),
        "    extents:".to_owned(),
    ];
    for (number, extent) in own.extents.iter().enumerate() {
        lines.push(format!("        [{number}]:"));
        if extent.packed {
            lines.push("            compressed: true".to_owned());
        }
        lines.push(format!("            virtual size: {}", extent.size));
        lines.push(format!("            filename: {}", extent.file));
        if let Some(bytes) = extent.grain {
            lines.push(format!("            cluster size: {bytes}"));
        }
        lines.push(format!("            format: {}", extent.kind));
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
