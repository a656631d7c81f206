//! Where an NBD server is.

use ring::File;
use std::fmt;
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The port that was given to NBD.
pub const PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Host (a name or a number) and port.
    Tcp(String, u16),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// Connects. Names are looked up and connections made on a helper thread: both block.
pub(super) async fn connect(address: &Address) -> io::Result<File> {
    let address = address.clone();
    let connecting = ring::unblock(move || -> io::Result<OwnedFd> {
        Ok(match address {
            Address::Unix(path) => UnixStream::connect(path)?.into(),
            Address::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), port))?;
                stream.set_nodelay(true)?;
                stream.into()
            }
        })
    });
    Ok(File::new(connecting.await?))
}
