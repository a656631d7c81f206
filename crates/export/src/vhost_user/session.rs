//! The protocol thread: accepts one front end after the other, reads its messages, hands each change to the shard.
//!
//! # Invariants
//! * Reading blocks only this thread: half a message never holds up a disk.
//! * A message is answered when the shard has carried it out, in particular `GET_VRING_BASE` when the queue is drained.
//! * A message that breaks the protocol ends the connection, and nothing else; what was in flight is drained before the
//!   next front end is served. A request that is merely refused ends it too, unless the front end has asked for an answer.

use super::config::{MAX_QUEUE_SIZE, protocol_features};
use super::inflight::{Layout, Region as InflightRegion};
use super::mailbox::{Addresses, Command, QueueCommand, Reply, ThreadEnd};
use super::memory::{self, Region, Table};
use super::socket::Socket;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

/// Size of a message's header: request, flags, size of the payload; 32 bits each.
const HEADER: usize = 12;

/// The flag that asks for an answer.
const NEED_REPLY: u32 = 1 << 3;

/// How the shard reaches the thread: only to stop it.
pub(super) struct Control {
    bell: OwnedFd,
    state: Mutex<ControlState>,
}

#[derive(Default)]
struct ControlState {
    stopped: bool,
    connection: Option<UnixStream>,
}

impl Control {
    /// Nothing is connected yet.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { bell, state: Mutex::default() }))
    }

    /// Ends the thread: it stops accepting, and what it reads from ends.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stopped = true;
        if let Some(connection) = &state.connection {
            // Fails if the front end was faster.
            let _ = connection.shutdown(Shutdown::Both);
        }
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Puts a connection (or none) where [`Control::stop`] finds it. False if it has been stopped.
    fn attach(&self, connection: Option<UnixStream>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.connection = connection;
        !state.stopped
    }
}

/// What the thread is given.
pub(super) struct Protocol {
    pub socket: Socket,
    pub control: Arc<Control>,
    pub mail: ThreadEnd,
    /// Virtio features offered.
    pub features: u64,
    /// Queues offered.
    pub queues: u16,
    /// What messages in the log call the device.
    pub name: String,
}

impl Protocol {
    /// Serves until stopped, or until the shard is gone.
    pub(super) fn run(self) {
        while let Some(connection) = self.accept() {
            tracing::info!(disk = self.name, "a vhost-user front end has connected");
            match self.serve(connection) {
                Ok(()) | Err(Error::Disconnected) => {
                    tracing::info!(disk = self.name, "the vhost-user front end has gone");
                }
                Err(error) => tracing::warn!(disk = self.name, %error, "the vhost-user connection is closed"),
            }
            let served = self.control.attach(None);
            if self.mail.call(Command::Gone).is_err() || !served {
                break;
            }
        }
        // The socket is removed before the shard hears that the thread has ended.
        let Self { socket, mail, .. } = self;
        drop(socket);
        drop(mail);
    }

