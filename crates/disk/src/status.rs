//! What a run of the disk is, for `map` and for NBD's block status.

use crate::Status;
use crate::disk::Inner;
use crate::view::Found;
use image::Result;
use layout::GuestRange;
use std::rc::Rc;
use store::Backing;

/// Neighbouring runs that are alike are joined, in at most so many steps: an answer shall come soon.
const STEPS: usize = 256;

impl Inner {
    /// The first run of `range` (on the disk, not empty), all alike.
    pub(crate) async fn status(self: &Rc<Self>, range: GuestRange) -> Result<Status> {
        let mut all = self.first_status(range).await?;
        for _ in 1..STEPS {
            let rest = range.skip(all.len);
            if rest.is_empty() {
                break;
            }
            let next = self.first_status(rest).await?;
            let goes_on = match (all.host, next.host) {
                (Some(this), Some(next)) => this.checked_add(all.len) == Some(next),
                (None, None) => true,
                _ => false,
            };
            if !goes_on
                || (all.zero, all.allocated, all.depth, all.compressed)
                    != (next.zero, next.allocated, next.depth, next.compressed)
            {
                break;
            }
            all.len += next.len;
        }
        Ok(all)
    }

    async fn first_status(&self, range: GuestRange) -> Result<Status> {
        let view = self.view();
        let run = view.resolve(0, view.depth(), range).await?;
        let len = run.len;
        let plain = |len, allocated, depth| Status { len, zero: true, allocated, depth, compressed: false, host: None };
        Ok(match run.found {
            Found::Data(depth, host) => {
                let (len, backing) = view.stored(depth, host, len).await?;
                Status { zero: backing == Backing::Hole, host: Some(host), ..plain(len, true, depth) }
            }
            Found::Packed(depth) => Status { compressed: true, zero: false, ..plain(len, true, depth) },
            Found::Zero(depth) => plain(len, true, depth),
            Found::PastEnd(ended) => plain(len, false, ended.saturating_sub(1)),
            Found::Nothing => plain(len, false, view.depth() - 1),
        })
    }
}
