//! SIGKILL at random instants: the daemon under load from another process, over NBD and over vhost-user-blk.
//!
//! After each kill the image must check without errors and every sector must hold a legal value; the next server goes on
//! from there. A vhost-user front end goes on over its server's death: then nothing at all may be lost, or the server
//! must refuse to promise anything.

mod nbd;
mod oracle;
mod vhost_user;

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::headwater::{Headwater, headwater};
use crate::process::PATIENCE;
use crate::qemu::{check, info, qemu_img};
use crate::random::Random;
use crate::{Result, error};
use oracle::{Oracle, SIZE};

/// How a front end reaches the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// An NBD client, which connects anew after every kill.
    Nbd,
    /// A vhost-user-blk front end, which keeps its memory, its rings and the record of what is in flight.
    VhostUser,
}

/// What was done and seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Servers killed.
    pub kills: u32,
    /// Streams that came to their end in between.
    pub streams: u32,
    /// Requests answered.
    pub requests: u64,
    /// Of these, flushes.
    pub flushes: u64,
    /// Requests in flight at a kill that a later server finished.
    pub taken_up: u64,
    /// Kills after which a front end went on, and every answered byte was there.
    pub seamless: u32,
    /// Kills after which the next server refused to go on, since answered writes were gone with its predecessor.
    pub refused: u32,
    /// Bytes held against the oracle after kills.
    pub verified: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { kills, streams, requests, flushes, taken_up, seamless, refused, verified } = self;
        let mib = verified >> 20;
        write!(f, "{kills} kills, {streams} streams to their end, {requests} requests answered ({flushes} flushes), ")?;
        write!(
            f,
            "{taken_up} taken up by a later server, {seamless} lives went on seamlessly, {refused} refused to, "
        )?;
        write!(f, "{mib} MiB verified")
    }
}

/// Kills `kills` servers. Everything random follows `seed`, as far as timing lets it.
pub fn run(way: Way, kills: u32, seed: u64) -> Result<Figures> {
    let mut random = Random::new(seed);
    let dir = tempfile::tempdir()?;
    let mut master = vec![0; SIZE as usize];
    for chunk in master.chunks_mut(64 << 10) {
        if random.below(3) > 0 {
            random.fill(chunk);
        }
    }
    fs::write(dir.path().join("master.raw"), &master)?;
    let mut figures = Figures::default();
    while figures.kills < kills {
        let (format, options) = IMAGES[random.below(IMAGES.len() as u64) as usize];
        let top = create(dir.path(), format, options)?;
        let mut bench = Bench {
            dir: dir.path().to_owned(),
            top,
            random: Random::new(random.bits()),
            oracle: Oracle::new(master.clone()),
            figures,
        };
        let until = kills.min(figures.kills + MOST_OF_AN_IMAGE);
        let lived = match way {
            Way::Nbd => nbd::life(&mut bench, until),
            Way::VhostUser => vhost_user::life(&mut bench, until),
        };
        figures = bench.figures;
        lived.map_err(|error| error!("{way:?}, kill {}, seed {seed}: {error}", figures.kills))?;
        fs::remove_file(&bench.top)?;
    }
    Ok(figures)
}

/// Kills that one image lives through, at most, should its stream never end.
const MOST_OF_AN_IMAGE: u32 = 60;

/// One image and what is known of it.
struct Bench {
    dir: PathBuf,
    top: PathBuf,
    random: Random,
    oracle: Oracle,
    figures: Figures,
}

impl Bench {
    /// Starts the stream, now and then.
    fn stream_perhaps(&mut self, server: &Headwater) -> Result<crate::qmp::Qmp> {
        let mut qmp = server.qmp()?;
        if self.random.below(3) > 0 {
            let speed = if self.random.below(2) == 0 { 0 } else { 20 << 20 };
            // Refused when an earlier round has finished: there is no backing file left to stream.
            let _ =
                qmp.command("block-stream", serde_json::json!({ "job-id": "s", "device": "my", "speed": speed }))?;
        }
        Ok(qmp)
    }

    /// What must be true of the image, whatever happened. `finished`: a stream's completion was told.
    fn look_at_the_image(&mut self, finished: bool) -> Result {
        self.figures.kills += 1;
        if finished {
            self.figures.streams += 1;
            if let Some(name) = info(&self.top)?.get("backing-filename") {
                return Err(error!("a stream completed, and {name} is still named"));
            }
        }
        released(&self.top)?;
        let checked = check(&self.top)?;
        if !matches!(checked.code()?, 0 | 3) {
            return Err(error!("qemu-img check: {}{}", checked.stdout, checked.stderr));
        }
        Ok(())
    }

    fn verify(&mut self, disk: &[u8]) -> Result {
        self.figures.verified += disk.len() as u64;
        self.oracle.verify(disk)
    }
}

/// Whether a monitor has told of a stream's good end.
fn told_of_an_end(mut qmp: crate::qmp::Qmp) -> bool {
    qmp.drain().iter().any(|event| event["event"] == "BLOCK_JOB_COMPLETED" && event["data"]["error"].is_null())
}

/// Kills the server after a while, from beside the load.
fn killer(server: &Headwater, after: Duration) -> Result<thread::JoinHandle<rustix::io::Result<()>>> {
    let pid = Pid::from_raw(i32::try_from(server.daemon.id())?).ok_or("no pid")?;
    Ok(thread::spawn(move || {
        thread::sleep(after);
        kill_process(pid, Signal::KILL)
    }))
}

/// What is killed: formats, and their options. Small clusters, so that there is much to map.
const IMAGES: [(&str, &str); 4] = [
    ("qed", "cluster_size=16k"),
    ("qcow2", "cluster_size=16k"),
    ("qcow2", "cluster_size=4k,compat=0.10"),
    ("qcow2", "cluster_size=16k,extended_l2=on,refcount_bits=64"),
];

/// Makes an overlay over the master in `dir`.
pub fn create(dir: &Path, format: &str, options: &str) -> Result<PathBuf> {
    let top = dir.join(format!("my.{format}"));
    let args = ["create", "-q", "-f", format, "-o", options, "-b", "master.raw", "-F", "raw"];
    headwater(args.map(OsStr::new).into_iter().chain([top.as_os_str()]))?.ok()?;
    Ok(top)
}

/// An image that was closed is clean; QCOW2 may hold clusters that kills left counted and unused, which a repair gives back.
fn clean(top: &Path) -> Result {
    if top.extension().is_some_and(|format| format == "qcow2") {
        // Leaks are all that may be found.
        let checked = check(top)?;
        if !matches!(checked.code()?, 0 | 3) {
            return Err(error!("qemu-img check: {}{}", checked.stdout, checked.stderr));
        }
        headwater(["img", "check", "-q", "-r", "leaks"].map(OsStr::new).into_iter().chain([top.as_os_str()]))?.ok()?;
    }
    check(top)?.ok().map(drop)
}

/// Waits until a killed server's locks are gone: the kernel lets go when the last write in flight has ended.
pub fn released(top: &Path) -> Result {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let looked = qemu_img([OsStr::new("info"), top.as_os_str()])?;
        if looked.status.success() {
            return Ok(());
        }
        if !looked.stderr.contains("lock") || Instant::now() > deadline {
            return Err(error!("{}", looked.stderr));
        }
        thread::sleep(Duration::from_millis(2));
    }
}
