//! Where monitors are.

use super::{CLIENTS, Client};
use crate::{Engine, Failure, socket};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// A place for a monitor.
#[derive(Debug)]
pub enum Place {
    /// Clients come to this unix socket, made anew.
    Listen(PathBuf),
    /// Clients come to this host and port.
    ListenTcp(String, u16),
    /// Clients come to a unix socket that listens already.
    Listening(OwnedFd),
    /// The client listens on this unix socket.
    Connect(PathBuf),
    /// The client listens on this host and port.
    ConnectTcp(String, u16),
    /// The client is at the other end of this unix socket.
    Connected(OwnedFd),
    /// The client is at standard input and output.
    Standard,
}

/// Both directions of a connection.
type Streams = (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>);

fn unix(stream: UnixStream) -> Streams {
    let (input, out) = stream.into_split();
    (Box::new(input), Box::new(out))
}

fn tcp(stream: TcpStream) -> Streams {
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    let (input, out) = stream.into_split();
    (Box::new(input), Box::new(out))
}

/// What accepts.
enum Listener {
    Made(socket::Listener),
    Found(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Streams> {
        match self {
            Self::Made(listener) => listener.accept().await.map(unix),
            Self::Found(listener) => listener.accept().await.map(|(stream, _)| unix(stream)),
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| tcp(stream)),
        }
    }
}

/// Serves QMP at `place` until the runtime ends. Returns when clients can come, or the one there is has been reached.
pub async fn serve(engine: Engine, place: Place, pretty: bool) -> Result<(), Failure> {
    let failed = |what: String| move |error: io::Error| Failure::generic(format!("{what}: {error}"));
    let streams = match place {
        Place::Listen(path) => {
            let listener = socket::listen(&path).await?;
            listen(engine, Listener::Made(listener), pretty);
            return Ok(());
        }
        Place::ListenTcp(host, port) => {
            let what = format!("could not listen on {host}:{port}");
            let listener = TcpListener::bind((host.as_str(), port)).await.map_err(failed(what))?;
            listen(engine, Listener::Tcp(listener), pretty);
            return Ok(());
        }
        Place::Listening(fd) => {
            let what = || failed("the descriptor is no listening unix socket".to_owned());
            let listener = std::os::unix::net::UnixListener::from(fd);
            listener.set_nonblocking(true).map_err(what())?;
            listen(engine, Listener::Found(UnixListener::from_std(listener).map_err(what())?), pretty);
            return Ok(());
        }
        Place::Connect(path) => {
            let what = format!("Failed to connect to '{}'", path.display());
            unix(UnixStream::connect(&path).await.map_err(failed(what))?)
        }
        Place::ConnectTcp(host, port) => {
            let what = format!("Failed to connect to '{host}:{port}'");
            tcp(TcpStream::connect((host.as_str(), port)).await.map_err(failed(what))?)
        }
        Place::Connected(fd) => {
            let what = || failed("the descriptor is no unix socket".to_owned());
            let stream = std::os::unix::net::UnixStream::from(fd);
            stream.set_nonblocking(true).map_err(what())?;
            unix(UnixStream::from_std(stream).map_err(what())?)
        }
        Place::Standard => {
            (Box::new(tokio::io::stdin()) as Box<dyn AsyncRead + Send + Unpin>, Box::new(tokio::io::stdout()) as _)
        }
    };
    tokio::spawn(talk(engine, streams, pretty));
    Ok(())
}

/// Talks to one client until it is gone.
async fn talk(engine: Engine, (input, out): Streams, pretty: bool) {
    let _at_monitor = engine.at_monitor();
    if let Err(error) = Client::new(engine.clone(), input, out, pretty).serve().await {
        tracing::debug!(%error, "a QMP client is gone");
    }
}

fn listen(engine: Engine, listener: Listener, pretty: bool) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    tokio::spawn(async move {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                // From here on nobody could do anything any more; the socket goes.
                _ = engine.ending() => return,
            };
            match accepted {
                Ok(streams) => {
                    let engine = engine.clone();
                    tokio::spawn(async move {
                        talk(engine, streams, pretty).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: others are served, this one may come again.
                    tracing::warn!(%error, "could not accept a QMP client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
}
