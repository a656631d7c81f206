//! A small guest: reads and writes bytes through an image as a disk would, without a disk.

use image::{Image, Keep, Mapping, Purpose};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use std::rc::Rc;

/// One image over a layer of plain bytes (as long as they are; zeros behind).
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) image: Rc<dyn Image>,
    pub(crate) below: Rc<Vec<u8>>,
}

impl Guest {
    pub(crate) fn new(image: Rc<dyn Image>, below: &[u8]) -> Self {
        Self { image, below: Rc::new(below.to_vec()) }
    }

    fn below(&self, range: GuestRange) -> Vec<u8> {
        let mut bytes = vec![0; range.len() as usize];
        let at = (range.start().get() as usize).min(self.below.len());
        let rest = &self.below[at..];
        let len = rest.len().min(bytes.len());
        bytes[..len].copy_from_slice(&rest[..len]);
        bytes
    }

    pub(crate) async fn mapping(&self, range: GuestRange) -> image::Result<image::Mapped> {
        loop {
            match self.image.lookup(range)? {
                Some(mapped) => {
                    assert!(mapped.len > 0 && mapped.len <= range.len());
                    return Ok(mapped);
                }
                None => self.image.load(range).await?,
            }
        }
    }

    pub(crate) async fn read(&self, at: u64, len: u64) -> image::Result<Vec<u8>> {
        let all = Iov::alloc(len as usize);
        let mut rest = GuestRange::new(GuestOffset(at), len);
        while !rest.is_empty() {
            let mapped = self.mapping(rest).await?;
            let run = rest.first(mapped.len);
            let start = (run.start().get() - at) as usize;
            let part = all.slice(start..start + run.len() as usize);
            match mapped.mapping {
                Mapping::Data(host) | Mapping::Shared(host) => self.image.store().read(host, part).await?,
                Mapping::Packed => self.image.unpack(run, part).await?,
                Mapping::Zero => part.fill(0),
                Mapping::Unallocated => part.write(0, &self.below(run)),
            }
            rest = rest.skip(mapped.len);
        }
        Ok(all.to_vec())
    }

    /// Writes `bytes`; the caller sees to it that no other write meets the same clusters.
    pub(crate) async fn write(&self, at: u64, bytes: &[u8]) -> image::Result<()> {
        let cluster = self.image.cluster_size();
        let mut rest = GuestRange::new(GuestOffset(at), bytes.len() as u64);
        while !rest.is_empty() {
            let from = (rest.start().get() - at) as usize;
            let mapped = self.mapping(rest).await?;
            if let Mapping::Data(host) = mapped.mapping {
                let part = Iov::from_slice(&bytes[from..from + mapped.len as usize]);
                self.image.store().write(host, part, false).await?;
                rest = rest.skip(mapped.len);
                continue;
            }
            let run = rest.first(mapped.len);
            let reservation = self.image.reserve(run, Purpose::Data).await?;
            let whole = reservation.range();
            assert!(whole.is_aligned(cluster) && whole.contains(run.start()));
            let host = reservation.host().unwrap();
            let inside = GuestRange::between(whole.start(), whole.end().min(GuestOffset(self.image.size())));
            let mut payload = self.read(inside.start().get(), inside.len()).await?;
            payload.resize(whole.len() as usize, 0);
            let written = run.intersect(whole);
            let offset = (written.start() - whole.start()) as usize;
            payload[offset..offset + written.len() as usize]
                .copy_from_slice(&bytes[from..from + written.len() as usize]);
            self.image.store().write(host, Iov::from_slice(&payload), false).await?;
            let linked = reservation.link(Keep::New, |_| false);
            assert_eq!((linked.linked, linked.dropped), (whole.len(), 0));
            rest = rest.skip(written.len());
        }
        Ok(())
    }

    /// Copies what lies below into the image where it is unallocated.
    pub(crate) async fn populate(&self, range: GuestRange) -> image::Result<()> {
        let size = GuestOffset(self.image.size());
        let mut rest = range;
        while !rest.is_empty() {
            let mapped = self.mapping(rest).await?;
            let run = rest.first(mapped.len);
            if mapped.mapping == Mapping::Unallocated {
                let reservation = self.image.reserve(run, Purpose::Data).await?;
                let whole = reservation.range();
                let mut payload = self.below(GuestRange::between(whole.start(), whole.end().min(size)));
                payload.resize(whole.len() as usize, 0);
                self.image.store().write(reservation.host().unwrap(), Iov::from_slice(&payload), false).await?;
                let linked = reservation.link(Keep::Unallocated, |_| false);
                assert_eq!(linked.linked + linked.dropped, whole.len());
                rest = rest.skip(whole.end() - rest.start());
                continue;
            }
            rest = rest.skip(run.len());
        }
        Ok(())
    }

    pub(crate) async fn read_all(&self) -> image::Result<Vec<u8>> {
        match self.image.size() {
            0 => Ok(Vec::new()),
            size => self.read(0, size).await,
        }
    }
}
