//! A virtio-blk request: taken out of a descriptor chain, checked, carried out (VIRTIO 1.3, 5.2.6).
//!
//! Everything is checked before anything is done; what decides is copied out of guest memory once. How a driver frames
//! header, data and status into descriptors is its own affair: only the direction counts, and the status byte is the
//! last byte the device may write.

use super::chain::Chain;
use super::config::{Features, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::memory::GuestMap;
use disk::Disk;
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use smallvec::SmallVec;
use std::rc::Rc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

/// Length of the header in bytes: type, reserved, sector.
const HEADER: u64 = 16;

/// Length of one range of a discard or write-zeroes request in bytes: sector, sectors, flags.
const RANGE: u64 = 16;

/// Length of the device's serial in bytes.
pub(super) const SERIAL: usize = 20;

/// Bytes handed to the disk at once. A longer request goes piece by piece, so that what a store copies to align it stays
/// bounded, whatever a guest puts into a descriptor.
const PIECE: usize = 4 << 20;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Done.
    Ok,
    /// Failed, or made no sense.
    IoError,
    /// Unknown here.
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// What there is to do.
#[derive(Clone)]
pub(super) enum Work {
    /// Read from this byte on.
    Read(GuestOffset, Iov),
    /// Write from this byte on.
    Write(GuestOffset, Iov),
    /// Make durable what was completed.
    Flush,
    /// Say the serial.
    Identify(Iov),
    /// Give these ranges back.
    Discard(SmallVec<[GuestRange; 1]>),
    /// Zero these ranges; with `true` space may be given back.
    WriteZeroes(SmallVec<[(GuestRange, bool); 1]>),
    /// Nothing: only answer.
    Refuse(Status),
}

/// A checked request.
pub(super) struct Request {
    /// What to do.
    pub work: Work,
    /// Where to say how it went.
    answer: Answer,
}

/// The status byte of a request, and what was negotiated about it.
pub(super) struct Answer {
    map: Rc<GuestMap>,
    at: GuestAddress,
    data: u32,
}

/// The chain has no place for a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoStatusByte;

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// As negotiated.
    pub features: Features,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Nothing may be written.
    pub read_only: bool,
}

impl Request {
    /// Takes a request out of `chain`.
    pub(super) fn parse(chain: &Chain, map: &Rc<GuestMap>, terms: &Terms) -> Result<Self, NoStatusByte> {
        let last = chain.writable.len().checked_sub(1).ok_or(NoStatusByte)?;
        let status = chain.writable.cut(last..last + 1).next().ok_or(NoStatusByte)?;
        if !map.has(status.at) {
            return Err(NoStatusByte);
        }
        let work = if chain.flaw.is_some() {
            Work::Refuse(Status::IoError)
        } else {
            Work::parse(chain, last, map, terms).unwrap_or_else(Work::Refuse)
        };
        let data = match &work {
            Work::Read(_, into) | Work::Identify(into) => into.len() as u32,
            _ => 0,
        };
        Ok(Self { work, answer: Answer { map: Rc::clone(map), at: status.at, data } })
    }

    /// What to do, and where to say how it went.
    pub(super) fn split(self) -> (Work, Answer) {
        (self.work, self.answer)
    }
}

impl Answer {
    /// Writes the status; returns how many bytes the device has written in all, as the used ring wants to know.
    pub(super) fn give(self, status: Status) -> u32 {
        // The address was found to be memory of this very map, so this cannot fail.
        let _ = self.map.memory().write_obj(status.byte(), self.at);
        match status {
            Status::Ok => self.data + 1,
            // The length counts from the first writable byte on: with data missing in between nothing is promised.
            _ if self.data > 0 => 0,
            _ => 1,
        }
    }
}

