//! The job against a target as awkward as need be, under the deterministic executor.

mod commit;
mod errors;
mod life;
mod pace;
mod progress;
mod target;

use crate::registry::Start;
use crate::{Event, JobError, JobInfo, Jobs, OnError, Status};
use ring::sim::Sim;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use target::Sketch;

/// Jobs that write down what they tell.
struct World {
    jobs: Rc<Jobs>,
    events: Rc<RefCell<Vec<Event>>>,
}

impl World {
    fn new() -> Self {
        let events: Rc<RefCell<Vec<Event>>> = Rc::default();
        let log = Rc::clone(&events);
        Self { jobs: Jobs::new(Rc::new(move |event| log.borrow_mut().push(event))), events }
    }

    fn start(&self, target: &Rc<Sketch>, change: impl FnOnce(&mut Start)) -> Result<(), JobError> {
        let mut start = Start {
            kind: "stream",
            id: Some("j".into()),
            device: "disk".into(),
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
        };
        change(&mut start);
        self.jobs.start(start, Rc::clone(target) as _, None)
    }

    fn info(&self) -> JobInfo {
        self.jobs.info("j").expect("the job is there")
    }

    fn status(&self) -> Option<Status> {
        self.jobs.info("j").map(|info| info.status)
    }

    /// Waits until the job has this status, or is gone (`None`).
    async fn until(&self, status: Option<Status>) {
        for _ in 0..100_000 {
            if self.status() == status {
                return;
            }
            ring::sleep(Duration::from_millis(1)).await;
        }
        panic!("not {status:?} but {:?}; {:?}", self.status(), self.events.borrow());
    }

    /// What was told, in short.
    fn told(&self) -> Vec<String> {
        self.events.borrow().iter().map(short).collect()
    }

    fn last_progress(&self) -> (u64, u64) {
        let events = self.events.borrow();
        let last = events.iter().rev().find_map(|event| match event {
            Event::Completed { len, offset, .. } | Event::Cancelled { len, offset, .. } => Some((*len, *offset)),
            _ => None,
        });
        last.expect("the job has ended")
    }
}

fn short(event: &Event) -> String {
    match event {
        Event::StatusChange { status, .. } => status.name().into(),
        Event::Completed { error: None, .. } => "COMPLETED".into(),
        Event::Completed { error: Some(_), .. } => "COMPLETED with error".into(),
        Event::Cancelled { .. } => "CANCELLED".into(),
        Event::Error { action, write, .. } => {
            format!("ERROR {} {}", if *write { "write" } else { "read" }, action.name())
        }
        Event::Pending { .. } => "PENDING".into(),
        Event::Ready { .. } => "READY".into(),
    }
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Runs a test under several orders of events.
fn sims(test: impl AsyncFn(World)) {
    for seed in 0..8 {
        Sim::new(seed).block_on(test(World::new()));
    }
}
