//! A stand-in for a guest: an NBD client that reads and writes at random and knows what every byte must be.

use disk::Disk;
use layout::GuestOffset;
use nbd::client::{Answer, ClientHandshake, ClientProgress, Completion, Goal, Transactions};
use nbd::proto::{Command, CommandFlags};
use ring::Iov;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// The master is made of runs of this length: two of data, one hole.
const RUN: u64 = 1 << 20;

/// The guest's requests are at most this long.
const LONGEST: u64 = 64 << 10;

/// Pause between two requests: a guest that thinks.
const THINKS: Duration = Duration::from_millis(1);

/// What the disk must hold: the master's pattern, and what the guest wrote since, in sectors.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    size: u64,
    written: BTreeMap<u64, u64>,
}

impl Pattern {
    pub(super) fn new(size: u64) -> Self {
        Self { size, written: BTreeMap::new() }
    }

    /// Writes the master image; returns how much of it is data.
    pub(super) fn write_master(&self, path: &Path) -> io::Result<u64> {
        let file = File::create(path)?;
        file.set_len(self.size)?;
        let mut data = 0;
        for start in (0..self.size).step_by(RUN as usize) {
            if holds_data(start) {
                file.write_all_at(&self.bytes(start, RUN.min(self.size - start)), start)?;
                data += RUN;
            }
        }
        Ok(data)
    }

    /// What `len` bytes at `at` must be (whole sectors).
    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len as usize);
        for sector in at / 512..(at + len) / 512 {
            let seed = match self.written.get(&sector) {
                Some(stamp) => *stamp,
                None if holds_data(sector * 512) => sector + 1,
                None => 0,
            };
            let mut state = seed;
            for _ in 0..64 {
                bytes.extend_from_slice(&mix(&mut state).to_le_bytes());
            }
        }
        bytes
    }
}

fn holds_data(at: u64) -> bool {
    at / RUN % 3 != 2
}

/// Pseudo-random words from a seed; zero stays zero (a hole).
fn mix(state: &mut u64) -> u64 {
    if *state == 0 {
        return 0;
    }
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A guest, at work or done.
pub(super) struct Guest {
    pattern: Pattern,
    requests: u64,
}

/// A guest at work on a thread of its own.
pub(super) struct Working {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<Guest, String>>,
}

impl Guest {
    /// Connects and starts to work.
    pub(super) fn boot(socket: PathBuf, pattern: Pattern) -> Result<Working, String> {
        let mut wire = Wire::connect(&socket)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut guest = Guest { pattern, requests: 0 };
            while !stopped.load(Ordering::Relaxed) {
                guest.one_request(&mut wire)?;
                thread::sleep(THINKS);
            }
            Ok(guest)
        });
        Ok(Working { stop, thread })
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    fn one_request(&mut self, wire: &mut Wire) -> Result<(), String> {
        self.requests += 1;
        let mut dice = self.requests.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let len = (mix(&mut dice) % LONGEST / 512 + 1) * 512;
        let at = mix(&mut dice) % ((self.pattern.size - len) / 512) * 512;
        match mix(&mut dice) % 4 {
            0 => {
                for sector in at / 512..(at + len) / 512 {
                    self.pattern.written.insert(sector, dice ^ sector | 1);
                }
                wire.request(Command::Write, at, len as u32, &self.pattern.bytes(at, len)).map(drop)
            }
            1 if self.requests.is_multiple_of(8) => wire.request(Command::Flush, 0, 0, &[]).map(drop),
            _ => match wire.request(Command::Read, at, len as u32, &[])? {
                Answer::Data { bytes, .. } if bytes == self.pattern.bytes(at, len) => Ok(()),
                _ => Err(format!("the guest read wrong bytes at {at}")),
            },
        }
    }

    /// Compares a whole disk with what it must hold.
    pub(super) async fn compare(&self, disk: &Disk) -> Result<(), String> {
        for at in (0..self.pattern.size).step_by(RUN as usize) {
            let len = RUN.min(self.pattern.size - at);
            let found = Iov::alloc(len as usize);
            disk.read(GuestOffset(at), found.clone()).await.map_err(|e| e.to_string())?;
            if found.to_vec() != self.pattern.bytes(at, len) {
                return Err(format!("bytes differ within the {len} at {at}"));
            }
        }
        Ok(())
    }
}

impl Working {
    /// Lets it finish its request, and hands over what it knows.
    pub(super) fn stop(self) -> Result<Guest, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| Err("the guest panicked".into()))
    }
}

/// A blocking NBD connection with one request under way at a time.
struct Wire {
    stream: UnixStream,
    transactions: Transactions,
}

impl Wire {
    fn connect(socket: &Path) -> Result<Self, String> {
        let failed = |e: io::Error| format!("the guest could not reach its disk: {e}");
        let mut stream = UnixStream::connect(socket).map_err(failed)?;
        let mut handshake = ClientHandshake::new(Goal::Export("my".into()), true, false);
        let (mut input, mut output) = (Vec::new(), Vec::new());
        loop {
            let (taken, progress) = handshake.advance(&input, &mut output).map_err(|e| e.to_string())?;
            input.drain(..taken);
            stream.write_all(&output).map_err(failed)?;
            output.clear();
            match progress {
                ClientProgress::Session(session) => {
                    return Ok(Self { stream, transactions: Transactions::new(&session) });
                }
                ClientProgress::Listed(_) => return Err("the server answered something else".into()),
                ClientProgress::Continue if taken == 0 => {
                    let mut more = [0; 4096];
                    let read = stream.read(&mut more).map_err(failed)?;
                    if read == 0 {
                        return Err("the server hung up".into());
                    }
                    input.extend_from_slice(&more[..read]);
                }
                ClientProgress::Continue => {}
            }
        }
    }

    fn request(&mut self, command: Command, at: u64, len: u32, payload: &[u8]) -> Result<Answer, String> {
        let failed = |e: io::Error| format!("the guest lost its disk: {e}");
        let request = self.transactions.begin(command, CommandFlags::empty(), at, len);
        self.stream.write_all(&request.encode()).map_err(failed)?;
        self.stream.write_all(payload).map_err(failed)?;
        let mut completions: Vec<Completion> = Vec::new();
        let mut bytes = vec![0; 128 << 10];
        while completions.is_empty() {
            let read = self.stream.read(&mut bytes).map_err(failed)?;
            if read == 0 {
                return Err("the server hung up".into());
            }
            self.transactions.receive(&bytes[..read], &mut completions).map_err(|e| e.to_string())?;
        }
        let done = completions.swap_remove(0);
        done.outcome
            .map_err(|failure| format!("the guest's request failed with error {}: {}", failure.error, failure.message))
    }
}
