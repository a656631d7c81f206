//! The scenario of the first streaming patches' test script, and what QEMU's iotest 030 asserts of it today, on the monitor and
//! over NBD.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use headwater_tests::headwater::{Headwater, Serve, headwater};
use headwater_tests::nbd::Client;
use headwater_tests::process::finish;
use headwater_tests::qemu::{check, compare, info, qemu_io};
use headwater_tests::qmp::Qmp;
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use serde_json::{Value, json};
use tempfile::TempDir;

/// base.raw ← mid.qed ← my.qed, with data in each that the one above does not hide entirely.
struct Chain {
    dir: TempDir,
}

impl Chain {
    fn new(size: u64) -> Result<Self> {
        let chain = Chain { dir: tempfile::tempdir()? };
        let mut base = vec![0; size as usize];
        Random::new(3).fill(&mut base[..size as usize / 2]);
        fs::write(chain.at("base.raw"), base)?;
        chain.create("mid.qed", "base.raw", "raw")?;
        chain.create("my.qed", "mid.qed", "qed")?;
        qemu_io("qed", &chain.at("mid.qed"), &["write -P 7 300k 700k"])?;
        Ok(chain)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn create(&self, name: &str, below: &str, format: &str) -> Result {
        let args = ["create", "-q", "-f", "qed", "-b", below, "-F", format].map(OsStr::new);
        headwater(args.into_iter().chain([self.at(name).as_os_str()]))?.ok()?;
        Ok(())
    }

    fn serve(&self) -> Serve {
        Headwater::serve(self.dir.path()).image(&self.at("my.qed"))
    }

    /// What the guest sees, kept before streaming to be compared with after it.
    fn snapshot(&self) -> Result<PathBuf> {
        let raw = self.at("expected.raw");
        let args = ["convert", "-f", "qed", "-O", "raw"].map(OsStr::new);
        headwater_tests::qemu::qemu_img(args.into_iter().chain([self.at("my.qed").as_os_str(), raw.as_os_str()]))?
            .ok()?;
        Ok(raw)
    }
}

fn jobs(qmp: &mut Qmp) -> Result<Vec<Value>> {
    Ok(qmp.execute("query-block-jobs", json!({}))?.as_array().cloned().unwrap_or_default())
}

/// The job's end, by event; `error` is absent on success.
fn completed(qmp: &mut Qmp) -> Result<Value> {
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert_eq!(done["type"], "stream", "{done}");
    assert!(done.get("error").is_none(), "{done}");
    assert_eq!(done["offset"], done["len"], "{done}");
    Ok(done)
}

#[test]
fn a_stream_brings_everything_in_and_lets_go() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(4 << 20)?;
    let expected = chain.snapshot()?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    assert!(jobs(&mut qmp)?.is_empty());
    // The 2011 name and arguments.
    qmp.execute("block_stream", json!({ "device": "my" }))?;
    let done = completed(&mut qmp)?;
    assert_eq!(done["device"], "my");
    assert!(jobs(&mut qmp)?.is_empty(), "a finished job is still listed");
    server.quit()?;
    let described = info(&chain.at("my.qed"))?;
    assert_eq!(described.get("backing-filename"), None);
    fs::remove_file(chain.at("mid.qed"))?;
    fs::remove_file(chain.at("base.raw"))?;
    check(&chain.at("my.qed"))?.ok()?;
    compare(&expected, &chain.at("my.qed"))?.ok()?;
    Ok(())
}

#[test]
fn a_stream_to_a_base_keeps_the_base() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(4 << 20)?;
    let expected = chain.snapshot()?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    let base = chain.at("base.raw");
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "s", "base": base }))?;
    completed(&mut qmp)?;
    let described = info(&chain.at("my.qed"))?;
    assert_eq!(described["backing-filename-format"], "raw");
    fs::rename(chain.at("mid.qed"), chain.at("gone.qed"))?;
    let copied = fs::metadata(chain.at("my.qed"))?.len();
    assert!(copied < 3 << 20, "copied more than the middle held: {copied}");
    // Then the rest.
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "rest" }))?;
    completed(&mut qmp)?;
    server.quit()?;
    fs::remove_file(chain.at("base.raw"))?;
    assert_eq!(info(&chain.at("my.qed"))?.get("backing-filename"), None);
    compare(&expected, &chain.at("my.qed"))?.ok()?;
    check(&chain.at("my.qed"))?.ok()?;
    Ok(())
}

