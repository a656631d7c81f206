//! Names, addresses, several clients, and the end.

use crate::client::{Client, NONE, Style, connect, inspect, list};
use crate::fixture::{Fixture, disk, export, on_ring, pattern};
use headwater_export::nbd::{Address, NbdExport, NbdServer};
use nbd::client::{Answer, ClientError, ListedExport};
use nbd::proto::{Command, NbdError, OptionReplyKind, TransmissionFlags};
use ring::Iov;
use rustix::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;
use store::memory::MemoryStore;

#[test]
fn exports_are_listed_described_and_found() {
    on_ring(async {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("s"));
        let (first, second) = (MemoryStore::new("first", 1 << 20), MemoryStore::new("second", 3 << 20));
        let (first, second) = (disk("first", first).await, disk("second", second).await);
        let exports = vec![export("one", &first, false), export("zwei", &second, true)];
        let server = NbdServer::start(address, exports).await.unwrap();

        let names = list(server.address()).await;
        let entry = |name: &str| ListedExport { name: name.into(), description: format!("the {name}") };
        assert_eq!(names, [entry("one"), entry("zwei")]);

        let session = inspect(server.address(), "zwei").await.unwrap();
        assert_eq!((session.size, session.name.as_deref()), (3 << 20, Some("zwei")));
        assert_eq!(session.description.as_deref(), Some("the zwei"));
        let sizes = session.block_size.unwrap();
        assert_eq!((sizes.minimum, sizes.preferred, sizes.maximum), (1, 4096, 32 << 20));
        let flags = session.transmission_flags();
        assert!(flags.contains(TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN));
        assert!(!flags.intersects(TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_WRITE_ZEROES));
        let writable = inspect(server.address(), "").await.unwrap();
        let all = TransmissionFlags::all()
            - (TransmissionFlags::READ_ONLY | TransmissionFlags::ROTATIONAL | TransmissionFlags::SEND_RESIZE);
        assert_eq!(writable.transmission_flags(), all);

        let unknown = inspect(server.address(), "trois").await.unwrap_err();
        assert!(matches!(unknown, ClientError::Refused { kind: Some(OptionReplyKind::ErrUnknown), .. }));
        let Err(unknown) = Client::to(server.address(), "trois", Style::Simple).await else { panic!("no such export") };
        assert!(matches!(unknown, ClientError::Refused { kind: Some(OptionReplyKind::ErrUnknown), .. }));

        let mut client = Client::to(server.address(), "one", Style::Simple).await.unwrap();
        client.write(NONE, 0, &[7; 512]).await.unwrap();
        let mut other = Client::to(server.address(), "zwei", Style::Simple).await.unwrap();
        assert_eq!(other.read(0, 512).await, [0; 512]);
        server.stop().await;
    });
}

#[test]
fn all_connections_see_one_disk() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let mut clients = Vec::new();
        for _ in 0..8 {
            clients.push(Client::new(fixture.address(), Style::Structured).await);
        }
        for (at, client) in clients.iter_mut().enumerate() {
            client.write(NONE, at as u64 * 4096, &pattern(4096, at as u64)).await.unwrap();
        }
        let before = fixture.store.flushes.get();
        clients[7].call(Command::Flush, NONE, 0, 0).await.unwrap();
        assert!(fixture.store.flushes.get() > before);
        for (at, client) in clients.iter_mut().rev().enumerate() {
            assert_eq!(client.read(at as u64 * 4096, 4096).await, pattern(4096, at as u64));
        }
        for client in clients {
            client.leave().await;
        }
    });
}

#[test]
fn tcp_serves_both_families() {
    on_ring(async {
        for host in ["127.0.0.1", "localhost", "::1"] {
            let disk = disk("disk", MemoryStore::new("memory", 1 << 20)).await;
            let address = Address::Tcp(host.into(), 0);
            let server = match NbdServer::start(address, vec![export("disk", &disk, false)]).await {
                // A machine without IPv6.
                Err(_) if host == "::1" => continue,
                started => started.unwrap(),
            };
            let Address::Tcp(_, port) = server.address() else { panic!("not TCP") };
            assert_ne!(*port, 0);
            let mut client = Client::new(server.address(), Style::Structured).await;
            let bytes = pattern(300_000, 5);
            client.write(NONE, 1, &bytes).await.unwrap();
            assert!(client.read(1, 300_000).await == bytes);
            client.leave().await;
            let address = server.address().clone();
            server.stop().await;
            assert!(connect(&address).await.is_err(), "nobody listens any more");
        }
    });
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_stale_one_replaced() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let again = NbdServer::start(fixture.address().clone(), vec![export("disk", &fixture.disk, false)]).await;
        let error = again.err().expect("the address is taken").to_string();
        assert!(error.contains("nbd.sock") && error.contains("another server"), "{error}");
        Client::new(fixture.address(), Style::Simple).await.leave().await;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stale");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let exports = vec![export("disk", &fixture.disk, false)];
        let server = NbdServer::start(Address::Unix(path.clone()), exports).await.unwrap();
        Client::new(server.address(), Style::Simple).await.leave().await;
        server.stop().await;
        assert!(!path.exists());
        // Once more is no error.
        server.stop().await;
    });
}

