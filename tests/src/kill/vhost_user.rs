//! Over vhost-user-blk: one front end lives on over the deaths of its servers, as a QEMU with `reconnect` does.
//!
//! After each restart every request that was in flight must come to its end, once. Then either everything that was ever
//! answered is there, flushed or not; or the server says of itself that something is gone: it refuses every change and
//! flush until the front end begins anew, and what was flushed is there all the same.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::oracle::{SECTOR, SIZE, ZEROES};
use super::{Bench, killer, told_of_an_end};
use crate::headwater::Headwater;
use crate::process::PATIENCE;
use crate::qemu::info;
use crate::vhost::{Client, Kind, Options, Slot, Status};
use crate::{Result, error};

const QUEUES: u16 = 2;

/// Looked for a completion this long, it is time to see whether the server is still there.
const GLANCE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    at: u64,
    length: u64,
    value: u64,
}

impl Request {
    fn touches(&self, at: u64, length: u64) -> bool {
        at < self.at + self.length && self.at < at + length
    }
}

/// What a front end knows.
struct Guest {
    client: Client,
    in_flight: HashMap<(usize, Slot), Request>,
    /// The server has refused something: it will until the front end begins anew.
    refused: bool,
}

/// What an attempt to talk to the server came to.
#[derive(PartialEq, Eq)]
enum Talk {
    Done,
    /// It is dead.
    Dead,
    /// It will change nothing for this front end any more.
    Refused,
}

/// Kills servers of one image until its stream has finished or so many were killed in all.
pub(super) fn life(bench: &mut Bench, until: u32) -> Result {
    let socket = bench.dir.join("vhost.sock");
    let mut guest: Option<Guest> = None;
    while bench.figures.kills < until && info(&bench.top)?.get("backing-filename").is_some() {
        let mut server = serve(bench, &socket)?;
        let qmp = bench.stream_perhaps(&server)?;
        let arrived = arrive(guest.take(), &socket);
        let at_work =
            arrived.map_err(|why| error!("no front end arrives: {why}; the server says:\n{}", server.daemon.log()))?;
        // Now and then right into what the new server takes up.
        let most = if bench.random.below(4) == 0 { 2_000 } else { 60_000 };
        let killer = killer(&server, Duration::from_micros(bench.random.below(most)))?;
        guest = at_work.live(bench, &socket, &mut || server.daemon.runs())?;
        killer.join().map_err(|_| "the killer panicked")??;
        server.daemon.exits()?;
        bench.look_at_the_image(told_of_an_end(qmp))?;
    }
    // The last one is not killed.
    let mut server = serve(bench, &socket)?;
    let mut last = arrive(guest.take(), &socket)?;
    if last.resume(bench, &mut || server.daemon.runs())? == Talk::Dead {
        return Err(error!("the server died by itself: {}", server.daemon.log()));
    }
    drop(last);
    server.quit()?;
    super::clean(&bench.top)?;
    Ok(())
}

fn serve(bench: &mut Bench, socket: &Path) -> Result<Headwater> {
    let mut serve = Headwater::serve(&bench.dir).image(&bench.top).vhost_user(socket);
    if bench.random.below(2) == 0 {
        serve = serve.arg("--copy-on-read");
    }
    if bench.random.below(2) == 0 {
        serve = serve.arg("--cache").arg("writethrough");
    }
    serve.start()
}

fn connect(socket: &Path) -> Result<Guest> {
    let options = Options { queues: QUEUES, depth: 8, buffer: 256 << 10, inflight: true, ..Options::default() };
    let client = Client::connect_with(socket, options)?;
    Ok(Guest { client, in_flight: HashMap::new(), refused: false })
}

/// The front end of before, or a new one.
fn arrive(guest: Option<Guest>, socket: &Path) -> Result<Guest> {
    match guest {
        None => connect(socket),
        Some(mut guest) => {
            guest.client.reconnect(socket)?;
            Ok(guest)
        }
    }
}

