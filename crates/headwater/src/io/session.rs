//! One disk and the commands given to it.

use super::number::{self, with_unit};
use super::request::Request;
use crate::images::{self, Look};
use crate::tool;
use disk::{Disk, DiskOptions};
use layout::{GuestOffset, GuestRange};
use ring::{Iov, JoinHandle};
use std::rc::Rc;
use std::time::{Duration, Instant};
use store::debug::{DebugStore, Event};

/// What is written where nothing else is said, and what memory holds that nobody has read into yet.
const DEFAULT_PATTERN: u8 = 0xcd;
const STALE: u8 = 0xab;

/// An open disk, or none, and what is under way on it.
pub(super) struct Session {
    look: Look,
    options: DiskOptions,
    disk: Option<Rc<Disk>>,
    file: String,
    /// Where requests can be stopped.
    debugs: Vec<Rc<DebugStore>>,
    /// Requests that nobody has waited for yet.
    under_way: Vec<JoinHandle<bool>>,
    over: bool,
}

impl Session {
    pub(super) fn new(look: Look, options: DiskOptions) -> Self {
        let (file, under_way) = (String::new(), Vec::new());
        Self { look, options, disk: None, file, debugs: Vec::new(), under_way, over: false }
    }

    /// Whether there shall be no more commands.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Opens `file`.
    pub(super) async fn open(&mut self, file: &str) -> Result<(), String> {
        let sources = images::sources(&self.look);
        let chain = images::open_from(&sources, file, &self.look).await;
        let chain = chain.map_err(|error| format!("can't open device {file}: {error}"))?;
        self.debugs = sources.debugs();
        for debug in &self.debugs {
            debug.listen(Rc::new(|tag, stopped| {
                let what = if stopped { "Suspended" } else { "Resuming" };
                println!("blkdebug: {what} request '{tag}'");
            }));
        }
        self.disk = Some(Disk::new(file, chain, self.options));
        file.clone_into(&mut self.file);
        Ok(())
    }

