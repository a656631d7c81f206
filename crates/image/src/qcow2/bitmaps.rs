//! Persistent bitmaps. They record which parts of a disk were written, for whoever copies changes only; they are not kept up here.
//!
//! **Invariant.** Before anything is written, every bitmap that records is marked as in use, durably: what it says is then known to
//! be incomplete, and whoever relied upon it starts afresh. Bitmaps that do not record stay what they are.

use super::Core;
use crate::Result;
use layout::qcow2::AUTOCLEAR_BITMAPS;
use layout::qcow2::bitmap::{AUTO, Bitmap, IN_USE};
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
            Err(error) if error.kind() == crate::ErrorKind::Corrupt => {
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
}
