//! `--trace`: which trace points tell from the start.

use crate::tool;
use control::trace;

/// Carries the options out; true where one was `help`, which is answered.
pub(crate) fn options(options: &[String]) -> Result<bool, String> {
    for option in options {
        if matches!(option.as_str(), "help" | "?") {
            for point in &trace::POINTS {
                println!("{:<20} {}", point.name, point.what);
            }
            return Ok(true);
        }
        for unknown in trace::from_option(option)? {
            tool::complain(&format!("--trace {option}: warning: trace event '{unknown}' does not exist"));
        }
    }
    Ok(false)
}