    /// The next connection; `None` when stopped.
    fn accept(&self) -> Option<UnixStream> {
        let listener = self.socket.listener();
        loop {
            let mut wait = [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.control.bell, PollFlags::IN)];
            match rustix::event::poll(&mut wait, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(disk = self.name, %error, "cannot wait for vhost-user front ends");
                    return None;
                }
            }
            if !self.control.attach(None) {
                return None;
            }
            if wait[0].revents().is_empty() {
                continue;
            }
            match listener.accept() {
                Ok((connection, _)) => return Some(connection),
                Err(error) => {
                    tracing::warn!(disk = self.name, %error, "could not accept a vhost-user front end");
                    // Out of descriptors, most likely: it is still there to be accepted later.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn serve(&self, connection: UnixStream) -> Result<()> {
        let peek = connection.try_clone().map_err(Error::SocketError)?;
        if !self.control.attach(Some(connection.try_clone().map_err(Error::SocketError)?)) {
            return Err(Error::Disconnected);
        }
        let session = Arc::new(Mutex::new(Session::new(self)));
        let mut handler = BackendReqHandler::from_stream(connection, Arc::clone(&session));
        loop {
            let header = Header::peek(&peek).map_err(Error::SocketError)?;
            {
                let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
                session.refused = false;
                if header.is(FrontendReq::SET_BACKEND_REQ_FD) {
                    session.channel = peek_descriptor(&peek).map_err(Error::SocketError)?;
                }
            }
            if let Err(error) = handler.handle_request() {
                let session = session.lock().unwrap_or_else(PoisonError::into_inner);
                if !(session.refused && session.answers(header)) {
                    return Err(error);
                }
            }
        }
    }
}

/// A message's header, seen before the message is taken.
#[derive(Clone, Copy, Default)]
struct Header {
    request: u32,
    flags: u32,
}

impl Header {
    /// Waits for the next message and looks at its header. All zeros (no valid message) at the end of the stream.
    fn peek(connection: &UnixStream) -> io::Result<Self> {
        let mut bytes = [0; HEADER];
        loop {
            match rustix::net::recv(connection, &mut bytes[..], RecvFlags::PEEK | RecvFlags::WAITALL) {
                Ok((_, HEADER)) => break,
                Ok(_) => return Ok(Self::default()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let [r0, r1, r2, r3, f0, f1, f2, f3, ..] = bytes;
        Ok(Self { request: u32::from_ne_bytes([r0, r1, r2, r3]), flags: u32::from_ne_bytes([f0, f1, f2, f3]) })
    }

    fn is(self, request: FrontendReq) -> bool {
        self.request == u32::from(request)
    }
}

/// A second descriptor for what comes with the next message. The `vhost` crate takes the socket for messages to the front
/// end for itself but cannot send the one message a disk has to send: that its configuration has changed.
fn peek_descriptor(connection: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut bytes = [0; HEADER];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    rustix::net::recvmsg(connection, &mut iov, &mut control, RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC)?;
    let mut found = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            found = descriptors.into_iter().next().or(found);
        }
    }
    Ok(found)
}

/// One connection: what must be known on this side, and the way to the shard.
struct Session<'a> {
    to: &'a Protocol,
    table: Table,
    acked: VhostUserProtocolFeatures,
    channel: Option<OwnedFd>,
    /// The message at hand was understood, and refused.
    refused: bool,
}

impl<'a> Session<'a> {
    fn new(to: &'a Protocol) -> Self {
        Self { to, table: Table::default(), acked: VhostUserProtocolFeatures::empty(), channel: None, refused: false }
    }

    /// Whether the front end has been told by an answer that its request is refused.
    fn answers(&self, header: Header) -> bool {
        let replies = [FrontendReq::GET_VRING_BASE, FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_LOG_BASE];
        self.acked.contains(VhostUserProtocolFeatures::REPLY_ACK)
            && header.flags & NEED_REPLY != 0
            && !replies.into_iter().any(|request| header.is(request))
    }

    fn refuse<T>(&mut self, why: impl std::fmt::Display) -> Result<T> {
        tracing::warn!(disk = self.to.name, %why, "refused a front end's request");
        self.refused = true;
        Err(Error::InvalidParam)
    }

    fn ask(&mut self, command: Command) -> Result<Reply> {
        match self.to.mail.call(command) {
            Ok(Reply::Refused(why)) => self.refuse(why),
            Ok(reply) => Ok(reply),
            Err(_) => Err(Error::Disconnected),
        }
    }

    fn tell(&mut self, command: Command) -> Result<()> {
        self.ask(command).map(|_| ())
    }

    fn queue(&mut self, index: u32, command: QueueCommand) -> Result<()> {
        let index = self.index(index)?;
        self.tell(Command::Queue(index, command))
    }

    fn index(&mut self, index: u32) -> Result<u16> {
        match u16::try_from(index) {
            Ok(index) if index < self.to.queues => Ok(index),
            _ => self.refuse(format_args!("there is no queue {index}")),
        }
    }

