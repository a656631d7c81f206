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
use tokio::sync::Semaphore;

/// People served at a time.
const CLIENTS: usize = 16;

/// A line may be this long, in bytes.
const LONGEST: u64 = 4096;

/// Listens for people on a unix socket, as [`crate::qmp::listen`] does for programs.
pub async fn listen(engine: Engine, socket: &Path) -> Result<(), Failure> {
    let listener = socket::listen(socket).await?;
    let places = Arc::new(Semaphore::new(CLIENTS));
    tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let engine = engine.clone();
                    tokio::spawn(async move {
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
    let greeting =
        concat!("Headwater ", env!("CARGO_PKG_VERSION"), " monitor - type 'help' for more information\r\n(qemu) ");
    out.write_all(greeting.as_bytes()).await?;
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut input).take(LONGEST);
        let read = tokio::select! {
            read = bounded.read_until(b'\n', &mut line) => read?,
            () = engine.quit_requested() => 0,
        };
        if read == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && read as u64 == LONGEST {
            out.write_all(b"the line is too long\r\n").await?;
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut text = answer(engine, line.trim()).await;
        text.push_str("(qemu) ");
        out.write_all(text.replace('\n', "\r\n").as_bytes()).await?;
    }
}