#[test]
fn names_that_cannot_be_offered_are_refused() {
    on_ring(async {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk("disk", MemoryStore::new("memory", 1 << 20)).await;
        for names in [vec!["same", "same"], vec!["nul\0"]] {
            let exports = names.iter().map(|name| export(name, &disk, false)).collect();
            let path = folder.path().join("s");
            assert!(NbdServer::start(Address::Unix(path.clone()), exports).await.is_err(), "{names:?}");
            assert!(!path.exists());
        }
    });
}

#[test]
fn stop_waits_for_requests_in_flight() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(1 << 20, 6)).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        fixture.store.hold();
        // More than may be in flight, all in one go: the rest is received, but not begun.
        let (mut cookies, mut bytes) = (Vec::new(), Vec::new());
        for at in 0..200 {
            let (cookie, head) = client.begin(Command::Read, at * 512, 512);
            cookies.push(cookie);
            bytes.extend(head);
        }
        client.raw(&bytes).await.unwrap();
        fixture.store.until_waiting(128).await;

        let mut stopping = Box::pin(fixture.server.stop());
        assert!(ring::timeout(Duration::from_millis(50), &mut stopping).await.is_none(), "reads are in flight");
        let Address::Unix(path) = fixture.address() else { panic!("not a unix socket") };
        assert!(!path.exists());
        assert!(connect(fixture.address()).await.is_err());

        fixture.store.release();
        let (mut done, mut refused) = (0, 0);
        let replies = async {
            while client.receive().await {}
            for cookie in &cookies {
                match client.ended(*cookie) {
                    Some(Ok(Answer::Data { .. })) => done += 1,
                    Some(Err(failure)) => {
                        assert_eq!(failure.kind(), Some(NbdError::Shutdown));
                        refused += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
        };
        futures_util::future::join(stopping, replies).await;
        assert!(done >= 128, "{done} were in flight");
        assert_eq!(done + refused, 200);
        assert!(refused > 0, "what was not begun is refused");
    });
}

#[test]
fn stop_ends_idle_and_unfinished_clients() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let mut idle = Client::new(fixture.address(), Style::Simple).await;
        let silent = connect(fixture.address()).await.unwrap();
        let mut half = Client::new(fixture.address(), Style::Simple).await;
        let (_, head) = half.begin(Command::Read, 0, 512);
        half.raw(&head[..9]).await.unwrap();
        idle.read(0, 512).await;
        while fixture.server.connections() < 3 {
            ring::sleep(Duration::from_millis(1)).await;
        }
        fixture.server.stop().await;
        assert_eq!(fixture.server.connections(), 0);
        assert!(!idle.receive().await);
        assert!(!half.receive().await);
        let buffer = Iov::alloc(100);
        let greeting = silent.recv(&buffer).await.unwrap_or(0);
        assert!(greeting == 0 || silent.recv(&buffer).await.unwrap_or(0) == 0);
    });
}

#[test]
fn stop_in_the_middle_of_a_payload_sends_what_is_due() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(1 << 20, 8)).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        fixture.store.hold();
        let read = client.submit(Command::Read, NONE, 0, 4096, &[]).await;
        let (write, mut half) = client.begin(Command::Write, 0, 1 << 20);
        half.extend([9; 1000]);
        client.raw(&half).await.unwrap();
        fixture.store.until_waiting(1).await;
        let mut stopping = Box::pin(fixture.server.stop());
        assert!(ring::timeout(Duration::from_millis(20), &mut stopping).await.is_none(), "a read is in flight");
        fixture.store.release();
        stopping.await;
        while client.receive().await {}
        assert!(client.ended(read).is_some_and(|outcome| outcome.is_ok()));
        assert!(client.ended(write).is_none());
        assert!(fixture.bytes() == pattern(1 << 20, 8));
    });
}

