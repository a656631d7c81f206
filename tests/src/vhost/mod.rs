//! A vhost-user-blk front-end: a guest's virtio-blk driver without the guest.
//!
//! It plays QEMU's part (negotiation, memory table, vrings) by the `vhost` crate and the guest's part (descriptors, requests, notifications)
//! by `Ring`, over memory that is only ever touched through `vm-memory`'s volatile accesses. Requests go out as asked,
//! so that a server can also be asked for what it must refuse.

mod ring;

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::process::PATIENCE;
use crate::{Result, error};
use ring::{Layout, Ring};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: there are protocol features to negotiate.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Block features this driver understands, as bits.
const BLOCK_FEATURES: [u32; 7] = [
    virtio_blk::VIRTIO_BLK_F_SEG_MAX,
    virtio_blk::VIRTIO_BLK_F_RO,
    virtio_blk::VIRTIO_BLK_F_BLK_SIZE,
    virtio_blk::VIRTIO_BLK_F_FLUSH,
    virtio_blk::VIRTIO_BLK_F_MQ,
    virtio_blk::VIRTIO_BLK_F_DISCARD,
    virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES,
];

/// The block device's configuration space as far as the features above reach.
const CONFIG_SIZE: u32 = 60;

/// How to drive the device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Queues.
    pub queues: u16,
    /// Requests in flight in each queue, at most.
    pub depth: u16,
    /// Bytes of data in each request, at most.
    pub buffer: u32,
    /// Negotiate event indices, if the device has them.
    pub event_index: bool,
    /// Put each request's descriptors in a table of their own, if the device can.
    pub indirect: bool,
    /// Keep the server's record of what is in flight, so that [`Client::reconnect`] loses nothing.
    pub inflight: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { queues: 1, depth: 32, buffer: 1 << 20, event_index: true, indirect: true, inflight: false }
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read data.
    Read,
    /// Write the data put into the request's buffer.
    Write,
    /// Make all completed writes durable.
    Flush,
    /// Discard a range.
    Discard,
    /// Write zeroes over a range; `true` allows the server to punch a hole.
    WriteZeroes(bool),
    /// Ask for the device's name.
    Identify,
    /// Anything else, as a number.
    Other(u32),
}

/// A request's place in its queue, from [`Client::claim`] until its completion was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

impl Slot {
    /// Its number, below the queue's depth.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// The status byte of a finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// Done.
    pub const OK: Status = Status(0);
    /// The device or driver failed.
    pub const IO_ERROR: Status = Status(1);
    /// The device does not know such requests.
    pub const UNSUPPORTED: Status = Status(2);
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Status::OK => f.write_str("virtio-blk OK"),
            Status::IO_ERROR => f.write_str("virtio-blk I/O error"),
            Status::UNSUPPORTED => f.write_str("virtio-blk request unsupported"),
            Status(other) => write!(f, "virtio-blk status {other}"),
        }
    }
}

impl std::error::Error for Status {}

/// A connected device with running queues.
pub struct Client {
    options: Options,
    frontend: Frontend,
    memory: GuestMemoryMmap,
    rings: Vec<Ring>,
    features: u64,
    config: Vec<u8>,
    /// The server's record of what is in flight, kept over its death.
    record: Option<(VhostUserInflight, File)>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("features", &format_args!("{:#x}", self.features))
            .field("queues", &self.rings.len())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects with the default options.
    pub fn connect(socket: &Path) -> Result<Client> {
        Client::connect_with(socket, Options::default())
    }

    /// Connects, negotiates, and starts the queues.
    pub fn connect_with(socket: &Path, options: Options) -> Result<Client> {
        let (frontend, features, config) = negotiate(socket, options)?;
        let layout = Layout::new(options.depth, options.buffer);
        let memory = memory(layout.size() * u64::from(options.queues))?;
        let has = |bit: u32| features & (1 << bit) != 0;
        let mut client = Client { options, frontend, rings: Vec::new(), features, config, memory, record: None };
        for queue in 0..options.queues {
            let base = GuestAddress(layout.size() * u64::from(queue));
            let memory = client.memory.clone();
            let indirect = has(VIRTIO_RING_F_INDIRECT_DESC);
            client.rings.push(Ring::new(memory, base, layout, has(VIRTIO_RING_F_EVENT_IDX), indirect)?);
        }
        if options.inflight {
            let wanted = VhostUserInflight::new(0, 0, options.queues, layout.ring_size());
            client.record = Some(client.frontend.get_inflight_fd(&wanted)?);
        }
        client.start()?;
        Ok(client)
    }

