//! Writing packed clusters, side by side: for images that are made at one go.
//!
//! A packed cluster begins at any byte; each one counts once for every cluster it has a share of.
//!
//! **Invariants.** What is packed reads as what was given. Streams can be unpacked with a window of 4 KiB, as QEMU does.

use super::Core;
use crate::room::Held;
use crate::{ErrorKind, Result};
use flate2::{Compress, FlushCompress, Status};
use layout::qcow2::{Compression, L2Entry, Packed};
use layout::{GuestOffset, HostOffset, HostRange};
use ring::Iov;
use std::cell::RefCell;
use std::rc::Rc;

/// Room for packed clusters is taken in steps of at least this.
const STEP: u64 = 1 << 20;

/// As QEMU packs: its window is what it unpacks with.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Where the next packed cluster goes.
#[derive(Default)]
pub(super) struct Packing {
    room: Option<Held>,
    next: u64,
}

impl Packing {
    /// Room for `len` bytes, if what was taken last has it.
    fn take(&mut self, len: u64) -> Option<HostOffset> {
        let room = self.room.as_ref()?;
        let end = room.range().end().get();
        (self.next + len <= end).then(|| {
            let at = self.next;
            self.next += len;
            HostOffset(at)
        })
    }

    /// Lets go of what nothing was put into.
    fn finish(&mut self, cluster: u64) {
        if let Some(room) = self.room.take() {
            room.keep_front(HostOffset(self.next).align_up(cluster));
        }
    }

    /// Goes on in `room`, which may follow what there was.
    fn go_on(&mut self, room: Held, cluster: u64) {
        let follows = self.room.as_ref().is_some_and(|old| old.range().end() == room.range().start());
        if !follows {
            self.finish(cluster);
            self.next = room.range().start().get();
        } else if let Some(old) = self.room.take() {
            // The old part ends in a cluster that is in use; what is in front is counted by what was put there.
            let _: HostRange = old.keep();
        }
        self.room = Some(room);
    }
}

thread_local! {
    /// Making them costs memory and time; they are used again.
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
}

/// Packs one cluster; `None` where that saves nothing.
pub(super) fn pack(how: Compression, cluster: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let most = cluster.len() - 1;
    match how {
        Compression::Deflate => {
            // Room for more than anything is packed into: whatever is begun comes to its end.
            let mut packed = vec![0; cluster.len() + cluster.len() / 8 + 64];
            let mut deflate = DEFLATE.take().unwrap_or_else(|| {
                Compress::new_with_window_bits(flate2::Compression::default(), false, DEFLATE_WINDOW_BITS)
            });
            deflate.reset();
            let status = deflate.compress(cluster, &mut packed, FlushCompress::Finish)?;
            packed.truncate(deflate.total_out() as usize);
            if status != Status::StreamEnd {
                // `reset` does not take back all that such a stream has used up (zlib-rs 0.6.8).
                return Ok(None);
            }
            DEFLATE.set(Some(deflate));
            Ok((packed.len() <= most).then_some(packed))
        }
        Compression::Zstd => {
            let packed = ZSTD.with_borrow_mut(|slot| {
                let packer = match slot {
                    Some(packer) => packer,
                    None => slot.insert(zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?),
                };
                packer.compress(cluster)
            })?;
            Ok((packed.len() <= most).then_some(packed))
        }
    }
}

impl Core {
    /// See [`crate::Image::pack`].
    pub(super) async fn pack(self: &Rc<Self>, at: GuestOffset, bytes: Iov) -> Result<bool> {
        self.health.check_writable()?;
        self.check_no_data_file("packed clusters")?;
        let cluster = self.cluster_size();
        if !at.is_aligned(cluster) || bytes.len() as u64 != cluster {
            let what = "only whole clusters are packed";
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        }
        self.health.check_range(at.range(cluster), self.size().next_multiple_of(cluster))?;
        if self.header.get().crypt != 0 {
            let what = "Compression and encryption not supported at the same time";
            return Err(self.health.error(ErrorKind::Unsupported, None, what));
        }
        let how = self.header.get().compression;
        let cluster_bytes = bytes.to_vec();
        let packed = ring::unblock(move || pack(how, &cluster_bytes)).await;
        let packed = packed.map_err(|error| {
            self.health.error(ErrorKind::Unsupported, None, format!("a cluster could not be packed: {error}"))
        })?;
        let Some(packed) = packed else { return Ok(false) };
        let _busy = self.active.begin();
        let len = packed.len() as u64;
        let place = loop {
            let taken = self.packing.borrow_mut().take(len);
            if let Some(place) = taken {
                break place;
            }
            let room = self.room.take_whole(STEP.max(2 * cluster)).await?;
            self.prepare_to_count(room.range()).await?;
            self.packing.borrow_mut().go_on(room, cluster);
        };
        self.store.write(place, Iov::from_slice(&packed), false).await?;
        let entry = Packed { at: place, len };
        let (table, slice) = self.pin_entry(at).await?;
        let header = self.header.get();
        let index = self.word_of(at);
        let before = self.cache.borrow().get(slice.number()).map_or(0, |slice| slice.raw()[index]);
        let words = self.words();
        self.cache.borrow_mut().change(slice.number(), |slice| {
            slice.set(index, entry.encode(header.cluster_bits));
            if words == 2 {
                slice.set(index + 1, 0);
            }
        });
        self.kept.borrow_mut().forget(at);
        self.room.space.borrow_mut().unlink(L2Entry::referred(before, &header));
        let raw = entry.encode(header.cluster_bits);
        self.count_later(L2Entry::referred(raw, &header));
        table.link();
        Ok(true)
    }

    /// Nothing more is packed: gives back what was taken ahead.
    pub(super) fn end_packing(&self) {
        self.packing.borrow_mut().finish(self.cluster_size());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, mut state: u64) -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// Each cluster is packed as if it were the first, whatever came before: above all, those that could not be packed.
    #[test]
    fn contexts_carry_nothing_over() {
        for how in [Compression::Deflate, Compression::Zstd] {
            for round in 0..120_usize {
                let mut cluster = noise([4096, 512, 65536][round / 30 % 3], round as u64);
                // Noise many times on end, and then everything between noise and none.
                let plain = cluster.len() / 8 * (round.saturating_sub(60) % 9);
                cluster[..plain].fill(round as u8);
                let packed = pack(how, &cluster).unwrap();
                let fresh = cluster.clone();
                let alone = std::thread::spawn(move || pack(how, &fresh).unwrap()).join().unwrap();
                assert_eq!(packed, alone, "{how:?} {round}");
            }
        }
    }

    #[test]
    fn what_saves_nothing_is_not_packed() {
        let noise = noise(65536, 1);
        for how in [Compression::Deflate, Compression::Zstd] {
            assert_eq!(pack(how, &noise).unwrap(), None, "{how:?}");
            assert!(pack(how, &vec![7; 65536]).unwrap().is_some_and(|packed| packed.len() < 1000), "{how:?}");
        }
    }
}
