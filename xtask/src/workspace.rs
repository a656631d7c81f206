//! Where the workspace is, and how programs are run in it.
//!
//! Every program is announced before it runs, and a failure carries its exit code to our own.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Why a subcommand ended, and the exit code that says so.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) code: u8,
}

impl Failure {
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        Failure { message: message.to_string(), code: 1 }
    }
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// Names what was tried when an I/O error stops it.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure::new(format!("{what}: {error}")))
    }
}

/// The checkout and its target directory.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo, which alone knows every way of moving the target directory.
    pub(crate) fn find() -> Outcome<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("Cargo.toml");
        let asked = Command::new(cargo_program())
            .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
            .arg(&manifest)
            .stderr(Stdio::inherit())
            .output()
            .doing("running cargo metadata")?;
        if !asked.status.success() {
            return Err(Failure::new("cargo metadata failed"));
        }
        let metadata: serde_json::Value = serde_json::from_slice(&asked.stdout).doing("reading cargo metadata")?;
        let path = |key: &str| {
            metadata[key]
                .as_str()
                .map(PathBuf::from)
                .ok_or_else(|| Failure::new(format!("cargo metadata names no {key}")))
        };
        Ok(Workspace { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// Where downloaded and unpacked test peers are kept; several target directories may share one by `HEADWATER_PEERS`.
    pub(crate) fn peers(&self) -> PathBuf {
        std::env::var_os("HEADWATER_PEERS").map_or_else(|| self.target.join("peers"), PathBuf::from)
    }

    /// The release binary the end-to-end tests and the bench drive.
    pub(crate) fn headwater(&self) -> PathBuf {
        self.target.join("release").join("headwater")
    }

    pub(crate) fn cargo(&self) -> Run {
        self.program(cargo_program())
    }

    /// A program started in the workspace's root.
    pub(crate) fn program(&self, program: impl AsRef<OsStr>) -> Run {
        let mut run = Run::new(program);
        run.command.current_dir(&self.root);
        run
    }
}

/// The cargo that started us, so that a chosen toolchain stays chosen.
fn cargo_program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// True where a skipped test is a failed test.
pub(crate) fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|ci| !matches!(ci.as_str(), "" | "0" | "false"))
}

/// Finds a program on the search path, and in the administrator's directories, which Debian leaves off a user's path.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// One program run, announced.
pub(crate) struct Run {
    pub(crate) command: Command,
}

impl Run {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        Run { command: Command::new(program) }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// The command as a shell would be given it.
    pub(crate) fn line(&self) -> String {
        let program = Path::new(self.command.get_program());
        let name = program.file_name().unwrap_or(program.as_os_str());
        std::iter::once(name)
            .chain(self.command.get_args())
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    pub(crate) fn announce(&self) {
        eprintln!("$ {}", self.line());
    }

    fn failed(&self, status: ExitStatus) -> Failure {
        let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        Failure { message: format!("{} failed ({status})", self.line()), code }
    }

    /// Runs it with our own input and output; anything but success is a failure with its exit code.
    pub(crate) fn run(mut self) -> Outcome {
        self.announce();
        let status = self.command.status().doing(format!("starting {}", self.line()))?;
        if status.success() { Ok(()) } else { Err(self.failed(status)) }
    }

    /// Runs it quietly and returns what it wrote to its standard output.
    pub(crate) fn read(mut self) -> Outcome<String> {
        let output = self
            .command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .doing(format!("starting {}", self.line()))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            let mut failure = self.failed(output.status);
            let errors = String::from_utf8_lossy(&output.stderr);
            failure.message = format!("{}: {}", failure.message, errors.trim());
            Err(failure)
        }
    }

    /// True if it ran and ended well; says nothing.
    pub(crate) fn succeeds(mut self) -> bool {
        self.command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }
}
