//! "Copied" flags: an entry says whether what it leads to is referred to by it alone, and may be changed where it is.

use super::Core;
use super::check::{Scan, Stop, Walk};
use super::references::plain_run;
use layout::HostOffset;
use layout::qcow2::{COPIED, Header, L1Entry, L2Entry, OFFSET, Slice, is_own};
use ring::Iov;
use std::rc::Rc;

impl Scan {
    /// Looks at the "copied" flags of the image's own tables; `fix`: sets them right, durably.
    pub(super) async fn check_flags(&mut self, core: &Rc<Core>, header: &Header, fix: bool) -> Walk<()> {
        let l1 = core.tables.borrow().l1().get(..header.l1_entries as usize).unwrap_or_default().to_vec();
        let words = core.words();
        for (index, raw) in l1.into_iter().enumerate() {
            let Ok(L1Entry::Table(table)) = L1Entry::decode(raw, header) else { continue };
            if table.get() >> header.cluster_bits >= self.clusters {
                continue;
            }
            self.check_flag("L2 cluster: l1_entry", core, header, (header.l1_table + index as u64 * 8, raw), fix)
                .await?;
            if header.has_data_file() {
                continue;
            }
            let bytes = Iov::alloc(header.cluster_size() as usize);
            if core.store.read(table, bytes.clone()).await.is_err() {
                continue;
            }
            // Clusters of a table that is shared are shared, too: their references say so.
            let entries = Slice::decode(&bytes.to_vec());
            let entries = entries.raw();
            let mut next = 0;
            while next < entries.len() / words {
                let n = next;
                let (raw, extended) = (entries[n * words], if words == 2 { entries[n * words + 1] } else { 0 });
                next += 1;
                if raw == 0 {
                    continue;
                }
                let run = plain_run(&entries[n * words..], words, header.cluster_size());
                if run > 1 && is_own(raw) && self.all_once((raw & OFFSET) >> header.cluster_bits, run as u64) {
                    next = n + run;
                    continue;
                }
                let plain = !matches!(L2Entry::decode(raw, extended, header), Ok(L2Entry::Packed(_)) | Err(_));
                if raw & OFFSET != 0 && plain {
                    let place = table + (n * words) as u64 * 8;
                    self.check_flag("data cluster: l2_entry", core, header, (place, raw), fix).await?;
                }
            }
        }
        Ok(())
    }

    /// Whether each of `len` clusters from `first` on is referred to once.
    fn all_once(&self, first: u64, len: u64) -> bool {
        let mut at = first;
        while at < first + len {
            let (Some(run), step) = self.counts.run(at) else { return false };
            let step = step.min(first + len - at);
            if run[..step as usize].iter().any(|count| *count != 1) {
                return false;
            }
            at += step;
        }
        true
    }

    async fn check_flag(
        &mut self,
        what: &str,
        core: &Rc<Core>,
        header: &Header,
        (place, raw): (HostOffset, u64),
        fix: bool,
    ) -> Walk<()> {
        let references = self.counts.get((raw & OFFSET) >> header.cluster_bits);
        if is_own(raw) == (references == 1) || references == 0 {
            return Ok(());
        }
        if fix {
            let entry = Iov::from_slice(&(raw ^ COPIED).to_be_bytes());
            core.health.write(place, entry).await.map_err(Stop::Failed)?;
            return Ok(());
        }
        self.flags += 1;
        self.corrupt(format!("OFLAG_COPIED {what}={raw:x} refcount={references}"));
        Ok(())
    }
}
