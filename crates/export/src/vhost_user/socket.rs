//! The listening socket: made anew, never stolen, removed at the end.

use rustix::fs::{FileType, Stat};
use std::io::{self, ErrorKind};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket with its path. Removes the path when dropped, if it is still its own.
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    made: Stat,
}

impl Socket {
    /// Binds `path`. A socket that nobody listens on any more is replaced; one that is served, or anything that is no
    /// socket, is left alone: [`ErrorKind::AddrInUse`].
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_stale(path)? => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                let why = "the address is in use by another process, or by a file that is no socket; \
                           end that process, remove the file, or choose another path";
                return Err(io::Error::new(ErrorKind::AddrInUse, why));
            }
            bound => bound?,
        };
        let made = rustix::fs::lstat(path)?;
        Ok(Self { listener, path: path.to_owned(), made })
    }

    /// To accept from.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

fn is_stale(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::lstat(path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Ok(false);
    }
    match UnixStream::connect(path) {
        Err(error) => Ok(error.kind() == ErrorKind::ConnectionRefused),
        Ok(_) => Ok(false),
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Somebody may have put another one in its place; that one is not ours to remove.
        if let Ok(now) = rustix::fs::lstat(&self.path)
            && (now.st_dev, now.st_ino) == (self.made.st_dev, self.made.st_ino)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_serves_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Socket::bind(&path).unwrap();
        assert_eq!(Socket::bind(&path).err().map(|e| e.kind()), Some(ErrorKind::AddrInUse));
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale socket");
        let second = Socket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let third = Socket::bind(&path).unwrap();
        drop(second);
        assert!(path.exists(), "not removed: it belongs to another one by now");
        drop(third);
        std::fs::write(&path, b"a file").unwrap();
        assert_eq!(Socket::bind(&path).err().map(|e| e.kind()), Some(ErrorKind::AddrInUse));
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }
}