    /// Waits for what is under way, and closes.
    pub(super) async fn end(&mut self) -> Result<(), String> {
        self.wait().await;
        match self.disk.take() {
            Some(disk) => disk.close().await.map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    async fn wait(&mut self) -> bool {
        let mut good = true;
        for request in self.under_way.drain(..) {
            good &= request.await;
        }
        good
    }

    /// Carries out one line; false where it failed (what is wrong was printed).
    pub(super) async fn command(&mut self, line: &str) -> bool {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((name, words)) = words.split_first() else { return true };
        match self.carry_out(name, words).await {
            Ok(good) => good,
            Err(message) => {
                // As that tool has it: what is no command goes to the one stream, what went wrong with one to the other.
                if message.starts_with("bad argument count") || message.starts_with("command \"") {
                    eprintln!("{message}");
                } else {
                    println!("{message}");
                }
                false
            }
        }
    }

    fn disk(&self) -> Result<&Rc<Disk>, String> {
        self.disk.as_ref().ok_or_else(|| "no file open, try 'help open'".to_owned())
    }

    async fn carry_out(&mut self, name: &str, words: &[&str]) -> Result<bool, String> {
        match name {
            "quit" | "q" => self.over = true,
            "help" | "?" => println!("{HELP}"),
            "open" | "o" => {
                let file = words.last().ok_or("bad argument count 0 to open")?;
                if self.disk.is_some() {
                    return Err("file open already, try 'help close'".to_owned());
                }
                self.open(file).await?;
            }
            "close" | "c" => self.end().await?,
            "reopen" => return self.reopen(words).await,
            "read" | "r" | "readv" => {
                let request = Request::parse(name, words, "abCqrvplsP", name == "readv")?;
                return Ok(read(Rc::clone(self.disk()?), request, if name == "readv" { "readv" } else { "read" }).await);
            }
            "write" | "w" | "writev" => {
                let request = Request::parse(name, words, "bcCfnpqrsuzP", name == "writev")?;
                return Ok(
                    write(Rc::clone(self.disk()?), request, if name == "writev" { "writev" } else { "write" }).await
                );
            }
            "aio_read" => {
                let request = Request::parse(name, words, "CqrvP", true)?;
                self.under_way.push(ring::spawn(read(Rc::clone(self.disk()?), request, "readv")));
            }
            "aio_write" => {
                let request = Request::parse(name, words, "CfqruzP", true)?;
                self.under_way.push(ring::spawn(write(Rc::clone(self.disk()?), request, "aio_write")));
            }
            "aio_flush" => {
                let good = self.wait().await;
                self.flush().await?;
                return Ok(good);
            }
            "flush" | "f" => self.flush().await?,
            "discard" | "d" => {
                let request = Request::parse(name, words, "Cq", false)?;
                return Ok(discard(self.disk()?, &request).await);
            }
            "truncate" | "t" => self.truncate(words).await?,
            "length" | "l" => println!("{}", with_unit(self.disk()?.size() as f64)),
            "info" | "i" => self.info()?,
            "map" => self.map().await?,
            "alloc" | "a" => self.alloc(words).await?,
            "sleep" => {
                let ms = words.first().and_then(|word| word.parse().ok()).ok_or("bad argument to sleep")?;
                ring::sleep(Duration::from_millis(ms)).await;
            }
            "abort" => std::process::abort(),
            "break" => self.break_at(words)?,
            "remove_break" => {
                let tag = words.first().ok_or("bad argument count 0 to remove_break, expected 1 argument")?;
                let found = self.debugs.iter().fold(false, |found, debug| found | debug.remove_break(tag));
                if !found {
                    return Err(format!("Could not remove breakpoint {tag}: No such file or directory"));
                }
            }
            "resume" => {
                let tag = words.first().ok_or("bad argument count 0 to resume, expected 1 argument")?;
                if !self.debugs.iter().any(|debug| debug.resume(tag)) {
                    return Err("Could not resume request: No such file or directory".to_owned());
                }
                // What goes on may say something before the next command does.
                ring::yield_now().await;
            }
            "wait_break" => {
                let tag = words.first().ok_or("bad argument count 0 to wait_break, expected 1 argument")?;
                let Some(debug) = self.debugs.first() else { return Ok(true) };
                debug.wait_stopped(tag).await;
            }
            _ => return Err(format!("command \"{name}\" not found")),
        }
        Ok(true)
    }

    /// Stops the next request at which an event happens.
    fn break_at(&self, words: &[&str]) -> Result<(), String> {
        let [event, tag] = words else {
            return Err(format!("bad argument count {} to break, expected 2 arguments", words.len()));
        };
        let event = Event::from_name(event).ok_or("Could not set breakpoint: No such file or directory")?;
        let debug = self.debugs.first().ok_or("Could not set breakpoint: Operation not supported")?;
        debug.break_at(event, tag);
        Ok(())
    }

    async fn flush(&self) -> Result<(), String> {
        self.disk()?.flush().await.map_err(|error| format!("flush failed: {error}"))
    }

    /// The same file again, with other rights.
    async fn reopen(&mut self, words: &[&str]) -> Result<bool, String> {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "-r" => self.look.writable = false,
                "-w" => self.look.writable = true,
                "-c" => {
                    let mode = words.next().ok_or("reopen: option requires an argument -- 'c'")?;
                    self.look.direct = ["none", "off", "directsync"].contains(mode);
                    self.look.no_flush = *mode == "unsafe";
                    self.options.write_through = ["writethrough", "directsync"].contains(mode);
                }
                _ => return Err(format!("reopen: invalid option -- '{word}'")),
            }
        }
        let file = self.file.clone();
        self.end().await?;
        self.open(&file).await.map(|()| true)
    }

    async fn truncate(&self, words: &[&str]) -> Result<(), String> {
        let size = number::parse(words.last().ok_or("bad argument count 0 to truncate, expected 1 argument")?)?;
        let disk = self.disk()?;
        let done = if size >= disk.size() {
            disk.resize(size).await
        } else {
            disk.flush().await.map_err(|error| error.to_string())?;
            disk.chain()[0].image.resize(size).await
        };
        done.map_err(|error| error.to_string())
    }

