//! SIGKILL at random instants of a run with guest writes, flushes and streaming.
//!
//! The oracle knows, for every sector, which values are legal: what the last answered flush covered, and whatever was sent
//! since. After each kill the image must check without errors, every sector must hold a legal value, and the next
//! round goes on from what was found there.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::nbd::{Client, Command};
use headwater_tests::process::PATIENCE;
use headwater_tests::qemu::{check, compare, info, qemu_img};
use headwater_tests::random::Random;
use headwater_tests::{Result, error, peer};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SECTOR: u64 = 512;
const SIZE: u64 = 6 << 20;
const KILLS: u32 = 300;

/// What a sector may hold: the master's bytes, zeroes, or a stamp repeated.
const MASTER: u64 = 0;
const ZEROES: u64 = 1;

/// Which values each sector may have.
struct Oracle {
    master: Vec<u8>,
    legal: Vec<BTreeSet<u64>>,
    /// The value the last completed request left, sector by sector.
    last: Vec<u64>,
    next_stamp: u64,
}

impl Oracle {
    fn new(master: Vec<u8>) -> Self {
        let sectors = (SIZE / SECTOR) as usize;
        Oracle { master, legal: vec![BTreeSet::from([MASTER]); sectors], last: vec![MASTER; sectors], next_stamp: 2 }
    }

    fn sectors(at: u64, length: u64) -> std::ops::Range<usize> {
        (at / SECTOR) as usize..((at + length) / SECTOR) as usize
    }

    /// A request was sent: from now on its value is legal beside the earlier ones.
    fn sent(&mut self, at: u64, length: u64, value: u64) {
        for sector in Self::sectors(at, length) {
            self.legal[sector].insert(value);
        }
    }

    /// A request was answered; a later one overwrites it, and a flush makes it the only one.
    fn answered(&mut self, at: u64, length: u64, value: u64) {
        for sector in Self::sectors(at, length) {
            self.last[sector] = value;
        }
    }

    /// A flush was answered while nothing else was in flight.
    fn flushed(&mut self) {
        for (legal, last) in self.legal.iter_mut().zip(&self.last) {
            if legal.len() > 1 {
                *legal = BTreeSet::from([*last]);
            }
        }
    }

    fn bytes(&self, sector: usize, value: u64) -> Vec<u8> {
        let at = sector * SECTOR as usize;
        match value {
            MASTER => self.master[at..at + SECTOR as usize].to_vec(),
            ZEROES => vec![0; SECTOR as usize],
            stamp => stamp.to_le_bytes().repeat(SECTOR as usize / 8),
        }
    }

    /// Compares the whole disk; what was found is from now on the only legal value.
    fn verify(&mut self, disk: &[u8]) -> Result {
        for (sector, found) in disk.chunks(SECTOR as usize).enumerate() {
            let value = self.legal[sector].iter().copied().find(|value| self.bytes(sector, *value) == found);
            let Some(value) = value else {
                let stamp = u64::from_le_bytes(found[..8].try_into()?);
                return Err(error!("sector {sector}: {stamp:#x}…, legal are {:?}", self.legal[sector]));
            };
            self.legal[sector] = BTreeSet::from([value]);
            self.last[sector] = value;
        }
        Ok(())
    }
}

/// Guest requests until the server dies. Overlapping ones are never in flight together.
fn load(client: &mut Client, random: &mut Random, oracle: &mut Oracle) {
    loop {
        let mut batch: Vec<(u64, u64, u64, u64)> = Vec::new();
        for _ in 0..=random.below(8) {
            let longest = if random.below(8) == 0 { 400 } else { 16 };
            let length = SECTOR * (1 + random.below(longest));
            let at = SECTOR * random.below((SIZE - length) / SECTOR);
            if batch.iter().any(|(_, other, len, _)| at < other + len && *other < at + length) {
                continue;
            }
            let zeroes = random.below(6) == 0;
            let value = if zeroes { ZEROES } else { oracle.next_stamp };
            oracle.next_stamp += u64::from(!zeroes);
            oracle.sent(at, length, value);
            let sent = if zeroes {
                client.submit(Command::WriteZeroes, 0, at, length as u32, &[])
            } else {
                let payload = value.to_le_bytes().repeat((length / 8) as usize);
                client.submit(Command::Write, 0, at, length as u32, &payload)
            };
            let Ok(cookie) = sent else { return };
            batch.push((cookie, at, length, value));
        }
        for _ in 0..batch.len() {
            let Ok((cookie, Ok(_))) = client.complete() else { return };
            if let Some((_, at, length, value)) = batch.iter().find(|(sent, ..)| *sent == cookie) {
                oracle.answered(*at, *length, *value);
            }
        }
        if random.below(5) == 0 {
            if client.flush().is_err() {
                return;
            }
            oracle.flushed();
        }
    }
}

