//! vhost-user: requests out of a guest's memory, and a front end's messages.

use disk::{Disk, DiskOptions, Layer};
use export::vhost_user::{VhostUserExport, VhostUserServer, fuzzing};
use image::{Format, OpenOptions};
use ring::sim::Sim;
use ring::{Config, Shard};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::cell::RefCell;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use store::Store;
use store::memory::MemoryStore;

const SIZE: u64 = 1 << 20;

async fn disk(store: Rc<MemoryStore>) -> Rc<Disk> {
    let image = image::open(store, Format::Raw, OpenOptions::default()).await.expect("bytes in memory");
    Disk::new("fuzzed", vec![Layer::new("top", "fuzzed", image)], DiskOptions::default())
}

/// Whatever a guest's memory holds: a chain with an end is answered with a status the specification has, the disk keeps
/// its size, and everything ends.
pub(crate) fn request(input: &[u8]) {
    let (choice, memory) = input.split_first().unwrap_or((&0, &[]));
    Sim::new(1).block_on(async {
        let store = MemoryStore::new("fuzzed", SIZE);
        let disk = disk(Rc::clone(&store)).await;
        if let Some((status, written)) = fuzzing::request(memory, u16::from(choice >> 1), choice & 1 != 0, &disk).await
        {
            assert!(status <= 2, "status {status}");
            // A guest may name the same memory in every descriptor of a table of the greatest length.
            assert!(written <= 1024 * (64 << 10), "{written} bytes written into 64 KiB of memory");
        }
        assert_eq!(store.size(), SIZE);
        disk.close().await.expect("memory closes");
    });
}

/// A server that lives as long as the process.
struct Server {
    shard: Shard,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

thread_local! {
    static SERVER: RefCell<Option<Server>> = const { RefCell::new(None) };
    static INSIDE: RefCell<Option<VhostUserServer>> = const { RefCell::new(None) };
}

fn start() -> Server {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("vhost.sock");
    let shard = Shard::start("fuzzed", Config::default()).expect("a shard");
    let path = socket.clone();
    let begin = move || async move {
        let export = VhostUserExport {
            socket: path,
            disk: disk(MemoryStore::new("fuzzed", SIZE)).await,
            read_only: false,
            write_through: false,
            queues: 2,
            serial: "fuzzed".into(),
        };
        let server = VhostUserServer::start(export).await.expect("a server");
        INSIDE.with(|inside| *inside.borrow_mut() = Some(server));
    };
    shard.handle().call(begin).wait().expect("it starts");
    Server { shard, socket, _folder: folder }
}

/// Messages of a front end, one after the other: request, flags, payload; some with a file. Whatever they are, the server
/// answers the next front end.
pub(crate) fn session(input: &[u8]) {
    SERVER.with(|server| {
        let mut server = server.borrow_mut();
        let server = server.get_or_insert_with(start);
        let connection = UnixStream::connect(&server.socket).expect("it accepts");
        connection.set_nonblocking(true).expect("a socket");
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 16).expect("room");
        let mut rest = input;
        while let Some((head, tail)) = rest.split_first_chunk::<4>() {
            let [request, flags, files, len] = *head;
            let (payload, tail) = tail.split_at(usize::from(len).min(tail.len()));
            rest = tail;
            let mut message = u32::from(request).to_ne_bytes().to_vec();
            message.extend((u32::from(flags) << 2 & 0xc | 1).to_ne_bytes());
            message.extend((payload.len() as u32).to_ne_bytes());
            message.extend(payload);
            let fds = [file.as_fd(), file.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let count = usize::from(files % 3);
            if count > 0 {
                control.push(SendAncillaryMessage::ScmRights(&fds[..count]));
            }
            if sendmsg(&connection, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).is_err() {
                break;
            }
        }
        drop(connection);
        assert!(server.answers(), "the next front end is not answered");
    });
}

impl Server {
    /// Asks for the features, as every front end does.
    fn answers(&self) -> bool {
        let Ok(mut connection) = UnixStream::connect(&self.socket) else { return false };
        let patience = connection.set_read_timeout(Some(Duration::from_secs(20)));
        let message: Vec<u8> = [1_u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let asked = std::io::Write::write_all(&mut connection, &message);
        let mut answer = [0; 20];
        patience.is_ok() && asked.is_ok() && connection.read_exact(&mut answer).is_ok() && answer[0] == 1
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let end = || async {
            let server = INSIDE.with(|inside| inside.borrow_mut().take());
            if let Some(server) = server {
                server.stop().await;
            }
        };
        // Whatever went wrong has been told.
        let _ = self.shard.handle().call(end).wait();
    }
}
