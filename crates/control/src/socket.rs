//! Unix sockets of monitors: made anew, never taken from somebody who still listens, and gone when nobody listens any more.

use crate::Failure;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// A listening socket. Dropping it removes its file.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that nobody else's is removed.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// The next client.
    pub(crate) async fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let now = self.path.symlink_metadata().ok().as_ref().map(file_id);
        if now.is_some() && now == self.file {
            // It may have gone in this moment: then that is done, too.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_id(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Listens on `path`. A socket that an ended process left there is replaced; one on which somebody listens, and a file
/// that is no socket, are refused.
pub(crate) async fn listen(path: &Path) -> Result<Listener, Failure> {
    let refuse = |why: String| Failure::generic(format!("could not listen on '{}': {why}", path.display()));
    let failed = |e: io::Error| refuse(e.to_string());
    let socket = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let meta = path.symlink_metadata().map_err(failed)?;
            if !meta.file_type().is_socket() {
                return Err(refuse("there is a file of that name that is no socket; choose another name".into()));
            }
            match UnixStream::connect(path).await {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(refuse("somebody listens there already".into())),
            }
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    let socket = socket.map_err(failed)?;
    let file = path.symlink_metadata().ok().as_ref().map(file_id);
    Ok(Listener { socket, path: path.to_owned(), file })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_tokio(test: impl AsyncFnOnce(&Path)) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(&dir.path().join("sock")));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_ours_is_removed() {
        with_tokio(async |path| {
            drop(std::os::unix::net::UnixListener::bind(path).unwrap());
            assert!(path.exists(), "left over");
            let listener = listen(path).await.unwrap();
            UnixStream::connect(path).await.unwrap();
            listener.accept().await.unwrap();
            drop(listener);
            assert!(!path.exists());
        });
    }

    #[test]
    fn nobodys_socket_and_nobodys_file_is_taken() {
        with_tokio(async |path| {
            let first = listen(path).await.unwrap();
            assert!(listen(path).await.unwrap_err().desc.contains("somebody listens there already"));
            UnixStream::connect(path).await.unwrap();
            drop(first);
            std::fs::write(path, "an image").unwrap();
            let refused = listen(path).await.unwrap_err().desc;
            assert!(refused.contains("no socket"), "{refused}");
            assert_eq!(std::fs::read(path).unwrap(), b"an image");
            let nowhere = path.join("below");
            assert!(listen(&nowhere).await.unwrap_err().desc.contains("below"));
        });
    }

    #[test]
    fn a_socket_of_somebody_later_is_not_removed() {
        with_tokio(async |path| {
            let first = listen(path).await.unwrap();
            std::fs::remove_file(path).unwrap();
            let second = listen(path).await.unwrap();
            drop(first);
            UnixStream::connect(path).await.unwrap();
            drop(second);
        });
    }
}