    fn share(&mut self, table: Table) -> Result<()> {
        let map = table.to_map();
        self.tell(Command::Memory(map))?;
        self.table = table;
        Ok(())
    }
}

fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session<'_> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Not in use any more; the specification recommends to ignore it.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.tell(Command::Reset)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.to.features)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.to.features;
        if unknown != 0 {
            return self.refuse(format_args!("features {unknown:#x} are not offered"));
        }
        self.tell(Command::Features(features))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut table = Table::default();
        for (region, file) in regions.iter().zip(files) {
            // Copied out: the structure is packed.
            let (guest, user, len, offset) =
                (region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset);
            if let Err(why) = Region::map(guest, user, len, offset, file).and_then(|region| table.add(region)) {
                return self.refuse(format_args!("memory region {guest:#x}+{len:#x}: {why}"));
            }
        }
        self.share(table)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        match u16::try_from(num) {
            Ok(size) if size <= MAX_QUEUE_SIZE => self.queue(index, QueueCommand::Size(size)),
            _ => self.refuse(format_args!("a queue of {num} entries; {MAX_QUEUE_SIZE} is the most")),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.queue(index, QueueCommand::Addresses(Addresses { descriptors, available, used }))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        match u16::try_from(base) {
            Ok(base) => self.queue(index, QueueCommand::Base(base)),
            Err(_) => self.refuse(format_args!("an available index of {base}")),
        }
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = self.index(index)?;
        match self.ask(Command::Queue(queue, QueueCommand::Stop))? {
            Reply::Base(base) => Ok(VhostUserVringState::new(index, u32::from(base))),
            _ => Err(Error::BackendInternalError),
        }
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        match fd {
            Some(file) => self.queue(u32::from(index), QueueCommand::Kick(file.into())),
            None => self.refuse("a queue without a kick would have to be polled"),
        }
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queue(u32::from(index), QueueCommand::Call(fd.map(Into::into)))
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queue(u32::from(index), QueueCommand::Err(fd.map(Into::into)))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        match VhostUserProtocolFeatures::from_bits(features) {
            Some(features) if protocol_features().contains(features) => {
                self.acked = features;
                Ok(())
            }
            _ => self.refuse(format_args!("protocol features {features:#x} are not all offered")),
        }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.to.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.queue(index, QueueCommand::Enable(enable))
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        match self.ask(Command::Config(offset, size))? {
            Reply::Config(bytes) => Ok(bytes),
            _ => Err(Error::BackendInternalError),
        }
    }

    fn set_config(&mut self, offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.refuse(format_args!("byte {offset} of the configuration space cannot be written"))
    }

    fn set_backend_req_fd(&mut self, _backend: vhost::vhost_user::Backend) {
        // What `vhost` makes of the socket is not needed; ours is the descriptor that was peeked at.
        if let Some(socket) = self.channel.take() {
            // Without a shard there is nobody to send anything; the next message finds that out.
            let _ = self.tell(Command::Channel(socket));
        }
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let Some(layout) = Layout::new(queues, size) else {
            return self.refuse(format_args!("an inflight region for {queues} queues of {size} entries"));
        };
        let (region, file) = InflightRegion::create(layout).map_err(Error::ReqHandlerError)?;
        self.tell(Command::Inflight(region))?;
        Ok((VhostUserInflight::new(layout.len(), 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let Some(layout) = Layout::new(queues, size) else {
            return self.refuse(format_args!("an inflight region for {queues} queues of {size} entries"));
        };
        match InflightRegion::map(layout, file, inflight.mmap_offset, inflight.mmap_size) {
            Ok(region) => self.tell(Command::Inflight(region)),
            Err(why) => self.refuse(why),
        }
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(memory::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let (guest, user, len, offset) =
            (region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset);
        let mut table = self.table.clone();
        if let Err(why) = Region::map(guest, user, len, offset, file).and_then(|region| table.add(region)) {
            return self.refuse(format_args!("memory region {guest:#x}+{len:#x}: {why}"));
        }
        self.share(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, user, len) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let mut table = self.table.clone();
        if let Err(why) = table.remove(guest, user, len) {
            return self.refuse(format_args!("memory region {guest:#x}+{len:#x}: {why}"));
        }
        self.share(table)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered()
    }
}
