//! nbdkit: an NBD server of other hands, with delays and errors on demand.

use std::path::Path;
use std::process::Command;

use crate::process::Daemon;
use crate::{Result, peer};

/// Serves `file`, read-only unless said otherwise, on the unix socket `socket` through `filters`.
#[derive(Debug)]
pub struct Nbdkit {
    filters: Vec<String>,
    settings: Vec<String>,
    writable: bool,
}

impl Default for Nbdkit {
    fn default() -> Self {
        Nbdkit::new()
    }
}

impl Nbdkit {
    /// A server without filters.
    pub fn new() -> Self {
        Nbdkit { filters: Vec::new(), settings: Vec::new(), writable: false }
    }

    /// Puts a filter in front, with its settings such as `rdelay=5ms`.
    #[must_use]
    pub fn filter(mut self, name: &str, settings: &[&str]) -> Self {
        self.filters.push(format!("--filter={name}"));
        self.settings.extend(settings.iter().map(ToString::to_string));
        self
    }

    /// Every read takes this many milliseconds longer.
    #[must_use]
    pub fn read_delay(self, milliseconds: u64) -> Self {
        self.filter("delay", &[&format!("rdelay={milliseconds}ms")])
    }

    /// Reads fail with EIO as long as the file `trigger` exists.
    #[must_use]
    pub fn read_errors_while(self, trigger: &Path) -> Self {
        let file = format!("error-file={}", trigger.display());
        self.filter("error", &["error=EIO", "error-pread-rate=100%", &file])
    }

    /// Takes writes, too.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Starts it and waits until it listens.
    pub fn start(self, file: &Path, socket: &Path) -> Result<Daemon> {
        let mut command = Command::new(peer::find("nbdkit")?);
        command.args(["--foreground", "--exit-with-parent"]);
        command.arg("--unix").arg(socket);
        if !self.writable {
            command.arg("--readonly");
        }
        command.args(&self.filters).arg("file").arg(file).args(&self.settings);
        let mut daemon = Daemon::spawn("nbdkit", command)?;
        daemon.listening(socket)?;
        Ok(daemon)
    }
}
