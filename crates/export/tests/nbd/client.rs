//! A client on the same ring as the server, over the library's own client codec, which believes nothing.

use headwater_export::nbd::Address;
use nbd::client::{
    Answer, ClientError, ClientHandshake, ClientProgress, Completion, Failure, Goal, ListedExport, Session,
    Transactions,
};
use nbd::proto::{Command, CommandFlags, NbdError};
use nbd::reply::Extent;
use ring::{File, Iov};
use rustix::net::Shutdown;
use std::collections::HashMap;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

pub(crate) const NONE: CommandFlags = CommandFlags::empty();

/// What to ask for in the handshake.
#[derive(Clone, Copy)]
pub(crate) enum Style {
    Simple,
    Structured,
    Allocation,
}

/// A connection in its transmission phase.
pub(crate) struct Client {
    file: File,
    transactions: Transactions,
    ended: HashMap<u64, Result<Answer, Failure>>,
    buffer: Iov,
}

/// Connects and says nothing.
pub(crate) async fn connect(address: &Address) -> std::io::Result<File> {
    let address = address.clone();
    let connecting = ring::unblock(move || -> std::io::Result<OwnedFd> {
        Ok(match address {
            Address::Unix(path) => UnixStream::connect(path)?.into(),
            Address::Tcp(host, port) => TcpStream::connect((host.as_str(), port))?.into(),
            Address::Inherited(number) => unreachable!("no test listens on descriptor {number}"),
        })
    });
    Ok(File::new(connecting.await?))
}

/// Goes through a handshake.
async fn shake(file: &File, mut handshake: ClientHandshake) -> Result<(ClientProgress, Vec<u8>), ClientError> {
    let buffer = Iov::alloc(4096);
    let mut input = Vec::new();
    loop {
        let mut output = Vec::new();
        let (taken, progress) = handshake.advance(&input, &mut output)?;
        input.drain(..taken);
        if file.send_all(&Iov::from_slice(&output)).await.is_err() {
            return Err(ClientError::Protocol("hung up"));
        }
        if progress != ClientProgress::Continue {
            return Ok((progress, input));
        }
        if taken == 0 {
            match file.recv(&buffer).await {
                Ok(0) | Err(_) => return Err(ClientError::Protocol("hung up")),
                Ok(received) => input.extend(buffer.slice(0..received).to_vec()),
            }
        }
    }
}

/// The exports of a server.
pub(crate) async fn list(address: &Address) -> Vec<ListedExport> {
    let file = connect(address).await.unwrap();
    match shake(&file, ClientHandshake::new(Goal::List, false, false)).await {
        Ok((ClientProgress::Listed(list), _)) => list,
        other => panic!("{other:?}"),
    }
}

/// What a server says about an export without giving it.
pub(crate) async fn inspect(address: &Address, name: &str) -> Result<Session, ClientError> {
    let file = connect(address).await.unwrap();
    match shake(&file, ClientHandshake::new(Goal::Inspect(name.into()), true, true)).await? {
        (ClientProgress::Session(session), _) => Ok(session),
        other => panic!("{other:?}"),
    }
}

impl Client {
    /// Connects to the server's first export.
    pub(crate) async fn new(address: &Address, style: Style) -> Self {
        Self::to(address, "", style).await.unwrap()
    }

    pub(crate) async fn to(address: &Address, name: &str, style: Style) -> Result<Self, ClientError> {
        let file = connect(address).await.unwrap();
        let (structured, allocation) = match style {
            Style::Simple => (false, false),
            Style::Structured => (true, false),
            Style::Allocation => (true, true),
        };
        let handshake = ClientHandshake::new(Goal::Export(name.into()), structured, allocation);
        let (ClientProgress::Session(session), rest) = shake(&file, handshake).await? else { panic!("no session") };
        assert!(rest.is_empty(), "a server does not speak first in transmission");
        let transactions = Transactions::new(&session);
        Ok(Self { file, transactions, ended: HashMap::new(), buffer: Iov::alloc(1 << 20) })
    }

    /// Sends a request with its payload.
    pub(crate) async fn submit(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> u64 {
        let request = self.transactions.begin(command, flags, offset, length);
        let mut bytes = request.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.file.send_all(&Iov::from_slice(&bytes)).await.unwrap();
        request.cookie
    }

    /// Makes a request to be sent by [`Client::raw`].
    pub(crate) fn begin(&mut self, command: Command, offset: u64, length: u32) -> (u64, Vec<u8>) {
        let request = self.transactions.begin(command, NONE, offset, length);
        (request.cookie, request.encode().to_vec())
    }

    /// Sends any bytes.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.send_all(&Iov::from_slice(bytes)).await
    }

    /// Waits for a request's end.
    pub(crate) async fn wait(&mut self, cookie: u64) -> Result<Answer, Failure> {
        loop {
            if let Some(outcome) = self.ended.remove(&cookie) {
                return outcome;
            }
            assert!(self.receive().await, "the server hung up before it replied");
        }
    }

    /// Takes in some replies; `false` when the server has hung up.
    pub(crate) async fn receive(&mut self) -> bool {
        let received = self.file.recv(&self.buffer).await.unwrap_or(0);
        let mut completions = Vec::new();
        let bytes = self.buffer.slice(0..received).to_vec();
        self.transactions.receive(&bytes, &mut completions).expect("replies within the protocol");
        for Completion { cookie, outcome } in completions {
            assert!(self.ended.insert(cookie, outcome).is_none(), "one reply per request");
        }
        received > 0
    }

    /// The outcome of a request, if it is there already.
    pub(crate) fn ended(&mut self, cookie: u64) -> Option<Result<Answer, Failure>> {
        self.ended.remove(&cookie)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.transactions.in_flight()
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        rustix::net::shutdown(self.file.as_fd(), how).unwrap();
    }

    /// A request without data, and its end.
    pub(crate) async fn call(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> Result<Answer, Failure> {
        let cookie = self.submit(command, flags, offset, length, &[]).await;
        self.wait(cookie).await
    }

    /// The error a request ends with.
    pub(crate) async fn error(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u32) -> NbdError {
        self.call(command, flags, offset, length).await.unwrap_err().kind().expect("an error of the protocol")
    }

    pub(crate) async fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        match self.call(Command::Read, NONE, offset, length).await {
            Ok(Answer::Data { bytes, .. }) => bytes,
            // An empty structured reply holds no chunk.
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn write(&mut self, flags: CommandFlags, offset: u64, bytes: &[u8]) -> Result<Answer, Failure> {
        let cookie = self.submit(Command::Write, flags, offset, bytes.len() as u32, bytes).await;
        self.wait(cookie).await
    }

    pub(crate) async fn extents(&mut self, flags: CommandFlags, offset: u64, length: u32) -> Vec<Extent> {
        match self.call(Command::BlockStatus, flags, offset, length).await {
            Ok(Answer::Extents(extents)) => extents,
            other => panic!("{other:?}"),
        }
    }

    /// Leaves politely, and waits until the server has let go.
    pub(crate) async fn leave(mut self) {
        self.submit(Command::Disc, NONE, 0, 0, &[]).await;
        while self.receive().await {}
    }
}