    /// After the server has gone without a word: finds its successor and goes on as QEMU does, with the same memory, rings and
    /// record.
    pub fn reconnect(&mut self, socket: &Path) -> Result {
        let (frontend, features, config) = negotiate(socket, self.options)?;
        if features != self.features {
            return Err(error!("the features were {:#x} and are {features:#x} now", self.features));
        }
        (self.frontend, self.config) = (frontend, config);
        self.start()
    }

    fn start(&mut self) -> Result {
        self.frontend.set_mem_table(&self.regions()?)?;
        if let Some((record, file)) = &self.record {
            self.frontend.set_inflight_fd(record, file.as_raw_fd())?;
        }
        (0..self.rings.len()).try_for_each(|queue| self.start_ring(queue))
    }

    fn regions(&self) -> Result<Vec<VhostUserMemoryRegionInfo>> {
        let regions = self.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        Ok(regions.collect::<std::result::Result<_, _>>()?)
    }

    /// Tells the server all about a ring, in the order QEMU does.
    fn start_ring(&mut self, index: usize) -> Result {
        let layout = Layout::new(self.options.depth, self.options.buffer);
        let base = layout.size() * index as u64;
        // The server is given our own addresses, which is what it finds in the memory table.
        let host = |offset: u64| -> Result<u64> {
            let address = GuestAddress(base + offset);
            Ok(self.memory.get_host_address(address)? as u64)
        };
        let (descriptors, available, used) = (host(0)?, host(layout.available())?, host(layout.used())?);
        let ring = &self.rings[index];
        self.frontend.set_vring_num(index, layout.ring_size())?;
        self.frontend.set_vring_base(index, ring.used_index()?)?;
        self.frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: layout.ring_size(),
                queue_size: layout.ring_size(),
                flags: 0,
                desc_table_addr: descriptors,
                used_ring_addr: used,
                avail_ring_addr: available,
                log_addr: None,
            },
        )?;
        self.frontend.set_vring_kick(index, ring.kick())?;
        self.frontend.set_vring_call(index, ring.call())?;
        self.frontend.set_vring_enable(index, true)?;
        Ok(())
    }

    fn config_u32(&self, at: usize) -> u32 {
        let bytes = self.config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        let sectors = u64::from(self.config_u32(0)) | u64::from(self.config_u32(4)) << 32;
        sectors * 512
    }

    /// The block size the device advertises, in bytes.
    pub fn block_size(&self) -> u32 {
        self.config_u32(20)
    }

    /// How many queues the device offers.
    pub fn max_queues(&self) -> u16 {
        (self.config_u32(32) >> 16) as u16
    }

    /// Whether a feature bit was agreed, block device's or ring's.
    pub fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// Claims a free request of `queue`, if there is one.
    pub fn claim(&mut self, queue: usize) -> Option<Slot> {
        self.rings[queue].claim().map(Slot)
    }

    /// Puts data into a claimed request's buffer.
    pub fn fill(&mut self, queue: usize, slot: Slot, data: &[u8]) -> Result {
        let address = self.rings[queue].buffer(slot.0);
        self.memory.write_slice(data, address)?;
        Ok(())
    }

    /// What a finished read left in the request's buffer.
    pub fn data(&self, queue: usize, slot: Slot, length: u32) -> Result<Vec<u8>> {
        let mut data = vec![0; length as usize];
        self.memory.read_slice(&mut data, self.rings[queue].buffer(slot.0))?;
        Ok(data)
    }

    /// Makes a claimed request available to the device. `offset` and `length` are bytes.
    pub fn submit(&mut self, queue: usize, slot: Slot, kind: Kind, offset: u64, length: u32) -> Result {
        self.rings[queue].submit(slot.0, kind, offset, length)
    }

    /// Notifies the device of what was submitted, if it wants to be.
    pub fn push(&mut self, queue: usize) -> Result {
        self.rings[queue].notify()
    }

    /// Takes one finished request and frees its place; waits for one if none is there. Its buffer stays as it is until
    /// its place is claimed again.
    pub fn complete(&mut self, queue: usize, within: Duration) -> Result<(Slot, Status)> {
        let ring = &mut self.rings[queue];
        if let Some((slot, status)) = ring.take()? {
            return Ok((Slot(slot), Status(status)));
        }
        self.push(queue)?;
        let (slot, status) = self.rings[queue].wait(within)?;
        Ok((Slot(slot), Status(status)))
    }

    /// One request in the first queue, from its submission to its end.
    pub fn one(&mut self, kind: Kind, offset: u64, length: u32, data: &[u8]) -> Result<(Slot, Status)> {
        let slot = self.claim(0).ok_or("all requests are in flight")?;
        self.fill(0, slot, data)?;
        self.submit(0, slot, kind, offset, length)?;
        self.push(0)?;
        let (done, status) = self.complete(0, PATIENCE)?;
        if done == slot { Ok((done, status)) } else { Err("one call at a time, or submit and complete".into()) }
    }

    fn done(&mut self, kind: Kind, offset: u64, length: u32, data: &[u8]) -> Result<Slot> {
        match self.one(kind, offset, length, data)? {
            (slot, Status::OK) => Ok(slot),
            (_, status) => Err(status.into()),
        }
    }

    /// Reads `length` bytes at `offset`.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        let slot = self.done(Kind::Read, offset, length, &[])?;
        self.data(0, slot, length)
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result {
        self.done(Kind::Write, offset, u32::try_from(data.len())?, data)?;
        Ok(())
    }

    /// Makes all that was written durable.
    pub fn flush(&mut self) -> Result {
        self.done(Kind::Flush, 0, 0, &[])?;
        Ok(())
    }

    /// Discards a range.
    pub fn discard(&mut self, offset: u64, length: u32) -> Result {
        self.done(Kind::Discard, offset, length, &[])?;
        Ok(())
    }

    /// Writes zeroes over a range; `unmap` allows a hole.
    pub fn write_zeroes(&mut self, offset: u64, length: u32, unmap: bool) -> Result {
        self.done(Kind::WriteZeroes(unmap), offset, length, &[])?;
        Ok(())
    }

    /// The device's name.
    pub fn identify(&mut self) -> Result<String> {
        let slot = self.done(Kind::Identify, 0, 20, &[])?;
        let bytes = self.data(0, slot, 20)?;
        // Shorter names end with a zero byte; the device need not write the rest.
        let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    /// Stops a queue as QEMU does when the guest resets: the server answers once all its requests are finished. Returns
    /// where it would go on.
    pub fn stop(&mut self, queue: usize) -> Result<u32> {
        Ok(self.frontend.get_vring_base(queue)?)
    }
}

