//! Raw: the guest's bytes as they are.