#[test]
fn stop_gets_rid_of_a_client_that_sends_and_sends() {
    on_ring(async {
        let disk = disk("disk", MemoryStore::new("memory", 1 << 20)).await;
        let exports = vec![export("disk", &disk, false)];
        let server = NbdServer::start(Address::Tcp("127.0.0.1".into(), 0), exports).await.unwrap();
        let mut client = Client::new(server.address(), Style::Simple).await;
        let mut flood = Vec::new();
        for _ in 0..100 {
            let (_, head) = client.begin(Command::Write, 0, 4096);
            flood.extend(head);
            flood.extend([1; 4096]);
        }
        let client = Rc::new(client);
        let sending = ring::spawn({
            let client = Rc::clone(&client);
            async move { while client.raw(&flood).await.is_ok() {} }
        });
        ring::sleep(Duration::from_millis(50)).await;
        server.stop().await;
        sending.await;
    });
}

#[test]
fn dropping_the_server_drops_its_clients() {
    on_ring(async {
        let disk = disk("disk", MemoryStore::new("memory", 1 << 20)).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let exports = vec![export("disk", &disk, false)];
        let server = NbdServer::start(Address::Unix(path.clone()), exports).await.unwrap();
        let mut client = Client::new(server.address(), Style::Simple).await;
        drop(server);
        assert!(!client.receive().await);
        assert!(!path.exists());
        // Nothing of it is left that holds the disk.
        while Rc::strong_count(&disk) > 1 {
            ring::sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn replies_arrive_after_a_half_close() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(1 << 20, 7)).await;
        let mut client = Client::new(fixture.address(), Style::Simple).await;
        fixture.store.hold();
        let mut cookies = Vec::new();
        for at in 0..20 {
            cookies.push(client.submit(Command::Read, NONE, at * 512, 512, &[]).await);
        }
        client.shutdown(Shutdown::Write);
        fixture.store.until_waiting(20).await;
        fixture.store.release();
        while client.receive().await {}
        assert_eq!(client.in_flight(), 0);
        assert!(cookies.into_iter().all(|cookie| client.ended(cookie).is_some_and(|outcome| outcome.is_ok())));
    });
}

#[test]
fn disc_is_obeyed_after_what_came_before_it() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let mut client = Client::new(fixture.address(), Style::Simple).await;
        let cookie = client.submit(Command::Write, NONE, 0, 4096, &[5; 4096]).await;
        client.submit(Command::Disc, NONE, 0, 0, &[]).await;
        assert_eq!(client.wait(cookie).await, Ok(Answer::Done));
        assert!(!client.receive().await);
        assert_eq!(fixture.bytes()[..4096], [5; 4096]);
    });
}

#[test]
fn written_through_every_write_is_durable() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let through = NbdExport { write_through: true, ..export("through", &fixture.disk, false) };
        fixture.server.add(through).unwrap();
        for (name, durable) in [("disk", 0), ("through", 1)] {
            let before = fixture.store.durable_writes.get();
            let mut client = Client::to(fixture.address(), name, Style::Structured).await.unwrap();
            client.write(NONE, 4096, &pattern(4096, 1)).await.unwrap();
            assert_eq!(fixture.store.durable_writes.get() - before, durable, "{name}");
            client.leave().await;
        }
    });
}

#[test]
fn more_clients_than_are_wanted_wait_until_one_has_left() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        fixture.server.limit_clients(1);
        let first = Client::new(fixture.address(), Style::Structured).await;
        let address = fixture.address().clone();
        let served = std::rc::Rc::new(std::cell::Cell::new(false));
        let mark = std::rc::Rc::clone(&served);
        let second = ring::spawn(async move {
            let client = Client::new(&address, Style::Structured).await;
            mark.set(true);
            client.leave().await;
        });
        ring::sleep(Duration::from_millis(50)).await;
        assert!(!served.get() && fixture.server.connections() == 1);
        first.leave().await;
        second.await;
        assert!(served.get());
    });
}

#[test]
fn a_socket_that_was_handed_over_is_listened_on_once() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("handed.sock");
        let handed = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(handed);
        let exports = || vec![export("disk", &fixture.disk, false)];
        assert!(NbdServer::start(Address::Inherited(number), exports()).await.is_err(), "nobody handed it over");
        ring::hand_over(number).unwrap();
        let server = NbdServer::start(Address::Inherited(number), exports()).await.unwrap();
        let client = Client::new(&Address::Unix(path), Style::Structured).await;
        client.leave().await;
        assert!(NbdServer::start(Address::Inherited(number), exports()).await.is_err(), "it is in use");
        server.stop().await;
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(one);
        ring::hand_over(number).unwrap();
        assert!(NbdServer::start(Address::Inherited(number), exports()).await.is_err(), "it does not listen");
    });
}
