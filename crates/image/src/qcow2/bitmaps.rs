//! Persistent bitmaps, as they are read. They record which parts of a disk were written, for whoever copies changes only; they are not
//! kept up here while a guest writes.
//!
//! **Invariants.**
//! * Before a guest may write, every bitmap that records is marked as in use, durably: what it says is then known to be incomplete,
//!   and whoever relied upon it starts afresh. Bitmaps that do not record stay what they are.
//! * Memory follows the data that the bitmaps have in the file, at most 512 MiB for one.

use super::Core;
use crate::bitmap::{Bitmap as Described, Bits, not_found};
use crate::{ErrorKind, Result};
use layout::qcow2::bitmap::{AUTO, Bitmap, IN_USE, MAX_DATA_BYTES, Part, table_entries};
use layout::qcow2::{AUTOCLEAR_BITMAPS, Header};
use layout::{HostOffset, HostRange};
use ring::Iov;

impl Core {
    /// Marks the bitmaps that record. False where there are none that could be read: then the header must not vouch for any.
    pub(super) async fn suspend_bitmaps(&self) -> Result<bool> {
        let header = self.header.get();
        if header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return Ok(false);
        }
        let found = match self.read_bitmaps(&header).await {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(image = self.store.name(), %error, "its bitmaps are given up");
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let Some((_, bitmaps)) = found else { return Ok(false) };
        let mut marked = false;
        for (place, bitmap) in bitmaps {
            if bitmap.flags & AUTO != 0 && bitmap.flags & IN_USE == 0 {
                let flags = Iov::from_slice(&(bitmap.flags | IN_USE).to_be_bytes());
                self.health.write(place + Bitmap::FLAGS_AT as u64, flags).await?;
                marked = true;
            }
        }
        if marked {
            self.health.barrier().await?;
        }
        Ok(true)
    }

    /// Where the directory is, and what it holds; nothing where the header does not vouch for it.
    pub(super) async fn directory(&self, header: &Header) -> Result<(HostRange, Vec<Bitmap>)> {
        if header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return Ok((HostRange::default(), Vec::new()));
        }
        let found = self.read_bitmaps(header).await?;
        Ok(found.map_or((HostRange::default(), Vec::new()), |(bitmaps, all)| {
            (bitmaps.directory, all.into_iter().map(|(_, bitmap)| bitmap).collect())
        }))
    }

    /// See [`crate::Image::bitmaps`].
    pub(super) async fn bitmaps(&self) -> Result<Vec<Described>> {
        let (_, all) = self.directory(&self.header.get()).await?;
        let describe = |bitmap: Bitmap| Described {
            name: bitmap.name,
            granularity: 1_u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0),
            enabled: bitmap.flags & AUTO != 0,
            in_use: bitmap.flags & IN_USE != 0,
        };
        Ok(all.into_iter().map(describe).collect())
    }

    /// See [`crate::Image::bitmap_bits`].
    pub(super) async fn bitmap_bits(&self, name: &str) -> Result<Bits> {
        let (_, all) = self.directory(&self.header.get()).await?;
        let bitmap = all.iter().find(|bitmap| bitmap.name == name);
        let bitmap = bitmap.ok_or_else(|| not_found(self.store.name(), name))?;
        self.check_usable(bitmap)?;
        Ok(self.read_bits(bitmap).await?.0)
    }

    /// Refuses one that is not to be relied upon.
    pub(super) fn check_usable(&self, bitmap: &Bitmap) -> Result<()> {
        if bitmap.flags & IN_USE == 0 {
            return Ok(());
        }
        let what = format!(
            "Bitmap '{}' is inconsistent and cannot be used\nTry block-dirty-bitmap-remove to delete this bitmap from disk",
            bitmap.name
        );
        Err(self.health.error(ErrorKind::InvalidArgument, None, what))
    }

    /// What a bitmap says, and the clusters it takes: its table, and its data.
    pub(super) async fn read_bits(&self, bitmap: &Bitmap) -> Result<(Bits, Vec<HostRange>)> {
        let header = self.header.get();
        let needed = table_entries(header.size, bitmap.granularity_bits.min(62), &header);
        if needed != Some(bitmap.table_entries) {
            let what = format!("bitmap '{}' is not one of a disk of this size; remove it", bitmap.name);
            return Err(self.health.error(ErrorKind::Corrupt, Some(bitmap.table), what));
        }
        let mut bits = Bits::new(header.size, bitmap.granularity_bits);
        let (parts, mut taken) = self.read_parts(bitmap).await?;
        let cluster = header.cluster_size();
        for (number, part) in parts.into_iter().enumerate() {
            let first = number as u64 * cluster * 8;
            match part {
                Part::Zeros => {}
                Part::Ones => bits.load_ones(first, cluster * 8),
                Part::At(at) => {
                    bits.load(first, &self.read_bytes(at.range(cluster)).await?);
                    taken.push(at.range(cluster));
                }
            }
        }
        Ok((bits, taken))
    }

    /// What a bitmap's table says, and the clusters of the table.
    pub(super) async fn read_parts(&self, bitmap: &Bitmap) -> Result<(Vec<Part>, Vec<HostRange>)> {
        let header = self.header.get();
        let damaged = |at: HostOffset| {
            let what =
                format!("the table of bitmap '{}' is damaged; check the image, or remove the bitmap", bitmap.name);
            self.health.error(ErrorKind::Corrupt, Some(at), what)
        };
        let table = bitmap.table_range(&header).ok_or_else(|| damaged(bitmap.table))?;
        let length = self.store.size().next_multiple_of(header.cluster_size());
        if table.end().get() > length || u64::from(bitmap.table_entries) << header.cluster_bits > MAX_DATA_BYTES {
            return Err(damaged(table.start()));
        }
        let mut parts = Vec::new();
        for (number, raw) in self.read_bytes(table).await?.as_chunks::<8>().0.iter().enumerate() {
            let place = table.start() + number as u64 * 8;
            let part = Part::decode(u64::from_be_bytes(*raw), &header).ok_or_else(|| damaged(place))?;
            if let Part::At(at) = part
                && at.get() >= length
            {
                return Err(damaged(place));
            }
            parts.push(part);
        }
        Ok((parts, vec![table]))
    }
}
