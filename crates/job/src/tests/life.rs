//! States, verbs and events.

use super::target::{CLUSTER, MIB, Sketch};
use super::{millis, sims};
use crate::window::CHUNK;
use crate::{JobErrorKind, Status, Verb};
use std::time::Duration;

#[test]
fn a_stream_runs_through_its_life() {
    sims(async |world| {
        let target = Sketch::new(8);
        world.start(&target, |_| {}).unwrap();
        assert_eq!(world.told(), ["created", "running"], "by the time the start is answered");
        world.until(None).await;
        assert_eq!(world.told(), ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]);
        assert_eq!(world.last_progress(), (8 * MIB, 8 * MIB));
        assert!(target.finished.get() && target.missing() == 0);
        assert!(world.jobs.list().is_empty());
    });
}

#[test]
fn nothing_to_do_completes_at_once() {
    sims(async |world| {
        let target = Sketch::new(0);
        world.start(&target, |_| {}).unwrap();
        ring::sleep(millis(1)).await;
        assert_eq!(world.told(), ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]);
        assert_eq!(world.last_progress(), (0, 0));
        assert!(target.finished.get());
    });
}

#[test]
fn by_hand_it_waits_for_finalize_and_dismiss() {
    sims(async |world| {
        let target = Sketch::new(2);
        world.start(&target, |start| (start.auto_finalize, start.auto_dismiss) = (false, false)).unwrap();
        world.until(Some(Status::Pending)).await;
        ring::sleep(Duration::from_mins(1)).await;
        assert_eq!(world.told(), ["created", "running", "waiting", "pending", "PENDING"]);
        assert!(!target.finished.get(), "nothing is published before its time");
        world.jobs.finalize("j").unwrap();
        assert_eq!(world.jobs.finalize("j").unwrap_err().kind, JobErrorKind::WrongState, "once is enough");
        world.until(Some(Status::Concluded)).await;
        ring::sleep(Duration::from_mins(1)).await;
        assert_eq!(world.info().error, None);
        world.jobs.dismiss("j").unwrap();
        assert_eq!(world.told()[5..], ["COMPLETED", "concluded", "null"]);
        assert_eq!(world.jobs.dismiss("j").unwrap_err().message, "Block job 'j' not found");
    });
}

#[test]
fn every_verb_in_every_state() {
    const RUNNING: [Verb; 3] = [Verb::Cancel, Verb::Pause, Verb::SetSpeed];
    const PAUSED: [Verb; 3] = [Verb::Cancel, Verb::Resume, Verb::SetSpeed];
    let cases: [(Status, &[Verb]); 4] = [
        (Status::Running, &RUNNING),
        (Status::Paused, &PAUSED),
        (Status::Pending, &[Verb::Cancel, Verb::Finalize]),
        (Status::Concluded, &[Verb::Dismiss]),
    ];
    for (status, allowed) in cases {
        for verb in Verb::ALL {
            sims(async |world| {
                let target = Sketch::new(1);
                target.hold(true);
                world.start(&target, |start| (start.auto_finalize, start.auto_dismiss) = (false, false)).unwrap();
                ring::sleep(millis(10)).await;
                if status == Status::Paused {
                    world.jobs.pause("j").unwrap();
                    target.hold(false);
                } else if status != Status::Running {
                    target.hold(false);
                    world.until(Some(Status::Pending)).await;
                    if status == Status::Concluded {
                        world.jobs.finalize("j").unwrap();
                    }
                }
                world.until(Some(status)).await;
                let answer = match verb {
                    Verb::Cancel => world.jobs.cancel("j", true),
                    Verb::Pause => world.jobs.pause("j"),
                    Verb::Resume => world.jobs.resume("j"),
                    Verb::SetSpeed => world.jobs.set_speed("j", 7),
                    Verb::Complete => world.jobs.complete("j"),
                    Verb::Finalize => world.jobs.finalize("j"),
                    Verb::Dismiss => world.jobs.dismiss("j"),
                };
                if allowed.contains(&verb) {
                    assert_eq!(answer, Ok(()), "{verb} in {status}");
                } else {
                    let refused = answer.expect_err(verb.name());
                    let expected = match (verb, status) {
                        (Verb::Resume, _) => "Can't resume a job that was not paused".to_owned(),
                        (Verb::Pause, Status::Paused) => "Job is already paused".to_owned(),
                        _ => format!("Job 'j' in state '{status}' cannot accept command verb '{verb}'"),
                    };
                    assert_eq!((refused.kind, refused.message), (JobErrorKind::WrongState, expected));
                    assert_eq!(world.status(), Some(status), "a refusal changes nothing");
                }
                target.hold(false);
                world.jobs.shut_down().await;
            });
        }
    }
}

