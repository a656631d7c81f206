//! Floor of `job` (contract being written).
