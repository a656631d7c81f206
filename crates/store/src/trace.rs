//! A decorator that records every operation on a store, for tests that check order and for `--trace`.
