//! Queues that start, stop and change while requests are in flight.

use crate::driver::{Driver, FLUSH, Guest, IN, OUT, Options, Slot, UNANSWERED, eventually, written};
use crate::server::{Server, Setup};
use std::sync::mpsc;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::EventFd;

#[test]
fn what_is_available_before_the_queue_starts_is_served_without_a_kick() {
    for enable_last in [true, false] {
        let server = Server::start(Setup::default());
        let mut driver = Driver::negotiate(server.path(), Guest::new(), Options::default());
        driver.frontend.set_mem_table(&[driver.guest.everything()]).unwrap();
        let head = driver.submit(0, Slot(0), IN, 0, 512);
        if enable_last {
            driver.start(0, 0);
            assert_eq!(driver.unseen(0), 0, "not enabled");
            driver.frontend.set_vring_enable(0, true).unwrap();
        } else {
            driver.frontend.set_vring_enable(0, true).unwrap();
            driver.start(0, 0);
        }
        eventually("the completion", || driver.unseen(0) == 1);
        assert_eq!(driver.take(0).0, head);
        server.stop();
    }
}

#[test]
fn a_disabled_queue_holds_still_and_goes_on_where_it_was() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), OUT, 0, 512), 0);
    driver.frontend.set_vring_enable(0, false).unwrap();
    driver.submit(0, Slot(1), IN, 0, 512);
    driver.queues[0].kick.write(1).unwrap();
    // A round trip to the shard after the kick: it has had its chance.
    driver.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!(server.on(|inside| inside.store.take_log()).len(), 1);
    driver.frontend.set_vring_enable(0, true).unwrap();
    driver.take(0);
    assert_eq!(driver.status(Slot(1)), 0);
    server.stop();
}

#[test]
fn a_new_kick_does_not_disable_and_a_new_call_is_rung() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    driver.queues[0].kick = EventFd::new(0).unwrap();
    driver.frontend.set_vring_kick(0, &driver.queues[0].kick).unwrap();
    driver.queues[0].call = EventFd::new(0).unwrap();
    driver.frontend.set_vring_call(0, &driver.queues[0].call).unwrap();
    assert_eq!(written(&driver.queues[0].call), 1, "what the old call was rung for may have been missed");
    for _ in 0..3 {
        assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    }
    server.stop();
}

#[test]
fn stopping_a_queue_waits_for_what_is_in_flight() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options { queues: 2, ..Options::default() });
    server.on(|inside| inside.store.close_gate());
    driver.submit(0, Slot(0), IN, 0, 512);
    driver.submit(0, Slot(1), OUT, 8, 512);
    driver.kick(0);
    server.wait_held(2);
    let (sender, stopped) = mpsc::channel();
    let frontend = driver.frontend.clone();
    let stopping = std::thread::spawn(move || {
        sender.send(()).unwrap();
        frontend.get_vring_base(0).unwrap()
    });
    stopped.recv().unwrap();
    // The other queue is served all the while.
    assert_eq!(driver.run(1, Slot(2), FLUSH, 0, 0), 0);
    for _ in 0..50 {
        assert_eq!(server.on(|inside| inside.store.waiting()), 2);
    }
    assert!(!stopping.is_finished());
    assert_eq!(driver.unseen(0), 0);
    server.on(|inside| inside.store.open_gate());
    assert_eq!(stopping.join().unwrap(), 2);
    assert_eq!((driver.unseen(0), driver.status(Slot(0)), driver.status(Slot(1))), (2, 0, 0));
    // Stopped: what comes now waits for the next start, also if somebody kicks.
    driver.submit(0, Slot(3), IN, 0, 512);
    driver.queues[0].kick.write(1).unwrap();
    assert_eq!(driver.run(1, Slot(2), FLUSH, 0, 0), 0);
    assert_eq!(driver.status(Slot(3)), UNANSWERED);
    driver.start(0, 2);
    eventually("the one that waited", || driver.unseen(0) == 3);
    assert_eq!(driver.status(Slot(3)), 0);
    server.stop();
}

