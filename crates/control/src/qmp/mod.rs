//! QMP: the machine monitor protocol, JSON over a unix socket.

use crate::{Engine, Failure};
use std::path::Path;

/// Listens for QMP clients on a unix socket (made anew; a stale one is replaced) until the engine is dropped or the
/// process ends. Returns when the socket accepts; must run inside a tokio runtime with a `LocalSet` or current-thread.
pub async fn listen(engine: Engine, socket: &Path) -> Result<(), Failure> {
    let _ = (engine, socket);
    todo!()
}
