//! What must not hurt anybody else.

use crate::driver::{Driver, FLUSH, Guest, IN, MEMORY, NEXT, OUT, Options, Slot, WRITE, eventually, wait_readable};
use crate::server::{Server, Setup};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_bad_chain_with_a_status_byte_is_answered() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    let slot = Slot(0);
    let (h, d, s) = (slot.header(), slot.data(), slot.status());
    let nowhere = MEMORY + (100 << 20);
    for parts in [
        &[(h, 16, 0), (nowhere, 512, WRITE), (s, 1, WRITE)][..],
        &[(nowhere, 16, 0), (d, 512, WRITE), (s, 1, WRITE)],
        &[(h, 16, 0), (d, 0, WRITE), (s, 1, WRITE)],
        &[(d, 512, WRITE), (h, 16, 0), (s, 1, WRITE)],
        &[(h, 8, 0), (s, 1, WRITE)],
        &[(h, 16, 0), (d, 100, WRITE), (s, 1, WRITE)],
        &[(s, 1, WRITE)],
    ] {
        driver.prepare(slot, IN, 0);
        let head = driver.submit_chain(0, parts);
        driver.kick(0);
        assert_eq!(driver.take(0).0, head);
        assert_eq!(driver.status(slot), 1, "{parts:?}");
    }
    assert_eq!(driver.run(0, slot, OUT, 0, 512), 0, "and the queue goes on");
    assert_eq!(server.on(|inside| inside.store.take_log()), ["write 0+512"]);
    server.stop();
}

#[test]
fn a_chain_without_an_end_breaks_its_queue_and_no_other() {
    let breakers: [fn(&mut Driver); 5] = [
        |driver| {
            // A loop.
            let table = driver.queues[0].descriptors();
            driver.describe(table, 50, Slot(9).header(), 16, NEXT, 51);
            driver.describe(table, 51, Slot(9).header(), 16, NEXT, 50);
            driver.publish(0, 50);
        },
        |driver| {
            // No status.
            driver.submit_chain(0, &[(Slot(9).header(), 16, 0)]);
        },
        |driver| driver.publish(0, 64),
        |driver| {
            // The same head twice at a time.
            let head = driver.submit(0, Slot(8), IN, 0, 512);
            driver.publish(0, head);
        },
        |driver| {
            // An available index that says more than there can be.
            let at = driver.queues[0].available() + 2;
            driver.guest.memory.store(1000u16, GuestAddress(at), Ordering::Release).unwrap();
        },
    ];
    for (i, breaks) in breakers.into_iter().enumerate() {
        let server = Server::start(Setup::default());
        let mut driver = Driver::connect(server.path(), Options { queues: 2, ..Options::default() });
        server.on(|inside| inside.store.close_gate());
        driver.submit(0, Slot(0), IN, 0, 512);
        driver.kick(0);
        server.wait_held(1);
        breaks(&mut driver);
        driver.queues[0].kick.write(1).unwrap();
        wait_readable(&driver.queues[0].err, "the front end to be told");
        // What was in flight ends; nothing more is taken.
        server.on(|inside| inside.store.open_gate());
        eventually("the good request", || driver.status(Slot(0)) == 0);
        driver.submit(0, Slot(2), OUT, 5, 512);
        driver.queues[0].kick.write(1).unwrap();
        assert_eq!(driver.run(1, Slot(4), FLUSH, 0, 0), 0, "{i}: the other queue");
        assert!(!server.on(|inside| inside.store.take_log()).contains(&"write 2560+512".into()), "{i}");
        // Stopped and started anew it serves again.
        driver.frontend.get_vring_base(0).unwrap();
        let Driver { queues, guest, .. } = &mut driver;
        queues[0].rewind(guest, 0);
        driver.start(0, 0);
        assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0, "{i}");
        drop(driver);
        server.stop();
    }
}