#[test]
fn cancelled_it_keeps_what_arrived_and_goes_on_later() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let expected = chain.snapshot()?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "my", "speed": 1 << 20 }))?;
    thread::sleep(Duration::from_millis(1500));
    let running = jobs(&mut qmp)?;
    assert_eq!(running[0]["type"], "stream");
    assert_eq!(running[0]["speed"], 1 << 20);
    let begun = Instant::now();
    qmp.execute("block_job_cancel", json!({ "device": "my" }))?;
    let cancelled = qmp.event("BLOCK_JOB_CANCELLED")?;
    // A throttled job is cancelled at once, not after its next slice; generous for a loaded machine.
    assert!(begun.elapsed() < Duration::from_secs(10));
    let arrived = cancelled["offset"].as_u64().unwrap_or(0);
    assert!(arrived > 0 && arrived < cancelled["len"].as_u64().unwrap_or(0), "{cancelled}");
    assert!(info(&chain.at("my.qed"))?.get("backing-filename").is_some());
    qmp.execute("block_stream", json!({ "device": "my" }))?;
    let done = completed(&mut qmp)?;
    assert!(done["len"].as_u64() < cancelled["len"].as_u64(), "what had arrived was copied again: {done}");
    server.quit()?;
    compare(&expected, &chain.at("my.qed"))?.ok()?;
    check(&chain.at("my.qed"))?.ok()?;
    Ok(())
}

#[test]
fn speed_is_set_before_and_while_it_runs() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block_stream", json!({ "device": "my" }))?;
    completed(&mut qmp)?;
    server.quit()?;
    let chain = Chain::new(16 << 20)?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "my", "speed": 65536 }))?;
    assert_eq!(jobs(&mut qmp)?[0]["speed"], 65536);
    qmp.execute("block_job_set_speed", json!({ "device": "my", "value": 131_072 }))?;
    assert_eq!(jobs(&mut qmp)?[0]["speed"], 131_072);
    qmp.execute("block-job-set-speed", json!({ "device": "my", "speed": 262_144 }))?;
    assert_eq!(jobs(&mut qmp)?[0]["speed"], 262_144);
    let refused = qmp.refused("block-job-set-speed", json!({ "device": "my", "speed": -1 }))?;
    assert_eq!(refused.class, "GenericError");
    // At this speed the rest would take half a minute; unlimited it is done at once.
    qmp.execute("block-job-set-speed", json!({ "device": "my", "speed": 0 }))?;
    completed(&mut qmp)?;
    server.quit()
}

#[test]
fn what_makes_no_sense_is_refused_in_qemus_words() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    let refused = qmp.refused("block-stream", json!({ "device": "nonexistent" }))?;
    assert!(refused.desc.contains("Cannot find device='nonexistent' nor node-name='nonexistent'"), "{refused}");
    for command in ["block_job_cancel", "block-job-cancel", "block-job-pause", "block-job-resume"] {
        let refused = qmp.refused(command, json!({ "device": "my" }))?;
        assert_eq!(refused.class, "DeviceNotActive", "{command}: {refused}");
    }
    let refused = qmp.refused("block-stream", json!({ "device": "my", "base": "nowhere.img" }))?;
    assert!(refused.desc.contains("nowhere.img"), "{refused}");
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "one", "speed": 65536 }))?;
    let twice = qmp.refused("block-stream", json!({ "device": "my", "job-id": "two" }))?;
    assert_eq!(twice.class, "GenericError", "{twice}");
    let same = qmp.refused("block-stream", json!({ "device": "my", "job-id": "one" }))?;
    assert!(same.desc.contains("one"), "{same}");
    qmp.execute("block-job-cancel", json!({ "device": "one" }))?;
    qmp.event("BLOCK_JOB_CANCELLED")?;
    server.quit()
}