    fn info(&self) -> Result<(), String> {
        let disk = self.disk()?;
        let image = Rc::clone(&disk.chain()[0].image);
        println!("format name: {}", image.format());
        let info = image.info();
        if let Some(bytes) = info.cluster_size {
            println!("cluster size: {}", with_unit(bytes as f64));
        }
        if let Some(own) = info.qcow2 {
            println!("{}", crate::img::info::specific(&own, &[]).join("\n"));
        }
        Ok(())
    }

    /// What of `range` the image itself decides, run by run.
    async fn runs(&self, range: GuestRange) -> Result<Vec<(bool, u64)>, String> {
        let disk = self.disk()?;
        let mut runs: Vec<(bool, u64)> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let status = disk.status(rest).await.map_err(|error| error.to_string())?;
            let own = status.allocated && status.depth == 0;
            match runs.last_mut() {
                Some((last, len)) if *last == own => *len += status.len,
                _ => runs.push((own, status.len)),
            }
            rest = rest.skip(status.len);
        }
        Ok(runs)
    }

    async fn map(&self) -> Result<(), String> {
        let size = self.disk()?.size();
        let mut at = 0;
        for (own, len) in self.runs(GuestRange::new(GuestOffset::ZERO, size)).await? {
            let word = if own { "    allocated" } else { "not allocated" };
            let (length, offset) = (with_unit(len as f64), with_unit(at as f64));
            println!("{length} ({len:#x}) bytes {word} at offset {offset} ({at:#x})");
            at += len;
        }
        Ok(())
    }

    async fn alloc(&self, words: &[&str]) -> Result<(), String> {
        let at = number::parse(words.first().ok_or("bad argument count 0 to alloc, expected at least 1 argument")?)?;
        let len = words.get(1).map_or(Ok(512), |word| number::parse(word))?;
        let range = GuestRange::new(GuestOffset(at), len);
        let size = self.disk()?.size();
        if range.end().get() > size {
            return Err(format!("is_allocated failed: the range ends behind the disk's {size} bytes"));
        }
        let own: u64 = self.runs(range).await?.into_iter().filter(|(own, _)| *own).map(|(_, len)| len).sum();
        println!("{own}/{len} bytes allocated at offset {}", with_unit(at as f64));
        Ok(())
    }
}

/// `read 65536/65536 bytes at offset 0`, and how fast that was.
fn report(what: &str, request: &Request, took: Duration) {
    if request.quiet {
        return;
    }
    let Request { at, len, .. } = *request;
    let seconds = took.as_secs_f64().max(1e-9);
    println!("{what} {len}/{len} bytes at offset {at}");
    let clock = format!("{:02}.{:02} sec", took.as_secs(), took.subsec_millis() / 10);
    let rate = with_unit(len as f64 / seconds);
    println!("{}, 1 ops; {clock} ({rate}/sec and {:.4} ops/sec)", with_unit(len as f64), 1.0 / seconds);
}

/// An error as the system calls it, as scripts look for.
fn reason(error: &disk::Error) -> String {
    let named = std::io::Error::from_raw_os_error(error.errno()).to_string();
    named.split(" (os error").next().unwrap_or_default().to_owned()
}

async fn read(disk: Rc<Disk>, request: Request, command: &'static str) -> bool {
    let began = Instant::now();
    let bytes = Iov::alloc(request.len as usize);
    bytes.fill(STALE);
    // Past its end there is nothing to read, as the system would say.
    let past_end = request.at.saturating_add(request.len) > disk.size();
    if past_end {
        println!("{command} failed: Input/output error");
        return false;
    }
    if let Err(error) = disk.read(GuestOffset(request.at), bytes.clone()).await {
        println!("{command} failed: {}", reason(&error));
        return false;
    }
    let took = began.elapsed();
    let bytes = bytes.to_vec();
    let mut good = true;
    if let Some(pattern) = request.pattern {
        let start = request.pattern_offset.min(request.len);
        let len = request.pattern_len.unwrap_or(request.len - start).min(request.len - start);
        if bytes[start as usize..(start + len) as usize].iter().any(|byte| *byte != pattern) {
            println!("Pattern verification failed at offset {}, {len} bytes", request.at + start);
            good = false;
        }
    }
    if request.dump && !request.quiet {
        dump(&bytes, request.at);
    }
    report("read", &request, took);
    good
}

