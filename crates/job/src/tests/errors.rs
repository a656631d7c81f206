//! What a job does about errors.

use super::target::{MIB, Sketch};
use super::{millis, sims};
use crate::window::CHUNK;
use crate::{Event, IoStatus, OnError, Status};
use std::time::Duration;
use store::ErrorKind::{Io, NoSpace, Poisoned};

const FAILED: [&str; 4] = ["aborting", "COMPLETED with error", "concluded", "null"];

#[test]
fn report_ends_the_job_with_the_error() {
    sims(async |world| {
        for kind in [Io, NoSpace] {
            let target = Sketch::new(64);
            target.fail(100, 1, kind);
            world.events.borrow_mut().clear();
            world.start(&target, |_| {}).unwrap();
            world.until(None).await;
            let error = if kind == Io { "ERROR read report" } else { "ERROR write report" };
            assert_eq!(world.told()[2..3], [error]);
            assert_eq!(world.told()[3..], FAILED);
            let (len, offset) = world.last_progress();
            assert!(len == 64 * MIB && offset < len && offset > 0);
            assert!(!target.finished.get() && target.in_flight.get() == 0);
            let text = if kind == Io { "Input/output error" } else { "No space left on device" };
            let said = world
                .events
                .borrow()
                .iter()
                .any(|event| matches!(event, Event::Completed { error: Some(error), .. } if error == text));
            assert!(said, "in the system's words");
        }
    });
}

#[test]
fn enospc_stops_for_want_of_space_only() {
    sims(async |world| {
        let target = Sketch::new(16);
        target.fail(100, 1, Io);
        world.start(&target, |start| start.on_error = OnError::Enospc).unwrap();
        world.until(None).await;
        assert_eq!(world.told()[2..3], ["ERROR read report"]);
        world.events.borrow_mut().clear();

        let target = Sketch::new(16);
        target.fail(100, 1, NoSpace);
        world.start(&target, |start| start.on_error = OnError::Enospc).unwrap();
        world.until(Some(Status::Paused)).await;
        assert_eq!(world.told(), ["created", "running", "ERROR write stop", "paused"]);
        assert_eq!(world.info().io_status, IoStatus::NoSpace);
        world.jobs.resume("j").unwrap();
        assert_eq!(world.info().io_status, IoStatus::Ok);
        world.until(None).await;
        assert_eq!(world.told()[4..], ["running", "waiting", "pending", "COMPLETED", "concluded", "null"]);
    });
}

#[test]
fn stop_tries_the_same_place_again_when_resumed() {
    sims(async |world| {
        let target = Sketch::new(16);
        // Two chunks fail in one go, and the first of them again.
        target.fail(17, 2, Io);
        target.fail(33, 1, Io);
        world.start(&target, |start| start.on_error = OnError::Stop).unwrap();
        world.until(Some(Status::Paused)).await;
        let info = world.info();
        assert!(info.paused && info.io_status == IoStatus::Failed && info.error.is_none());
        assert_eq!(world.told(), ["created", "running", "ERROR read stop", "paused"], "one event for one stop");
        ring::sleep(Duration::from_secs(100)).await;
        world.jobs.resume("j").unwrap();
        world.until(Some(Status::Paused)).await;
        world.jobs.resume("j").unwrap();
        world.until(None).await;
        assert!(target.finished.get() && target.missing() == 0);
        assert_eq!(world.last_progress(), (16 * MIB, 16 * MIB));
        assert_eq!(target.begun.borrow().len(), 32 + 3, "only what failed was asked for again");
    });
}

#[test]
fn a_job_stopped_by_an_error_can_be_cancelled() {
    sims(async |world| {
        let target = Sketch::new(16);
        target.fail(40, 1, Io);
        world.start(&target, |start| start.on_error = OnError::Stop).unwrap();
        world.until(Some(Status::Paused)).await;
        assert!(world.jobs.cancel("j", false).is_err());
        world.jobs.cancel("j", true).unwrap();
        world.until(None).await;
        assert_eq!(world.told()[4..], ["running", "aborting", "CANCELLED", "concluded", "null"]);
        assert!(!target.finished.get());
    });
}

