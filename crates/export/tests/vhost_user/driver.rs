//! A front end and a guest's driver in one: it lays out every descriptor itself, so that it can also do it wrongly.

use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::poll::PollContext;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const F_RO: u64 = 1 << 5;
pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;

/// Never a status: shows that none was written.
pub(crate) const UNANSWERED: u8 = 0xee;

/// Where the guest's memory starts.
pub(crate) const MEMORY: u64 = 0x10_0000;
const MEMORY_LEN: u64 = 8 << 20;
/// What the front end adds to a guest address for its own.
const USER: u64 = 0x7000_0000_0000;
/// Each queue has so much for its parts, from the start of memory on.
const QUEUE_AREA: u64 = 0x8000;
/// Requests are laid out from here on.
const REQUESTS: u64 = MEMORY + (1 << 20);
const REQUEST_AREA: u64 = 0x2000;

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something that must come.
pub(crate) fn eventually(what: &str, mut happens: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happens() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Guest memory in a file of its own.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) file: File,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_LEN).unwrap();
        let range = (GuestAddress(MEMORY), MEMORY_LEN as usize, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        Self { memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(), file }
    }

    /// Part of the memory, as a region to share.
    pub(crate) fn region(&self, from: u64, to: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: MEMORY + from,
            memory_size: to - from,
            userspace_addr: USER + MEMORY + from,
            mmap_offset: from,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn everything(&self) -> VhostUserMemoryRegionInfo {
        self.region(0, MEMORY_LEN)
    }

    pub(crate) fn fill(&self, at: u64, len: usize, byte: u8) {
        self.memory.write_slice(&vec![byte; len], GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// A laid-out request: header, one page of data, status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) u64);

impl Slot {
    pub(crate) fn header(self) -> u64 {
        REQUESTS + self.0 * REQUEST_AREA
    }
    pub(crate) fn status(self) -> u64 {
        self.header() + 0x20
    }
    /// Room for an indirect table.
    pub(crate) fn table(self) -> u64 {
        self.header() + 0x40
    }
    pub(crate) fn data(self) -> u64 {
        self.header() + 0x1000
    }
}

/// The driver's side of one queue.
pub(crate) struct Queue {
    pub(crate) size: u16,
    base: u64,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
    avail: u16,
    kicked: u16,
    used: u16,
    /// The descriptor the next chain begins with.
    pub(crate) next: u16,
}

impl Queue {
    fn new(index: usize, size: u16) -> Self {
        // Blocking eventfds, as some front ends use them.
        let fd = || EventFd::new(0).unwrap();
        let base = MEMORY + index as u64 * QUEUE_AREA;
        Self { size, base, kick: fd(), call: fd(), err: fd(), avail: 0, kicked: 0, used: 0, next: 0 }
    }
    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }
    pub(crate) fn available(&self) -> u64 {
        self.base + 0x4000
    }
    pub(crate) fn used_ring(&self) -> u64 {
        self.base + 0x5000
    }
    /// Sets ring and driver to what they are after `count` requests.
    pub(crate) fn rewind(&mut self, guest: &Guest, count: u16) {
        guest.fill(self.available(), 0x3000, 0);
        guest.memory.write_obj(count, GuestAddress(self.available() + 2)).unwrap();
        guest.memory.write_obj(count, GuestAddress(self.used_ring() + 2)).unwrap();
        (self.avail, self.kicked, self.used, self.next) = (count, count, count, 0);
    }
}

/// How to connect.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) queues: usize,
    pub(crate) size: u16,
    /// Features not to accept.
    pub(crate) without: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 1, size: 64, without: 0 }
    }
}

pub(crate) struct Driver {
    pub(crate) frontend: Frontend,
    pub(crate) guest: Guest,
    pub(crate) queues: Vec<Queue>,
    pub(crate) features: u64,
}