#[test]
fn memory_may_change_under_requests_in_flight() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    driver.guest.fill(Slot(0).data(), 512, 0x77);
    assert_eq!(driver.run(0, Slot(0), OUT, 0, 512), 0);
    server.on(|inside| inside.store.close_gate());
    // The data of one request is in a region that will be taken away.
    let far = crate::driver::MEMORY + (4 << 20);
    driver.prepare(Slot(2), IN, 0);
    driver.submit_chain(0, &[(Slot(2).header(), 16, 0), (far, 512, 2), (Slot(2).status(), 1, 2)]);
    driver.kick(0);
    server.wait_held(1);
    driver.frontend.set_mem_table(&[driver.guest.region(0, 4 << 20)]).unwrap();
    // Taken while the memory is gone: its data is none any more.
    driver.prepare(Slot(4), IN, 0);
    let bad = driver.submit_chain(0, &[(Slot(4).header(), 16, 0), (far, 512, 2), (Slot(4).status(), 1, 2)]);
    driver.kick(0);
    assert_eq!(driver.take(0), (bad, 1));
    assert_eq!(driver.status(Slot(4)), 1);
    server.on(|inside| inside.store.open_gate());
    driver.take(0);
    assert_eq!(driver.status(Slot(2)), 0);
    assert_eq!(driver.guest.bytes(far, 512), [0x77; 512], "written through the mapping it was begun with");
    // And back again, region by region.
    driver.frontend.add_mem_region(&driver.guest.region(4 << 20, 8 << 20)).unwrap();
    driver.guest.fill(far, 512, 0);
    driver.submit_chain(0, &[(Slot(2).header(), 16, 0), (far, 512, 2), (Slot(2).status(), 1, 2)]);
    driver.kick(0);
    driver.take(0);
    assert_eq!(driver.guest.bytes(far, 512), [0x77; 512]);
    assert!(driver.frontend.add_mem_region(&driver.guest.region(5 << 20, 6 << 20)).is_err(), "it overlaps");
    driver.frontend.remove_mem_region(&driver.guest.region(4 << 20, 8 << 20)).unwrap();
    assert!(driver.frontend.remove_mem_region(&driver.guest.region(4 << 20, 8 << 20)).is_err(), "it is gone");
    assert_eq!(driver.frontend.get_max_mem_slots().unwrap(), 509);
    server.stop();
}

#[test]
fn a_ring_whose_memory_goes_away_waits_for_it() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    server.on(|inside| inside.store.close_gate());
    driver.submit(0, Slot(0), IN, 0, 512);
    driver.kick(0);
    server.wait_held(1);
    // The ring lies in the first mebibyte.
    driver.frontend.set_mem_table(&[driver.guest.region(1 << 20, 8 << 20)]).unwrap();
    server.on(|inside| inside.store.open_gate());
    eventually("the status", || driver.status(Slot(0)) == 0);
    driver.submit(0, Slot(2), IN, 0, 512);
    driver.queues[0].kick.write(1).unwrap();
    driver.frontend.set_mem_table(&[driver.guest.everything()]).unwrap();
    eventually("both", || driver.unseen(0) == 2);
    server.stop();
}

#[test]
fn a_reset_device_starts_from_nothing() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    driver.frontend.reset_device().unwrap();
    let Driver { queues, guest, .. } = &mut driver;
    queues[0].rewind(guest, 0);
    driver.start(0, 0);
    driver.submit(0, Slot(0), FLUSH, 0, 0);
    driver.queues[0].kick.write(1).unwrap();
    driver.frontend.set_vring_call(0, &driver.queues[0].call).unwrap();
    assert_eq!(driver.status(Slot(0)), UNANSWERED, "not enabled");
    driver.frontend.set_vring_enable(0, true).unwrap();
    driver.take(0);
    assert_eq!(driver.status(Slot(0)), 0);
    server.stop();
}

#[test]
fn stopping_the_server_drains_first() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    server.on(|inside| inside.store.close_gate());
    driver.submit(0, Slot(0), OUT, 0, 512);
    driver.kick(0);
    server.wait_held(1);
    let mut stop = Some(server.spawn(|inside| async move { inside.server.stop().await }));
    for _ in 0..50 {
        assert_eq!(server.on(|inside| inside.store.waiting()), 1);
    }
    assert_eq!(driver.status(Slot(0)), UNANSWERED);
    assert!(server.path().exists());
    assert!(driver.frontend.get_features().is_ok(), "still connected");
    server.on(|inside| inside.store.open_gate());
    stop.take().unwrap().wait().unwrap();
    assert_eq!((driver.unseen(0), driver.status(Slot(0))), (1, 0));
    assert!(driver.frontend.get_features().is_err(), "the connection is closed");
    server.stop();
}
