//! `headwater demo`: the whole of it in half a minute, on a machine with nothing else installed.
//!
//! A master image behind a slow link, an empty overlay, a guest that works on it at once while it streams, and in the end an
//! image that stands alone: proved by comparing every byte after the master is gone.

mod boot;
mod guest;

use crate::create;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, on_ring};
use crate::progress;
use crate::size::human;
use control::{CacheMode, DiskSpec, Engine, EngineConfig, Failure, Happening, Stamped};
use export::nbd::Address;
use guest::{Guest, Pattern};
use image::Format;
use image::create::CreateOptions;
use indicatif::ProgressBar;
use job::{Event, OnError, StreamOptions};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use store::ailing::Ailments;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Boot a real guest under QEMU (needs qemu-system-x86_64)
    #[arg(long)]
    boot: bool,
    /// Size of the master image
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, default_value = "96M")]
    size: u64,
    /// Milliseconds that every request to the master takes
    #[arg(long, value_name = "MS", default_value_t = 4)]
    delay: u64,
}

/// How often the demo looks at the job.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn run(args: &Args) -> Outcome {
    let folder = tempfile::Builder::new()
        .prefix("headwater-demo-")
        .tempdir()
        .map_err(|e| format!("no temporary folder: {e}"))?;
    if args.boot { boot::run(folder.path(), args.delay) } else { show(folder.path(), args) }
}

/// Says one step of the story.
fn step(text: &str) {
    println!("• {text}");
}

fn show(folder: &Path, args: &Args) -> Outcome {
    let size = args.size.clamp(8 << 20, 16 << 30).next_multiple_of(1 << 20);
    let master = folder.join("master.img");
    let top = folder.join("my.qed");
    let pattern = Pattern::new(size);
    let data = pattern.write_master(&master).map_err(|e| format!("could not write '{}': {e}", master.display()))?;
    step(&format!("a master image of {} ({} of data), {} ms away", human(size), human(data), args.delay));
    make_overlay(&master, &top, size)?;
    step(&format!("an empty overlay of {}", human(fs::metadata(&top).map_or(0, |meta| meta.len()))));
    let (guest, took) = block_on(serve_and_stream(folder, &top, args.delay, pattern))?;
    step(&format!(
        "everything arrived in {:.1} s while the guest did {} requests; its reads were all right",
        took.as_secs_f64(),
        guest.requests()
    ));
    prove(&master, &top, &guest)?;
    Ok(Exit::Ok)
}

fn block_on<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| format!("could not set up the control thread: {e}"))?.block_on(work)
}

/// An empty overlay over `master`, which is recorded as raw.
fn make_overlay(master: &Path, top: &Path, size: u64) -> Result<(), String> {
    let name = master.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let options = CreateOptions {
        format: Format::Qed,
        size,
        backing: Some(image::BackingRef { name, format: Some(Format::Raw) }),
        cluster_size: None,
        table_size: None,
        qcow2: image::qcow2::Options::default(),
        passphrase: None,
        iteration_time: None,
    };
    on_ring(create::write(&top.to_string_lossy(), &options))
}

/// What the demo serves: the overlay with copy-on-read, its master slowed down.
fn spec(top: &Path, delay: u64) -> DiskSpec {
    DiskSpec {
        description: None,
        name: "my".into(),
        file: top.to_string_lossy().into_owned(),
        format: Some(Format::Qed),
        cache: CacheMode::Writeback,
        read_only: false,
        copy_on_read: true,
        snapshot: None,
        source: Ailments { delay: Some(Duration::from_millis(delay)), broken_while: None },
    }
}

async fn serve_and_stream(
    folder: &Path,
    top: &Path,
    delay: u64,
    pattern: Pattern,
) -> Result<(Guest, Duration), String> {
    let failed = |e: Failure| e.to_string();
    let engine = Engine::start(&EngineConfig::default()).map_err(|e| format!("could not start: {e}"))?;
    let begun = Instant::now();
    engine.add_disk(spec(top, delay)).await.map_err(failed)?;
    let socket = folder.join("nbd.sock");
    engine.serve_nbd(Address::Unix(socket.clone()), vec!["my".into()]).await.map_err(failed)?;
    let guest = Guest::boot(socket, pattern)?;
    step(&format!("the guest runs after {} ms; nothing has arrived yet", begun.elapsed().as_millis()));
    let mut events = engine.subscribe();
    stream(&engine).await.map_err(failed)?;
    let bar = progress::bytes(0, "streaming");
    let ended = loop {
        let event = tokio::time::timeout(LOOK_EVERY, events.recv()).await;
        match event {
            Ok(Some(Stamped { event: Happening::Job(Event::Completed { error, .. }), .. })) => break error,
            Ok(Some(_)) => {}
            Ok(None) => break Some("the engine ended".into()),
            Err(_) => look(&engine, &bar).await.map_err(failed)?,
        }
    };
    let took = begun.elapsed();
    bar.finish_and_clear();
    let guest = guest.stop();
    engine.shut_down().await.map_err(failed)?;
    match ended {
        None => Ok((guest?, took)),
        Some(error) => Err(format!("the stream failed: {error}")),
    }
}

async fn stream(engine: &Engine) -> Result<(), Failure> {
    engine
        .on_device("my", |device, shard| async move {
            let options = StreamOptions {
                id: None,
                disk: device.disk.clone(),
                base: disk::StreamBase::Nothing,
                backing_name: None,
                speed: 0,
                on_error: OnError::Report,
                auto_finalize: true,
                auto_dismiss: true,
                hold: None,
            };
            shard.jobs().stream(options).map_err(Failure::from)
        })
        .await
}

async fn look(engine: &Engine, bar: &ProgressBar) -> Result<(), Failure> {
    let job = engine.on_device("my", |_, shard| async move { Ok(shard.jobs().info("my")) }).await?;
    if let Some(job) = job {
        bar.set_length(job.len);
        bar.set_position(job.offset);
    }
    Ok(())
}

/// The master goes; what is left must be whole: no backing file in the header, clean tables, every byte as the guest left it.
fn prove(master: &Path, top: &Path, guest: &Guest) -> Result<(), String> {
    fs::remove_file(master).map_err(|e| e.to_string())?;
    let top = PathBuf::from(top);
    on_ring(async {
        let chain = images::open(&top.to_string_lossy(), &Look::default()).await?;
        let image = chain.first().ok_or("no image")?.image.clone();
        if let Some(below) = image.backing() {
            return Err(format!("the header still names '{}'", below.name));
        }
        step("the header names no backing file any more; the master is deleted");
        let report = image.check(image::Repair::None).await.map_err(|e| e.to_string())?;
        if !report.is_clean() {
            return Err(format!("the image is not clean: {report:?}"));
        }
        let disk = disk::Disk::new("proof", chain, disk::DiskOptions::default());
        guest.compare(&disk).await?;
        disk.close().await.map_err(|e| e.to_string())
    })?;
    step("every byte is as it must be: the image stands alone");
    Ok(())
}