#[test]
fn nothing_to_do_is_done_at_once() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(4 << 20)?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    for _ in 0..2 {
        // The second one finds no backing file at all.
        qmp.execute("block-stream", json!({ "device": "my", "job-id": "s" }))?;
        completed(&mut qmp)?;
    }
    server.quit()
}

#[test]
fn paused_it_waits_and_resumed_it_ends() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let expected = chain.snapshot()?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "s", "speed": 2 << 20 }))?;
    thread::sleep(Duration::from_millis(300));
    qmp.execute("block-job-pause", json!({ "device": "s" }))?;
    qmp.event_where(Duration::from_secs(30), |event| event["data"]["status"] == "paused")?;
    let before = jobs(&mut qmp)?[0].clone();
    assert_eq!(before["paused"], true);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(jobs(&mut qmp)?[0]["offset"], before["offset"], "a paused job went on");
    qmp.execute("block-job-resume", json!({ "device": "s" }))?;
    qmp.execute("block-job-set-speed", json!({ "device": "s", "speed": 0 }))?;
    completed(&mut qmp)?;
    server.quit()?;
    compare(&expected, &chain.at("my.qed"))?.ok()?;
    Ok(())
}

/// auto-finalize and auto-dismiss off: the job waits for both words, and publishes only after the first.
#[test]
fn finalized_and_dismissed_by_hand() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(4 << 20)?;
    let server = chain.serve().start()?;
    let mut qmp = server.qmp()?;
    let arguments = json!({ "device": "my", "job-id": "s", "auto-finalize": false, "auto-dismiss": false });
    qmp.execute("block-stream", arguments)?;
    qmp.event("BLOCK_JOB_PENDING")?;
    assert!(info(&chain.at("my.qed"))?.get("backing-filename").is_some(), "published before it was told to");
    let early = qmp.refused("job-dismiss", json!({ "id": "s" }))?;
    assert!(early.desc.contains("state 'pending'"), "{early}");
    qmp.execute("job-finalize", json!({ "id": "s" }))?;
    completed(&mut qmp)?;
    let concluded = qmp.execute("query-jobs", json!({}))?;
    assert_eq!(concluded[0]["status"], "concluded", "{concluded}");
    qmp.execute("job-dismiss", json!({ "id": "s" }))?;
    assert_eq!(qmp.execute("query-jobs", json!({}))?, json!([]));
    server.quit()?;
    assert_eq!(info(&chain.at("my.qed"))?.get("backing-filename"), None);
    Ok(())
}

/// Errors of the source, under each policy.
#[test]
fn source_errors_follow_the_policy() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for policy in ["report", "ignore", "stop", "enospc"] {
        let chain = Chain::new(8 << 20)?;
        let expected = chain.snapshot()?;
        let broken = chain.at("broken");
        let server = chain.serve().arg("--source-error-while").arg(&broken).start()?;
        fs::write(&broken, "")?;
        let mut qmp = server.qmp()?;
        qmp.execute("block-stream", json!({ "device": "my", "job-id": "s", "on-error": policy }))?;
        let said = qmp.event("BLOCK_JOB_ERROR")?;
        let action = match policy {
            "ignore" => "ignore",
            "stop" => "stop",
            _ => "report",
        };
        assert_eq!(said["action"], action, "{policy}: {said}");
        assert_eq!(said["operation"], "read", "{policy}: {said}");
        if policy == "stop" {
            qmp.event_where(Duration::from_secs(30), |event| event["data"]["status"] == "paused")?;
            let stopped = jobs(&mut qmp)?[0].clone();
            assert_eq!(stopped["io-status"], "failed", "{stopped}");
            fs::remove_file(&broken)?;
            qmp.execute("block-job-resume", json!({ "device": "s" }))?;
            completed(&mut qmp)?;
            server.quit()?;
            compare(&expected, &chain.at("my.qed"))?.ok()?;
            continue;
        }
        let done = qmp.event("BLOCK_JOB_COMPLETED")?;
        assert!(done["error"].is_string(), "{policy}: {done}");
        assert!(info(&chain.at("my.qed"))?.get("backing-filename").is_some(), "{policy}: a failed job let go");
        fs::remove_file(&broken)?;
        // With the source mended, a new stream makes it whole.
        qmp.execute("block-stream", json!({ "device": "my", "job-id": "again" }))?;
        completed(&mut qmp)?;
        server.quit()?;
        compare(&expected, &chain.at("my.qed"))?.ok()?;
        check(&chain.at("my.qed"))?.ok()?;
    }
    Ok(())
}