#[test]
fn ignore_goes_on_and_never_lets_the_backing_file_go() {
    sims(async |world| {
        let target = Sketch::new(16);
        target.fail(17, 1, Io);
        target.fail(200, 1, NoSpace);
        world.start(&target, |start| (start.on_error, start.auto_dismiss) = (OnError::Ignore, false)).unwrap();
        world.until(Some(Status::Concluded)).await;
        let told = world.told();
        assert_eq!(
            told[2..],
            ["ERROR read ignore", "ERROR write ignore", "aborting", "COMPLETED with error", "concluded"]
        );
        assert_eq!(target.missing(), 2 * CHUNK, "everything else has arrived");
        assert!(!target.finished.get());
        assert_eq!(world.last_progress(), (16 * MIB, 16 * MIB));
        assert_eq!(world.info().error.as_deref(), Some("Input/output error"), "the first");
        world.jobs.dismiss("j").unwrap();
        // The next one, without faults, brings in the rest.
        world.start(&target, |_| {}).unwrap();
        world.until(None).await;
        assert!(target.finished.get());
    });
}

#[test]
fn a_source_that_fails_at_once_does_not_flood_anybody() {
    sims(async |world| {
        let target = Sketch::new(256);
        target.latency.set(Duration::ZERO);
        target.fail(0, 1_000_000, Io);
        for at in 1..4096 {
            target.fail(at, 1_000_000, Io);
        }
        world.start(&target, |start| start.on_error = OnError::Ignore).unwrap();
        ring::sleep(Duration::from_secs(1)).await;
        let errors = world.told().iter().filter(|told| told.starts_with("ERROR")).count();
        assert!((50..=500).contains(&errors), "{errors} events a second");
        world.until(None).await;
        assert!(!target.finished.get());
    });
}

#[test]
fn an_image_that_refuses_writes_ends_the_job_whatever_the_policy() {
    sims(async |world| {
        for policy in OnError::ALL {
            world.events.borrow_mut().clear();
            let target = Sketch::new(16);
            target.fail(30, 1, Poisoned);
            world.start(&target, |start| start.on_error = policy).unwrap();
            world.until(None).await;
            assert_eq!(world.told()[2..3], ["ERROR read report"], "{policy:?}");
            assert_eq!(world.told()[3..], FAILED);
        }
    });
}

#[test]
fn a_table_that_cannot_be_read_is_met_by_the_policy_too() {
    sims(async |world| {
        for policy in OnError::ALL {
            world.events.borrow_mut().clear();
            let target = Sketch::new(16);
            target.set(64..128, super::target::Cluster::There);
            // The scan may meet it first and says nothing; then the copying meets it.
            target.blind.set((64, 2));
            world.start(&target, |start| (start.on_error, start.auto_dismiss) = (policy, false)).unwrap();
            ring::sleep(millis(500)).await;
            match policy {
                OnError::Report | OnError::Enospc => assert_eq!(world.status(), Some(Status::Concluded)),
                OnError::Ignore => {
                    assert_eq!(world.status(), Some(Status::Concluded));
                    assert!(
                        world.info().error.unwrap().contains("mid.qed"),
                        "what the system did not say is said whole"
                    );
                    assert!(!target.finished.get());
                    assert_eq!(target.missing(), 0, "what could be told was copied");
                }
                OnError::Stop => {
                    while world.status() == Some(Status::Paused) {
                        world.jobs.resume("j").unwrap();
                        ring::sleep(millis(100)).await;
                    }
                    assert_eq!((world.status(), world.info().error), (Some(Status::Concluded), None));
                    assert!(target.finished.get());
                }
            }
            world.jobs.dismiss("j").unwrap();
        }
    });
}

#[test]
fn where_a_guest_was_in_the_way_is_looked_at_again() {
    sims(async |world| {
        let target = Sketch::new(16);
        target.in_the_way.borrow_mut().extend([(3, 1), (77, 3), (255, 2)]);
        world.start(&target, |_| {}).unwrap();
        world.until(None).await;
        assert!(target.finished.get() && target.missing() == 0);
        assert_eq!(world.last_progress(), (16 * MIB, 16 * MIB));
    });
}

#[test]
fn errors_after_a_cancel_are_nobodys_business() {
    sims(async |world| {
        let target = Sketch::new(16);
        target.hold(true);
        target.fail(0, 100, Io);
        world.start(&target, |_| {}).unwrap();
        ring::sleep(millis(10)).await;
        world.jobs.cancel("j", false).unwrap();
        ring::sleep(millis(10)).await;
        assert_eq!(world.status(), Some(Status::Running), "what is in flight is awaited");
        target.hold(false);
        world.until(None).await;
        assert_eq!(world.told(), ["created", "running", "aborting", "CANCELLED", "concluded", "null"]);
    });
}
