//! Carrying what upper layers say down into a lower one: the work of a commit.
//!
//! **Invariants.**
//! * Only what a layer above the base says is written to the base: what the base shows already stays as it is, so whoever looks
//!   through the upper layers sees the same before, during and after.
//! * What was written is read back and compared before it counts as carried.
//! * A layer in the middle that ends early says zeros from there on, and those are carried, too.

use crate::disk::Inner;
use crate::read::usize_of;
use crate::view::Found;
use crate::walk::FirstRun;
use crate::{Copied, Disk, Missing};
use image::{Error, ErrorKind, Result};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use std::rc::Rc;
use store::Backing;

/// Data are moved in parts of at most this.
const PART: u64 = 1 << 20;

impl Inner {
    /// See [`Disk::next_above`]; within `range`.
    pub(crate) async fn next_above(&self, range: GuestRange, base: &str) -> Result<Option<Missing>> {
        let view = self.view();
        let above = view.layers.iter().position(|layer| layer.node == base).ok_or_else(|| self.no_layer(base))?;
        let mut rest = range.intersect(GuestRange::between(GuestOffset::ZERO, GuestOffset(self.top.size())));
        let mut first = FirstRun::new();
        while !rest.is_empty() && first.goes_on().await {
            let run = view.resolve(0, above, rest).await?;
            let (zero, len) = match run.found {
                Found::Data(layer, host) => match view.stored(layer, host, run.len).await? {
                    (len, Backing::Data) => (Some(false), len),
                    (len, Backing::Hole) => (Some(true), len),
                },
                Found::Packed(_) => (Some(false), run.len),
                Found::Zero(_) | Found::PastEnd(_) => (Some(true), run.len),
                Found::Nothing => (None, run.len),
            };
            if !first.take(rest.first(len), zero) {
                break;
            }
            rest = rest.skip(len);
        }
        Ok(first.found().map(|(range, zero)| Missing { range, zero }))
    }

    /// See [`Disk::carry`].
    pub(crate) async fn carry(self: &Rc<Self>, range: GuestRange, base: &str, into: &Disk) -> Result<Copied> {
        let mut copied = Copied::default();
        let mut rest = self.clip(range);
        while let Some(Missing { range: run, zero }) = self.next_above(rest, base).await? {
            rest = GuestRange::between(run.end(), rest.end());
            if zero {
                into.write_zeroes(run, true, false).await?;
                copied.zero += run.len();
                continue;
            }
            let mut run = run;
            while !run.is_empty() {
                let part = run.first(PART);
                run = run.skip(part.len());
                let data = Iov::alloc(usize_of(part.len()));
                self.read_pieces(part, &data).await?;
                if data.is_zero() {
                    into.write_zeroes(part, true, false).await?;
                    copied.zero += part.len();
                } else {
                    into.write(part.start(), data.clone(), false).await?;
                    self.check_carried(part, &data, into).await?;
                    copied.data += part.len();
                }
            }
        }
        Ok(copied)
    }

    /// Reads back what was carried.
    async fn check_carried(&self, part: GuestRange, data: &Iov, into: &Disk) -> Result<()> {
        let back = Iov::alloc(data.len());
        into.read(part.start(), back.clone()).await?;
        if back.holds(data) {
            return Ok(());
        }
        let what = format!("{part} was written to '{}' and reads back as something else", into.name());
        Err(self.refuse(ErrorKind::Corrupt, what))
    }

    fn no_layer(&self, node: &str) -> Error {
        self.refuse(ErrorKind::InvalidArgument, format!("'{node}' is not a layer of it"))
    }
}
