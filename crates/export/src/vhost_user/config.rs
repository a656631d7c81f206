//! What the device says about itself: feature bits and the configuration space (VIRTIO 1.3, 5.2.3 and 5.2.4).

use disk::Disk;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Size of a sector, the unit of every address in a request, in bytes.
pub(super) const SECTOR: u64 = 512;

/// Data segments a request may have. Header and status byte take two more descriptors, and 128 is the smallest queue that
/// front ends make by default: without indirect descriptors a request must fit into the queue.
const SEG_MAX: u32 = 126;

/// Sectors in one range of a discard or write-zeroes request (1 GiB): keeps a request short, costs nothing noticeable.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: usize = 32;

/// Queues a device may have: the protocol's kick and call messages have eight bits for a queue's index.
pub(super) const MAX_QUEUES: u16 = 256;

/// Entries of a queue: what QEMU's own virtio devices allow at most.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// The bit that says that protocol features are negotiated (vhost-user's, not virtio's).
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// A set of virtio feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Features(pub u64);

impl Features {
    /// What a device for a disk offers.
    pub(super) fn offered(read_only: bool) -> Self {
        let mut bits = F_PROTOCOL_FEATURES;
        for bit in [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
        ] {
            bits |= 1 << bit;
        }
        let access: &[u32] =
            if read_only { &[VIRTIO_BLK_F_RO] } else { &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] };
        Self(access.iter().fold(bits, |bits, bit| bits | 1 << bit))
    }

    /// Whether `bit` (its number) is in the set.
    pub(super) fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// Indirect descriptor tables may be used.
    pub(super) fn indirect(self) -> bool {
        self.has(VIRTIO_RING_F_INDIRECT_DESC)
    }

    /// Notifications are suppressed by index.
    pub(super) fn event_idx(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    /// The driver flushes what must be durable. Without it every write must be durable when it completes.
    pub(super) fn write_back(self) -> bool {
        self.has(VIRTIO_BLK_F_FLUSH)
    }

    /// Rings wait for an explicit enable.
    pub(super) fn protocol(self) -> bool {
        self.0 & F_PROTOCOL_FEATURES != 0
    }
}

/// The vhost-user protocol features offered.
pub(super) fn protocol_features() -> Protocol {
    Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
}

/// What the configuration space says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Size of the disk in bytes. A last part of a sector is not offered.
    pub size: u64,
    /// Bytes below which writing costs a read-modify-write, a power of two.
    pub alignment: u32,
    /// Bytes that a discard gives back as a whole, a power of two.
    pub cluster: u64,
    /// Zeroing may give space back.
    pub unmap: bool,
    /// Queues.
    pub queues: u16,
}

impl Shape {
    /// As `disk` is now.
    pub(super) fn of(disk: &Disk, queues: u16) -> Self {
        let cluster = disk.chain().first().map_or(1, |top| top.image.cluster_size());
        Self { size: disk.size(), alignment: disk.request_alignment(), cluster, unmap: disk.options().discard, queues }
    }

    /// Bytes `offset..offset + len` of the configuration space; what the driver does not know of reads as zeros. `None`
    /// past the 256 bytes that a configuration space has.
    pub(super) fn read(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let (from, len) = (offset as usize, len as usize);
        let to = from.checked_add(len).filter(|&to| to <= 256)?;
        Some(self.bytes()[from..to].to_vec())
    }

    fn bytes(&self) -> [u8; 256] {
        let alignment = self.alignment.clamp(SECTOR as u32, 1 << 20);
        let physical = alignment.ilog2() - (SECTOR as u32).ilog2();
        let in_blocks = alignment / SECTOR as u32;
        let granularity = (self.cluster.clamp(u64::from(alignment), 1 << 31) / SECTOR) as u32;
        let mut space = [0; 256];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.size / SECTOR).to_le_bytes()); // capacity
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes()); // blk_size
        put(24, &[physical as u8]); // physical_block_exp; alignment_offset stays 0
        put(26, &(in_blocks as u16).to_le_bytes()); // min_io_size
        put(28, &granularity.to_le_bytes()); // opt_io_size
        put(32, &[1]); // writeback
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &(MAX_RANGES as u32).to_le_bytes()); // max_discard_seg
        put(44, &granularity.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &(MAX_RANGES as u32).to_le_bytes()); // max_write_zeroes_seg
        put(56, &[u8::from(self.unmap)]); // write_zeroes_may_unmap
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config as C;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_configuration_space_is_laid_out_as_virtio_says() {
        let shape = Shape { size: (5 << 20) + 100, alignment: 4096, cluster: 65536, unmap: true, queues: 4 };
        let space = shape.read(0, 96).unwrap();
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), (5 << 20) / 512);
        assert_eq!(u32_at(&space, offset_of!(C, seg_max)), 126);
        assert_eq!(u32_at(&space, offset_of!(C, blk_size)), 512);
        assert_eq!(space[offset_of!(C, physical_block_exp)], 3);
        assert_eq!(space[offset_of!(C, min_io_size)], 8);
        assert_eq!(u32_at(&space, offset_of!(C, opt_io_size)), 128);
        assert_eq!(space[offset_of!(C, wce)], 1);
        assert_eq!(space[offset_of!(C, num_queues)], 4);
        assert_eq!(u32_at(&space, offset_of!(C, max_discard_sectors)), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(&space, offset_of!(C, max_discard_seg)), 32);
        assert_eq!(u32_at(&space, offset_of!(C, discard_sector_alignment)), 128);
        assert_eq!(u32_at(&space, offset_of!(C, max_write_zeroes_sectors)), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(&space, offset_of!(C, max_write_zeroes_seg)), 32);
        assert_eq!(space[offset_of!(C, write_zeroes_may_unmap)], 1);
        assert_eq!(shape.read(4, 12).unwrap(), &space[4..16]);
        assert_eq!(shape.read(200, 56).unwrap(), [0; 56]);
        assert_eq!(shape.read(200, 57), None);
        assert_eq!(shape.read(u32::MAX, u32::MAX), None);
    }

    #[test]
    fn a_read_only_device_offers_nothing_that_writes() {
        let rw = Features::offered(false);
        let ro = Features::offered(true);
        assert!(rw.has(VIRTIO_BLK_F_DISCARD) && rw.has(VIRTIO_BLK_F_WRITE_ZEROES) && !rw.has(VIRTIO_BLK_F_RO));
        assert!(!ro.has(VIRTIO_BLK_F_DISCARD) && !ro.has(VIRTIO_BLK_F_WRITE_ZEROES) && ro.has(VIRTIO_BLK_F_RO));
    }
}
