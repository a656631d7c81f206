//! A bar on a terminal, silence elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;

/// A bar over `total` bytes with bytes, rate and time left; hidden when standard error is no terminal.
pub(crate) fn bytes(total: u64, what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template =
        "{msg} [{bar:30}] {percent}%  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_message(what.to_owned());
    bar.set_style(style.progress_chars("=> "));
    bar
}
