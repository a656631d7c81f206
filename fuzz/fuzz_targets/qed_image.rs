//! A damaged QED image: looked at, checked, repaired, opened, written; held against a naive reading of the specification.
//!
//! The body is shared with the stable smoke test in `crates/image/tests/image/mutation.rs`.
#![no_main]

#[path = "../../crates/image/tests/image/guest.rs"]
#[expect(dead_code, reason = "shared with tests that use more of it")]
mod guest;
#[path = "../../crates/image/tests/image/mutation.rs"]
#[expect(dead_code, reason = "each target uses its own half")]
mod mutation;

libfuzzer_sys::fuzz_target!(|input: &[u8]| mutation::image_stands(input));
