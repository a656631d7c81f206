//! Over NBD: every server has a new client, for which the last one's unflushed writes may be there or not.

use std::time::Duration;

use super::oracle::{SECTOR, SIZE, ZEROES};
use super::{Bench, killer, told_of_an_end};
use crate::Result;
use crate::headwater::Headwater;
use crate::nbd::{Client, Command};
use crate::qemu::info;

/// Kills servers of one image until its stream has finished or so many were killed in all.
pub(super) fn life(bench: &mut Bench, until: u32) -> Result {
    while bench.figures.kills < until && info(&bench.top)?.get("backing-filename").is_some() {
        kill_once(bench)?;
    }
    Ok(())
}

fn kill_once(bench: &mut Bench) -> Result {
    let socket = bench.dir.join("nbd.sock");
    let mut serve = Headwater::serve(&bench.dir).image(&bench.top).nbd(&socket);
    if bench.random.below(2) == 0 {
        serve = serve.arg("--copy-on-read");
    }
    let mut server = serve.start()?;
    let mut client = Client::connect(&socket)?;
    let qmp = bench.stream_perhaps(&server)?;
    let killer = killer(&server, Duration::from_micros(bench.random.below(60_000)))?;
    load(&mut client, bench);
    killer.join().map_err(|_| "the killer panicked")??;
    server.daemon.exits()?;
    let finished = told_of_an_end(qmp);
    drop(server);
    bench.look_at_the_image(finished)?;
    // Opening repairs what a kill leaves: read everything through a new server, then look again.
    let server = Headwater::serve(&bench.dir).image(&bench.top).nbd(&socket).start()?;
    let mut client = Client::connect(&socket)?;
    let disk = client.read(0, SIZE as u32)?;
    client.disconnect()?;
    server.quit()?;
    bench.verify(&disk)?;
    super::clean(&bench.top)?;
    Ok(())
}

/// Guest requests until the server dies. Overlapping ones are never in flight together.
fn load(client: &mut Client, bench: &mut Bench) {
    let Bench { random, oracle, figures, .. } = bench;
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
            figures.requests += 1;
            if let Some((_, at, length, value)) = batch.iter().find(|(sent, ..)| *sent == cookie) {
                oracle.answered(*at, *length, *value);
            }
        }
        if random.below(5) == 0 {
            if client.flush().is_err() {
                return;
            }
            figures.requests += 1;
            figures.flushes += 1;
            oracle.flushed();
        }
    }
}
