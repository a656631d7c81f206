//! The guest's side of one split virtqueue of a block device.
//!
//! Every request has a place of its own for its descriptors, header, status and data, so nothing is allocated while it
//! runs: place `n` uses descriptors `3n`, `3n+1`, `3n+2` (header, data, status), or with indirect descriptors the one
//! descriptor `n` and a table of three.

use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use virtio_bindings::virtio_blk;
use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::poll::PollContext;

use super::Kind;
use crate::{Result, error};

const DESCRIPTOR: u64 = 16;
const USED_ELEMENT: u64 = 8;
const PAGE: u64 = 4096;

/// Each request's header, its range for discards and write-zeroes, and its status byte.
const REQUEST: u64 = 64;
const RANGE: u64 = 16;
const STATUS: u64 = 32;

/// Never a status, so that a device that forgets to write one is caught.
const NO_STATUS: u8 = 0xff;

/// Where everything is, counted from the ring's base.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    depth: u16,
    buffer: u64,
}

impl Layout {
    pub(super) fn new(depth: u16, buffer: u32) -> Self {
        Layout { depth, buffer: u64::from(buffer).next_multiple_of(PAGE) }
    }

    /// Descriptors: three for each request, and a power of two.
    pub(super) fn ring_size(self) -> u16 {
        (self.depth * 3).next_power_of_two()
    }

    pub(super) fn available(self) -> u64 {
        DESCRIPTOR * u64::from(self.ring_size())
    }

    /// Flags, index, the ring, and the index of the used event.
    fn used_event(self) -> u64 {
        self.available() + 4 + 2 * u64::from(self.ring_size())
    }

    pub(super) fn used(self) -> u64 {
        (self.used_event() + 2).next_multiple_of(PAGE)
    }

    fn available_event(self) -> u64 {
        self.used() + 4 + USED_ELEMENT * u64::from(self.ring_size())
    }

    fn requests(self) -> u64 {
        (self.available_event() + 2).next_multiple_of(PAGE)
    }

    fn tables(self) -> u64 {
        self.requests() + REQUEST * u64::from(self.depth)
    }

    fn buffers(self) -> u64 {
        (self.tables() + 3 * DESCRIPTOR * u64::from(self.depth)).next_multiple_of(PAGE)
    }

    pub(super) fn size(self) -> u64 {
        self.buffers() + self.buffer * u64::from(self.depth)
    }
}

struct Descriptor {
    address: u64,
    length: u32,
    flags: u32,
    next: u16,
}

pub(super) struct Ring {
    memory: GuestMemoryMmap,
    base: GuestAddress,
    layout: Layout,
    event_index: bool,
    indirect: bool,
    kick: EventFd,
    call: EventFd,
    called: PollContext<()>,
    free: Vec<u16>,
    /// The index of the next available entry, and what it was when the device was last notified.
    available: u16,
    notified: u16,
    /// The index of the next used entry to take.
    used: u16,
}

impl Ring {
    pub(super) fn new(
        memory: GuestMemoryMmap,
        base: GuestAddress,
        layout: Layout,
        event_index: bool,
        indirect: bool,
    ) -> Result<Ring> {
        let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
        let called = PollContext::new()?;
        called.add(&call, ())?;
        Ok(Ring {
            memory,
            base,
            layout,
            event_index,
            indirect,
            kick,
            call,
            called,
            free: (0..layout.depth).rev().collect(),
            available: 0,
            notified: 0,
            used: 0,
        })
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub(super) fn call(&self) -> &EventFd {
        &self.call
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base.0 + offset)
    }

    pub(super) fn buffer(&self, slot: u16) -> GuestAddress {
        self.at(self.layout.buffers() + self.layout.buffer * u64::from(slot))
    }

    fn request(&self, slot: u16) -> GuestAddress {
        self.at(self.layout.requests() + REQUEST * u64::from(slot))
    }

