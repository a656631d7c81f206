//! The commit job over small disks in memory, whose chain is changed by nobody.

use super::{World, millis};
use crate::{CommitOptions, Ending, JobError, OnError, Status};
use disk::{Dirty, Disk, DiskOptions, Layer, Result};
use futures_util::future::LocalBoxFuture;
use image::create::{CreateOptions, create};
use image::{BackingRef, Format, OpenOptions};
use layout::GuestOffset;
use ring::Iov;
use ring::sim::Sim;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::fault::{Action, FaultStore, Match};
use store::memory::MemoryStore;
use store::{Operation, Store};

const SIZE: u64 = 4 << 20;

/// A QED image over a raw file that can be written to, and what the job did to the chain.
struct Chain {
    disk: Rc<Disk>,
    base: Rc<FaultStore>,
    changed: Rc<Dirty>,
    done: RefCell<Vec<&'static str>>,
    publish_fails: Cell<bool>,
}

impl Ending for Chain {
    fn quiesce(&self) -> LocalBoxFuture<'_, Result<()>> {
        self.done.borrow_mut().push("quiesce");
        Box::pin(async { Ok(()) })
    }

    fn publish(&self) -> LocalBoxFuture<'_, Result<()>> {
        self.done.borrow_mut().push("publish");
        let failed = || disk::Error::new(disk::ErrorKind::Corrupt, "top", None, "not today");
        Box::pin(async move { if self.publish_fails.get() { Err(failed()) } else { Ok(()) } })
    }

    fn end(&self) -> LocalBoxFuture<'_, ()> {
        self.done.borrow_mut().push("end");
        Box::pin(async {})
    }
}

async fn chain() -> Rc<Chain> {
    let base = FaultStore::new(MemoryStore::from_bytes("base", &vec![7; SIZE as usize]), 1);
    let top: Rc<dyn Store> = MemoryStore::from_bytes("top", &[]);
    let backing = Some(BackingRef { name: "base".into(), format: Some(Format::Raw) });
    create(Rc::clone(&top), &CreateOptions { backing, ..CreateOptions::new(Format::Qed, SIZE) }).await.unwrap();
    let open = OpenOptions::default();
    let top = image::open(top, Format::Qed, open).await.unwrap();
    let below = image::open(Rc::clone(&base) as _, Format::Raw, open).await.unwrap();
    let disk =
        Disk::new("disk", vec![Layer::new("t", "top", top), Layer::new("b", "base", below)], DiskOptions::default());
    let changed = Rc::new(Dirty::default());
    disk.watch(&changed);
    disk.set_changes_below(true);
    write(&disk, 65536, 1).await;
    write(&disk, 1 << 20, 2).await;
    changed.clear(GuestOffset(0).range(SIZE), GuestOffset(SIZE));
    Rc::new(Chain { disk, base, changed, done: RefCell::default(), publish_fails: Cell::new(false) })
}

async fn write(disk: &Disk, at: u64, byte: u8) {
    disk.write(GuestOffset(at), Iov::from_slice(&[byte; 5000]), false).await.unwrap();
}

impl Chain {
    async fn base_holds(&self, at: u64, byte: u8) -> bool {
        let into = Iov::alloc(5000);
        self.base.read(layout::HostOffset(at), into.clone()).await.unwrap();
        into.to_vec() == [byte; 5000]
    }

    fn done(&self) -> Vec<&'static str> {
        self.done.borrow().clone()
    }
}

fn start(world: &World, chain: &Rc<Chain>, active: bool, policy: OnError) -> std::result::Result<(), JobError> {
    world.jobs.commit(CommitOptions {
        id: "j".into(),
        device: "disk".into(),
        source: chain.disk.from_layer("t").unwrap(),
        base: chain.disk.from_layer("b").unwrap(),
        base_node: "b".into(),
        changed: active.then(|| Rc::clone(&chain.changed)),
        speed: 0,
        on_error: policy,
        auto_finalize: true,
        auto_dismiss: true,
        hold: None,
        ending: Rc::clone(chain) as _,
    })
}

fn sims(test: impl AsyncFn(World, Rc<Chain>)) {
    for seed in 0..6 {
        Sim::new(seed).block_on(async { test(World::new(), chain().await).await });
    }
}

