//! `headwater serve`: disks to guests, monitors to operators, until a signal or `quit` ends it.

use crate::exit::{Exit, Outcome};
use crate::images::format_named;
use crate::size::parse;
use crate::trace;
use control::{CacheMode, DiskSpec, Engine, EngineConfig, Failure};
use export::nbd::Address;
use job::{OnError, StreamOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::ailing::Ailments;
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Images to serve; each disk is called after its file (`my` for my.qed)
    #[arg(required_unless_present = "devices")]
    files: Vec<String>,
    /// An image to serve under a name of its own
    #[arg(long = "device", value_name = "NAME=FILE")]
    devices: Vec<String>,
    /// Format of the images, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Keep in the image what guests read from its backing file
    #[arg(long)]
    copy_on_read: bool,
    /// Stream each disk's backing data in from the start, at SPEED bytes a second at most (suffixes k, M, G)
    #[arg(long, value_name = "SPEED", num_args = 0..=1, default_missing_value = "0", require_equals = true, value_parser = parse)]
    stream: Option<u64>,
    /// How images meet the host's caches: none, writeback, writethrough, directsync, unsafe
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// Offer a disk on a vhost-user-blk socket (repeat it, in the disks' order or as NAME=SOCK)
    #[arg(long, value_name = "SOCK")]
    vhost_user: Vec<String>,
    /// Virtqueues a vhost-user-blk front end may use
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Offer all disks over NBD, on a unix socket or HOST:PORT
    #[arg(long, value_name = "SOCK|HOST:PORT")]
    nbd: Vec<String>,
    /// Listen for QMP clients
    #[arg(long, value_name = "SOCK")]
    qmp: Vec<PathBuf>,
    /// Listen for people (HMP)
    #[arg(long, value_name = "SOCK")]
    hmp: Vec<PathBuf>,
    /// Tell what happens: `[enable=]PATTERN[,events=FILE][,file=FILE]`; help lists what there is
    #[arg(short = 'T', long, value_name = "PATTERN")]
    trace: Vec<String>,
    /// Write nothing, and refuse guests' writes
    #[arg(long)]
    read_only: bool,
    /// Threads to spread the disks over
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: u16,
    /// Let every request to a backing file take at least this many milliseconds (for demonstrations and tests)
    #[arg(long, value_name = "MS", hide = true)]
    source_delay: Option<u64>,
    /// Let every read of a backing file fail as long as this file exists (for tests)
    #[arg(long, value_name = "FILE", hide = true)]
    source_error_while: Option<PathBuf>,
}

/// Everything the command line asked for, checked.
struct Plan {
    disks: Vec<DiskSpec>,
    vhost_user: Vec<(String, PathBuf)>,
    nbd: Vec<Address>,
}

pub(crate) fn run(args: Args) -> Outcome {
    if trace::options(&args.trace)? {
        return Ok(Exit::Ok);
    }
    let plan = plan(&args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| format!("could not set up the control thread: {e}"))?.block_on(serve(args, plan))
}

fn plan(args: &Args) -> Result<Plan, String> {
    let format = args.format.as_deref().map(format_named).transpose()?;
    let cache = CacheMode::from_name(&args.cache).ok_or_else(|| {
        format!("Unknown cache mode '{}': one of {}", args.cache, CacheMode::ALL.map(CacheMode::name).join(", "))
    })?;
    let mut named: Vec<(String, String)> = args.files.iter().map(|file| (stem(file), file.clone())).collect();
    for device in &args.devices {
        let (name, file) = device.split_once('=').ok_or_else(|| format!("--device {device}: NAME=FILE is expected"))?;
        named.push((name.to_owned(), file.to_owned()));
    }
    let disks: Vec<DiskSpec> = named
        .into_iter()
        .map(|(name, file)| DiskSpec {
            description: None,
            name,
            file,
            format,
            cache,
            read_only: args.read_only,
            copy_on_read: args.copy_on_read,
            snapshot: None,
            source: Ailments {
                delay: args.source_delay.map(Duration::from_millis),
                broken_while: args.source_error_while.clone(),
            },
        })
        .collect();
    let mut vhost_user = Vec::new();
    for (index, socket) in args.vhost_user.iter().enumerate() {
        let by_name = socket.split_once('=').filter(|(name, _)| disks.iter().any(|disk| disk.name == *name));
        match (by_name, disks.get(index)) {
            (Some((name, path)), _) => vhost_user.push((name.to_owned(), PathBuf::from(path))),
            (None, Some(disk)) => vhost_user.push((disk.name.clone(), PathBuf::from(socket))),
            (None, None) => return Err(format!("--vhost-user {socket}: there is no disk left for it; say NAME=SOCK")),
        }
    }
    Ok(Plan { disks, vhost_user, nbd: args.nbd.iter().map(|address| nbd_address(address)).collect() })
}

