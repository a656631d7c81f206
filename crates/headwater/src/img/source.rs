//! What is copied from: one disk, or several one behind the other.

use crate::images::{self, Look};
use disk::{Disk, DiskOptions, Status};
use image::{Format, Image};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use std::rc::Rc;

/// Disks, one behind the other.
pub(crate) struct Source {
    disks: Vec<(u64, Rc<Disk>)>,
    size: u64,
}

impl Source {
    /// Opens `files`, read-only.
    pub(crate) async fn open(files: &[String], look: &Look) -> Result<Self, String> {
        let mut source = Self { disks: Vec::new(), size: 0 };
        for file in files {
            match images::open(file, look).await {
                Ok(chain) => source.push(Disk::new(file, chain, DiskOptions::default())),
                Err(error) => {
                    let _ = source.close().await;
                    return Err(error);
                }
            }
        }
        Ok(source)
    }

    /// One disk that is open already.
    pub(crate) fn of(disk: Rc<Disk>) -> Self {
        let mut source = Self { disks: Vec::new(), size: 0 };
        source.push(disk);
        source
    }

    fn push(&mut self, disk: Rc<Disk>) {
        let size = disk.size();
        self.disks.push((self.size, disk));
        self.size += size;
    }

    /// Bytes in all.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The image of the first, its top.
    pub(crate) fn top(&self) -> Option<Rc<dyn Image>> {
        self.disks.first().map(|(_, disk)| Rc::clone(&disk.chain()[0].image))
    }

    /// The format of the first.
    pub(crate) fn format(&self) -> Format {
        self.disks.first().map_or(Format::Raw, |(_, disk)| disk.chain()[0].image.format())
    }

    /// The disk that holds the byte at `at`, where it is there, and how much follows.
    fn find(&self, at: u64) -> Option<(&Rc<Disk>, GuestOffset, u64)> {
        let number = self.disks.partition_point(|(start, _)| *start <= at).checked_sub(1)?;
        let (start, disk) = &self.disks[number];
        let left = disk.size().checked_sub(at - start).filter(|left| *left > 0)?;
        Some((disk, GuestOffset(at - start), left))
    }

    /// The first run of `len` bytes at `at`, all alike; zeros past the end.
    pub(crate) async fn status(&self, at: u64, len: u64) -> Result<Status, String> {
        match self.find(at) {
            Some((disk, offset, left)) => {
                let range = GuestRange::new(offset, len.min(left));
                disk.status(range).await.map_err(|error| error.to_string())
            }
            None => Ok(Status { len, zero: true, allocated: false, depth: 0, compressed: false, host: None }),
        }
    }

    /// Reads into all of `into`; zeros past the end.
    pub(crate) async fn read(&self, at: u64, into: Iov) -> Result<(), String> {
        let mut done = 0;
        while done < into.len() {
            match self.find(at + done as u64) {
                Some((disk, offset, left)) => {
                    let part = ((into.len() - done) as u64).min(left) as usize;
                    let read = disk.read(offset, into.slice(done..done + part)).await;
                    read.map_err(|error| format!("error while reading at byte {}: {error}", at + done as u64))?;
                    done += part;
                }
                None => {
                    into.slice(done..into.len()).fill(0);
                    done = into.len();
                }
            }
        }
        Ok(())
    }

    /// Closes all of them.
    pub(crate) async fn close(&self) -> Result<(), String> {
        let mut outcome = Ok(());
        for (_, disk) in &self.disks {
            outcome = outcome.and(disk.close().await.map_err(|error| error.to_string()));
        }
        outcome
    }
}
