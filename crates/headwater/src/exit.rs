//! Exit codes, as documented in `docs/cli.md`. Usage errors are clap's, with code 2, but for the tools of [`crate::usage`].

use std::process::ExitCode;

/// What a command ends with: an exit code, or the one message that says why it failed.
pub(crate) type Outcome = Result<Exit, String>;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok,
    /// Failed; a message was printed.
    Failed,
    /// `check`: the image has errors.
    Corrupt,
    /// `check`: the image has leaked clusters, nothing worse.
    Leaks,
    /// `stream --wait`: cancelled before the end; what has arrived is kept.
    Cancelled,
    /// `check`: the format has no checks.
    NoChecks,
    /// `qemu`: as QEMU ended.
    Code(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(match exit {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Corrupt => 2,
            Exit::Leaks => 3,
            Exit::Cancelled => 4,
            Exit::NoChecks => 63,
            Exit::Code(code) => code,
        })
    }
}
