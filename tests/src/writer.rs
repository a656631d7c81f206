//! A guest that never stops writing, and what must be there of it afterwards.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use crate::nbd::{Client, Options};
use crate::process::finish;
use crate::random::Random;
use crate::{Result, error};

/// A writer that never stops: every block it writes holds the number of the write, and it remembers the last one of each.
pub struct Writer {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<Vec<u64>>>,
}

/// Bytes of each write.
pub const BLOCK: u64 = 4096;

impl Writer {
    /// Writes to the first `blocks` blocks of an export, and is under way when this returns.
    ///
    /// # Errors
    /// Where the export cannot be written to.
    pub fn start(socket: &Path, export: &str, blocks: u64, seed: u64) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = Client::connect_with(socket, &Options { name: export.to_owned(), ..Options::default() })?;
        let (going, began) = mpsc::channel();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut random = Random::new(seed);
            let mut last = vec![0; usize::try_from(blocks)?];
            let mut number = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                number += 1;
                let block = random.below(blocks);
                let at = usize::try_from(block)?;
                client.write(block * BLOCK, &number.to_le_bytes().repeat(BLOCK as usize / 8))?;
                last[at] = number;
                // And what it reads is what it wrote, whatever happens to the chain meanwhile.
                let other = random.below(blocks);
                let read = client.read(other * BLOCK, BLOCK as u32)?;
                let seen = u64::from_le_bytes(read[..8].try_into()?);
                let wanted = last[usize::try_from(other)?];
                if wanted > 0 && seen != wanted {
                    return Err(error!("block {other} holds {seen} where {wanted} was written"));
                }
                if number.is_multiple_of(50) {
                    client.flush()?;
                }
                if number == 20 {
                    going.send(())?;
                }
            }
            client.flush()?;
            Ok(last)
        });
        began.recv().map_err(|_| "the writer ended before it began")?;
        Ok(Self { stop, thread })
    }

    /// Stops it, with a flush; the number that each block holds (0: it was never written).
    ///
    /// # Errors
    /// Where something it wrote failed, or it did not read what it had written.
    pub fn stop(self) -> Result<Vec<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the writer panicked")?
    }
}

/// What an image shows, as raw bytes.
///
/// # Errors
/// Where `qemu-img` cannot read it.
pub fn shown(image: &Path) -> Result<Vec<u8>> {
    let raw = image.with_extension("shown");
    let image = image.to_str().ok_or("a name")?;
    finish(Command::new("qemu-img").args(["convert", "-O", "raw", image]).arg(&raw))?.ok()?;
    Ok(fs::read(&raw)?)
}

/// That `bytes` hold what a writer wrote last.
///
/// # Errors
/// Where a block does not.
pub fn holds(bytes: &[u8], last: &[u64]) -> Result {
    for (block, number) in last.iter().enumerate().filter(|(_, number)| **number > 0) {
        let at = block * BLOCK as usize;
        let held = u64::from_le_bytes(bytes[at..at + 8].try_into()?);
        if held != *number {
            return Err(error!("block {block} holds {held} where {number} was written last"));
        }
    }
    Ok(())
}