    /// Where the device has come to, as a front end finds out whose device went without a word.
    pub(super) fn used_index(&self) -> Result<u16> {
        let index: u16 = self.memory.load(self.at(self.layout.used() + 2), Ordering::Acquire)?;
        Ok(u16::from_le(index))
    }

    pub(super) fn claim(&mut self) -> Option<u16> {
        self.free.pop()
    }

    fn describe(&self, table: GuestAddress, index: u16, descriptor: &Descriptor) -> Result {
        let mut bytes = [0; DESCRIPTOR as usize];
        bytes[0..8].copy_from_slice(&descriptor.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&(descriptor.flags as u16).to_le_bytes());
        bytes[14..16].copy_from_slice(&descriptor.next.to_le_bytes());
        let address = GuestAddress(table.0 + DESCRIPTOR * u64::from(index));
        self.memory.write_slice(&bytes, address)?;
        Ok(())
    }

    pub(super) fn submit(&mut self, slot: u16, kind: Kind, offset: u64, length: u32) -> Result {
        if u64::from(length) > self.layout.buffer && matches!(kind, Kind::Read | Kind::Write) {
            return Err(error!("{length} bytes in a buffer of {}", self.layout.buffer));
        }
        self.write_request(slot, kind, offset, length)?;
        let request = self.request(slot);
        let (data, data_length, from_device) = match kind {
            Kind::Read | Kind::Identify => (self.buffer(slot), length, true),
            Kind::Discard | Kind::WriteZeroes(_) => (GuestAddress(request.0 + RANGE), 16, false),
            Kind::Write | Kind::Flush | Kind::Other(_) => (self.buffer(slot), length, false),
        };
        let (table, first) = if self.indirect {
            (self.at(self.layout.tables() + 3 * DESCRIPTOR * u64::from(slot)), 0)
        } else {
            (self.base, 3 * slot)
        };
        let has_data = data_length != 0;
        let last = first + if has_data { 2 } else { 1 };
        self.describe(
            table,
            first,
            &Descriptor { address: request.0, length: 16, flags: VRING_DESC_F_NEXT, next: first + 1 },
        )?;
        if has_data {
            let flags = VRING_DESC_F_NEXT | if from_device { VRING_DESC_F_WRITE } else { 0 };
            let address = data.0;
            self.describe(table, first + 1, &Descriptor { address, length: data_length, flags, next: last })?;
        }
        let address = request.0 + STATUS;
        self.describe(table, last, &Descriptor { address, length: 1, flags: VRING_DESC_F_WRITE, next: 0 })?;
        let head = if self.indirect {
            let length = DESCRIPTOR as u32 * if has_data { 3 } else { 2 };
            let address = table.0;
            self.describe(self.base, slot, &Descriptor { address, length, flags: VRING_DESC_F_INDIRECT, next: 0 })?;
            slot
        } else {
            first
        };
        let place = u64::from(self.available % self.layout.ring_size());
        self.memory.write_obj(head.to_le(), self.at(self.layout.available() + 4 + 2 * place))?;
        self.available = self.available.wrapping_add(1);
        // Everything above is visible before the index says so.
        let index = self.at(self.layout.available() + 2);
        self.memory.store(self.available.to_le(), index, Ordering::Release)?;
        Ok(())
    }

