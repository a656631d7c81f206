//! Floor of `image` (contract being written).