fn dump(bytes: &[u8], at: u64) {
    for (n, line) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let hex = format!("{} ", hex.join(" "));
        let text: String = line.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
        println!("{:08x}:  {hex} {text}", at + n as u64 * 16);
    }
}

async fn write(disk: Rc<Disk>, request: Request, command: &'static str) -> bool {
    if disk.read_only() {
        tool::complain("Block node is read-only");
        return false;
    }
    let began = Instant::now();
    let (at, len) = (GuestOffset(request.at), request.len);
    let done = if request.at.saturating_add(len) > disk.size() {
        println!("{command} failed: Input/output error");
        return false;
    } else if request.zero {
        disk.write_zeroes(at.range(len), request.unmap, request.fua).await
    } else {
        match payload(&request) {
            Ok(bytes) if request.packed => pack(&disk, at, bytes).await,
            Ok(bytes) => disk.write(at, bytes, request.fua).await,
            Err(message) => {
                println!("{message}");
                return false;
            }
        }
    };
    if let Err(error) = done {
        println!("{command} failed: {}", reason(&error));
        return false;
    }
    report("wrote", &request, began.elapsed());
    true
}

/// What is to be written: a pattern, or what a file holds, over and over.
fn payload(request: &Request) -> Result<Iov, String> {
    let bytes = Iov::alloc(request.len as usize);
    match &request.file {
        None => bytes.fill(request.pattern.unwrap_or(DEFAULT_PATTERN)),
        Some(file) => {
            let held = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
            if held.is_empty() {
                return Err(format!("{file}: file is empty"));
            }
            for at in (0..bytes.len()).step_by(held.len()) {
                bytes.write(at, &held[..held.len().min(bytes.len() - at)]);
            }
        }
    }
    Ok(bytes)
}

/// Writes whole clusters packed, where that saves anything.
async fn pack(disk: &Rc<Disk>, at: GuestOffset, bytes: Iov) -> disk::Result<()> {
    let image = Rc::clone(&disk.chain()[0].image);
    let cluster = image.cluster_size() as usize;
    for start in (0..bytes.len()).step_by(cluster) {
        let part = bytes.slice(start..bytes.len().min(start + cluster));
        let place = at + start as u64;
        if !image.pack(place, part.clone()).await? {
            disk.write(place, part, false).await?;
        }
    }
    Ok(())
}

async fn discard(disk: &Rc<Disk>, request: &Request) -> bool {
    if disk.read_only() {
        tool::complain("Block node is read-only");
        return false;
    }
    if request.at.saturating_add(request.len) > disk.size() {
        println!("discard failed: Input/output error");
        return false;
    }
    let began = Instant::now();
    match disk.discard(GuestOffset(request.at).range(request.len)).await {
        Ok(()) => {
            report("discard", request, began.elapsed());
            true
        }
        Err(error) => {
            println!("discard failed: {}", reason(&error));
            false
        }
    }
}

const HELP: &str = "\
read [-qv] [-P PATTERN [-s OFFSET] [-l LENGTH]] OFFSET LENGTH
write [-cfquz] [-P PATTERN | -s FILE] OFFSET LENGTH
readv, writev, aio_read, aio_write: the same, with one or more lengths
aio_flush, flush, discard OFFSET LENGTH, truncate SIZE
length, info, map, alloc OFFSET [LENGTH]
break EVENT TAG, wait_break TAG, resume TAG, remove_break TAG (of a disk over blkdebug)
open FILE, close, reopen [-r|-w] [-c CACHE], sleep MS, abort, quit";
