//! `headwater info`: qemu-img's fields and texts.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Output, format_named, on_ring};
use crate::size::human;
use disk::chain::{FileOpener, Layer, Opener};
use serde_json::{Map, Value, json};
use std::os::unix::fs::MetadataExt;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Also what lies below, each image in turn
    #[arg(long)]
    backing_chain: bool,
    /// Even while somebody writes to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let format = args.format.as_deref().map(format_named).transpose()?;
    let look = Look { format, force_share: args.force_share, no_backing: !args.backing_chain, ..Look::default() };
    let described = on_ring(async {
        let chain = images::open(&args.file, look).await?;
        let described: Vec<Described> =
            chain.iter().enumerate().map(|(depth, layer)| Described::of(layer, depth, &args.file)).collect();
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
    disk_size: Option<u64>,
    file_length: u64,
    cluster_size: Option<u64>,
    dirty: bool,
    backing: Option<(String, Option<&'static str>, String)>,
    warnings: Vec<String>,
}

impl Described {
    fn of(layer: &Layer, depth: usize, asked: &str) -> Self {
        let image = &layer.image;
        let store = image.store();
        let filename = if depth == 0 { asked.to_owned() } else { store.name().to_owned() };
        let info = image.info();
        let opener = FileOpener::default();
        Self {
            format: image.format().name(),
            virtual_size: image.size(),
            disk_size: std::fs::metadata(store.name()).ok().map(|meta| meta.blocks() * 512),
            file_length: store.size(),
            cluster_size: info.cluster_size,
            dirty: info.dirty,
            backing: image.backing().map(|below| {
                let full = full_name(&opener, &below.name, &filename);
                (below.name, below.format.map(image::Format::name), full)
            }),
            warnings: info.warnings,
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
        if self.dirty {
            line("cleanly shut down: no".into());
        }
        if let Some(bytes) = self.cluster_size {
            line(format!("cluster_size: {bytes}"));
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
        line("Child node '/file':".into());
        line(format!("    filename: {}", self.filename));
        line("    protocol type: file".into());
        line(format!("    file length: {} ({} bytes)", human(self.file_length), self.file_length));
        line(format!("    disk size: {disk_size}"));
        text
    }

    fn json(&self) -> Value {
        let mut file = Map::new();
        file.insert("children".into(), json!([]));
        file.insert("virtual-size".into(), json!(self.file_length));
        file.insert("filename".into(), json!(self.filename));
        file.insert("format".into(), json!("file"));
        if let Some(bytes) = self.disk_size {
            file.insert("actual-size".into(), json!(bytes));
        }
        file.insert("format-specific".into(), json!({ "type": "file", "data": {} }));
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
        top.insert("virtual-size".into(), json!(self.virtual_size));
        top.insert("filename".into(), json!(self.filename));
        if let Some(bytes) = self.cluster_size {
            top.insert("cluster-size".into(), json!(bytes));
        }
        top.insert("format".into(), json!(self.format));
        if let Some(bytes) = self.disk_size {
            top.insert("actual-size".into(), json!(bytes));
        }
        top.insert("dirty-flag".into(), json!(self.dirty));
        Value::Object(top)
    }
}

/// The backing file's name as seen from here rather than from the image that names it.
fn full_name(opener: &FileOpener, name: &str, referrer: &str) -> String {
    let plain = std::path::Path::new(referrer).parent().is_none_or(|folder| folder.as_os_str().is_empty());
    if plain || name.starts_with('/') {
        return name.to_owned();
    }
    let joined = std::path::Path::new(referrer).with_file_name(name);
    joined.to_str().map_or_else(|| opener.identify(name, Some(referrer)), str::to_owned)
}