/// Whether the server is dead, or soon is.
fn dies(lives: &mut impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while lives() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

impl Guest {
    /// Takes up what was left, then works until the server dies; what is left of the front end then.
    fn live(mut self, bench: &mut Bench, socket: &Path, lives: &mut impl FnMut() -> bool) -> Result<Option<Self>> {
        match self.resume(bench, lives)? {
            Talk::Dead => return Ok(Some(self)),
            Talk::Done => {}
            Talk::Refused => {
                // The guest is reset. The server takes the next front end once this one has gone.
                drop(self);
                self = match connect(socket) {
                    Ok(fresh) => fresh,
                    // A dying process closes its sockets before it is dead.
                    Err(_) if dies(lives) => return Ok(None),
                    Err(error) => return Err(error),
                };
            }
        }
        self.load(bench, lives)?;
        Ok(Some(self))
    }

    /// Everything that was in flight comes to its end; then the disk is looked at.
    fn resume(&mut self, bench: &mut Bench, lives: &mut impl FnMut() -> bool) -> Result<Talk> {
        let left = self.in_flight.len() as u64;
        while !self.in_flight.is_empty() {
            if self.complete_one(bench, lives)? == Talk::Dead {
                bench.figures.taken_up += left - self.in_flight.len() as u64;
                return Ok(Talk::Dead);
            }
        }
        bench.figures.taken_up += left;
        // Whatever it was asked before, a flush says whether it dares to promise anything.
        if self.ask(bench, Kind::Flush, 0, 0, 0, lives)? == Talk::Dead {
            return Ok(Talk::Dead);
        }
        let refused = self.refused;
        if refused {
            let (at, length) = (SECTOR * bench.random.below(SIZE / SECTOR), SECTOR);
            let stamp = bench.oracle.next_stamp;
            bench.oracle.next_stamp += 1;
            bench.oracle.sent(at, length, stamp);
            self.refused = false;
            if self.ask(bench, Kind::Write, at, length, stamp, lives)? == Talk::Dead {
                self.refused = true;
                return Ok(Talk::Dead);
            }
            if !self.refused {
                return Err("a server refused a flush, and took a write after it".into());
            }
        } else {
            bench.oracle.nothing_lost();
        }
        let Some(disk) = self.read_all(lives)? else { return Ok(Talk::Dead) };
        bench.verify(&disk)?;
        if refused {
            bench.figures.refused += 1;
            return Ok(Talk::Refused);
        }
        bench.figures.seamless += 1;
        Ok(Talk::Done)
    }

    /// Requests, many at a time and never two for one sector, until the server dies.
    fn load(&mut self, bench: &mut Bench, lives: &mut impl FnMut() -> bool) -> Result {
        loop {
            for _ in 0..=bench.random.below(8) {
                self.submit_some(bench)?;
            }
            let flush = bench.random.below(5) == 0;
            let leave = if flush { 0 } else { bench.random.below(6) as usize };
            while self.in_flight.len() > leave {
                if self.complete_one(bench, lives)? == Talk::Dead {
                    return Ok(());
                }
            }
            if flush && self.ask(bench, Kind::Flush, 0, 0, 0, lives)? == Talk::Dead {
                return Ok(());
            }
        }
    }

    fn submit_some(&mut self, bench: &mut Bench) -> Result {
        let longest = if bench.random.below(8) == 0 { 400 } else { 16 };
        let length = SECTOR * (1 + bench.random.below(longest));
        let at = SECTOR * bench.random.below((SIZE - length) / SECTOR);
        if self.in_flight.values().any(|other| other.touches(at, length)) {
            return Ok(());
        }
        let kind = match bench.random.below(8) {
            0 | 1 => Kind::Read,
            2 => Kind::WriteZeroes(bench.random.below(2) == 0),
            _ => Kind::Write,
        };
        let value = match kind {
            Kind::Write => bench.oracle.next_stamp,
            _ => ZEROES,
        };
        if kind != Kind::Read {
            bench.oracle.next_stamp += 1;
            bench.oracle.sent(at, length, value);
        }
        let queue = bench.random.below(u64::from(QUEUES)) as usize;
        self.submit(queue, Request { kind, at, length, value })
    }

    fn submit(&mut self, queue: usize, request: Request) -> Result {
        let Some(slot) = self.client.claim(queue) else { return Ok(()) };
        let Request { kind, at, length, value } = request;
        if kind == Kind::Write {
            self.client.fill(queue, slot, &value.to_le_bytes().repeat((length / 8) as usize))?;
        }
        self.client.submit(queue, slot, kind, at, length as u32)?;
        self.client.push(queue)?;
        self.in_flight.insert((queue, slot), request);
        Ok(())
    }

    /// One request while nothing else is in flight.
    fn ask(
        &mut self,
        bench: &mut Bench,
        kind: Kind,
        at: u64,
        length: u64,
        value: u64,
        lives: &mut impl FnMut() -> bool,
    ) -> Result<Talk> {
        self.submit(0, Request { kind, at, length, value })?;
        while !self.in_flight.is_empty() {
            if self.complete_one(bench, lives)? == Talk::Dead {
                return Ok(Talk::Dead);
            }
        }
        Ok(Talk::Done)
    }

    /// Takes one completion, from whichever queue has one.
    fn complete_one(&mut self, bench: &mut Bench, lives: &mut impl FnMut() -> bool) -> Result<Talk> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Looked at before the queues: what a server gives back before it dies is taken.
            let alive = lives();
            for queue in 0..usize::from(QUEUES) {
                if !self.in_flight.keys().any(|(of, _)| *of == queue) {
                    continue;
                }
                let within = if alive { GLANCE } else { Duration::ZERO };
                let Ok((slot, status)) = self.client.complete(queue, within) else { continue };
                let done = self.in_flight.remove(&(queue, slot)).ok_or("a request came back that was not in flight")?;
                self.ended(bench, done, (queue, slot), status)?;
                return Ok(Talk::Done);
            }
            if !alive {
                return Ok(Talk::Dead);
            }
            if Instant::now() > deadline {
                return Err(error!("requests do not come back: {:?}", self.in_flight));
            }
        }
    }

    fn ended(&mut self, bench: &mut Bench, done: Request, place: (usize, Slot), status: Status) -> Result {
        let Request { kind, at, length, value } = done;
        match (kind, status) {
            (_, Status::OK) => {}
            (Kind::Read, status) => return Err(error!("a read of {length} bytes at {at}: {status}")),
            (_, Status::IO_ERROR) => {
                self.refused = true;
                return Ok(());
            }
            (_, status) => return Err(error!("{kind:?} of {length} bytes at {at}: {status}")),
        }
        bench.figures.requests += 1;
        match kind {
            Kind::Read => {
                let data = self.client.data(place.0, place.1, length as u32)?;
                bench.oracle.saw(at, &data)?;
            }
            Kind::Flush => {
                bench.figures.flushes += 1;
                bench.oracle.flushed();
            }
            _ => bench.oracle.answered(at, length, value),
        }
        Ok(())
    }

    /// The whole disk; `None` if the server dies over it.
    fn read_all(&mut self, lives: &mut impl FnMut() -> bool) -> Result<Option<Vec<u8>>> {
        let step = 256 << 10;
        let mut disk = Vec::with_capacity(SIZE as usize);
        for at in (0..SIZE).step_by(step) {
            let slot = self.client.claim(0).ok_or("nothing is in flight, and yet no place is free")?;
            self.client.submit(0, slot, Kind::Read, at, step as u32)?;
            self.client.push(0)?;
            self.in_flight.insert((0, slot), Request { kind: Kind::Read, at, length: step as u64, value: ZEROES });
            let deadline = Instant::now() + PATIENCE;
            let status = loop {
                let alive = lives();
                if let Ok((_, status)) = self.client.complete(0, GLANCE) {
                    break status;
                }
                if !alive {
                    return Ok(None);
                }
                if Instant::now() > deadline {
                    return Err("a read does not come back".into());
                }
            };
            self.in_flight.clear();
            if status != Status::OK {
                return Err(error!("a read at {at}: {status}"));
            }
            disk.extend(self.client.data(0, slot, step as u32)?);
        }
        Ok(Some(disk))
    }
}
