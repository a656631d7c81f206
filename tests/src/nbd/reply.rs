//! Replies of the transmission phase, simple and structured, gathered until their request is finished.

use std::collections::HashMap;
use std::io::Read;

use super::negotiate::{read_u16, read_u32, read_u64};
use super::{Command, Completion, Extent, NbdError, Pending, Reply};
use crate::{Result, error};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = (1 << 15) | 1;
const CHUNK_ERROR_AT: u16 = (1 << 15) | 2;

/// The last chunk of its reply.
const DONE: u16 = 1;

/// Reads until one request is finished. Chunks of one reply are taken as adjoining: no server in the tests interleaves
/// the chunks of two replies, and one that did would be an error here, not a wrong result.
pub(super) fn next(
    reader: &mut impl Read,
    pending: &mut HashMap<u64, Pending>,
    structured: bool,
) -> Result<Completion> {
    match read_u32(reader)? {
        SIMPLE_MAGIC => simple(reader, pending, structured),
        STRUCTURED_MAGIC if structured => chunks(reader, pending),
        magic => Err(error!("not an NBD reply: {magic:#x}")),
    }
}

fn take(pending: &mut HashMap<u64, Pending>, cookie: u64) -> Result<Pending> {
    pending.remove(&cookie).ok_or_else(|| error!("a reply to {cookie}, which is not in flight"))
}

fn simple(reader: &mut impl Read, pending: &mut HashMap<u64, Pending>, structured: bool) -> Result<Completion> {
    let (errno, cookie) = (read_u32(reader)?, read_u64(reader)?);
    let Pending { command, length } = take(pending, cookie)?;
    if errno != 0 {
        let text = String::new();
        return Ok((cookie, Err(NbdError { errno, text })));
    }
    let mut reply = Reply::default();
    if command == Command::Read {
        if structured {
            return Err("a simple reply to a read although structured ones were agreed".into());
        }
        reply.data = vec![0; length as usize];
        reader.read_exact(&mut reply.data)?;
    }
    Ok((cookie, Ok(reply)))
}

fn chunks(reader: &mut impl Read, pending: &mut HashMap<u64, Pending>) -> Result<Completion> {
    let mut gathered: Option<Gathered> = None;
    loop {
        let flags = read_u16(reader)?;
        let kind = read_u16(reader)?;
        let cookie = read_u64(reader)?;
        let length = read_u32(reader)?;
        let gathered = match &mut gathered {
            Some(gathered) if gathered.cookie == cookie => gathered,
            Some(gathered) => {
                return Err(error!("a chunk of {cookie} within the reply to {}", gathered.cookie));
            }
            None => gathered.insert(Gathered::new(cookie, take(pending, cookie)?)),
        };
        gathered.chunk(reader, kind, length)?;
        if flags & DONE != 0 {
            return gathered.finish();
        }
        let magic = read_u32(reader)?;
        if magic != STRUCTURED_MAGIC {
            return Err(error!("not a further chunk: {magic:#x}"));
        }
    }
}

struct Gathered {
    cookie: u64,
    command: Command,
    length: u32,
    /// Where the read began, once a chunk has said so. Chunks name absolute offsets and may come in any order.
    pieces: Vec<(u64, Vec<u8>)>,
    extents: Vec<Extent>,
    error: Option<NbdError>,
}

impl Gathered {
    fn new(cookie: u64, Pending { command, length }: Pending) -> Self {
        Gathered { cookie, command, length, pieces: Vec::new(), extents: Vec::new(), error: None }
    }

    fn chunk(&mut self, reader: &mut impl Read, kind: u16, length: u32) -> Result {
        let bad = || error!("a chunk of kind {kind} and {length} bytes");
        match kind {
            CHUNK_NONE if length == 0 => {}
            CHUNK_DATA if length > 8 && length - 8 <= self.length => {
                let offset = read_u64(reader)?;
                let mut data = vec![0; length as usize - 8];
                reader.read_exact(&mut data)?;
                self.pieces.push((offset, data));
            }
            CHUNK_HOLE if length == 12 => {
                let (offset, zeroes) = (read_u64(reader)?, read_u32(reader)?);
                if zeroes > self.length {
                    return Err(error!("a hole of {zeroes} in a read of {}", self.length));
                }
                self.pieces.push((offset, vec![0; zeroes as usize]));
            }
            CHUNK_STATUS if length >= 12 && length % 8 == 4 => {
                let _context = read_u32(reader)?;
                for _ in 0..length / 8 {
                    let (length, flags) = (read_u32(reader)?, read_u32(reader)?);
                    self.extents.push(Extent { length, flags });
                }
            }
            CHUNK_ERROR | CHUNK_ERROR_AT if (6..0x1_0000).contains(&length) => {
                let (errno, said) = (read_u32(reader)?, read_u16(reader)?);
                let mut rest = vec![0; length as usize - 6];
                reader.read_exact(&mut rest)?;
                let text = rest.get(..usize::from(said)).ok_or_else(bad)?;
                let text = String::from_utf8_lossy(text).into_owned();
                self.error = Some(NbdError { errno, text });
            }
            _ => return Err(bad()),
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Completion> {
        if let Some(error) = self.error.take() {
            return Ok((self.cookie, Err(error)));
        }
        let mut reply = Reply { data: Vec::new(), extents: std::mem::take(&mut self.extents) };
        if self.command == Command::Read {
            self.pieces.sort_by_key(|(offset, _)| *offset);
            let mut pieces = std::mem::take(&mut self.pieces).into_iter();
            let (start, first) = pieces.next().unwrap_or_default();
            reply.data = first;
            for (offset, data) in pieces {
                if offset != start + reply.data.len() as u64 {
                    return Err(error!("a read reply with a gap or an overlap at {offset}"));
                }
                reply.data.extend(data);
            }
            if reply.data.len() != self.length as usize {
                return Err(error!("{} bytes answered a read of {}", reply.data.len(), self.length));
            }
        }
        Ok((self.cookie, Ok(reply)))
    }
}
