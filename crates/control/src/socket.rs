//! Unix sockets of monitors: made anew, and never taken from somebody who still listens.

use crate::Failure;
use std::io;
use std::path::Path;
use tokio::net::{UnixListener, UnixStream};

/// Listens on `path`. What an ended process left there is replaced; a socket on which somebody listens is refused.
pub(crate) async fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let failed = |e: io::Error| Failure::generic(format!("could not listen on '{}': {e}", path.display()));
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).await.is_ok() {
                let taken = format!("could not listen on '{}': somebody listens there already", path.display());
                return Err(Failure::generic(taken));
            }
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)
        }
        bound => bound.map_err(failed),
    }
}