/// Waits until a killed server's locks are gone: the kernel lets go when the last write in flight has ended.
fn released(top: &Path) -> Result {
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

fn create(dir: &Path) -> Result<PathBuf> {
    let top = dir.join("my.qed");
    let args = ["create", "-q", "-f", "qed", "-o", "cluster_size=16k", "-b", "master.raw", "-F", "raw"];
    headwater(args.map(OsStr::new).into_iter().chain([top.as_os_str()]))?.ok()?;
    Ok(top)
}

#[test]
fn killed_at_random_instants() -> Result {
    peer!("headwater", "qemu-img");
    let seed = Random::seed();
    println!("HEADWATER_SEED={seed}");
    let mut random = Random::new(seed);
    let dir = tempfile::tempdir()?;
    let mut master = vec![0; SIZE as usize];
    for chunk in master.chunks_mut(64 << 10) {
        if random.below(3) > 0 {
            random.fill(chunk);
        }
    }
    fs::write(dir.path().join("master.raw"), &master)?;
    let (mut kills, mut streamed) = (0, 0);
    while kills < KILLS {
        let top = create(dir.path())?;
        let mut oracle = Oracle::new(master.clone());
        loop {
            kill_once(dir.path(), &top, &mut random, &mut oracle)
                .map_err(|e| error!("kill {kills}, seed {seed}: {e}"))?;
            kills += 1;
            if info(&top)?.get("backing-filename").is_none() {
                streamed += 1;
                break;
            }
            if kills >= KILLS {
                break;
            }
        }
        fs::remove_file(&top)?;
    }
    // Were no stream ever finished, the publish at its end would not have been under test.
    assert!(streamed > 0, "no stream came to its end in {KILLS} kills");
    println!("{KILLS} kills, {streamed} streams finished");
    Ok(())
}

fn kill_once(dir: &Path, top: &Path, random: &mut Random, oracle: &mut Oracle) -> Result {
    let socket = dir.join("nbd.sock");
    let mut serve = Headwater::serve(dir).image(top).nbd(&socket);
    if random.below(2) == 0 {
        serve = serve.arg("--copy-on-read");
    }
    let mut server = serve.start()?;
    let mut client = Client::connect(&socket)?;
    let mut qmp = server.qmp()?;
    if random.below(3) > 0 {
        let speed = if random.below(2) == 0 { 0 } else { 20 << 20 };
        // Refused when an earlier round has finished: there is no backing file left to stream.
        let _ = qmp.command("block-stream", json!({ "job-id": "s", "device": "my", "speed": speed }))?;
    }
    let pid = Pid::from_raw(i32::try_from(server.daemon.id())?).ok_or("no pid")?;
    let after = Duration::from_micros(random.below(60_000));
    let killer = thread::spawn(move || {
        thread::sleep(after);
        kill_process(pid, Signal::KILL)
    });
    load(&mut client, random, oracle);
    killer.join().map_err(|_| "the killer panicked")??;
    server.daemon.exits()?;
    let finished =
        qmp.drain().iter().any(|event| event["event"] == "BLOCK_JOB_COMPLETED" && event["data"]["error"].is_null());
    drop(server);
    if finished {
        assert_eq!(info(top)?.get("backing-filename"), None, "completed, and the backing file is still named");
    }
    released(top)?;
    let checked = check(top)?;
    if !matches!(checked.code()?, 0 | 3) {
        return Err(error!("qemu-img check: {}{}", checked.stdout, checked.stderr));
    }
    // Opening repairs what a kill leaves: read everything through a new server, then look again.
    let server = Headwater::serve(dir).image(top).nbd(&socket).start()?;
    let mut client = Client::connect(&socket)?;
    let disk = client.read(0, SIZE as u32)?;
    client.disconnect()?;
    server.quit()?;
    oracle.verify(&disk)?;
    check(top)?.ok()?;
    Ok(())
}

/// Bytes the top image holds itself, as its map on disk says.
fn allocated(top: &Path) -> Result<u64> {
    let text = headwater(["map", "--output", "json"].map(OsStr::new).into_iter().chain([top.as_os_str()]))?.ok()?;
    let runs: Vec<Value> = serde_json::from_str(&text)?;
    let own = runs.iter().filter(|run| run["depth"] == 0 && run["present"] == true);
    Ok(own.filter_map(|run| run["length"].as_u64()).sum())
}

#[test]
fn a_stream_goes_on_where_it_was_killed() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let size = 64 << 20;
    let mut random = Random::new(5);
    let mut master = vec![0; size];
    random.fill(&mut master);
    let base = dir.path().join("master.raw");
    fs::write(&base, &master)?;
    let top = create(dir.path())?;
    let mut server = Headwater::serve(dir.path()).image(&top).start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "job-id": "s", "device": "my", "speed": 16 << 20 }))?;
    // Until well over a quarter has arrived, and long enough for what arrived early to be committed in the background.
    thread::sleep(Duration::from_millis(2500));
    let jobs = qmp.execute("query-block-jobs", json!({}))?;
    let arrived = jobs[0]["offset"].as_u64().ok_or("no offset")?;
    server.daemon.kill()?;
    drop(server);
    let server = Headwater::serve(dir.path()).image(&top).start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "job-id": "s", "device": "my", "speed": 0 }))?;
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert!(done["error"].is_null(), "{done}");
    let copied = done["len"].as_u64().ok_or("no len")?;
    let committed = size as u64 - copied;
    assert!(committed >= 8 << 20, "{arrived} bytes had arrived, only {committed} were kept");
    server.quit()?;
    assert_eq!(allocated(&top)?, size as u64);
    compare(&base, &top)?.ok()?;
    check(&top)?.ok()?;
    Ok(())
}

/// The first promise: killed right after the completion event, nothing is lost. The master goes away to prove it.
#[test]
fn killed_right_after_the_completion_event() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let mut random = Random::new(6);
    for round in 0..10 {
        let mut master = vec![0; 8 << 20];
        random.fill(&mut master);
        let base = dir.path().join("master.raw");
        fs::write(&base, &master)?;
        let top = create(dir.path())?;
        let mut server = Headwater::serve(dir.path()).image(&top).start()?;
        let mut qmp = server.qmp()?;
        qmp.execute("block-stream", json!({ "job-id": "s", "device": "my" }))?;
        qmp.event("BLOCK_JOB_COMPLETED")?;
        server.daemon.kill()?;
        released(&top)?;
        let kept = dir.path().join("kept.raw");
        fs::rename(&base, &kept)?;
        assert_eq!(info(&top)?.get("backing-filename"), None, "round {round}");
        compare(&kept, &top)?.ok()?;
        fs::remove_file(&top)?;
    }
    Ok(())
}
