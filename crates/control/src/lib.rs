//! Floor of `control` (contract being written).
