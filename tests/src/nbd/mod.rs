//! An NBD client for tests: every request of the protocol, one at a time or many in flight, and nothing hidden.
//!
//! Requests go out as asked (no splitting, no alignment, no checking against the advertised limits), so that a server
//! can also be asked for what it must refuse. Replies may come in any order and are matched by their cookie. The
//! protocol is that of `doc/proto.md` in the NBD project: fixed newstyle negotiation, simple and structured replies.

mod negotiate;
mod reply;

use std::collections::HashMap;
use std::fmt;
use std::io::{BufReader, BufWriter, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;

pub use negotiate::{Export, Options};

use crate::process::PATIENCE;
use crate::{Result, error};

const REQUEST_MAGIC: u32 = 0x2560_9513;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Read bytes.
    Read = 0,
    /// Write bytes.
    Write = 1,
    /// Say goodbye; has no reply.
    Disconnect = 2,
    /// Make all completed writes durable.
    Flush = 3,
    /// Discard.
    Trim = 4,
    /// Fetch into the cache.
    Cache = 5,
    /// Write zeroes.
    WriteZeroes = 6,
    /// Describe extents.
    BlockStatus = 7,
}

/// Request flags, to be combined with `|`.
pub mod flag {
    /// The write is durable when it is answered.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes must be allocated, not punched.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The read's reply must be one data chunk.
    pub const DF: u16 = 1 << 2;
    /// Describe one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than write zeroes slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// What the server says of an export, from its transmission flags.
pub mod can {
    /// Takes no writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Takes flushes.
    pub const FLUSH: u16 = 1 << 2;
    /// Takes FUA.
    pub const FUA: u16 = 1 << 3;
    /// Takes trims.
    pub const TRIM: u16 = 1 << 5;
    /// Takes write-zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// A flush on one connection covers the writes of all.
    pub const MULTI_CONN: u16 = 1 << 8;
    /// Takes cache requests.
    pub const CACHE: u16 = 1 << 10;
    /// Takes fast-zero requests.
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// The error a server answered a request with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdError {
    /// An errno of the protocol's list, such as 5 (EIO) or 28 (ENOSPC).
    pub errno: u32,
    /// The server's words, if it sent any.
    pub text: String,
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NBD error {} {}", self.errno, self.text)
    }
}

impl std::error::Error for NbdError {}

/// One extent of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes.
    pub length: u32,
    /// Flags of the metadata context: for `base:allocation`, 1 is a hole and 2 reads as zeroes.
    pub flags: u32,
}

/// What answered a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Bytes read; empty for all but reads.
    pub data: Vec<u8>,
    /// Extents; empty for all but block status.
    pub extents: Vec<Extent>,
}

/// A finished request: its cookie, and what the server said.
pub type Completion = (u64, std::result::Result<Reply, NbdError>);

trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

struct Pending {
    command: Command,
    length: u32,
}

/// One connection in the transmission phase.
pub struct Client {
    reader: BufReader<Box<dyn Socket>>,
    writer: BufWriter<Box<dyn Socket>>,
    export: Export,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("export", &self.export)
            .field("in_flight", &self.pending.len())
            .finish_non_exhaustive()
    }
}

/// Replies read at once: several small ones, or most of a large one.
const BUFFER: usize = 256 << 10;

impl Client {
    /// Connects to the empty export name on a unix socket, asking for all this client knows.
    pub fn connect(socket: &Path) -> Result<Client> {
        Client::connect_with(socket, &Options::default())
    }

    /// Connects on a unix socket.
    pub fn connect_with(socket: &Path, options: &Options) -> Result<Client> {
        let stream = UnixStream::connect(socket).map_err(|why| error!("connecting to {}: {why}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let writer = stream.try_clone()?;
        Client::negotiate(Box::new(stream), Box::new(writer), options)
    }

    /// Connects over TCP.
    pub fn connect_tcp(address: (&str, u16), options: &Options) -> Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let writer = stream.try_clone()?;
        Client::negotiate(Box::new(stream), Box::new(writer), options)
    }

    fn negotiate(reader: Box<dyn Socket>, writer: Box<dyn Socket>, options: &Options) -> Result<Client> {
        let mut reader = BufReader::with_capacity(BUFFER, reader);
        let mut writer = BufWriter::with_capacity(BUFFER, writer);
        let export = negotiate::go(&mut reader, &mut writer, options)?;
        Ok(Client { reader, writer, export, pending: HashMap::new(), next_cookie: 1 })
    }

    /// What the server said of the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// Requests sent and not answered.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Queues a request and returns its cookie. It is sent by [`Client::push`], or when a reply is waited for.
    /// `payload` is what a write writes; for other commands it is empty.
    pub fn submit(&mut self, command: Command, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut header = [0u8; 28];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&flags.to_be_bytes());
        header[6..8].copy_from_slice(&(command as u16).to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..28].copy_from_slice(&length.to_be_bytes());
        self.writer.write_all(&header)?;
        self.writer.write_all(payload)?;
        if command != Command::Disconnect {
            self.pending.insert(cookie, Pending { command, length });
        }
        Ok(cookie)
    }

    /// Sends what was queued.
    pub fn push(&mut self) -> Result {
        self.writer.flush()?;
        Ok(())
    }

    /// Waits for the next request to finish, whichever it is.
    pub fn complete(&mut self) -> Result<Completion> {
        // While replies wait in the buffer, further requests gather in theirs: one write for many.
        if self.reader.buffer().is_empty() {
            self.push()?;
        }
        reply::next(&mut self.reader, &mut self.pending, self.export.structured)
    }

    fn one(&mut self, command: Command, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Result<Reply> {
        let cookie = self.submit(command, flags, offset, length, payload)?;
        let (answered, reply) = self.complete()?;
        if answered != cookie {
            return Err("one call at a time, or submit and complete".into());
        }
        Ok(reply?)
    }

    /// Reads `length` bytes at `offset`.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        Ok(self.one(Command::Read, 0, offset, length, &[])?.data)
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result {
        self.write_with(0, offset, data)
    }

    /// Writes `data` at `offset` with [`flag`]s.
    pub fn write_with(&mut self, flags: u16, offset: u64, data: &[u8]) -> Result {
        let length = u32::try_from(data.len())?;
        self.one(Command::Write, flags, offset, length, data)?;
        Ok(())
    }

    /// Makes all that was written durable.
    pub fn flush(&mut self) -> Result {
        self.one(Command::Flush, 0, 0, 0, &[])?;
        Ok(())
    }

    /// Discards a range.
    pub fn trim(&mut self, offset: u64, length: u32) -> Result {
        self.one(Command::Trim, 0, offset, length, &[])?;
        Ok(())
    }

    /// Writes zeroes over a range, with [`flag`]s.
    pub fn write_zeroes(&mut self, flags: u16, offset: u64, length: u32) -> Result {
        self.one(Command::WriteZeroes, flags, offset, length, &[])?;
        Ok(())
    }

    /// Asks the server to fetch a range into its cache.
    pub fn cache(&mut self, offset: u64, length: u32) -> Result {
        self.one(Command::Cache, 0, offset, length, &[])?;
        Ok(())
    }

    /// The extents of a range, as the negotiated metadata context describes them.
    pub fn block_status(&mut self, flags: u16, offset: u64, length: u32) -> Result<Vec<Extent>> {
        Ok(self.one(Command::BlockStatus, flags, offset, length, &[])?.extents)
    }

    /// Says goodbye.
    pub fn disconnect(mut self) -> Result {
        self.submit(Command::Disconnect, 0, 0, 0, &[])?;
        self.push()
    }
}