/// Out of space: `enospc` and `stop` pause the job with io-status nospace; with space again it goes on.
#[test]
fn out_of_space_pauses_the_job() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let small = dir.path().join("small");
    fs::create_dir(&small)?;
    let mut mount = std::process::Command::new("mount");
    if !finish(mount.args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&small))?.status.success() {
        peer::skip("mounting a tmpfs needs root");
        return Ok(());
    }
    let tested = out_of_space(&dir, &small);
    let mut unmount = std::process::Command::new("umount");
    finish(unmount.arg("--lazy").arg(&small))?.ok()?;
    tested
}

fn out_of_space(dir: &TempDir, small: &Path) -> Result {
    let base = dir.path().join("base.raw");
    let mut bytes = vec![0; 12 << 20];
    Random::new(8).fill(&mut bytes);
    fs::write(&base, bytes)?;
    let top = small.join("my.qed");
    let args = ["create", "-q", "-f", "qed", "-F", "raw", "-b"].map(OsStr::new);
    headwater(args.into_iter().chain([base.as_os_str(), top.as_os_str()]))?.ok()?;
    let server = Headwater::serve(dir.path()).image(&top).start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "s", "on-error": "enospc" }))?;
    let said = qmp.event("BLOCK_JOB_ERROR")?;
    assert_eq!((&said["action"], &said["operation"]), (&json!("stop"), &json!("write")), "{said}");
    qmp.event_where(Duration::from_secs(30), |event| event["data"]["status"] == "paused")?;
    assert_eq!(jobs(&mut qmp)?[0]["io-status"], "nospace");
    let mut grow = std::process::Command::new("mount");
    finish(grow.args(["-o", "remount,size=32m"]).arg(small))?.ok()?;
    qmp.execute("block-job-resume", json!({ "device": "s" }))?;
    completed(&mut qmp)?;
    server.quit()?;
    compare(&base, &top)?.ok()?;
    check(&top)?.ok()?;
    Ok(())
}

/// A guest at work while its disk is streamed: what it writes wins, what it reads is right at every moment.
#[test]
fn a_guest_at_work_sees_its_own_disk_throughout() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let mut model = fs::read(chain.snapshot()?)?;
    let socket = chain.at("nbd.sock");
    let server = chain.serve().arg("--copy-on-read").nbd(&socket).start()?;
    let mut qmp = server.qmp()?;
    let mut client = Client::connect(&socket)?;
    let seed = Random::seed();
    println!("HEADWATER_SEED={seed}");
    let mut random = Random::new(seed);
    qmp.execute("block-stream", json!({ "device": "my", "job-id": "s", "speed": 8 << 20 }))?;
    let mut offset = 0;
    for round in 0..2000_u64 {
        let length = 1 + random.below(20_000) as usize;
        let at = random.below((model.len() - length) as u64) as usize;
        match random.below(5) {
            0 | 1 => {
                let mut bytes = vec![0; length];
                random.fill(&mut bytes);
                client.write(at as u64, &bytes)?;
                model[at..at + length].copy_from_slice(&bytes);
            }
            2 => {
                client.write_zeroes(0, at as u64, length as u32)?;
                model[at..at + length].fill(0);
            }
            _ => assert_eq!(client.read(at as u64, length as u32)?, model[at..at + length], "round {round}, at {at}"),
        }
        if round % 100 == 0
            && let Some(job) = jobs(&mut qmp)?.first()
        {
            let now = job["offset"].as_u64().unwrap_or(0);
            assert!(now >= offset, "progress ran backwards: {offset}, then {now}");
            assert!(now <= job["len"].as_u64().unwrap_or(0), "{job}");
            offset = now;
        }
    }
    // It may be through already; then the job is not there any more.
    let _ = qmp.command("block-job-set-speed", json!({ "device": "s", "speed": 0 }))?;
    completed(&mut qmp)?;
    client.disconnect()?;
    server.quit()?;
    let expected = chain.at("model.raw");
    fs::write(&expected, &model)?;
    assert_eq!(info(&chain.at("my.qed"))?.get("backing-filename"), None);
    compare(&expected, &chain.at("my.qed"))?.ok()?;
    check(&chain.at("my.qed"))?.ok()?;
    Ok(())
}

