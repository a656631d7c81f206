//! HMP: the monitor for people.

use crate::{Engine, Failure};
use std::path::Path;

/// Listens for people on a unix socket, as [`crate::qmp::listen`] does for programs.
pub async fn listen(engine: Engine, socket: &Path) -> Result<(), Failure> {
    let _ = (engine, socket);
    todo!()
}
