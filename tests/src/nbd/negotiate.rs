//! Fixed newstyle negotiation: from the server's greeting to the transmission phase.

use std::io::{Read, Write};

use crate::{Result, error};

const GREETING: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, in both directions.
const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// A reply longer than this is a broken server's.
const REPLY_LIMIT: u32 = 64 << 10;

/// What to ask for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The export's name.
    pub name: String,
    /// Ask for structured replies.
    pub structured: bool,
    /// Ask for this metadata context, if any; needs structured replies.
    pub context: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options { name: String::new(), structured: true, context: Some("base:allocation".to_owned()) }
    }
}

/// What the server said of the export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags, see [`super::can`].
    pub flags: u16,
    /// Smallest, preferred and largest request in bytes, if the server says.
    pub block_sizes: Option<(u32, u32, u32)>,
    /// Structured replies were agreed.
    pub structured: bool,
    /// The metadata context was agreed, under this id.
    pub context: Option<u32>,
}

struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

impl OptionReply {
    fn refusal(&self, what: &str) -> crate::Error {
        error!("{what} refused ({:#x}): {}", self.kind, String::from_utf8_lossy(&self.data))
    }
}

pub(super) fn go(reader: &mut impl Read, writer: &mut impl Write, options: &Options) -> Result<Export> {
    let (magic, option_magic) = (read_u64(reader)?, read_u64(reader)?);
    if (magic, option_magic) != (GREETING, OPTION_MAGIC) {
        return Err(error!("not a newstyle NBD greeting: {magic:#x} {option_magic:#x}"));
    }
    let server = read_u16(reader)?;
    if server & FIXED_NEWSTYLE == 0 {
        return Err("the server does not know fixed newstyle".into());
    }
    writer.write_all(&u32::from(server & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;
    let mut export = Export::default();
    if options.structured {
        send(writer, OPT_STRUCTURED_REPLY, &[])?;
        export.structured = receive(reader, OPT_STRUCTURED_REPLY)?.kind == REP_ACK;
    }
    if let (true, Some(context)) = (export.structured, &options.context) {
        export.context = set_context(reader, writer, &options.name, context)?;
    }
    let mut data = sized(&options.name)?;
    // Two information requests: the export, which always comes, and its block sizes.
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    send(writer, OPT_GO, &data)?;
    loop {
        let reply = receive(reader, OPT_GO)?;
        match reply.kind {
            REP_ACK => return Ok(export),
            REP_INFO => read_info(&reply.data, &mut export)?,
            _ => return Err(reply.refusal("the export")),
        }
    }
}

fn read_info(data: &[u8], export: &mut Export) -> Result {
    let mut data = data;
    match read_u16(&mut data)? {
        INFO_EXPORT => {
            export.size = read_u64(&mut data)?;
            export.flags = read_u16(&mut data)?;
        }
        INFO_BLOCK_SIZE => {
            let sizes = (read_u32(&mut data)?, read_u32(&mut data)?, read_u32(&mut data)?);
            export.block_sizes = Some(sizes);
        }
        _ => {}
    }
    Ok(())
}

fn set_context(reader: &mut impl Read, writer: &mut impl Write, name: &str, context: &str) -> Result<Option<u32>> {
    let mut data = sized(name)?;
    data.extend(1u32.to_be_bytes());
    data.extend(sized(context)?);
    send(writer, OPT_SET_META_CONTEXT, &data)?;
    let mut id = None;
    loop {
        let reply = receive(reader, OPT_SET_META_CONTEXT)?;
        match reply.kind {
            REP_META_CONTEXT => id = Some(read_u32(&mut reply.data.as_slice())?),
            REP_ACK => return Ok(id),
            kind if kind & REP_ERROR != 0 => return Ok(None),
            _ => return Err(reply.refusal("the metadata context")),
        }
    }
}

/// A string as the protocol writes it: its length, then its bytes.
fn sized(text: &str) -> Result<Vec<u8>> {
    let mut data = u32::try_from(text.len())?.to_be_bytes().to_vec();
    data.extend(text.as_bytes());
    Ok(data)
}

fn send(writer: &mut impl Write, option: u32, data: &[u8]) -> Result {
    writer.write_all(&OPTION_MAGIC.to_be_bytes())?;
    writer.write_all(&option.to_be_bytes())?;
    writer.write_all(&u32::try_from(data.len())?.to_be_bytes())?;
    writer.write_all(data)?;
    writer.flush()?;
    Ok(())
}

fn receive(reader: &mut impl Read, option: u32) -> Result<OptionReply> {
    let (magic, answers) = (read_u64(reader)?, read_u32(reader)?);
    let (kind, length) = (read_u32(reader)?, read_u32(reader)?);
    if magic != OPTION_REPLY || answers != option || length > REPLY_LIMIT {
        return Err(error!("not a reply to option {option}: {magic:#x} {answers} {length}"));
    }
    let mut data = vec![0; length as usize];
    reader.read_exact(&mut data)?;
    Ok(OptionReply { kind, data })
}

pub(super) fn read_u16(reader: &mut impl Read) -> Result<u16> {
    let mut bytes = [0; 2];
    reader.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

pub(super) fn read_u32(reader: &mut impl Read) -> Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

pub(super) fn read_u64(reader: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}
