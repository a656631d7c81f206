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

/// Steps towards an end, in bytes: shown as qemu-img's `-p` shows them, and on SIGUSR1.
pub(crate) struct Steps {
    total: std::cell::Cell<u64>,
    done: std::cell::Cell<u64>,
    shown: std::cell::Cell<u64>,
    print: bool,
    asked: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Steps {
    /// Of `total` bytes; `print`: whenever a hundredth is done.
    pub(crate) fn new(total: u64, print: bool) -> Self {
        let steps = Self { total: total.into(), done: 0.into(), shown: 0.into(), print, asked: on_sigusr1() };
        if print {
            steps.show();
        }
        steps
    }

    fn show(&self) {
        use std::io::Write;
        let percent = self.done.get().min(self.total.get()) as f64 * 100.0 / self.total.get().max(1) as f64;
        let mut out = std::io::stdout().lock();
        // Nobody is there to be told that nobody is there.
        let _ = write!(out, "    ({percent:.2}/100%)\r").and_then(|()| out.flush());
    }

    /// So many bytes more are done.
    pub(crate) fn add(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        let hundredth = (self.total.get() / 100).max(1);
        let asked = self.asked.swap(false, std::sync::atomic::Ordering::Relaxed);
        if asked || self.print && self.done.get() - self.shown.get() >= hundredth {
            self.shown.set(self.done.get());
            self.show();
        }
    }

    /// All is done.
    pub(crate) fn end(&self) {
        if self.print {
            println!("    (100.00/100%)");
        }
    }
}

/// A flag that SIGUSR1 sets. Where the signal cannot be caught, the flag stays as it is.
fn on_sigusr1() -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let asked = std::sync::Arc::clone(&flag);
    let (ready, listening) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().ok()?;
        runtime.block_on(async {
            let kind = tokio::signal::unix::SignalKind::user_defined1();
            let mut signals = tokio::signal::unix::signal(kind).ok()?;
            let _ = ready.send(());
            while signals.recv().await.is_some() {
                asked.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            Some(())
        })
    });
    // The thread may have given up: then nobody sends, and that ends the wait too.
    let _ = listening.recv();
    flag
}
