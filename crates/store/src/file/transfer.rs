//! Whole transfers out of the system's partial ones.

use ring::{File, Iov};
use std::io;

/// Reads from `at` on until `into` is full or the file ends (which is known not to be before `size`, unless somebody cut
/// it). Says how many bytes came. `unit` is what offsets have to be multiples of.
pub(super) async fn read(file: &File, at: u64, into: &Iov, unit: u64, size: u64) -> io::Result<usize> {
    let mut done = 0;
    loop {
        let got = match done {
            0 => file.read_at(at, into).await?,
            _ => file.read_at(at + done as u64, &into.slice(done..into.len())).await?,
        };
        let reached = done + got;
        if got == 0 || reached == into.len() || at + reached as u64 >= size {
            return Ok(reached);
        }
        match resume(reached, unit) {
            // Not one whole block came: the file ends in this one.
            next if next <= done => return Ok(reached),
            next => done = next,
        }
    }
}

/// Writes all of `from` at `at`. `unit` is what offsets have to be multiples of.
pub(super) async fn write(file: &File, at: u64, from: &Iov, dsync: bool, unit: u64) -> io::Result<()> {
    let mut done = 0;
    while done < from.len() {
        let put = match done {
            0 => file.write_at(at, from, dsync).await?,
            _ => file.write_at(at + done as u64, &from.slice(done..from.len()), dsync).await?,
        };
        let reached = done + put;
        done = match resume(reached, unit) {
            _ if reached == from.len() => reached,
            next if next > done => next,
            _ => return Err(io::Error::new(io::ErrorKind::WriteZero, "the file took not one block more")),
        };
    }
    Ok(())
}

/// Where to go on after `reached` bytes (from an offset that is a multiple of `unit`): at a block.
fn resume(reached: usize, unit: u64) -> usize {
    reached - reached % unit as usize
}
