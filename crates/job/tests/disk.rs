//! The stream job on real disks: QED over raw in memory, with sources that are slow, break and fill up.

extern crate headwater_job as job;

use disk::chain::{ChainOptions, Opened, Opener, open_chain};
use disk::{Disk, DiskOptions, Error, ErrorKind, StreamBase};
use futures_util::future::LocalBoxFuture;
use image::create::{CreateOptions, create};
use image::{BackingRef, Format};
use job::{Event, JobErrorKind, Jobs, OnError, Status, StreamOptions};
use layout::{GuestOffset, HostOffset, HostRange};
use ring::Iov;
use ring::sim::Sim;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::LazyLock;
use std::time::Duration;
use store::Operation;
use store::fault::{Action, Failure, FaultStore, Match};
use store::memory::MemoryStore;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

/// Named files in memory, jobs, and what these told.
struct World {
    files: RefCell<HashMap<String, Rc<FaultStore>>>,
    jobs: Rc<Jobs>,
    events: Rc<RefCell<Vec<Event>>>,
}

impl World {
    /// `top.qed` over `mid.qed` over `base.img`: the base full of bytes but for a hole, the middle with 2 MiB of its own.
    async fn new() -> Self {
        let events: Rc<RefCell<Vec<Event>>> = Rc::default();
        let log = Rc::clone(&events);
        let jobs = Jobs::new(Rc::new(move |event| log.borrow_mut().push(event)));
        let world = Self { files: RefCell::default(), jobs, events };
        world.put("base.img", MemoryStore::from_bytes("base.img", &BASE));
        world.overlay("mid.qed", "base.img", Format::Raw).await;
        let mid = world.disk("mid.qed").await;
        mid.write(GuestOffset(4 * MIB), Iov::from_slice(&vec![0x5a; 2 << 20]), false).await.unwrap();
        mid.close().await.unwrap();
        world.overlay("top.qed", "mid.qed", Format::Qed).await;
        world
    }

    fn put(&self, name: &str, bytes: Rc<MemoryStore>) {
        self.files.borrow_mut().insert(name.to_owned(), FaultStore::new(bytes, 1));
    }

    async fn overlay(&self, name: &str, backing: &str, format: Format) {
        let bytes = MemoryStore::new(name, 0);
        let backing = Some(BackingRef { name: backing.to_owned(), format: Some(format) });
        let options = CreateOptions { backing, ..CreateOptions::new(Format::Qed, SIZE) };
        create(bytes.clone(), &options).await.unwrap();
        self.put(name, bytes);
    }

    fn faults(&self, name: &str) -> Rc<FaultStore> {
        Rc::clone(&self.files.borrow()[name])
    }

    async fn disk(&self, name: &str) -> Rc<Disk> {
        let options = ChainOptions { format: Some(Format::Qed), ..ChainOptions::default() };
        let mut chain = open_chain(self, name, options).await.unwrap();
        for layer in &mut chain {
            layer.node = format!("node-{}", layer.name);
        }
        Disk::new(name.trim_end_matches(".qed"), chain, DiskOptions::default())
    }

    fn stream(&self, disk: &Rc<Disk>, change: impl FnOnce(&mut StreamOptions)) -> Result<(), job::JobError> {
        let mut options = StreamOptions {
            id: None,
            disk: Rc::clone(disk),
            base: StreamBase::Nothing,
            backing_name: None,
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            hold: None,
        };
        change(&mut options);
        self.jobs.stream(options)
    }

    async fn gone(&self) {
        for _ in 0..100_000 {
            if self.jobs.list().is_empty() {
                return;
            }
            ring::sleep(Duration::from_millis(1)).await;
        }
        panic!("{:?}; {:?}", self.jobs.list(), self.events.borrow());
    }

    /// How the last job ended: its progress, and its error.
    fn end(&self) -> (u64, u64, Option<String>) {
        let events = self.events.borrow();
        let end = events.iter().rev().find_map(|event| match event {
            Event::Completed { len, offset, error, .. } => Some((*len, *offset, error.clone())),
            Event::Cancelled { len, offset, .. } => Some((*len, *offset, Some("cancelled".into()))),
            _ => None,
        });
        end.unwrap()
    }

