//! Where clients of a joined monitor come in: the places that a user's command line names, taken by us in QEMU's stead.
//!
//! **Invariant.** One client at a time, as with QEMU's monitors: the next one waits to be accepted.

use super::wire::Link;
use crate::qmp::Place;
use crate::{Failure, socket};
use std::io;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// What lets clients in.
pub(super) enum Door {
    Made(socket::Listener),
    Found(UnixListener),
    Tcp(TcpListener),
    /// There is one client, and never another.
    Single(Option<Link>),
}

impl Door {
    /// Takes the place. A client that has to be reached is reached when this returns.
    pub(super) async fn open(place: Place) -> Result<Self, Failure> {
        let failed = |what: String| move |error: io::Error| Failure::generic(format!("{what}: {error}"));
        let single = |link| Ok(Self::Single(Some(link)));
        match place {
            Place::Listen(path) => Ok(Self::Made(socket::listen(&path).await?)),
            Place::ListenTcp(host, port) => {
                let what = format!("could not listen on {host}:{port}");
                Ok(Self::Tcp(TcpListener::bind((host.as_str(), port)).await.map_err(failed(what))?))
            }
            Place::Listening(fd) => {
                let what = || failed("the descriptor is no listening unix socket".to_owned());
                let listener = std::os::unix::net::UnixListener::from(fd);
                listener.set_nonblocking(true).map_err(what())?;
                Ok(Self::Found(UnixListener::from_std(listener).map_err(what())?))
            }
            Place::Connect(path) => {
                let what = format!("Failed to connect to '{}'", path.display());
                single(Link::Unix(UnixStream::connect(&path).await.map_err(failed(what))?))
            }
            Place::ConnectTcp(host, port) => {
                let what = format!("Failed to connect to '{host}:{port}'");
                single(tcp(TcpStream::connect((host.as_str(), port)).await.map_err(failed(what))?))
            }
            Place::Connected(fd) => {
                let what = || failed("the descriptor is no unix socket".to_owned());
                let stream = std::os::unix::net::UnixStream::from(fd);
                stream.set_nonblocking(true).map_err(what())?;
                single(Link::Unix(UnixStream::from_std(stream).map_err(what())?))
            }
            Place::Standard => single(Link::Standard(tokio::io::stdin(), tokio::io::stdout())),
        }
    }

    /// The next client; `None` when there will be none.
    pub(super) async fn client(&mut self) -> io::Result<Option<Link>> {
        match self {
            Self::Made(listener) => listener.accept().await.map(|stream| Some(Link::Unix(stream))),
            Self::Found(listener) => listener.accept().await.map(|(stream, _)| Some(Link::Unix(stream))),
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| Some(tcp(stream))),
            Self::Single(link) => Ok(link.take()),
        }
    }
}

fn tcp(stream: TcpStream) -> Link {
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    Link::Tcp(stream)
}
