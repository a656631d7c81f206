//! What a check finds, in the terms `qemu-img check` reports.

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: look only.
    #[default]
    None,
    /// Leaked clusters: harmless, only waste.
    Leaks,
    /// Everything that can be repaired without inventing data.
    All,
}

/// What was found. Counts are clusters unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Broken table entries left after the repair.
    pub corruptions: u64,
    /// Broken table entries that were repaired.
    pub corruptions_fixed: u64,
    /// Clusters that take space and hold nothing, left after the repair.
    pub leaks: u64,
    /// Such clusters given back.
    pub leaks_fixed: u64,
    /// Tables that could not be read or judged.
    pub check_errors: u64,
    /// Clusters the guest sees.
    pub total_clusters: u64,
    /// Of these, allocated.
    pub allocated_clusters: u64,
    /// Of these, not next to their predecessor in the store.
    pub fragmented_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// End of the last used cluster in the store, bytes.
    pub image_end_offset: u64,
    /// One line a finding, the first few hundred: path, offset, what is wrong.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is left to repair.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}
