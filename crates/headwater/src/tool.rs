//! Under which name the program speaks. Messages begin with it, so that scripts written for the tool of that name find what they
//! look for.

use std::sync::OnceLock;

static NAME: OnceLock<String> = OnceLock::new();

/// Sets the name, once, before anything is said.
pub(crate) fn set_name(name: &str) {
    let _ = NAME.set(name.to_owned());
}

/// The name.
pub(crate) fn name() -> &'static str {
    NAME.get().map_or("headwater", String::as_str)
}

/// Says what is wrong, to standard error.
pub(crate) fn complain(message: &str) {
    eprintln!("{}: {message}", name());
}
