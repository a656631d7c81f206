//! What a well-behaved driver does.

use crate::driver::{
    DISCARD, Driver, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_RO, FLUSH, GET_ID, IN, OUT, Options, Slot, UNANSWERED, WRITE,
    WRITE_ZEROES, wait_readable, written,
};
use crate::server::{Server, Setup};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

fn range(driver: &Driver, slot: Slot, sector: u64, sectors: u32, flags: u32) {
    let memory = &driver.guest.memory;
    memory.write_obj(sector, GuestAddress(slot.data())).unwrap();
    memory.write_obj(sectors, GuestAddress(slot.data() + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(slot.data() + 12)).unwrap();
}

#[test]
fn every_request_on_every_kind_of_ring() {
    for without in [0, F_EVENT_IDX, F_INDIRECT, F_EVENT_IDX | F_INDIRECT] {
        let server = Server::start(Setup::default());
        let mut driver = Driver::connect(server.path(), Options { queues: 2, without, ..Options::default() });
        for queue in 0..2 {
            for i in 0..6 {
                let (slot, sector) = (Slot(i), 8 * i + 64 * queue as u64);
                driver.guest.fill(slot.data(), 4096, 0x40 + i as u8);
                assert_eq!(driver.run(queue, slot, OUT, sector, 4096), 0);
                driver.guest.fill(slot.data(), 4096, 0);
                // What one queue has written the other reads.
                assert_eq!(driver.run(1 - queue, slot, IN, sector, 4096), 0);
                assert_eq!(driver.guest.bytes(slot.data(), 4096), vec![0x40 + i as u8; 4096]);
            }
            assert_eq!(driver.run(queue, Slot(0), FLUSH, 0, 0), 0);
            range(&driver, Slot(1), 64 * queue as u64, 8, 1);
            assert_eq!(driver.run(queue, Slot(1), WRITE_ZEROES, 0, 16), 0);
            range(&driver, Slot(2), 64 * queue as u64 + 8, 8, 0);
            assert_eq!(driver.run(queue, Slot(2), DISCARD, 0, 16), 0);
            assert_eq!(driver.run(queue, Slot(3), IN, 64 * queue as u64, 4096), 0);
            assert_eq!(driver.guest.bytes(Slot(3).data(), 4096), [0; 4096]);
            assert_eq!(driver.run(queue, Slot(4), GET_ID, 0, 20), 0);
            assert_eq!(&driver.guest.bytes(Slot(4).data(), 20), b"serial-of-the-disk\0\0");
            assert_eq!(driver.run(queue, Slot(5), 99, 0, 0), 2, "unsupported");
            assert_eq!(driver.run(queue, Slot(5), IN, 2048, 512), 1, "past the end");
        }
        drop(driver);
        server.stop();
    }
}

#[test]
fn the_used_length_counts_what_was_written() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    for (kind, len, written) in [(IN, 4096, 4097), (OUT, 512, 1), (FLUSH, 0, 1), (GET_ID, 20, 21), (77, 0, 1)] {
        driver.submit(0, Slot(0), kind, 0, len);
        driver.kick(0);
        assert_eq!(driver.take(0).1, written, "request {kind}");
    }
    server.stop();
}

#[test]
fn the_configuration_space_is_what_the_disk_is() {
    let server = Server::start(Setup { size: 3 << 20, queues: 5, ..Setup::default() });
    let mut driver = Driver::connect(server.path(), Options::default());
    let mut config = |offset, len: u32| {
        let blank = vec![0; len as usize];
        driver.frontend.get_config(offset, len, VhostUserConfigFlags::empty(), &blank).map(|(_, bytes)| bytes)
    };
    let space = config(0, 60).unwrap();
    assert_eq!(space[..8], (6u64 << 10).to_le_bytes());
    assert_eq!(space[34..36], 5u16.to_le_bytes());
    assert_eq!(config(20, 4).unwrap(), 512u32.to_le_bytes());
    assert_eq!(driver.frontend.get_queue_num().unwrap(), 5);
    assert!(driver.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).is_err());
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0, "and goes on");
    server.stop();
}

