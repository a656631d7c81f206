//! What is measured: for each workload the disk, the way to it, the load, and the goal.

use std::time::Instant;

use headwater_tests::process::PATIENCE;
use headwater_tests::qemu::Cache;
use headwater_tests::{Result, error};
use serde_json::{Value, json};

use crate::files::Files;
use crate::load::{self, Nbd, Op, Pattern, VhostUser};
use crate::side::{Disk, Export, Server, Side};
use crate::tool::Tool;

/// Which disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    /// Raw, allocated.
    Raw,
    /// QED without backing file, allocated.
    Qed,
    /// QED in which nothing is allocated, over a raw master.
    Overlay,
    /// The same in QCOW2.
    Qcow2Overlay,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    Random {
        export: Export,
        image: Image,
        op: Op,
        pattern: Pattern,
        depth: usize,
        cache: Cache,
    },
    /// The stream job from start to end, over an overlay in which nothing is allocated.
    Stream {
        format: &'static str,
        slow: bool,
    },
    /// The image tool.
    Tool(Tool),
}

pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) unit: &'static str,
    /// The ratio of the first side to the second that is aimed at.
    pub(crate) goal: f64,
    work: Work,
}

/// One side of one round.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// In the workload's unit; more is better.
    pub(crate) rate: f64,
    /// Microseconds of processor time the server spent on one request, or on one MiB of a stream.
    pub(crate) cpu: f64,
    /// Microseconds; none for streams.
    pub(crate) latency: Option<(f64, f64)>,
}

impl Sample {
    pub(crate) fn json(&self) -> Value {
        json!({
            "rate": self.rate, "cpu_us": self.cpu,
            "p50_us": self.latency.map(|(median, _)| median), "p99_us": self.latency.map(|(_, p99)| p99),
        })
    }
}

/// All of them, the cheap ones first.
pub(crate) fn all() -> Vec<Workload> {
    use {
        Export::Nbd, Export::VhostUser, Image::Overlay, Image::Qcow2Overlay, Image::Qed, Image::Raw, Op::Read,
        Op::Write,
    };
    const ZLIB: &str = "compression_type=zlib";
    const ZSTD: &str = "compression_type=zstd";
    let random = |name, about, goal, export, image, op, pattern, depth| Workload {
        name,
        about,
        unit: "IOPS",
        goal,
        work: Work::Random { export, image, op, pattern, depth, cache: Cache::None },
    };
    let near =
        |name, about, export, image, op, depth| random(name, about, 1.0, export, image, op, Pattern::Anywhere, depth);
    let allocating = |name, about, export| random(name, about, 5.0, export, Overlay, Write, Pattern::EachCluster, 32);
    let cached = |name, about, export| Workload {
        name,
        about,
        unit: "IOPS",
        goal: 5.0,
        work: Work::Random {
            export,
            image: Overlay,
            op: Write,
            pattern: Pattern::EachCluster,
            depth: 32,
            cache: Cache::Writeback,
        },
    };
    let stream = |name, about, format, slow| Workload {
        name,
        about,
        unit: "MiB/s",
        goal: 1.0,
        work: Work::Stream { format, slow },
    };
    let tool = |name, about, unit, goal, tool| Workload { name, about, unit, goal, work: Work::Tool(tool) };
    vec![
        near("nbd-raw-read-1", "4k random reads of a raw disk over NBD, one at a time", Nbd, Raw, Read, 1),
        near("nbd-raw-read-32", "4k random reads of a raw disk over NBD, 32 in flight", Nbd, Raw, Read, 32),
        near("nbd-qed-read-1", "the same of a QED overlay's master, one at a time", Nbd, Overlay, Read, 1),
        near("nbd-qed-read-32", "the same of a QED overlay's master, 32 in flight", Nbd, Overlay, Read, 32),
        near("nbd-raw-write-32", "4k random writes in place, raw, over NBD", Nbd, Raw, Write, 32),
        near("nbd-qed-write-32", "4k random writes in place, allocated QED, over NBD", Nbd, Qed, Write, 32),
        allocating("nbd-qed-alloc-32", "4k random writes that allocate, QED with backing file, over NBD", Nbd),
        near("vhost-raw-read-1", "4k random reads over vhost-user-blk, one at a time", VhostUser, Raw, Read, 1),
        near("vhost-raw-read-32", "4k random reads over vhost-user-blk, 32 in flight", VhostUser, Raw, Read, 32),
        near("vhost-qed-read-1", "the same of a QED overlay's master, one at a time", VhostUser, Overlay, Read, 1),
        near("vhost-qed-read-32", "the same of a QED overlay's master, 32 in flight", VhostUser, Overlay, Read, 32),
        near("vhost-raw-write-32", "4k random writes in place, raw", VhostUser, Raw, Write, 32),
        near("vhost-qed-write-32", "4k random writes in place, allocated QED", VhostUser, Qed, Write, 32),
        allocating("vhost-qed-alloc-32", "4k random writes that allocate, QED with backing file", VhostUser),
        cached("nbd-qed-alloc-32-writeback", "the same through the page cache, over NBD", Nbd),
        cached("vhost-qed-alloc-32-writeback", "the same through the page cache", VhostUser),
        random(
            "nbd-qcow2-alloc-32",
            "4k random writes that allocate, QCOW2 with backing file, over NBD",
            1.0,
            Nbd,
            Qcow2Overlay,
            Write,
            Pattern::EachCluster,
            32,
        ),
        stream("stream-local", "the stream job from a local master", "qed", false),
        stream("stream-qcow2", "the same into QCOW2", "qcow2", false),
        stream("stream-slow", "the stream job from a master each read of which takes 10 ms", "qed", true),
        tool("img-convert", "img convert, raw into qcow2", "MiB/s", 1.0, Tool::Convert),
        tool("img-convert-back", "img convert, qcow2 into raw", "MiB/s", 1.0, Tool::Back),
        tool("img-pack-zlib", "img convert -c, raw into packed qcow2", "MiB/s", 2.0, Tool::Pack(ZLIB)),
        tool("img-unpack-zlib", "img convert, packed qcow2 into raw", "MiB/s", 2.0, Tool::Unpack(ZLIB)),
        tool("img-pack-zstd", "the same with zstd", "MiB/s", 2.0, Tool::Pack(ZSTD)),
        tool("img-unpack-zstd", "the same with zstd", "MiB/s", 2.0, Tool::Unpack(ZSTD)),
        tool("img-check", "img check of a full qcow2 image of 256 GiB", "runs", 2.0, Tool::Check),
        tool("img-map", "img map of the same", "runs", 1.0, Tool::Map),
        tool("img-create", "img create, 64 GiB, preallocation=metadata", "runs", 1.0, Tool::Create),
    ]
}