impl Work {
    /// `data_in`: the writable bytes before the status byte.
    fn parse(chain: &Chain, data_in: u64, map: &Rc<GuestMap>, terms: &Terms) -> Result<Self, Status> {
        let mut header = [0; HEADER as usize];
        if chain.readable.len() < HEADER || !map.read(chain.readable.cut(0..HEADER), &mut header) {
            return Err(Status::IoError);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);
        let data_out = chain.readable.len() - HEADER;
        match kind {
            VIRTIO_BLK_T_IN => {
                let range = terms.range(sector, data_in)?;
                let into = map.buffer(chain.writable.cut(0..data_in)).ok_or(Status::IoError)?;
                Ok(Self::Read(range.start(), into))
            }
            VIRTIO_BLK_T_OUT if terms.read_only => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => {
                let range = terms.range(sector, data_out)?;
                let from = map.buffer(chain.readable.cut(HEADER..HEADER + data_out)).ok_or(Status::IoError)?;
                Ok(Self::Write(range.start(), from))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => {
                let into = map.buffer(chain.writable.cut(0..data_in.min(SERIAL as u64))).ok_or(Status::IoError)?;
                Ok(Self::Identify(into))
            }
            VIRTIO_BLK_T_DISCARD if terms.features.has(VIRTIO_BLK_F_DISCARD) => {
                let mut ranges = SmallVec::new();
                terms.each_range(chain, map, |range, flags| {
                    // Discarding knows no flag at all.
                    if flags != 0 {
                        return Err(Status::Unsupported);
                    }
                    ranges.push(range);
                    Ok(())
                })?;
                Ok(Self::Discard(ranges))
            }
            VIRTIO_BLK_T_WRITE_ZEROES if terms.features.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let mut ranges = SmallVec::new();
                terms.each_range(chain, map, |range, flags| {
                    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                        return Err(Status::Unsupported);
                    }
                    ranges.push((range, flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0));
                    Ok(())
                })?;
                Ok(Self::WriteZeroes(ranges))
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Whether it changes the disk, or promises something about changes.
    pub(super) fn changes(&self) -> bool {
        match self {
            Self::Write(..) | Self::Flush | Self::Discard(_) | Self::WriteZeroes(_) => true,
            Self::Read(..) | Self::Identify(_) | Self::Refuse(_) => false,
        }
    }

    /// Does it. With `durable` whatever is written is durable afterwards.
    pub(super) async fn carry_out(self, disk: &Disk, serial: &str, durable: bool) -> Status {
        let (what, result) = match self {
            Self::Refuse(status) => return status,
            Self::Identify(into) => {
                let mut id = [0; SERIAL];
                let len = serial.len().min(SERIAL);
                id[..len].copy_from_slice(&serial.as_bytes()[..len]);
                into.write(0, &id[..into.len()]);
                return Status::Ok;
            }
            Self::Read(at, into) => ("read", read(disk, at, into).await),
            Self::Write(at, from) => ("write", write(disk, at, from, durable).await),
            Self::Flush => ("flush", disk.flush().await),
            Self::Discard(ranges) => ("discard", discard(disk, ranges).await),
            Self::WriteZeroes(ranges) => ("write zeroes", write_zeroes(disk, ranges, durable).await),
        };
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                tracing::warn!(disk = disk.name(), what, %error, "a guest's request failed");
                Status::IoError
            }
        }
    }
}

async fn read(disk: &Disk, at: GuestOffset, into: Iov) -> disk::Result<()> {
    if into.len() <= PIECE {
        return if into.is_empty() { Ok(()) } else { disk.read(at, into).await };
    }
    for from in (0..into.len()).step_by(PIECE) {
        disk.read(at + from as u64, into.slice(from..into.len().min(from + PIECE))).await?;
    }
    Ok(())
}

async fn write(disk: &Disk, at: GuestOffset, from: Iov, durable: bool) -> disk::Result<()> {
    if from.len() <= PIECE {
        return if from.is_empty() { Ok(()) } else { disk.write(at, from, durable).await };
    }
    for start in (0..from.len()).step_by(PIECE) {
        disk.write(at + start as u64, from.slice(start..from.len().min(start + PIECE)), durable).await?;
    }
    Ok(())
}

async fn discard(disk: &Disk, ranges: SmallVec<[GuestRange; 1]>) -> disk::Result<()> {
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        disk.discard(range).await?;
    }
    Ok(())
}

async fn write_zeroes(disk: &Disk, ranges: SmallVec<[(GuestRange, bool); 1]>, durable: bool) -> disk::Result<()> {
    for (range, unmap) in ranges.into_iter().filter(|(range, _)| !range.is_empty()) {
        disk.write_zeroes(range, unmap, durable).await?;
    }
    Ok(())
}

impl Terms {
    /// `len` bytes from `sector` on: whole sectors, inside of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<GuestRange, Status> {
        let at = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = at.checked_add(len).ok_or(Status::IoError)?;
        // What the configuration space offers: whole sectors.
        let capacity = self.size / SECTOR * SECTOR;
        if !len.is_multiple_of(SECTOR) || end > capacity {
            return Err(Status::IoError);
        }
        Ok(GuestRange::new(GuestOffset(at), len))
    }

    /// Calls `each` with every range (possibly empty) of a discard or write-zeroes request and its flags.
    fn each_range(
        &self,
        chain: &Chain,
        map: &GuestMap,
        mut each: impl FnMut(GuestRange, u32) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let len = chain.readable.len() - HEADER;
        if self.read_only || len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > MAX_RANGES as u64 {
            return Err(Status::IoError);
        }
        for i in 0..len / RANGE {
            let mut bytes = [0; RANGE as usize];
            let from = HEADER + i * RANGE;
            if !map.read(chain.readable.cut(from..from + RANGE), &mut bytes) {
                return Err(Status::IoError);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let range = self.range(sector, u64::from(sectors) * SECTOR)?;
            if sectors > MAX_RANGE_SECTORS {
                return Err(Status::IoError);
            }
            each(range, u32::from_le_bytes(flags))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
