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

/// A place that is taken: clients can come, or the one there is has been reached.
pub struct Open(Opened);

enum Opened {
    Listens(Listener, Option<Streams>),
    Client(Streams),
    /// Whoever is there or not, again after this time.
    Again(Place, Duration),
}

/// Takes `place`.
///
/// # Errors
/// It cannot be had, or nobody is there.
pub async fn open(place: Place) -> Result<Open, Failure> {
    let failed = |what: String| move |error: io::Error| Failure::generic(format!("{what}: {}", plain(&error)));
    let streams = match place {
        Place::Listen(path) => return Ok(Open(Opened::Listens(Listener::Made(socket::listen(&path).await?), None))),
        Place::ListenTcp(host, port) => {
            let what = format!("could not listen on {host}:{port}");
            let listener = TcpListener::bind((host.as_str(), port)).await.map_err(failed(what))?;
            return Ok(Open(Opened::Listens(Listener::Tcp(listener), None)));
        }
        Place::Listening(fd) => {
            let what = || failed("the descriptor is no listening unix socket".to_owned());
            let listener = std::os::unix::net::UnixListener::from(fd);
            listener.set_nonblocking(true).map_err(what())?;
            let listener = UnixListener::from_std(listener).map_err(what())?;
            return Ok(Open(Opened::Listens(Listener::Found(listener), None)));
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
    Ok(Open(Opened::Client(streams)))
}

/// An error of the system without its number.
fn plain(error: &io::Error) -> String {
    let said = error.to_string();
    said.split(" (os error").next().unwrap_or_default().to_owned()
}

impl Open {
    /// A client that listens at `place`, which is sought again and again.
    pub fn again(place: Place, after: Duration) -> Self {
        Self(Opened::Again(place, after))
    }

    /// Where others listen, waits until the first of them has come.
    ///
    /// # Errors
    /// Nobody can come.
    pub async fn wait(&mut self) -> Result<(), Failure> {
        if let Opened::Listens(listener, first @ None) = &mut self.0 {
            let came = listener.accept().await;
            *first = Some(came.map_err(|error| Failure::generic(format!("nobody can come: {}", plain(&error))))?);
        }
        Ok(())
    }

    /// Serves QMP there until the runtime ends.
    pub fn serve(self, engine: Engine, pretty: bool) {
        match self.0 {
            Opened::Listens(listener, first) => listen(engine, listener, first, pretty),
            Opened::Client(streams) => drop(tokio::spawn(talk(engine, streams, pretty))),
            Opened::Again(place, after) => drop(tokio::spawn(async move {
                let mut told = false;
                loop {
                    let reached = match &place {
                        Place::Connect(path) => UnixStream::connect(path).await.map(unix),
                        Place::ConnectTcp(host, port) => TcpStream::connect((host.as_str(), *port)).await.map(tcp),
                        _ => return,
                    };
                    match reached {
                        Ok(streams) => {
                            talk(engine.clone(), streams, pretty).await;
                            told = false;
                        }
                        Err(error) if !told => {
                            tracing::warn!(%error, ?place, "nobody is there yet for a monitor");
                            told = true;
                        }
                        Err(_) => {}
                    }
                    tokio::select! {
                        () = tokio::time::sleep(after) => {}
                        _ = engine.ending() => return,
                    }
                }
            })),
        }
    }
}

/// Serves QMP at `place` until the runtime ends. Returns when clients can come, or the one there is has been reached.
pub async fn serve(engine: Engine, place: Place, pretty: bool) -> Result<(), Failure> {
    open(place).await?.serve(engine, pretty);
    Ok(())
}

/// Talks to one client until it is gone.
async fn talk(engine: Engine, (input, out): Streams, pretty: bool) {
    let _at_monitor = engine.at_monitor();
    if let Err(error) = Client::new(engine.clone(), input, out, pretty).serve().await {
        tracing::debug!(%error, "a QMP client is gone");
    }
}

fn listen(engine: Engine, listener: Listener, mut first: Option<Streams>, pretty: bool) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    tokio::spawn(async move {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = match first.take() {
                Some(streams) => Ok(streams),
                None => tokio::select! {
                    accepted = listener.accept() => accepted,
                    // From here on nobody could do anything any more; the socket goes.
                    _ = engine.ending() => return,
                },
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
