//! `headwater map`: which bytes are where, in qemu-img's columns and JSON fields.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, Output, on_ring};
use disk::{Disk, DiskOptions, Status};
use layout::{GuestOffset, GuestRange};
use std::io::{BufWriter, Write};
use std::rc::Rc;
use store::Store;

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
    /// First byte to look at
    #[arg(short, long, value_name = "OFFSET", value_parser = crate::size::parse)]
    start_offset: Option<u64>,
    /// How many bytes to look at
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = crate::size::parse)]
    max_length: Option<u64>,
    /// Even while somebody writes to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: String,
}

/// A run as it is printed: neighbours that continue each other are one.
struct Run {
    start: u64,
    status: Status,
}

impl Run {
    fn end(&self) -> u64 {
        self.start + self.status.len
    }

    /// Takes `next` in, if it just goes on.
    fn extend(&mut self, next: &Run) -> bool {
        let (a, b) = (&self.status, &next.status);
        let goes_on = match (a.host, b.host) {
            (Some(here), Some(there)) => here.checked_add(a.len) == Some(there),
            (None, None) => true,
            _ => false,
        };
        let same = a.compressed == b.compressed
            && a.zero == b.zero
            && a.allocated == b.allocated
            && a.depth == b.depth
            && self.end() == next.start;
        if same && goes_on {
            self.status.len += b.len;
        }
        same && goes_on
    }
}

pub(crate) fn run(args: &Args) -> Outcome {
    let look = Look { force_share: args.force_share, ..args.naming.look(args.format.as_deref())? };
    on_ring(async {
        let chain = images::open(&args.file, &look).await?;
        let stores: Vec<Rc<dyn Store>> = chain.iter().map(|layer| Rc::clone(layer.image.store())).collect();
        let disk = Disk::new("map", chain, DiskOptions::default());
        let printed = print(args, &disk, &stores).await;
        disk.close().await.map_err(|e| e.to_string())?;
        printed
    })?;
    Ok(Exit::Ok)
}

async fn print(args: &Args, disk: &Disk, stores: &[Rc<dyn Store>]) -> Result<(), String> {
    let whole = GuestRange::new(GuestOffset::ZERO, disk.size());
    let start = GuestOffset(args.start_offset.unwrap_or(0));
    let mut left = whole.intersect(GuestRange::new(start, args.max_length.unwrap_or(u64::MAX)));
    let mut out = Printer { out: BufWriter::new(std::io::stdout().lock()), output: args.output, stores, first: true };
    out.begin().map_err(|e| e.to_string())?;
    let mut run: Option<Run> = None;
    while !left.is_empty() {
        let status = disk.status(left).await.map_err(|e| e.to_string())?;
        let next = Run { start: left.start().get(), status };
        left = left.skip(status.len);
        let merged = run.as_mut().is_some_and(|run| run.extend(&next));
        if !merged && let Some(done) = run.replace(next) {
            out.run(&done).map_err(|e| e.to_string())?;
        }
    }
    if let Some(done) = run {
        out.run(&done).map_err(|e| e.to_string())?;
    }
    out.end().map_err(|e| e.to_string())
}

struct Printer<'a, W: Write> {
    out: W,
    output: Output,
    stores: &'a [Rc<dyn Store>],
    first: bool,
}

impl<W: Write> Printer<'_, W> {
    fn begin(&mut self) -> std::io::Result<()> {
        match self.output {
            Output::Human => writeln!(self.out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"),
            Output::Json => write!(self.out, "["),
        }
    }

    fn run(&mut self, run: &Run) -> std::io::Result<()> {
        let Status { len, zero, allocated, depth, compressed, host } = run.status;
        let data = allocated && !zero;
        // An image may be made of several files.
        let place = host.map(|host| self.stores.get(depth).map_or(("", host), |store| store.locate(host)));
        match (self.output, place) {
            (Output::Human, Some((name, host))) if data => {
                let hex = |value: u64| if value == 0 { "0".to_owned() } else { format!("{value:#x}") };
                writeln!(self.out, "{:<16}{:<16}{:<16}{name}", hex(run.start), hex(len), hex(host.get()))
            }
            (Output::Human, _) => Ok(()),
            (Output::Json, place) => {
                let comma = if std::mem::take(&mut self.first) { "" } else { ",\n" };
                write!(
                    self.out,
                    "{comma}{{ \"start\": {}, \"length\": {len}, \"depth\": {}, \"present\": {allocated}, \"zero\": {zero}, \
                     \"data\": {data}, \"compressed\": {compressed}",
                    run.start, depth,
                )?;
                if let Some((_, host)) = place {
                    write!(self.out, ", \"offset\": {}", host.get())?;
                }
                write!(self.out, "}}")
            }
        }
    }

    fn end(&mut self) -> std::io::Result<()> {
        if self.output == Output::Json {
            writeln!(self.out, "]")?;
        }
        self.out.flush()
    }
}
