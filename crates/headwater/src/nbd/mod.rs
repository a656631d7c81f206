//! `headwater nbd`, which is also what the program is when it is called `qemu-nbd`: one disk at one address, until its clients have
//! left.

mod list;

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming};
use crate::{background, size, tool};
use control::{CacheMode, DiskSpec, Engine, EngineConfig};
use disk::chain::Opener;
use export::nbd::Address;
use image::create::CreateOptions;
use image::{BackingRef, Format};
use serde_json::{Value, json};
use std::path::PathBuf;
use store::ailing::Ailments;
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "a command line is made of switches")]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Port to listen on
    #[arg(short, long, value_name = "PORT", default_value_t = 10809)]
    port: u16,
    /// Address to listen on
    #[arg(short, long, value_name = "IFACE", default_value = "0.0.0.0")]
    bind: String,
    /// Unix socket to listen on, instead
    #[arg(short = 'k', long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How many clients share it at once; more wait (0: any number)
    #[arg(short = 'e', long, value_name = "NUM", default_value_t = 1)]
    shared: u32,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Where in the image the disk begins
    #[arg(short, long, value_name = "BYTES", value_parser = size::parse)]
    offset: Option<u64>,
    /// Clients may not write
    #[arg(short, long)]
    read_only: bool,
    /// What is written goes to a temporary file and is lost at the end
    #[arg(short, long)]
    snapshot: bool,
    /// The disk as it was in this internal snapshot: its id, its name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short, long, value_name = "SNAPSHOT")]
    load_snapshot: Option<String>,
    /// Past the page cache
    #[arg(short, long)]
    nocache: bool,
    /// none, writeback, writethrough, directsync, unsafe
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// io_uring (there is no other), native, threads
    #[arg(long, value_name = "MODE")]
    aio: Option<String>,
    /// unmap (they are carried out in any case), ignore
    #[arg(long, value_name = "MODE")]
    discard: Option<String>,
    /// The export's name
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    export_name: String,
    /// Go on when the last client has left
    #[arg(short = 't', long)]
    persistent: bool,
    /// Say more
    #[arg(short, long)]
    verbose: bool,
    /// Go into the background once clients can come
    #[arg(long)]
    fork: bool,
    /// Write the process's number into this file
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// Say what a server offers, instead of serving
    #[arg(short = 'L', long)]
    list: bool,
    /// What clients are told of the export
    #[arg(short = 'D', long, value_name = "TEXT")]
    description: Option<String>,
    /// The image
    file: Option<String>,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let _ = (&args.aio, &args.discard, args.verbose);
    if args.list {
        if args.file.is_some() {
            return Err("List mode is incompatible with a file name".into());
        }
        return list::run(args);
    }
    let Some(file) = &args.file else {
        return Err(format!("No image file was named; see '{} --help'", tool::name()));
    };
    if args.snapshot && args.load_snapshot.is_some() {
        return Err("-s writes over the present state, so it does not go with -l".into());
    }
    let look = args.naming.look(args.format.as_deref())?;
    let format = look.format;
    let mut named = args.naming.name(file)?;
    let mut format = format;
    if let Some(offset) = args.offset.filter(|offset| *offset > 0) {
        named = part(&named, &look, offset)?;
        format = None;
    }
    let look = Look { format, ..look };
    let cache = if args.nocache { Some(CacheMode::None) } else { CacheMode::from_name(&args.cache) };
    let cache = cache.ok_or_else(|| format!("Invalid cache mode '{}'", args.cache))?;
    if args.fork {
        return background::start("--fork", "--pid-file", args.pid_file.as_deref(), "nbd");
    }
    let temporary = if args.snapshot { Some(overlay(&named, &look)?) } else { None };
    let file = temporary.as_ref().map_or_else(|| named.clone(), |(_, file)| file.clone());
    let spec = DiskSpec {
        name: args.export_name.clone(),
        file,
        format: if args.snapshot { Some(Format::Qcow2) } else { format },
        cache,
        description: args.description.clone(),
        read_only: args.read_only || args.load_snapshot.is_some(),
        snapshot: args.load_snapshot.clone(),
        copy_on_read: false,
        source: Ailments::default(),
    };
    let address = match &args.socket {
        Some(path) => Address::Unix(path.clone()),
        None => Address::Tcp(args.bind.clone(), args.port),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("could not set up the control thread: {error}"))?;
    runtime.block_on(serve(args, spec, address))?;
    Ok(Exit::Ok)
}

async fn serve(args: &Args, spec: DiskSpec, address: Address) -> Result<(), String> {
    let mut ends = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        ends.push(signal(kind).map_err(|error| format!("could not watch for signals: {error}"))?);
    }
    let engine = Engine::start(&EngineConfig {
        shards: 1,
        objects: args.naming.object_texts().to_vec(),
        ..EngineConfig::default()
    });
    let engine = engine.map_err(|error| format!("could not start: {error}"))?;
    let name = spec.name.clone();
    let started = async {
        engine.add_disk(spec).await.map_err(|error| error.to_string())?;
        engine.serve_nbd_to(address, vec![name.clone()], args.shared).await.map_err(|error| error.to_string())?;
        match &args.pid_file {
            Some(path) => std::fs::write(path, format!("{}\n", std::process::id()))
                .map_err(|error| format!("{}: {error}", path.display())),
            None => Ok(()),
        }
    };
    let started = started.await;
    if started.is_ok() {
        background::stands();
        let signalled = futures_util::future::select_all(ends.iter_mut().map(|end| Box::pin(end.recv())));
        let left = async {
            if args.persistent {
                std::future::pending().await
            } else {
                engine
                    .on_device(&name, |_, shard| async move {
                        shard.clients_left().await;
                        Ok(())
                    })
                    .await
            }
        };
        tokio::select! {
            _ = signalled => {}
            _ = left => {}
        }
    }
    let ended = engine.shut_down().await.map_err(|error| error.to_string());
    if let (Ok(()), Some(path)) = (&started, &args.pid_file) {
        // It may be gone already: then there is nothing to do.
        let _ = std::fs::remove_file(path);
    }
    started.and(ended)
}

/// What `named` shows from `offset` on, as a name.
fn part(named: &str, look: &Look, offset: u64) -> Result<String, String> {
    let tree: Value = match named.strip_prefix("json:") {
        Some(text) => serde_json::from_str(text).map_err(|error| error.to_string())?,
        None => {
            let format = images::on_ring(async {
                let chain = images::open(named, &Look { image_opts: false, ..look.clone() }).await?;
                let format = chain[0].image.format();
                images::close(&chain).await?;
                Ok(format)
            })?;
            json!({ "driver": format.name(), "file": { "driver": "file", "filename": named } })
        }
    };
    Ok(format!("json:{}", json!({ "driver": "raw", "offset": offset, "file": tree })))
}

/// An empty image over `file`, which goes away with the folder.
pub(crate) fn overlay(file: &str, look: &Look) -> Result<(tempfile::TempDir, String), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let place = dir.path().join("snapshot.qcow2").to_string_lossy().into_owned();
    let absolute = images::sources(look).identify(file, None);
    images::on_ring(async {
        let chain = images::open(file, &Look { image_opts: false, writable: false, ..look.clone() }).await?;
        let (size, format) = (chain[0].image.size(), chain[0].image.format());
        images::close(&chain).await?;
        let backing = BackingRef { name: absolute, format: Some(format) };
        let options =
            CreateOptions { backing: Some(backing), ..CreateOptions::new(Format::Qcow2, size.next_multiple_of(512)) };
        crate::img::create::write(&place, &options).await
    })?;
    Ok((dir, place))
}