/// A disk's name: its file's, without folder and extension.
fn stem(file: &str) -> String {
    let path = Path::new(file.strip_prefix("file:").unwrap_or(file));
    path.file_stem().map_or_else(|| file.to_owned(), |stem| stem.to_string_lossy().into_owned())
}

/// HOST:PORT if it ends in a port and looks like no path, else a unix socket's path.
fn nbd_address(text: &str) -> Address {
    let tcp = text.rsplit_once(':').filter(|(host, _)| !host.contains('/') && !host.is_empty());
    match tcp.and_then(|(host, port)| Some((host, port.parse().ok()?))) {
        Some((host, port)) => Address::Tcp(host.trim_matches(['[', ']']).to_owned(), port),
        None => Address::Unix(PathBuf::from(text)),
    }
}

async fn serve(args: Args, plan: Plan) -> Outcome {
    // Before anything is there to clean up, so that no signal finds the default action.
    let mut ends = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        ends.push(signal(kind).map_err(|e| format!("could not watch for signals: {e}"))?);
    }
    let config = EngineConfig { shards: usize::from(args.shards), ..EngineConfig::default() };
    let engine = Engine::start(&config).map_err(|e| format!("could not start: {e}"))?;
    let started = start(&args, plan, &engine).await;
    if started.is_ok() {
        let signalled = futures_util::future::select_all(ends.iter_mut().map(|end| Box::pin(end.recv())));
        tokio::select! {
            _ = signalled => {}
            () = engine.quit_requested() => {}
        }
    }
    let ended = engine.shut_down().await;
    started?;
    ended.map_err(|e| e.to_string())?;
    Ok(Exit::Ok)
}

/// Opens disks, then monitors, then exports: a guest is let in only when everything stands.
async fn start(args: &Args, plan: Plan, engine: &Engine) -> Result<(), String> {
    let failed = |e: Failure| e.to_string();
    let names: Vec<String> = plan.disks.iter().map(|disk| disk.name.clone()).collect();
    for disk in plan.disks {
        engine.add_disk(disk).await.map_err(failed)?;
    }
    for socket in &args.qmp {
        control::qmp::listen(engine.clone(), socket).await.map_err(failed)?;
    }
    for socket in &args.hmp {
        control::hmp::listen(engine.clone(), socket).await.map_err(failed)?;
    }
    for address in plan.nbd {
        match engine.serve_nbd(address, names.clone()).await.map_err(failed)? {
            Address::Unix(path) => tracing::info!("NBD on {}", path.display()),
            Address::Tcp(host, port) => eprintln!("headwater: NBD on {host}:{port}"),
            Address::Inherited(number) => tracing::info!("NBD on descriptor {number}"),
        }
    }
    for (name, socket) in plan.vhost_user {
        engine.serve_vhost_user(&name, socket, args.queues).await.map_err(failed)?;
    }
    if let Some(speed) = args.stream {
        for name in &names {
            start_stream(engine, name, speed).await.map_err(failed)?;
        }
    }
    Ok(())
}

async fn start_stream(engine: &Engine, name: &str, speed: u64) -> Result<(), Failure> {
    engine
        .on_device(name, move |device, shard| async move {
            if device.disk.chain().len() < 2 {
                return Ok(());
            }
            let options = StreamOptions {
                id: None,
                disk: device.disk.clone(),
                base: disk::StreamBase::Nothing,
                backing_name: None,
                speed,
                on_error: OnError::Report,
                auto_finalize: true,
                auto_dismiss: true,
                hold: None,
            };
            shard.jobs().stream(options).map_err(Failure::from)
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_called_after_their_files() {
        assert_eq!(stem("/a/b/my_fedora.qed"), "my_fedora");
        assert_eq!(stem("disk"), "disk");
    }

    #[test]
    fn an_address_with_a_port_is_tcp_and_the_rest_are_paths() {
        assert_eq!(nbd_address("localhost:10809"), Address::Tcp("localhost".into(), 10809));
        assert_eq!(nbd_address("[::1]:0"), Address::Tcp("::1".into(), 0));
        assert_eq!(nbd_address("/run/x:1"), Address::Unix("/run/x:1".into()));
        assert_eq!(nbd_address("sock"), Address::Unix("sock".into()));
    }
}