#[test]
fn requests_the_server_must_refuse() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::negotiate(server.path(), Guest::new(), Options { queues: 200, ..Options::default() });
    let f = &mut driver.frontend;
    assert!(f.set_features(1 << 60).is_err());
    assert!(f.set_vring_num(0, 2048).is_err());
    assert!(f.set_vring_num(0, 48).is_err(), "no power of two");
    assert!(f.set_vring_num(2, 64).is_err(), "no such queue");
    assert!(f.set_vring_enable(100, true).is_err());
    assert!(f.get_features().is_ok(), "and the connection goes on");
    let short = std::fs::File::from(rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    short.set_len(4096).unwrap();
    let mut region = driver.guest.everything();
    region.mmap_handle = std::os::fd::AsRawFd::as_raw_fd(&short);
    assert!(driver.frontend.set_mem_table(&[region]).is_err(), "the file is shorter than the region");
    let regions = [driver.guest.region(0, 2 << 20), driver.guest.region(1 << 20, 3 << 20)];
    assert!(driver.frontend.set_mem_table(&regions).is_err(), "they overlap");
    assert!(driver.frontend.get_features().is_ok());
    server.stop();
}

/// Half of a connection's messages are right but for one field, the other half are not even that.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let body = prop::collection::vec(prop_oneof![3 => 0u64..4, 1 => any::<u64>()], 0..6);
    let message = (0u32..45, prop_oneof![4 => Just(1u32), 2 => Just(9), 1 => any::<u32>()], body, any::<bool>())
        .prop_map(|(request, flags, body, honest)| {
            let mut bytes = Vec::new();
            let len = if honest { 8 * body.len() as u32 } else { 8 };
            for word in [request, flags, len] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
            bytes
        });
    prop::collection::vec(message, 1..8).prop_map(|list| list.concat())
}

#[test]
fn garbage_costs_a_front_end_its_connection_at_most() {
    let server = Server::start(Setup::default());
    let mut runner = TestRunner::new(Config { cases: 96, ..Config::default() });
    runner
        .run(&messages(), |bytes| {
            let mut stream = UnixStream::connect(server.path()).unwrap();
            // The server may have closed it by now.
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let mut answers = Vec::new();
            let _ = stream.read_to_end(&mut answers);
            Ok(())
        })
        .unwrap();
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    server.stop();
}

#[test]
fn a_guest_that_writes_garbage_into_its_rings_hurts_itself_alone() {
    let server = Server::start(Setup::default());
    let mut runner = TestRunner::new(Config { cases: 48, ..Config::default() });
    let descriptor = (
        prop_oneof![4 => MEMORY..MEMORY + (8 << 20), 1 => any::<u64>()],
        prop_oneof![4 => 0u32..5000, 1 => any::<u32>()],
        0u16..8,
        0u16..70,
    );
    let garbage = (
        prop::collection::vec(descriptor, 64),
        prop::collection::vec(0u16..66, 1..64),
        prop::collection::vec((0u32..15, 0u64..2100), 16),
    );
    runner
        .run(&garbage, |(descriptors, heads, headers)| {
            let mut driver = Driver::connect(server.path(), Options { queues: 2, ..Options::default() });
            for (i, (kind, sector)) in headers.into_iter().enumerate() {
                driver.prepare(Slot(i as u64), kind, sector);
            }
            let table = driver.queues[0].descriptors();
            for (i, (at, len, flags, next)) in descriptors.into_iter().enumerate() {
                // Rings stay out of it: what the device writes would change them.
                let at = if at < MEMORY + (1 << 20) { at + (1 << 20) } else { at };
                driver.describe(table, i as u16, at, len, flags, next);
            }
            for head in heads {
                driver.publish(0, head);
            }
            driver.queues[0].kick.write(1).unwrap();
            prop_assert_eq!(driver.run(1, Slot(300), FLUSH, 0, 0), 0);
            driver.frontend.get_vring_base(0).unwrap();
            prop_assert!(driver.unseen(0) <= 64);
            Ok(())
        })
        .unwrap();
    server.stop();
}
