//! SIGKILL: at random instants under load, in the middle of a stream, and right after its end.
//!
//! The long version of the first is `cargo xtask kill`.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::kill::{self, Way, create, released};
use headwater_tests::qemu::{check, compare, info};
use headwater_tests::random::Random;
use headwater_tests::vhost::{Client, Options};
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

#[test]
fn killed_at_random_instants() -> Result {
    peer!("headwater", "qemu-img");
    let seed = Random::seed();
    println!("HEADWATER_SEED={seed}");
    let figures = kill::run(Way::Nbd, 150, seed)?;
    println!("{figures}");
    // Were no stream ever finished, the publish at its end would not have been under test.
    assert!(figures.streams > 0 && figures.flushes > 0, "{figures}");
    Ok(())
}

#[test]
fn a_front_end_lives_on_over_the_deaths_of_its_servers() -> Result {
    peer!("headwater", "qemu-img");
    let seed = Random::seed();
    println!("HEADWATER_SEED={seed}");
    let figures = kill::run(Way::VhostUser, 60, seed)?;
    println!("{figures}");
    assert!(figures.taken_up > 0 && figures.seamless > 0 && figures.flushes > 0, "{figures}");
    Ok(())
}

/// Nothing hangs on a server that ends in good order: its guest goes on, whatever it had not flushed.
#[test]
fn a_clean_restart_is_seamless() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("master.raw"), vec![7; 8 << 20])?;
    let top = create(dir.path(), "qed", "cluster_size=16k")?;
    let socket = dir.path().join("vhost.sock");
    let start = || Headwater::serve(dir.path()).image(&top).vhost_user(&socket).start();
    let mut server = start()?;
    let mut client = Client::connect_with(&socket, Options { inflight: true, ..Options::default() })?;
    for round in 0..6_u8 {
        // Into a new cluster, and never flushed.
        let at = u64::from(round) << 20;
        client.write(at, &[round + 1; 4096])?;
        if round % 2 == 0 {
            server.quit()?;
        } else {
            server.daemon.terminate()?;
        }
        server = start()?;
        client.reconnect(&socket)?;
        client.flush()?;
        for written in 0..=round {
            assert!(client.read(u64::from(written) << 20, 4096)? == [written + 1; 4096], "{written} after {round}");
        }
    }
    drop(client);
    server.quit()?;
    check(&top)?.ok()?;
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
    let top = create(dir.path(), "qed", "cluster_size=16k")?;
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
        let top = create(dir.path(), "qed", "cluster_size=16k")?;
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