    fn backing(disk: &Disk) -> Option<String> {
        disk.chain()[0].image.backing().map(|backing| backing.name)
    }
}

impl Opener for World {
    fn open<'a>(&'a self, name: &'a str, _: Option<&'a str>, _: bool) -> LocalBoxFuture<'a, disk::Result<Opened>> {
        Box::pin(async move {
            let found = self.files.borrow().get(name).map(|faults| Opened::from(Rc::clone(faults)));
            found.ok_or_else(|| Error::new(ErrorKind::Chain, name, None, "no such file in this world"))
        })
    }

    fn identify(&self, name: &str, _: Option<&str>) -> String {
        name.to_owned()
    }
}

/// The base's bytes: every 8-byte word tells where it is, but for a hole of 3 MiB.
static BASE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = Vec::with_capacity(SIZE as usize);
    for word in 0..SIZE / 8 {
        bytes.extend_from_slice(&(word * 0x9e37_79b9 + 1).to_le_bytes());
    }
    bytes[9 << 20..12 << 20].fill(0);
    bytes
});

/// What the guest sees.
fn expected() -> Vec<u8> {
    let mut bytes = BASE.clone();
    bytes[4 << 20..6 << 20].fill(0x5a);
    bytes
}

async fn content(disk: &Disk) -> Vec<u8> {
    let into = Iov::alloc(SIZE as usize);
    disk.read(GuestOffset(0), into.clone()).await.unwrap();
    into.to_vec()
}

fn sims(test: impl AsyncFn(World)) {
    for seed in 0..2 {
        Sim::new(seed).block_on(async { test(World::new().await).await });
    }
}

#[test]
fn a_stream_makes_the_image_stand_alone() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        world.stream(&disk, |_| {}).unwrap();
        world.gone().await;
        let (len, offset, error) = world.end();
        assert_eq!((len, error), (offset, None));
        assert_eq!((World::backing(&disk), disk.chain().len()), (None, 1));
        assert!(content(&disk).await == expected());
        disk.close().await.unwrap();
        world.files.borrow_mut().retain(|name, _| name == "top.qed");
        let alone = world.disk("top.qed").await;
        assert!(content(&alone).await == expected());
        alone.close().await.unwrap();
    });
}

#[test]
fn a_stream_with_a_base_brings_in_what_is_above_it_and_then_the_rest() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        let base = disk.find_base("base.img").unwrap();
        world.stream(&disk, |options| options.base = base).unwrap();
        world.gone().await;
        assert_eq!(world.end(), (2 * MIB, 2 * MIB, None), "only what the middle has");
        assert_eq!((World::backing(&disk).as_deref(), disk.chain().len()), (Some("base.img"), 2));
        // Again: nothing to do. Then the rest.
        let base = disk.find_base("base.img").unwrap();
        world.stream(&disk, |options| options.base = base).unwrap();
        world.gone().await;
        assert_eq!(world.end(), (0, 0, None));
        world.stream(&disk, |_| {}).unwrap();
        world.gone().await;
        assert_eq!((World::backing(&disk), world.end().2), (None, None));
        assert!(content(&disk).await == expected());
        disk.close().await.unwrap();
    });
}

#[test]
fn the_base_can_be_recorded_under_another_name() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        let base = disk.find_base("base.img").unwrap();
        world
            .stream(&disk, |options| (options.base, options.backing_name) = (base, Some("/other/name".into())))
            .unwrap();
        world.gone().await;
        assert_eq!(World::backing(&disk).as_deref(), Some("/other/name"));
        disk.close().await.unwrap();
    });
}