impl Workload {
    /// One round of one side.
    pub(crate) fn measure(&self, side: Side, files: &Files, seconds: f64, fio: bool) -> Result<Sample> {
        match self.work {
            Work::Stream { format, slow: false } => stream(side, files, &files.base(), format),
            Work::Stream { format, slow: true } => {
                let slow = files.slow()?;
                stream(side, files, &slow.file, format)
            }
            Work::Tool(tool) => tool.measure(side, files),
            Work::Random { export, image, op, pattern, depth, cache } => {
                let disk = match image {
                    Image::Raw => Disk { top: files.disk_raw(), format: "raw", base: None, cache },
                    Image::Qed => Disk { top: files.disk_qed(), format: "qed", base: None, cache },
                    Image::Overlay | Image::Qcow2Overlay => {
                        let format = if image == Image::Overlay { "qed" } else { "qcow2" };
                        Disk { top: files.fresh(&files.base(), format)?, format, base: Some(files.base()), cache }
                    }
                };
                let server = side.serve(&disk, export)?;
                let sample = random(&server, export, op, pattern, depth, seconds, fio)?;
                server.quit()?;
                Ok(sample)
            }
        }
    }
}

fn random(
    server: &Server,
    export: Export,
    op: Op,
    pattern: Pattern,
    depth: usize,
    seconds: f64,
    fio: bool,
) -> Result<Sample> {
    const SEED: u64 = 20_111_108;
    let mut target: Box<dyn load::Target> = match export {
        Export::Nbd => Box::new(Nbd::connect(&server.socket)?),
        Export::VhostUser => Box::new(VhostUser::connect(&server.socket, depth)?),
    };
    let before = server.cpu()?;
    let done = if fio && export == Export::Nbd && pattern == Pattern::Anywhere {
        load::fio(&server.socket, op, depth, seconds)?
    } else {
        load::drive(target.as_mut(), op, pattern, depth, seconds, SEED)?
    };
    let cpu = server.cpu()?.since(before).total();
    Ok(Sample {
        rate: done.ops as f64 / done.seconds,
        cpu: cpu.as_secs_f64() * 1e6 / done.ops as f64,
        latency: Some((done.median, done.p99)),
    })
}

fn stream(side: Side, files: &Files, base: &std::path::Path, format: &'static str) -> Result<Sample> {
    let size = std::fs::metadata(base)?.len();
    let disk = Disk { top: files.fresh(base, format)?, format, base: Some(base.to_path_buf()), cache: Cache::None };
    let server = side.serve(&disk, Export::Nbd)?;
    let mut qmp = server.qmp()?;
    let before = server.cpu()?;
    let begin = Instant::now();
    qmp.execute("block-stream", json!({ "job-id": "stream", "device": server.device }))?;
    let done = qmp.event_where(PATIENCE * 10, |event| event["event"] == "BLOCK_JOB_COMPLETED")?;
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = server.cpu()?.since(before).total();
    if let Some(why) = done["data"].get("error") {
        return Err(error!("the stream job failed: {why}"));
    }
    drop(qmp);
    server.quit()?;
    let mib = size as f64 / f64::from(1 << 20);
    Ok(Sample { rate: mib / seconds, cpu: cpu.as_secs_f64() * 1e6 / mib, latency: None })
}
