//! Floor of `export` (contract being written).