/// Connects and agrees on features; also returns the configuration space.
fn negotiate(socket: &Path, options: Options) -> Result<(Frontend, u64, Vec<u8>)> {
    let mut frontend = Frontend::connect(socket, u64::from(options.queues))
        .map_err(|why| error!("connecting to {}: {why}", socket.display()))?;
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let mut wanted = BLOCK_FEATURES.iter().fold(1 << VIRTIO_F_VERSION_1, |bits, bit| bits | 1u64 << bit);
    wanted |= PROTOCOL_FEATURES;
    if options.event_index {
        wanted |= 1 << VIRTIO_RING_F_EVENT_IDX;
    }
    if options.indirect {
        wanted |= 1 << VIRTIO_RING_F_INDIRECT_DESC;
    }
    let features = offered & wanted;
    if features & PROTOCOL_FEATURES == 0 {
        return Err(error!("a vhost-user-blk server without protocol features: {offered:#x}"));
    }
    let mut understood =
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
    if options.inflight {
        understood |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    }
    let protocol = frontend.get_protocol_features()? & understood;
    if options.inflight && !protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
        return Err("a vhost-user-blk server that keeps no record of what is in flight".into());
    }
    frontend.set_protocol_features(protocol)?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend.set_features(features)?;
    let blank = vec![0; CONFIG_SIZE as usize];
    let (_, config) = frontend.get_config(0, CONFIG_SIZE, VhostUserConfigFlags::empty(), &blank)?;
    Ok((frontend, features, config))
}

/// Shared memory from guest address zero on.
fn memory(size: u64) -> Result<GuestMemoryMmap> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    let range = (GuestAddress(0), usize::try_from(size)?, Some(FileOffset::new(file, 0)));
    Ok(GuestMemoryMmap::from_ranges_with_files([range])?)
}
