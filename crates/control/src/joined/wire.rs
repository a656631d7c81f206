//! One end of a QMP conversation: messages cut out of a byte stream, and the descriptors that travel with them.
//!
//! # Invariants
//! * Bounded: a message's length ([`graph::json`]), the messages read ahead (what one read brings), and the descriptors that wait.
//! * [`Wire::next`] may be dropped at any time: nothing that was read is lost.
//! * A descriptor waits for the command that takes it: the kernel glues what was sent before it to what it came with, so a read does not
//!   tell which message that was. As with QEMU, later ones replace those that nobody took.

use graph::json::{Framed, Framer};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest, Stdin, Stdout};
use tokio::net::{TcpStream, UnixStream};

/// Bytes read at once.
const READ: usize = 16 << 10;

/// Descriptors in one message, and descriptors that may wait for one: `getfd` and `add-fd` take one each.
const DESCRIPTORS: usize = 16;

/// Somebody who takes nothing for this long is gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// What carries the bytes.
pub(super) enum Link {
    /// Descriptors can travel here.
    Unix(UnixStream),
    Tcp(TcpStream),
    /// Standard input and output.
    Standard(Stdin, Stdout),
}

/// One end.
pub(super) struct Wire {
    link: Link,
    framer: Framer,
    ready: VecDeque<Framed>,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    pretty: bool,
}

impl Wire {
    pub(super) fn new(link: Link, pretty: bool) -> Self {
        Self { link, framer: Framer::default(), ready: VecDeque::new(), bytes: vec![0; READ], fds: Vec::new(), pretty }
    }

    /// The next message; `None` when the other side has hung up.
    pub(super) async fn next(&mut self) -> io::Result<Option<Framed>> {
        loop {
            if let Some(framed) = self.ready.pop_front() {
                return Ok(Some(framed));
            }
            let bytes = &mut self.bytes[..];
            let read = match &mut self.link {
                Link::Unix(stream) => receive(stream, bytes, &mut self.fds).await?,
                Link::Tcp(stream) => stream.read(bytes).await?,
                Link::Standard(input, _) => input.read(bytes).await?,
            };
            if read == 0 {
                return Ok(None);
            }
            for byte in &bytes[..read] {
                self.ready.extend(self.framer.take(*byte));
            }
        }
    }

    /// The descriptors that wait.
    pub(super) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// Sends a message, with what goes with it.
    pub(super) async fn send(&mut self, message: &Value, fds: Vec<OwnedFd>) -> io::Result<()> {
        let mut line = if self.pretty { format!("{message:#}") } else { message.to_string() };
        line.push_str("\r\n");
        match tokio::time::timeout(PATIENCE, self.write(line.as_bytes(), fds)).await {
            Ok(sent) => sent,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn write(&mut self, mut line: &[u8], fds: Vec<OwnedFd>) -> io::Result<()> {
        match &mut self.link {
            Link::Unix(stream) => {
                if !fds.is_empty() {
                    let sent = send_with(stream, line, &fds).await?;
                    line = &line[sent..];
                }
                stream.write_all(line).await
            }
            Link::Tcp(stream) => stream.write_all(line).await,
            Link::Standard(_, out) => {
                out.write_all(line).await?;
                out.flush().await
            }
        }
    }
}

/// Reads bytes, and the descriptors that come with them; more than there is room for are closed.
async fn receive(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    *fds = rights.collect();
                }
            }
            Ok(received.bytes)
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// Sends some of the bytes, and with them all the descriptors.
async fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let borrowed: Vec<_> = fds.iter().take(DESCRIPTORS).map(AsFd::as_fd).collect();
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
            let flags = SendFlags::NOSIGNAL;
            Ok(sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, flags)?)
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Read;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (near, far) = UnixStream::pair().unwrap();
            let (mut near, mut far) = (Wire::new(Link::Unix(near), false), Wire::new(Link::Unix(far), true));
            let named = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(named.path(), "told").unwrap();
            let file = named.reopen().unwrap();
            near.send(&json!({"execute": "query-status"}), Vec::new()).await.unwrap();
            near.send(&json!({"execute": "getfd"}), vec![file.into()]).await.unwrap();
            let first = far.next().await.unwrap().unwrap();
            assert_eq!(first.unwrap()["execute"], "query-status");
            let second = far.next().await.unwrap().unwrap();
            assert_eq!(second.unwrap()["execute"], "getfd");
            let mut said = String::new();
            std::fs::File::from(far.take_descriptors().pop().unwrap()).read_to_string(&mut said).unwrap();
            assert_eq!(said, "told");
            far.send(&json!({"return": {}}), Vec::new()).await.unwrap();
            assert_eq!(near.next().await.unwrap().unwrap().unwrap(), json!({"return": {}}));
            drop(far);
            assert!(near.next().await.unwrap().is_none());
        });
    }
}
