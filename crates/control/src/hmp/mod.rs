//! HMP: the monitor for people. A line in, text and a prompt out; QEMU's commands and words.

mod command;

pub(crate) use command::answer;

use crate::{Engine, Failure, socket};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::Semaphore;

/// People served at a time.
const CLIENTS: usize = 16;

/// A line may be this long, in bytes.
const LONGEST: u64 = 4096;

/// Somebody who takes nothing for this long is gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Listens for people on a unix socket, as [`crate::qmp::listen`] does for programs.
pub async fn listen(engine: Engine, socket: &Path) -> Result<(), Failure> {
    let listener = socket::listen(socket).await?;
    let places = Arc::new(Semaphore::new(CLIENTS));
    tokio::spawn(async move {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = engine.ending() => return,
            };
            match accepted {
                Ok(stream) => {
                    let engine = engine.clone();
                    tokio::spawn(async move {
                        let _at_monitor = engine.at_monitor();
                        if let Err(error) = talk(&engine, stream).await {
                            tracing::debug!(%error, "somebody at the monitor is gone");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept somebody at the monitor");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn talk(engine: &Engine, stream: UnixStream) -> io::Result<()> {
    let (input, mut out) = stream.into_split();
    let mut input = BufReader::new(input);
    let greeting = concat!("Headwater ", env!("CARGO_PKG_VERSION"), " monitor - type 'help' for more information\n");
    say(&mut out, greeting).await?;
    loop {
        say(&mut out, "(qemu) ").await?;
        let mut line = Vec::new();
        let mut bounded = (&mut input).take(LONGEST);
        let read = tokio::select! {
            read = bounded.read_until(b'\n', &mut line) => read?,
            _ = engine.ending() => 0,
        };
        if read == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && read as u64 == LONGEST {
            return say(&mut out, "the line is too long\n").await;
        }
        let line = String::from_utf8_lossy(&line);
        say(&mut out, &answer(engine, line.trim()).await).await?;
    }
}

async fn say(out: &mut OwnedWriteHalf, text: &str) -> io::Result<()> {
    let text = text.replace('\n', "\r\n");
    match tokio::time::timeout(WRITE_PATIENCE, out.write_all(text.as_bytes())).await {
        Ok(said) => said,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}