#[test]
fn starts_that_make_no_sense_are_refused() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        let said =
            |refused: Result<(), job::JobError>| refused.map_err(|error| (error.kind, error.message)).unwrap_err();
        let nowhere = world.stream(&disk, |options| options.base = StreamBase::Node("nowhere".into()));
        let expected = "Can't find 'nowhere' in the backing chain".to_owned();
        assert_eq!(said(nowhere), (JobErrorKind::InvalidArgument, expected));
        let top = world.stream(&disk, |options| options.base = StreamBase::Node("node-top.qed".into()));
        assert_eq!(said(top).0, JobErrorKind::InvalidArgument);
        let entire = world.stream(&disk, |options| options.backing_name = Some("x".into()));
        let expected = "backing file specified, but streaming the entire chain".to_owned();
        assert_eq!(said(entire), (JobErrorKind::InvalidArgument, expected));
        assert!(world.events.borrow().is_empty(), "a job that never was says nothing");

        world.stream(&disk, |options| options.speed = 1).unwrap();
        let twice = world.stream(&disk, |options| options.id = Some("other".into()));
        let expected = "Node 'top' is busy: block device is in use by block job: stream".to_owned();
        assert_eq!(said(twice), (JobErrorKind::Busy, expected));
        world.jobs.cancel("top", false).unwrap();
        world.gone().await;
        world.stream(&disk, |_| {}).unwrap();
        world.gone().await;
        assert_eq!(world.end().2, None, "a refused start leaves the disk free");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_job_that_waits_for_its_dismissal_keeps_the_disk() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        world.stream(&disk, |options| options.auto_dismiss = false).unwrap();
        while world.jobs.info("top").unwrap().status != Status::Concluded {
            ring::sleep(Duration::from_millis(1)).await;
        }
        let other = |options: &mut StreamOptions| options.id = Some("other".into());
        assert_eq!(world.stream(&disk, other).unwrap_err().kind, JobErrorKind::Busy);
        world.jobs.dismiss("top").unwrap();
        world.stream(&disk, other).unwrap();
        world.gone().await;
        disk.close().await.unwrap();
    });
}

