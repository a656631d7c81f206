//! Floor of `disk` (contract being written).