    fn write_request(&self, slot: u16, kind: Kind, offset: u64, length: u32) -> Result {
        let number = match kind {
            Kind::Read => virtio_blk::VIRTIO_BLK_T_IN,
            Kind::Write => virtio_blk::VIRTIO_BLK_T_OUT,
            Kind::Flush => virtio_blk::VIRTIO_BLK_T_FLUSH,
            Kind::Discard => virtio_blk::VIRTIO_BLK_T_DISCARD,
            Kind::WriteZeroes(_) => virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES,
            Kind::Identify => virtio_blk::VIRTIO_BLK_T_GET_ID,
            Kind::Other(number) => number,
        };
        let sector = offset / 512;
        let ranged = matches!(kind, Kind::Discard | Kind::WriteZeroes(_));
        let mut bytes = [0; STATUS as usize + 1];
        bytes[0..4].copy_from_slice(&number.to_le_bytes());
        if ranged {
            bytes[16..24].copy_from_slice(&sector.to_le_bytes());
            bytes[24..28].copy_from_slice(&(length / 512).to_le_bytes());
            let unmap = u32::from(kind == Kind::WriteZeroes(true));
            bytes[28..32].copy_from_slice(&unmap.to_le_bytes());
        } else {
            bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        }
        bytes[STATUS as usize] = NO_STATUS;
        self.memory.write_slice(&bytes, self.request(slot))?;
        Ok(())
    }

    pub(super) fn notify(&mut self) -> Result {
        if self.notified == self.available {
            return Ok(());
        }
        let old = std::mem::replace(&mut self.notified, self.available);
        // The index is written before what the device wants is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event: u16 = self.memory.load(self.at(self.layout.available_event()), Ordering::Relaxed)?;
            crosses(u16::from_le(event), self.available, old)
        } else {
            let flags: u16 = self.memory.load(self.at(self.layout.used()), Ordering::Relaxed)?;
            u32::from(u16::from_le(flags)) & VRING_USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kick.write(1)?;
        }
        Ok(())
    }

    pub(super) fn take(&mut self) -> Result<Option<(u16, u8)>> {
        if self.used_index()? == self.used {
            return Ok(None);
        }
        let place = u64::from(self.used % self.layout.ring_size());
        let element = self.at(self.layout.used() + 4 + USED_ELEMENT * place);
        let head = u32::from_le(self.memory.read_obj(element)?);
        self.used = self.used.wrapping_add(1);
        let slot = if self.indirect { head } else { head / 3 };
        let slot = u16::try_from(slot).ok().filter(|slot| *slot < self.layout.depth);
        let slot = slot.ok_or_else(|| error!("the device returned descriptor {head}"))?;
        if self.free.contains(&slot) {
            return Err(error!("the device returned descriptor {head} twice"));
        }
        self.free.push(slot);
        let status: u8 = self.memory.read_obj(GuestAddress(self.request(slot).0 + STATUS))?;
        if status == NO_STATUS {
            return Err("the device returned a request without its status".into());
        }
        Ok(Some((slot, status)))
    }

    pub(super) fn wait(&mut self, within: Duration) -> Result<(u16, u8)> {
        loop {
            // "Call me for the next one", and only then look again: one that came in between is not missed.
            if self.event_index {
                self.memory.store(self.used.to_le(), self.at(self.layout.used_event()), Ordering::Relaxed)?;
                fence(Ordering::SeqCst);
            }
            if let Some(done) = self.take()? {
                return Ok(done);
            }
            if self.called.wait_timeout(within)?.iter().next().is_none() {
                return Err(error!("no virtio-blk completion within {within:?}"));
            }
            self.call.read()?;
        }
    }
}

/// Whether an index that went from `old` to `new` passed `event`, by the specification's arithmetic.
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap() {
        for depth in [1, 32, 128] {
            let layout = Layout::new(depth, 5000);
            assert!(layout.ring_size().is_power_of_two() && layout.ring_size() >= 3 * depth);
            let edges = [
                layout.available(),
                layout.used_event() + 2,
                layout.used(),
                layout.available_event() + 2,
                layout.requests(),
                layout.tables(),
                layout.buffers(),
                layout.size(),
            ];
            assert!(edges.is_sorted(), "{edges:?}");
            assert_eq!(layout.buffer, 8192);
        }
    }

    #[test]
    fn events_are_crossed_across_the_wrap() {
        assert!(crosses(4, 5, 4));
        assert!(!crosses(5, 5, 4));
        assert!(crosses(0xffff, 1, 0xfffe));
        assert!(!crosses(3, 1, 0xfffe));
    }
}