#[test]
fn layers_that_nobody_writes_to_are_carried_and_let_go_of() {
    sims(async |world, chain| {
        start(&world, &chain, false, OnError::Report).unwrap();
        world.until(None).await;
        let told = ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];
        assert_eq!(world.told(), told);
        assert_eq!(chain.done(), ["publish", "end"]);
        assert!(chain.base_holds(65536, 1).await && chain.base_holds(1 << 20, 2).await && chain.base_holds(0, 7).await);
        assert_eq!(world.last_progress(), (2 << 16, 2 << 16));
    });
}

#[test]
fn a_layer_in_use_is_followed_until_it_is_said_how_to_end() {
    sims(async |world, chain| {
        start(&world, &chain, true, OnError::Report).unwrap();
        world.until(Some(Status::Ready)).await;
        write(&chain.disk, 2 << 20, 3).await;
        ring::sleep(millis(500)).await;
        assert!(chain.base_holds(2 << 20, 3).await, "what a guest writes follows by itself");
        world.jobs.pause("j").unwrap();
        world.until(Some(Status::Standby)).await;
        write(&chain.disk, 3 << 20, 4).await;
        ring::sleep(millis(500)).await;
        assert!(chain.base_holds(3 << 20, 7).await, "but not while it rests");
        world.jobs.resume("j").unwrap();
        // Before the job has come to look.
        write(&chain.disk, 65536, 5).await;
        world.jobs.complete("j").unwrap();
        world.until(None).await;
        assert_eq!(chain.done(), ["quiesce", "publish", "end"]);
        assert!(chain.changed.is_empty());
        for (at, byte) in [(65536, 5), (1 << 20, 2), (2 << 20, 3), (3 << 20, 4)] {
            assert!(chain.base_holds(at, byte).await, "at {at}");
        }
        let told = world.told();
        assert_eq!(told[..4], ["created", "running", "ready", "READY"]);
        assert_eq!(told[told.len() - 5..], ["waiting", "pending", "COMPLETED", "concluded", "null"]);
    });
}

#[test]
fn left_as_it_is_it_ends_well_and_cancelled_it_does_not() {
    for force in [false, true] {
        sims(async |world, chain| {
            start(&world, &chain, true, OnError::Report).unwrap();
            world.until(Some(Status::Ready)).await;
            write(&chain.disk, 2 << 20, 3).await;
            world.jobs.cancel("j", force).unwrap();
            world.until(None).await;
            let last = if force { "CANCELLED" } else { "COMPLETED" };
            assert!(world.told().contains(&last.to_owned()), "{:?}", world.told());
            assert_eq!(chain.done(), if force { &["end"][..] } else { &["quiesce", "end"] });
            assert!(force || chain.base_holds(2 << 20, 3).await, "all of it is below all the same");
        });
    }
}

#[test]
fn errors_follow_the_policy_and_nothing_is_let_go_of_then() {
    sims(async |world, chain| {
        let rule = chain.base.rule(Match::on(Operation::Write), Action::Fail(store::ErrorKind::NoSpace.into()));
        start(&world, &chain, false, OnError::Report).unwrap();
        world.until(None).await;
        assert!(world.told().contains(&"COMPLETED with error".to_owned()));
        assert_eq!(chain.done(), ["end"]);
        start(&world, &chain, false, OnError::Ignore).unwrap();
        world.until(None).await;
        assert_eq!(chain.done(), ["end", "end"], "an ignored error lets go of nothing");
        start(&world, &chain, false, OnError::Enospc).unwrap();
        world.until(Some(Status::Paused)).await;
        rule.end();
        world.jobs.resume("j").unwrap();
        world.until(None).await;
        assert_eq!(chain.done(), ["end", "end", "publish", "end"]);
        assert!(chain.base_holds(65536, 1).await && chain.base_holds(1 << 20, 2).await);
    });
}

#[test]
fn what_cannot_be_published_is_an_error_and_the_end_all_the_same() {
    sims(async |world, chain| {
        chain.publish_fails.set(true);
        start(&world, &chain, true, OnError::Report).unwrap();
        world.until(Some(Status::Ready)).await;
        world.jobs.complete("j").unwrap();
        world.until(None).await;
        assert_eq!(chain.done(), ["quiesce", "publish", "end"]);
        assert!(world.told().contains(&"COMPLETED with error".to_owned()));
    });
}