/// The command line's own hand on a running daemon.
#[test]
fn the_command_line_steers_a_daemon() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let server = chain.serve().start()?;
    let socket = server.qmp_socket().to_path_buf();
    let hw = |args: &[&str]| {
        let mut all: Vec<&OsStr> = vec![OsStr::new(args[0]), OsStr::new("--qmp"), socket.as_os_str()];
        all.extend(args[1..].iter().map(OsStr::new));
        headwater(all)
    };
    assert_eq!(hw(&["jobs"])?.ok()?.trim(), "No active jobs");
    hw(&["stream", "--speed", "64k", "my"])?.ok()?;
    assert!(hw(&["jobs"])?.ok()?.contains("my"));
    hw(&["pause", "my"])?.ok()?;
    hw(&["resume", "my"])?.ok()?;
    hw(&["speed", "my", "128k"])?.ok()?;
    let listed: Value = serde_json::from_str(&hw(&["jobs", "--output", "json"])?.ok()?)?;
    assert_eq!(listed[0]["speed"], 131_072);
    hw(&["cancel", "my"])?.ok()?;
    let refused = hw(&["cancel", "nobody"])?;
    assert_eq!(refused.code()?, 1);
    assert!(refused.stderr.starts_with("headwater: "), "{}", refused.stderr);
    // A cancelled job is gone within moments; a new one may only then begin.
    let mut qmp = server.qmp()?;
    while !jobs(&mut qmp)?.is_empty() {
        thread::sleep(Duration::from_millis(10));
    }
    let waited = hw(&["stream", "--wait", "my"])?;
    assert!(waited.stdout.contains("complete"), "{}{}", waited.stdout, waited.stderr);
    waited.ok()?;
    server.quit()
}

/// HMP, in QEMU's words.
#[test]
fn people_have_a_monitor_too() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let chain = Chain::new(16 << 20)?;
    let socket = chain.at("hmp.sock");
    let server = chain.serve().hmp(&socket).start()?;
    let mut monitor = UnixStream::connect(&socket)?;
    monitor.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut ask = |line: &str| -> Result<String> {
        use std::io::{Read, Write};
        if !line.is_empty() {
            monitor.write_all(line.as_bytes())?;
            monitor.write_all(b"\n")?;
        }
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(b"(qemu) ") {
            monitor.read_exact(&mut byte)?;
            text.push(byte[0]);
        }
        Ok(String::from_utf8_lossy(&text).replace("\r\n", "\n"))
    };
    ask("")?;
    assert!(ask("info block-jobs")?.contains("No active jobs"));
    ask("block_stream my 65536")?;
    let told = ask("info block-jobs")?;
    assert!(told.contains("Streaming device my: Completed ") && told.contains("speed limit 65536 bytes/s"), "{told}");
    ask("block_job_set_speed my 0")?;
    assert!(ask("info block")?.contains("my"));
    assert!(ask("help")?.contains("block_stream"));
    assert!(ask("no_such_thing")?.contains("unknown command"));
    let mut qmp = server.qmp()?;
    while !jobs(&mut qmp)?.is_empty() {
        thread::sleep(Duration::from_millis(10));
    }
    server.quit()?;
    assert_eq!(info(&chain.at("my.qed"))?.get("backing-filename"), None);
    Ok(())
}
