//! Front ends that come, go, and come back.

use crate::driver::{Driver, FLUSH, Guest, IN, OUT, Options, Slot};
use crate::server::{Server, Setup};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};

#[test]
fn a_front_end_may_come_back() {
    let server = Server::start(Setup::default());
    for round in 0..3u8 {
        let mut driver = Driver::connect(server.path(), Options { queues: 2, ..Options::default() });
        if round > 0 {
            assert_eq!(driver.run(1, Slot(0), IN, 0, 512), 0);
            assert_eq!(driver.guest.bytes(Slot(0).data(), 512), [round - 1; 512]);
        }
        driver.guest.fill(Slot(0).data(), 512, round);
        assert_eq!(driver.run(0, Slot(0), OUT, 0, 512), 0);
    }
    server.stop();
}

#[test]
fn the_next_front_end_waits_until_the_last_one_is_drained() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    server.on(|inside| inside.store.close_gate());
    driver.submit(0, Slot(0), OUT, 0, 512);
    driver.kick(0);
    server.wait_held(1);
    let guest = driver.guest;
    drop(driver.frontend);
    let path = server.path().to_owned();
    let next = std::thread::spawn(move || drop(Driver::negotiate(&path, Guest::new(), Options::default())));
    for _ in 0..50 {
        assert_eq!(server.on(|inside| inside.store.waiting()), 1);
    }
    assert!(!next.is_finished());
    server.on(|inside| inside.store.open_gate());
    next.join().unwrap();
    assert_eq!(guest.bytes(Slot(0).status(), 1), [0], "and it was completed, in memory that both still had");
    server.stop();
}

#[test]
fn what_a_lost_connection_left_behind_is_not_done_twice() {
    // The monitor goes on from the used index it saw when the connection broke; requests that ended later are in the ring.
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    server.on(|inside| inside.store.close_gate());
    for i in 0..3 {
        driver.submit(0, Slot(2 * i), OUT, i, 512);
    }
    driver.kick(0);
    server.wait_held(3);
    let Driver { guest, queues, frontend, .. } = driver;
    drop(frontend);
    server.on(|inside| inside.store.open_gate());
    let mut driver = Driver::negotiate(server.path(), guest, Options::default());
    driver.queues = queues;
    server.on(|inside| inside.store.take_log());
    driver.frontend.set_mem_table(&[driver.guest.everything()]).unwrap();
    driver.start(0, 0);
    driver.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(driver.run_after(3, Slot(6), FLUSH), 0);
    assert_eq!(server.on(|inside| inside.store.take_log()), ["flush"]);
    server.stop();
}

#[test]
fn a_killed_servers_requests_are_taken_up_by_the_next() {
    let first = Server::start(Setup::default());
    let mut driver = Driver::connect(first.path(), Options { queues: 1, ..Options::default() });
    // As QEMU does it: stopped, given a region, started.
    driver.frontend.get_vring_base(0).unwrap();
    let (inflight, file) = driver.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, 64)).unwrap();
    driver.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
    driver.start(0, 0);
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    first.on(|inside| inside.store.close_gate());
    // Heads in no order: what counts is when they were made available.
    let mut heads = [40, 9, 30, 21, 50];
    for (i, &head) in (1..).zip(&heads) {
        driver.queues[0].next = head;
        assert_eq!(driver.submit(0, Slot(2 * i), OUT, 10 + i, 512), head);
    }
    heads.sort_unstable();
    // One of them ends, out of order: flushes pass the gate.
    let flush = driver.submit(0, Slot(20), FLUSH, 0, 0);
    driver.kick(0);
    first.wait_held(5);
    assert_eq!(driver.take(0).0, flush);
    // The first server does nothing more for anybody: to its guest it is as good as killed. What it would still do to the
    // rings when its gate opened is prevented by never opening it before the guest is done.
    let second = Server::start(Setup::default());
    let Driver { guest, queues, frontend, .. } = driver;
    drop(frontend);
    let mut driver = Driver::negotiate(second.path(), guest, Options::default());
    driver.queues = queues;
    driver.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
    driver.frontend.set_mem_table(&[driver.guest.everything()]).unwrap();
    // QEMU restores the available index from the used ring: two requests had ended.
    driver.start(0, 2);
    driver.frontend.set_vring_enable(0, true).unwrap();
    let mut ended: Vec<_> = (0..5).map(|_| driver.take(0).0).collect();
    let log = second.on(|inside| inside.store.take_log());
    assert_eq!(log, (1..6).map(|i| format!("write {}+512", (10 + i) * 512)).collect::<Vec<_>>(), "in the old order");
    ended.sort_unstable();
    assert_eq!(ended, heads);
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0, "and it goes on with what is new");
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 8);
    drop(driver);
    second.stop();
    first.stop();
}

#[test]
fn a_resize_is_announced() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    let (ours, theirs) = UnixStream::pair().unwrap();
    driver.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    let resize = |inside: std::rc::Rc<crate::server::Inside>| async move {
        inside.disk.resize(2 << 20).await.unwrap();
        inside.server.resized();
    };
    server.spawn(resize).wait().unwrap();
    let mut message = [0; 12];
    (&ours).read_exact(&mut message).unwrap();
    assert_eq!(message[..4], 2u32.to_ne_bytes(), "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
    assert_eq!(message[4..8], 1u32.to_ne_bytes());
    assert_eq!(message[8..], 0u32.to_ne_bytes());
    let (_, config) = driver.frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    assert_eq!(config, (4u64 << 10).to_le_bytes());
    assert_eq!(driver.run(0, Slot(0), IN, 4095, 512), 0);
    // Nobody reads any more: announcing must neither block nor fail.
    drop(ours);
    for _ in 0..3 {
        server.on(|inside| inside.server.resized());
    }
    server.stop();
}

#[test]
fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
    let server = Server::start(Setup::default());
    let path = server.path().to_owned();
    let second = |inside: std::rc::Rc<crate::server::Inside>| async move {
        let export = headwater_export::vhost_user::VhostUserExport {
            socket: path,
            disk: std::rc::Rc::clone(&inside.disk),
            read_only: false,
            write_through: false,
            queues: 1,
            serial: String::new(),
        };
        match headwater_export::vhost_user::VhostUserServer::start(export).await {
            Ok(_) => "started".to_owned(),
            Err(error) => error.to_string(),
        }
    };
    let error = server.spawn(second).wait().unwrap();
    assert!(error.starts_with("could not listen on /") && error.contains("in use"), "{error}");
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    server.stop();
}

#[test]
fn an_unfinished_message_holds_up_nobody() {
    use std::io::Write;
    let server = Server::start(Setup::default());
    let mut half = UnixStream::connect(server.path()).unwrap();
    half.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    // The shard goes on; the server can be stopped.
    assert_eq!(server.on(|inside| inside.disk.size()), 1 << 20);
    server.stop();
    // Closed: orderly, or reset for what was never read.
    let mut rest = Vec::new();
    let end = half.read_to_end(&mut rest).map_err(|error| error.kind());
    assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
}