#[test]
fn what_is_not_in_the_configuration_space_is_answered_with_nothing() {
    let server = Server::start(Setup::default());
    let mut stream = UnixStream::connect(server.path()).unwrap();
    let mut send = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        stream.write_all(&bytes).unwrap();
    };
    // Protocol features: CONFIG. Then twelve bytes at 250; a configuration space has 256.
    send(&[16, 1, 8, 1 << 9, 0]);
    send(&[24, 1, 24, 250, 12, 0, 0, 0, 0]);
    let mut answer = [0; 24];
    stream.read_exact(&mut answer).unwrap();
    let words: Vec<_> = answer.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [24, 5, 12, 250, 0, 0]);
    server.stop();
}

#[test]
fn without_flushes_every_write_is_durable() {
    for (without, want) in [(F_FLUSH, "write 0+512 fua"), (0, "write 0+512")] {
        let server = Server::start(Setup::default());
        let mut driver = Driver::connect(server.path(), Options { without, ..Options::default() });
        assert_eq!(driver.run(0, Slot(0), OUT, 0, 512), 0);
        assert_eq!(server.on(|inside| inside.store.take_log()), [want]);
        server.stop();
    }
}

#[test]
fn written_through_every_write_is_durable_also_for_guests_that_flush() {
    let server = Server::start(Setup { write_through: true, ..Setup::default() });
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), OUT, 0, 512), 0);
    assert_eq!(server.on(|inside| inside.store.take_log()), ["write 0+512 fua"]);
    server.stop();
}

#[test]
fn a_read_only_device_says_so_and_means_it() {
    let server = Server::start(Setup { read_only: true, ..Setup::default() });
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_ne!(driver.features & F_RO, 0);
    assert_eq!(driver.run(0, Slot(0), OUT, 0, 512), 1);
    range(&driver, Slot(0), 0, 8, 0);
    assert_eq!(driver.run(0, Slot(0), WRITE_ZEROES, 0, 16), 2, "not offered");
    assert_eq!(driver.run(0, Slot(0), IN, 0, 512), 0);
    assert_eq!(server.on(|inside| inside.store.take_log()), ["read 0+512"]);
    server.stop();
}

#[test]
fn a_small_queue_wraps_many_times() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options { size: 16, ..Options::default() });
    for round in 0..200u64 {
        // Five plain chains of three, as many as there is room for.
        let slots: Vec<_> = (0..5).map(|i| Slot(2 * i)).collect();
        for &slot in &slots {
            driver.guest.fill(slot.data(), 512, (round + slot.0) as u8);
            driver.submit(0, slot, OUT, slot.0 + round, 512);
        }
        driver.kick(0);
        for _ in &slots {
            driver.take(0);
        }
        assert!(slots.iter().all(|&slot| driver.status(slot) == 0));
        assert_eq!(driver.run(0, Slot(1), IN, round, 512), 0);
        assert_eq!(driver.guest.bytes(Slot(1).data(), 1), [round as u8]);
    }
    server.stop();
}

#[test]
fn the_rings_indices_wrap() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::negotiate(server.path(), crate::driver::Guest::new(), Options::default());
    driver.frontend.set_mem_table(&[driver.guest.everything()]).unwrap();
    let Driver { queues, guest, .. } = &mut driver;
    queues[0].rewind(guest, 0xfffd);
    driver.start(0, 0xfffd);
    driver.frontend.set_vring_enable(0, true).unwrap();
    for _ in 0..8 {
        assert_eq!(driver.run(0, Slot(0), IN, 0, 512), 0);
    }
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 5);
    server.stop();
}

#[test]
fn what_ends_together_is_announced_once() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    written(&driver.queues[0].call);
    server.on(|inside| inside.store.close_gate());
    driver.arm(0);
    for i in 0..16 {
        driver.submit(0, Slot(i), IN, i, 512);
    }
    driver.kick(0);
    server.wait_held(16);
    server.on(|inside| inside.store.open_gate());
    crate::driver::eventually("16 completions", || driver.unseen(0) == 16);
    wait_readable(&driver.queues[0].call, "the call");
    // With event indices: one call for the first of them; the driver has asked for no other.
    assert_eq!(written(&driver.queues[0].call), 1);
    server.stop();
}