impl Driver {
    /// Connects and negotiates; starts nothing.
    pub(crate) fn negotiate(path: &Path, guest: Guest, options: Options) -> Self {
        let mut frontend = Frontend::connect(path, options.queues as u64).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap() & !options.without;
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert_eq!(protocol & wanted, wanted);
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).unwrap();
        let queues = (0..options.queues).map(|index| Queue::new(index, options.size)).collect();
        Self { frontend, guest, queues, features }
    }

    /// Connects, shares memory, starts every queue.
    pub(crate) fn connect(path: &Path, options: Options) -> Self {
        let mut driver = Self::negotiate(path, Guest::new(), options);
        driver.frontend.set_mem_table(&[driver.guest.everything()]).unwrap();
        for queue in 0..options.queues {
            driver.start(queue, 0);
            driver.frontend.set_vring_enable(queue, true).unwrap();
        }
        driver
    }

    /// Tells the server about a queue: everything but the enabling.
    pub(crate) fn start(&mut self, queue: usize, base: u16) {
        let q = &self.queues[queue];
        self.frontend.set_vring_num(queue, q.size).unwrap();
        self.frontend.set_vring_base(queue, base).unwrap();
        self.frontend
            .set_vring_addr(
                queue,
                &VringConfigData {
                    queue_max_size: q.size,
                    queue_size: q.size,
                    flags: 0,
                    desc_table_addr: USER + q.descriptors(),
                    used_ring_addr: USER + q.used_ring(),
                    avail_ring_addr: USER + q.available(),
                    log_addr: None,
                },
            )
            .unwrap();
        self.frontend.set_vring_err(queue, &q.err).unwrap();
        self.frontend.set_vring_call(queue, &q.call).unwrap();
        self.frontend.set_vring_kick(queue, &q.kick).unwrap();
    }

    /// Writes a descriptor table entry.
    pub(crate) fn describe(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let place = GuestAddress(table + 16 * u64::from(index));
        self.guest.memory.write_obj(Descriptor::new(at, len, flags, next), place).unwrap();
    }

    /// Makes `head` available.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let place = q.available() + 4 + 2 * u64::from(q.avail % q.size);
        self.guest.memory.write_obj(head, GuestAddress(place)).unwrap();
        q.avail = q.avail.wrapping_add(1);
        self.guest.memory.store(q.avail, GuestAddress(q.available() + 2), Ordering::Release).unwrap();
    }

    /// Makes a chain of descriptors available; returns its head.
    pub(crate) fn submit_chain(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let q = &mut self.queues[queue];
        let (size, table) = (q.size, q.descriptors());
        let head = q.next;
        q.next = (q.next + parts.len() as u16) % size;
        for (i, &(at, len, flags)) in parts.iter().enumerate() {
            let (here, next) = ((head + i as u16) % size, (head + i as u16 + 1) % size);
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            self.describe(table, here, at, len, flags | more, next);
        }
        self.publish(queue, head);
        head
    }

    /// The same with an indirect table at `table`.
    pub(crate) fn submit_indirect(&mut self, queue: usize, table: u64, parts: &[(u64, u32, u16)]) -> u16 {
        for (i, &(at, len, flags)) in parts.iter().enumerate() {
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            self.describe(table, i as u16, at, len, flags | more, i as u16 + 1);
        }
        self.submit_chain(queue, &[(table, 16 * parts.len() as u32, INDIRECT)])
    }

    /// Fills in the header and an unanswered status.
    pub(crate) fn prepare(&self, slot: Slot, kind: u32, sector: u64) {
        self.guest.memory.write_obj(kind, GuestAddress(slot.header())).unwrap();
        self.guest.memory.write_obj(0u32, GuestAddress(slot.header() + 4)).unwrap();
        self.guest.memory.write_obj(sector, GuestAddress(slot.header() + 8)).unwrap();
        self.guest.fill(slot.status(), 1, UNANSWERED);
    }

    /// Submits an ordinary request with `len` bytes of data.
    pub(crate) fn submit(&mut self, queue: usize, slot: Slot, kind: u32, sector: u64, len: u32) -> u16 {
        self.prepare(slot, kind, sector);
        let direction = if matches!(kind, IN | GET_ID) { WRITE } else { 0 };
        let parts = [(slot.header(), 16, 0), (slot.data(), len, direction), (slot.status(), 1, WRITE)];
        let parts = if len == 0 { vec![parts[0], parts[2]] } else { parts.to_vec() };
        if self.features & F_INDIRECT != 0 && slot.0 % 2 == 1 {
            self.submit_indirect(queue, slot.table(), &parts)
        } else {
            self.submit_chain(queue, &parts)
        }
    }

    /// Kicks, if the device wants to be.
    pub(crate) fn kick(&mut self, queue: usize) {
        let q = &mut self.queues[queue];
        let old = std::mem::replace(&mut q.kicked, q.avail);
        fence(Ordering::SeqCst);
        let wanted = if self.features & F_EVENT_IDX != 0 {
            let at = q.used_ring() + 4 + 8 * u64::from(q.size);
            let event: u16 = self.guest.memory.load(GuestAddress(at), Ordering::Relaxed).unwrap();
            q.avail.wrapping_sub(event).wrapping_sub(1) < q.avail.wrapping_sub(old)
        } else {
            let flags: u16 = self.guest.memory.load(GuestAddress(q.used_ring()), Ordering::Relaxed).unwrap();
            flags & 1 == 0
        };
        if wanted {
            q.kick.write(1).unwrap();
        }
    }

    fn used_index(&self, queue: usize) -> u16 {
        self.guest.memory.load(GuestAddress(self.queues[queue].used_ring() + 2), Ordering::Acquire).unwrap()
    }

    /// Used entries that have not been taken yet.
    pub(crate) fn unseen(&self, queue: usize) -> u16 {
        self.used_index(queue).wrapping_sub(self.queues[queue].used)
    }

    /// Says that the next used entry is waited for (with event indices: that a call is wanted for it).
    pub(crate) fn arm(&self, queue: usize) {
        self.arm_for(queue, 0);
    }

    /// The same for the one behind `more` others.
    pub(crate) fn arm_for(&self, queue: usize, more: u16) {
        if self.features & F_EVENT_IDX != 0 {
            let q = &self.queues[queue];
            let at = q.available() + 4 + 2 * u64::from(q.size);
            self.guest.memory.store(q.used.wrapping_add(more), GuestAddress(at), Ordering::Relaxed).unwrap();
            fence(Ordering::SeqCst);
        }
    }

    /// Takes the next used entry, waiting for it as a driver does: by the call. Head and length.
    pub(crate) fn take(&mut self, queue: usize) -> (u16, u32) {
        self.arm(queue);
        while self.unseen(queue) == 0 {
            wait_readable(&self.queues[queue].call, "a completion");
            self.queues[queue].call.read().unwrap();
        }
        let q = &mut self.queues[queue];
        let at = q.used_ring() + 4 + 8 * u64::from(q.used % q.size);
        q.used = q.used.wrapping_add(1);
        let head: u32 = self.guest.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.guest.memory.read_obj(GuestAddress(at + 4)).unwrap();
        (head as u16, len)
    }

    pub(crate) fn status(&self, slot: Slot) -> u8 {
        self.guest.bytes(slot.status(), 1)[0]
    }

    /// One request behind `count` that have ended, or will end, before it; its status.
    pub(crate) fn run_after(&mut self, count: u16, slot: Slot, kind: u32) -> u8 {
        let head = self.submit(0, slot, kind, 0, 0);
        self.kick(0);
        for _ in 0..count {
            assert_ne!(self.take(0).0, head);
        }
        assert_eq!(self.take(0).0, head);
        assert_eq!(self.unseen(0), 0, "nothing is given back twice");
        self.status(slot)
    }

    /// One request from beginning to end; its status.
    pub(crate) fn run(&mut self, queue: usize, slot: Slot, kind: u32, sector: u64, len: u32) -> u8 {
        let head = self.submit(queue, slot, kind, sector, len);
        self.kick(queue);
        assert_eq!(self.take(queue).0, head);
        self.status(slot)
    }
}

/// Waits until an eventfd has been written to.
pub(crate) fn wait_readable(fd: &EventFd, what: &str) {
    let poll = PollContext::new().unwrap();
    poll.add(fd, ()).unwrap();
    assert!(poll.wait_timeout(PATIENCE).unwrap().iter().next().is_some(), "waited in vain for {what}");
}

/// How often an eventfd has been written to since it was last read.
pub(crate) fn written(fd: &EventFd) -> u64 {
    let poll = PollContext::new().unwrap();
    poll.add(fd, ()).unwrap();
    let ready = poll.wait_timeout(Duration::ZERO).unwrap().iter().next().is_some();
    if ready { fd.read().unwrap() } else { 0 }
}
