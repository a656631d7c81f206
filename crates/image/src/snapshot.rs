//! Internal snapshots: states of a disk that an image keeps beside the present one.

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest had run, nanoseconds.
    pub vm_clock: u64,
    /// Bytes of the guest's state that are kept with it.
    pub vm_state_size: u64,
    /// Bytes of the disk at that time.
    pub disk_size: u64,
    /// Instructions counted, if they were.
    pub icount: Option<u64>,
}

/// What is to be done. Nothing else is in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotAction {
    /// Keep the present state under this name, taken at this time (seconds since 1970, and nanoseconds).
    Create(String, (u32, u32)),
    /// Make this one (its id, or its name) the present state.
    Apply(String),
    /// Forget this one (its id, or its name).
    Delete(String),
}
