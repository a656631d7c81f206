//! libFuzzer over one of the targets; which, `HEADWATER_FUZZ_TARGET` says.
#![no_main]

use headwater_fuzz_targets::TARGETS;
use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("HEADWATER_FUZZ_TARGET").unwrap_or_default();
    let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    found.unwrap_or_else(|| panic!("HEADWATER_FUZZ_TARGET is '{wanted}', and may be one of {names:?}")).1
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| (*TARGET)(input));
