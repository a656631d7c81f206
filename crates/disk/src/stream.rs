//! What streaming needs of a disk: what is missing, bring it in, let go of what lies below.

use layout::GuestRange;

/// How far down a stream reaches: it copies what lies between the top and this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StreamBase {
    /// To the bottom: at the end the image stands alone.
    #[default]
    Nothing,
    /// Down to, not including, this layer (its node name, unique in the chain).
    Node(String),
}

/// A run that a stream has to bring in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Where, clipped to the disk's size; starts and ends on cluster boundaries of the top (or at the disk's end).
    pub range: GuestRange,
    /// It reads as zeros: nothing is to be fetched, only marked.
    pub zero: bool,
}

/// What a populate did, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Fetched and linked.
    pub data: u64,
    /// Found to be zeros: marked or left as a hole.
    pub zero: u64,
    /// Left alone: somebody else was there first.
    pub skipped: u64,
}
