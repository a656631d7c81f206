//! Floor of `store` (contract being written).