#[test]
fn what_does_not_exist_is_not_found() {
    sims(async |world| {
        let refusals = [
            world.jobs.cancel("x", false),
            world.jobs.pause("x"),
            world.jobs.resume("x"),
            world.jobs.set_speed("x", 1),
            world.jobs.complete("x"),
            world.jobs.finalize("x"),
            world.jobs.dismiss("x"),
        ];
        for refusal in refusals {
            let refusal = refusal.unwrap_err();
            assert_eq!((refusal.kind, &*refusal.message), (JobErrorKind::NotFound, "Block job 'x' not found"));
        }
        assert_eq!(world.jobs.info("x"), None);
    });
}

#[test]
fn ids_are_checked_and_unique_and_default_to_the_device() {
    sims(async |world| {
        let target = Sketch::new(1);
        for id in ["", "1x", "a b", "-a", "a/b", "ä"] {
            let refused = world.start(&target, |start| start.id = Some(id.into())).unwrap_err();
            assert_eq!(
                (refused.kind, refused.message),
                (JobErrorKind::InvalidArgument, format!("Invalid job ID '{id}'"))
            );
        }
        world.start(&target, |start| start.id = Some("a-b.c_1".into())).unwrap();
        let refused = world.start(&target, |start| start.id = Some("a-b.c_1".into())).unwrap_err();
        assert_eq!((refused.kind, &*refused.message), (JobErrorKind::Busy, "Job ID 'a-b.c_1' already in use"));
        world.start(&target, |start| (start.id, start.device) = (None, "2 disk".into())).unwrap();
        assert!(world.jobs.info("2 disk").is_some());
    });
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_issues_nothing() {
    sims(async |world| {
        let target = Sketch::new(64);
        target.latency.set(millis(30));
        world.start(&target, |_| {}).unwrap();
        ring::sleep(millis(100)).await;
        world.jobs.pause("j").unwrap();
        let issued = target.begun.borrow().len();
        assert!(world.info().paused && world.status() == Some(Status::Running), "asked for, not there yet");
        world.until(Some(Status::Paused)).await;
        assert_eq!(target.in_flight.get(), 0);
        ring::sleep(Duration::from_secs(100)).await;
        assert_eq!(target.begun.borrow().len(), issued);
        let before = world.info();
        assert!(!before.busy && before.offset == issued as u64 * CHUNK);
        world.jobs.resume("j").unwrap();
        world.until(None).await;
        let told = world.told();
        assert_eq!(told[..4], ["created", "running", "paused", "running"]);
        assert_eq!(target.begun.borrow().len(), 128, "and nothing was copied twice");
    });
}

#[test]
fn pausing_and_resuming_at_once_is_no_pause() {
    sims(async |world| {
        let target = Sketch::new(16);
        world.start(&target, |_| {}).unwrap();
        for _ in 0..20 {
            world.jobs.pause("j").unwrap();
            world.jobs.resume("j").unwrap();
            ring::yield_now().await;
        }
        world.until(None).await;
        assert!(target.finished.get());
    });
}

#[test]
fn resuming_and_pausing_at_once_is_still_a_pause() {
    sims(async |world| {
        let target = Sketch::new(16);
        world.start(&target, |_| {}).unwrap();
        world.jobs.pause("j").unwrap();
        world.until(Some(Status::Paused)).await;
        world.jobs.resume("j").unwrap();
        world.jobs.pause("j").unwrap();
        world.until(Some(Status::Paused)).await;
        world.jobs.resume("j").unwrap();
        world.until(None).await;
        assert_eq!(world.told()[..6], ["created", "running", "paused", "running", "paused", "running"]);
    });
}

#[test]
fn a_cancel_keeps_what_has_arrived() {
    sims(async |world| {
        let target = Sketch::new(64);
        target.latency.set(millis(50));
        world.start(&target, |_| {}).unwrap();
        ring::sleep(millis(120)).await;
        world.jobs.cancel("j", false).unwrap();
        let issued = target.begun.borrow().len() as u64;
        world.until(None).await;
        assert_eq!(world.told(), ["created", "running", "aborting", "CANCELLED", "concluded", "null"]);
        assert_eq!(target.begun.borrow().len() as u64, issued, "nothing new was issued");
        let rest = 64 * MIB - issued * CHUNK;
        assert_eq!(target.missing(), rest);
        assert_eq!(world.last_progress(), (64 * MIB, issued * CHUNK));
        assert!(!target.finished.get());
        // And another one goes on from there.
        world.start(&target, |_| {}).unwrap();
        world.until(None).await;
        assert_eq!(world.last_progress(), (rest, rest));
        assert!(target.finished.get());
    });
}

#[test]
fn a_cancel_is_quick_while_throttled() {
    sims(async |world| {
        let target = Sketch::new(64);
        world.start(&target, |start| start.speed = 1).unwrap();
        ring::sleep(Duration::from_secs(10)).await;
        let asked = ring::now();
        world.jobs.cancel("j", false).unwrap();
        world.until(None).await;
        assert!(ring::now().since(asked) <= millis(5));
        assert_eq!(world.last_progress(), (64 * MIB, CLUSTER));
    });
}

#[test]
fn a_paused_job_is_cancelled_by_force_only() {
    sims(async |world| {
        let target = Sketch::new(64);
        world.start(&target, |start| start.speed = MIB).unwrap();
        world.jobs.pause("j").unwrap();
        world.until(Some(Status::Paused)).await;
        let refused = world.jobs.cancel("j", false).unwrap_err();
        assert_eq!(refused.message, "The block job for device 'j' is currently paused");
        world.jobs.cancel("j", true).unwrap();
        world.until(None).await;
        assert_eq!(
            world.told(),
            ["created", "running", "paused", "running", "aborting", "CANCELLED", "concluded", "null"]
        );
    });
}

#[test]
fn a_pending_job_can_still_be_cancelled_and_keeps_its_error() {
    sims(async |world| {
        let target = Sketch::new(1);
        world.start(&target, |start| (start.auto_finalize, start.auto_dismiss) = (false, false)).unwrap();
        world.until(Some(Status::Pending)).await;
        world.jobs.cancel("j", false).unwrap();
        world.until(Some(Status::Concluded)).await;
        assert_eq!(world.info().error.as_deref(), Some("Operation canceled"));
        assert!(!target.finished.get());
        assert_eq!(world.told()[5..], ["aborting", "CANCELLED", "concluded"]);
    });
}

#[test]
fn a_cancel_that_comes_while_the_end_is_published_comes_too_late() {
    sims(async |world| {
        let target = Sketch::new(1);
        target.finish_takes.set(millis(100));
        world.start(&target, |_| {}).unwrap();
        world.until(Some(Status::Pending)).await;
        world.jobs.cancel("j", true).unwrap();
        world.until(None).await;
        assert_eq!(world.told()[4..], ["COMPLETED", "concluded", "null"]);
        assert!(target.finished.get());
    });
}

#[test]
fn an_end_that_cannot_be_published_is_a_failure() {
    sims(async |world| {
        let target = Sketch::new(1);
        target.finish_fails.set(true);
        world.start(&target, |start| start.auto_dismiss = false).unwrap();
        world.until(Some(Status::Concluded)).await;
        assert_eq!(world.told()[2..], ["waiting", "pending", "aborting", "COMPLETED with error", "concluded"]);
        assert_eq!(world.info().error.as_deref(), Some("'my.qed': something is still missing"));
    });
}

#[test]
fn shutting_down_cancels_all_and_lets_none_start() {
    sims(async |world| {
        let targets = [Sketch::new(64), Sketch::new(64), Sketch::new(64), Sketch::new(1)];
        for (at, target) in targets.iter().enumerate() {
            target.latency.set(millis(40));
            let by_hand = at == 3;
            world
                .start(target, |start| {
                    (start.id, start.auto_finalize, start.auto_dismiss) = (Some(format!("j{at}")), !by_hand, !by_hand);
                })
                .unwrap();
        }
        world.jobs.pause("j1").unwrap();
        ring::sleep(millis(100)).await;
        world.jobs.shut_down().await;
        assert!(world.jobs.list().is_empty());
        assert_eq!(targets.iter().map(|target| target.in_flight.get()).sum::<usize>(), 0);
        let cancelled = world.told().iter().filter(|told| *told == "CANCELLED").count();
        assert_eq!(cancelled, 4, "{:?}", world.told());
        assert_eq!(world.told().iter().filter(|told| *told == "null").count(), 4);
        assert_eq!(world.start(&targets[0], |_| {}).unwrap_err().kind, JobErrorKind::Busy);
        world.jobs.shut_down().await;
    });
}

#[test]
fn a_job_whose_task_dies_ends_with_an_error() {
    sims(async |world| {
        let target = Sketch::new(64);
        target.dies.set(true);
        world.start(&target, |_| {}).unwrap();
        world.until(None).await;
        assert_eq!(world.told()[2..], ["aborting", "COMPLETED with error", "concluded", "null"]);
    });
}