#[test]
fn a_driver_is_called_at_the_completion_it_asked_for() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    written(&driver.queues[0].call);
    driver.arm_for(0, 3);
    for i in 0..6 {
        driver.submit(0, Slot(0), FLUSH, 0, 0);
        driver.kick(0);
        crate::driver::eventually("the completion", || driver.unseen(0) == i + 1);
        // A round trip over the protocol: what the server had to do it has done.
        driver.frontend.set_vring_enable(0, true).unwrap();
        assert_eq!(written(&driver.queues[0].call), u64::from(i == 3), "completion {i}");
    }
    server.stop();
}

#[test]
fn a_server_that_has_been_kicked_comes_to_rest() {
    // Processor time of the shard's thread, in ticks (usually of 10 ms).
    fn ticks() -> u64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
    }
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    assert_eq!(driver.run(0, Slot(0), FLUSH, 0, 0), 0);
    let before = server.on(|_| ticks());
    std::thread::sleep(std::time::Duration::from_millis(500));
    // A thread that spins has used 50 by now (on a busy machine fewer, never more): one that rests has used none.
    let used = server.on(|_| ticks()) - before;
    assert!(used <= 5, "{used} ticks for nothing");
    server.stop();
}

#[test]
fn a_driver_that_wants_no_calls_gets_none() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options { without: F_EVENT_IDX, ..Options::default() });
    written(&driver.queues[0].call);
    driver.guest.memory.write_obj(1u16, GuestAddress(driver.queues[0].available())).unwrap();
    driver.submit(0, Slot(0), IN, 0, 512);
    driver.kick(0);
    crate::driver::eventually("the completion", || driver.unseen(0) == 1);
    // The stop drains: nothing can come after it.
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 1);
    assert_eq!(written(&driver.queues[0].call), 0);
    server.stop();
}

#[test]
fn any_framing_of_a_request_is_understood() {
    let server = Server::start(Setup::default());
    let mut driver = Driver::connect(server.path(), Options::default());
    let slot = Slot(1);
    driver.guest.fill(slot.data(), 1024, 0x33);
    driver.prepare(slot, OUT, 4);
    // A header in three parts, data in odd ones.
    let (h, d, s) = (slot.header(), slot.data(), slot.status());
    driver.submit_chain(0, &[(h, 1, 0), (h + 1, 10, 0), (h + 11, 5, 0), (d, 100, 0), (d + 100, 924, 0), (s, 1, WRITE)]);
    driver.kick(0);
    driver.take(0);
    assert_eq!(driver.status(slot), 0);
    // Data and status in one descriptor, in an indirect table behind a plain header.
    let other = Slot(3);
    driver.prepare(other, IN, 4);
    driver.guest.fill(other.data(), 1025, UNANSWERED);
    driver.describe(other.table(), 0, other.data(), 1025, WRITE, 0);
    let table = driver.queues[0].descriptors();
    driver.describe(table, 40, other.header(), 16, crate::driver::NEXT, 41);
    driver.describe(table, 41, other.table(), 16, crate::driver::INDIRECT, 0);
    driver.publish(0, 40);
    driver.kick(0);
    assert_eq!(driver.take(0), (40, 1025));
    let bytes = driver.guest.bytes(other.data(), 1025);
    assert_eq!((&bytes[..1024], bytes[1024]), (&[0x33; 1024][..], 0));
    server.stop();
}

#[test]
fn a_request_longer_than_a_piece_is_whole() {
    let server = Server::start(Setup { size: 8 << 20, ..Setup::default() });
    let mut driver = Driver::connect(server.path(), Options::default());
    let slot = Slot(0);
    // 6 MiB from the middle of memory, written and read back into itself.
    let (at, len) = (crate::driver::MEMORY + (2 << 20), 6 << 20);
    let pattern: Vec<u8> = (0..len).map(|i| (i / 4096 % 251) as u8).collect();
    driver.guest.memory.write_slice(&pattern, GuestAddress(at)).unwrap();
    for (kind, flags) in [(OUT, 0), (IN, WRITE)] {
        driver.prepare(slot, kind, 0);
        driver.submit_chain(0, &[(slot.header(), 16, 0), (at, len as u32, flags), (slot.status(), 1, WRITE)]);
        driver.kick(0);
        driver.take(0);
        assert_eq!(driver.status(slot), 0);
        if kind == OUT {
            driver.guest.fill(at, len, 0);
        }
    }
    assert!(driver.guest.bytes(at, len) == pattern);
    server.stop();
}
