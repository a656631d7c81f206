//! Listening sockets: made, found stale, removed.
//!
//! **Invariant.** A socket file is only ever removed if nobody listens on it (before we bind) or if it is still the one we
//! made (at the end).

use super::Address;
use crate::ExportError;
use ring::File;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A socket that listens.
pub(super) struct Listener {
    pub(super) file: File,
    /// With the port that the system chose.
    pub(super) address: Address,
    pub(super) socket_file: Option<SocketFile>,
}

/// The file of a unix socket that we made; removed when dropped.
pub(super) struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Tells a socket from another of the same name: inode numbers alone are used again.
type Identity = (u64, u64, i64, i64);

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Nothing more can be done about a folder that no longer lets us.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds. A name is looked up by the system's resolver; the first of its addresses that can be bound is used.
pub(super) async fn listen(address: Address) -> Result<Listener, ExportError> {
    let what = match &address {
        Address::Unix(path) => format!("listen on {}", path.display()),
        Address::Tcp(host, port) => format!("listen on {host}:{port}"),
        Address::Inherited(number) => format!("listen on descriptor {number}"),
    };
    let bound = ring::unblock(move || match address {
        Address::Unix(path) => bind_unix(path),
        Address::Tcp(host, port) => bind_tcp(host, port),
        Address::Inherited(number) => take(number),
    });
    let (fd, address, socket_file) = bound.await.map_err(|source| ExportError { what, source })?;
    Ok(Listener { file: File::new(fd), address, socket_file })
}

type Bound = (OwnedFd, Address, Option<SocketFile>);

fn take(number: RawFd) -> io::Result<Bound> {
    let fd = ring::inherited(number)?;
    if !sockopt::socket_acceptconn(&fd)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no socket that listens"));
    }
    Ok((fd, Address::Inherited(number), None))
}

fn bind_tcp(host: String, port: u16) -> io::Result<Bound> {
    let listener = match host.trim_start_matches('[').trim_end_matches(']') {
        // Every address: both families where the system has both.
        "" | "*" => TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?,
        host => TcpListener::bind((host, port).to_socket_addrs()?.collect::<Vec<_>>().as_slice())?,
    };
    let port = listener.local_addr()?.port();
    Ok((listener.into(), Address::Tcp(host, port), None))
}

fn bind_unix(path: PathBuf) -> io::Result<Bound> {
    make_room(&path)?;
    let listener = UnixListener::bind(&path)?;
    let socket_file = SocketFile::new(&path)?;
    Ok((listener.into(), Address::Unix(path), Some(socket_file)))
}

/// Removes a socket that nobody listens on any more.
fn make_room(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            let why = "there is a file of this name that is no socket; remove it or choose another name";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        Err(Errno::NOENT) => Ok(()),
        // Connected, or its queue is full (`EAGAIN`): somebody is there.
        Ok(()) | Err(Errno::AGAIN) => {
            let why = "another server listens there; stop it or choose another name";
            Err(io::Error::new(io::ErrorKind::AddrInUse, why))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_makes_room_and_a_live_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let live = UnixListener::bind(&path).unwrap();
        assert_eq!(make_room(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists());
        drop(live);
        make_room(&path).unwrap();
        assert!(!path.exists());
        make_room(&path).unwrap();
    }

    #[test]
    fn other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        fs::write(&path, "precious").unwrap();
        assert_eq!(make_room(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_our_own_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_, _, file) = bind_unix(path.clone()).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(file);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        let (_, _, file) = bind_unix(path.clone()).unwrap();
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn tcp_takes_names_and_addresses() {
        for host in ["127.0.0.1", "localhost", ""] {
            let (_, address, _) = bind_tcp(host.into(), 0).unwrap();
            let Address::Tcp(name, port) = address else { panic!("{address:?}") };
            assert_eq!(name, host);
            assert_ne!(port, 0);
        }
        assert!(bind_tcp("no.such.host.invalid".into(), 0).is_err());
    }
}
