//! What a killed server takes along: a note, kept by the front end, whether answers were given that hang on this process.
//!
//! A guest goes on over a restart of its server as if nothing had happened. But a write that was answered and not flushed
//! may be mapped in the memory of the server only; with the server that mapping is gone, and the guest does not know. A
//! flush after the restart would then promise what is lost already. So whoever starts with such a note refuses writes and
//! flushes, as after a failed flush, until the guest is reset; reads go on.
//!
//! **Invariant.** While an answered write is in the memory of this process only, the note bears the number of its life.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{MmapRegion, VolatileMemory};

/// Nothing hangs on anybody.
const SETTLED: u64 = 0;

/// Something is lost.
const LOST: u64 = u64::MAX;

/// Tells this process from every other one: even, and neither of the above.
static LIFE: LazyLock<u64> = LazyLock::new(|| (RandomState::new().hash_one(std::process::id()) | 2) & !1);

/// The note, in memory that the front end keeps.
pub(super) struct Ledger {
    mapping: Arc<MmapRegion<()>>,
    at: usize,
}

impl Ledger {
    /// At `at` (a multiple of 8, within the mapping).
    pub(super) fn new(mapping: Arc<MmapRegion<()>>, at: usize) -> Self {
        Self { mapping, at }
    }

    /// Whether a server before this one took something along. It stays so until the front end begins with a new region.
    pub(super) fn is_lost(&self) -> bool {
        let lost = self.cell().is_some_and(|cell| ![SETTLED, *LIFE].contains(&cell.load(Ordering::Acquire)));
        if lost {
            self.set(LOST);
        }
        lost
    }

    /// Before answers are given: whether they hang on this process.
    pub(super) fn note(&self, unsettled: bool) {
        self.set(if unsettled { *LIFE } else { SETTLED });
    }

    fn set(&self, value: u64) {
        if let Some(cell) = self.cell() {
            cell.store(value, Ordering::Release);
        }
    }

    // It lies within the mapping and is aligned by construction; a `None` cannot come up.
    fn cell(&self) -> Option<&AtomicU64> {
        self.mapping.get_atomic_ref(self.at).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(Arc::new(MmapRegion::new(4096).unwrap()), 64)
    }

    #[test]
    fn what_hangs_on_this_process_is_lost_only_to_others() {
        let ledger = ledger();
        assert!(!ledger.is_lost(), "a new one");
        ledger.note(true);
        assert!(!ledger.is_lost(), "the front end came back to the same server");
        ledger.note(false);
        assert!(!ledger.is_lost());
        ledger.set(*LIFE + 2);
        assert!(ledger.is_lost());
        assert_eq!(ledger.cell().unwrap().load(Ordering::Relaxed), LOST);
        assert!(ledger.is_lost(), "and stays lost, whoever comes next");
        assert!(![SETTLED, LOST].contains(&*LIFE));
    }
}