#[test]
fn a_source_that_breaks_is_met_by_every_policy() {
    for policy in OnError::ALL {
        sims(async |world| {
            let disk = world.disk("top.qed").await;
            let broken = HostRange::new(HostOffset(7 * MIB), MIB);
            let on_read = Match::on(Operation::Read).touching(broken);
            let rule = world.faults("base.img").rule(on_read, Action::Fail(Failure::EIO));
            world.stream(&disk, |options| options.on_error = policy).unwrap();
            match policy {
                OnError::Report | OnError::Enospc => world.gone().await,
                OnError::Ignore => {
                    world.gone().await;
                    let rest = disk.next_missing(GuestOffset(0), &StreamBase::Nothing).await.unwrap().unwrap();
                    assert!(rest.range.start().get() >= 7 * MIB && rest.range.end().get() <= 8 * MIB, "{rest:?}");
                }
                OnError::Stop => {
                    while world.jobs.info("top").unwrap().status != Status::Paused {
                        ring::sleep(Duration::from_millis(1)).await;
                    }
                    rule.end();
                    world.jobs.resume("top").unwrap();
                    world.gone().await;
                    assert_eq!((World::backing(&disk), world.end().2), (None, None));
                }
            }
            if policy != OnError::Stop {
                assert_eq!(world.end().2.as_deref(), Some("Input/output error"));
                assert_eq!(World::backing(&disk).as_deref(), Some("mid.qed"), "the backing reference stays");
                rule.end();
                world.stream(&disk, |_| {}).unwrap();
                world.gone().await;
                assert_eq!((World::backing(&disk), world.end().2), (None, None));
            }
            assert!(content(&disk).await == expected(), "{policy:?}");
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn a_full_disk_stops_the_job_and_room_lets_it_go_on() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        let large = Match::any().when(|request| {
            let grows = matches!(request.operation, Operation::Write | Operation::Allocate | Operation::SetSize);
            grows && request.range.is_some_and(|range| range.end().get() > 5 * MIB)
        });
        let full = world.faults("top.qed").rule(large, Action::Fail(Failure::ENOSPC));
        world.stream(&disk, |options| options.on_error = OnError::Enospc).unwrap();
        while world.jobs.info("top").unwrap().status != Status::Paused {
            ring::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(world.jobs.info("top").unwrap().io_status, job::IoStatus::NoSpace);
        let said =
            world.events.borrow().iter().filter(|event| matches!(event, Event::Error { write: true, .. })).count();
        assert_eq!(said, 1);
        full.end();
        world.jobs.resume("top").unwrap();
        world.gone().await;
        assert_eq!((World::backing(&disk), world.end().2), (None, None));
        assert!(content(&disk).await == expected());
        disk.close().await.unwrap();
    });
}

#[test]
fn what_guests_write_meanwhile_stays_and_is_not_fetched_twice() {
    sims(async |world| {
        world.faults("base.img").rule(Match::on(Operation::Read), Action::Delay(Duration::from_millis(20)));
        let disk = world.disk("top.qed").await;
        let mut expected = expected();
        world.stream(&disk, |options| options.speed = 8 * MIB).unwrap();
        for step in 0..60_u64 {
            let at = step * 7919 * 4096 % (SIZE - 65536);
            let bytes = vec![step as u8 | 0x80; 40_000];
            disk.write(GuestOffset(at), Iov::from_slice(&bytes), false).await.unwrap();
            expected[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            ring::sleep(Duration::from_millis(25)).await;
        }
        world.gone().await;
        let (len, offset, error) = world.end();
        assert_eq!((offset, error), (len, None));
        assert!(content(&disk).await == expected);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_cancelled_stream_leaves_a_chain_that_reads_the_same() {
    sims(async |world| {
        world.faults("base.img").rule(Match::on(Operation::Read), Action::Delay(Duration::from_millis(10)));
        let disk = world.disk("top.qed").await;
        world.stream(&disk, |options| options.speed = 4 * MIB).unwrap();
        ring::sleep(Duration::from_secs(1)).await;
        world.jobs.cancel("top", false).unwrap();
        world.gone().await;
        let (len, offset, end) = world.end();
        assert_eq!(end.as_deref(), Some("cancelled"));
        assert!((3 * MIB..6 * MIB).contains(&offset) && offset < len);
        assert_eq!(World::backing(&disk).as_deref(), Some("mid.qed"));
        disk.close().await.unwrap();
        let disk = world.disk("top.qed").await;
        assert!(content(&disk).await == expected());
        world.stream(&disk, |_| {}).unwrap();
        world.gone().await;
        assert!(world.end().0 <= len - offset, "what had arrived is not asked for again");
        disk.close().await.unwrap();
    });
}

#[test]
fn an_end_that_cannot_be_made_durable_is_no_success() {
    sims(async |world| {
        let disk = world.disk("top.qed").await;
        world.stream(&disk, |options| options.auto_finalize = false).unwrap();
        while world.jobs.info("top").unwrap().status != Status::Pending {
            ring::sleep(Duration::from_millis(1)).await;
        }
        world.faults("top.qed").rule(Match::on(Operation::Flush), Action::Fail(Failure::EIO));
        world.jobs.finalize("top").unwrap();
        world.gone().await;
        assert!(world.end().2.is_some());
        assert_eq!(World::backing(&disk).as_deref(), Some("mid.qed"));
        let _ = disk.close().await;
    });
}

#[test]
fn shutting_down_in_the_middle_leaves_nothing_in_flight() {
    sims(async |world| {
        world.faults("base.img").rule(Match::on(Operation::Read), Action::Delay(Duration::from_millis(50)));
        let disk = world.disk("top.qed").await;
        world.stream(&disk, |_| {}).unwrap();
        ring::sleep(Duration::from_millis(60)).await;
        world.jobs.shut_down().await;
        assert!(world.jobs.list().is_empty());
        disk.close().await.unwrap();
        let disk = world.disk("top.qed").await;
        assert!(content(&disk).await == expected());
        disk.close().await.unwrap();
    });
}
