//! Tasks, timers, panics, blocking work.

use ring::{Ring, now, sleep, sleep_until, spawn, timeout, unblock, yield_now};
use std::cell::{Cell, RefCell};
use std::future::{pending, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::Poll;
use std::thread;
use std::time::Duration;

on_both! {
    tasks_run_in_order_and_hand_back_results
    yielding_lets_everybody_else_run_once
    timers_fire_in_order
    a_timeout_drops_the_future
    cancelling_drops_now
    detached_tasks_run_on
    a_panic_goes_to_whoever_joins
    wakes_from_other_threads
    blocking_work_runs_elsewhere
    a_panic_of_blocking_work_goes_on_here
    tasks_left_over_go_on_later
    a_busy_task_starves_no_timer
}

fn tasks_run_in_order_and_hand_back_results(ring: &Ring) {
    let order = Rc::new(RefCell::new(Vec::new()));
    ring.block_on(async {
        let tasks: Vec<_> = (0..10)
            .map(|number| {
                let order = Rc::clone(&order);
                spawn(async move {
                    order.borrow_mut().push(number);
                    number * 2
                })
            })
            .collect();
        for (number, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await, number * 2);
        }
    });
    assert_eq!(*order.borrow(), (0..10).collect::<Vec<_>>());
}

fn yielding_lets_everybody_else_run_once(ring: &Ring) {
    ring.block_on(async {
        let count = Rc::new(Cell::new(0));
        for _ in 0..5 {
            let count = Rc::clone(&count);
            drop(spawn(async move { count.set(count.get() + 1) }));
        }
        assert_eq!(count.get(), 0);
        yield_now().await;
        assert_eq!(count.get(), 5);
    });
}

fn timers_fire_in_order(ring: &Ring) {
    ring.block_on(async {
        loop {
            let order = Rc::new(RefCell::new(Vec::new()));
            let start = now();
            let tasks: Vec<_> = [30, 10, 20, 0, 10]
                .into_iter()
                .enumerate()
                .map(|(number, wait)| {
                    let order = Rc::clone(&order);
                    spawn(async move {
                        let deadline = start + Duration::from_millis(wait);
                        sleep_until(deadline).await;
                        assert!(now() >= deadline, "not before its time");
                        order.borrow_mut().push(number);
                    })
                })
                .collect();
            yield_now().await;
            let in_time = now().since(start) < Duration::from_millis(10);
            for task in tasks {
                task.await;
            }
            assert!(now().since(start) >= Duration::from_millis(30));
            assert_eq!(start.since(now()), Duration::ZERO);
            // On a machine too busy to have them all wait before the first is due, they come as they are polled.
            if in_time {
                assert_eq!(*order.borrow(), [3, 1, 4, 2, 0]);
                break;
            }
        }
    });
}

fn a_timeout_drops_the_future(ring: &Ring) {
    ring.block_on(async {
        let held = Rc::new(());
        let inside = Rc::clone(&held);
        let late = timeout(Duration::from_millis(1), async move {
            pending::<()>().await;
            drop(inside);
        });
        assert_eq!(late.await, None);
        assert_eq!(Rc::strong_count(&held), 1);
        assert_eq!(timeout(Duration::MAX, async { 5 }).await, Some(5));
        assert_eq!(timeout(Duration::ZERO, async { 6 }).await, Some(6), "what is there beats the clock");
        assert!(timeout(Duration::from_millis(1), sleep(Duration::MAX)).await.is_none());
    });
}

fn cancelling_drops_now(ring: &Ring) {
    ring.block_on(async {
        let held = Rc::new(());
        let start = || {
            let held = Rc::clone(&held);
            spawn(async move {
                pending::<()>().await;
                drop(held);
            })
        };
        let unstarted = start();
        assert_eq!(Rc::strong_count(&held), 2);
        unstarted.cancel();
        assert_eq!(Rc::strong_count(&held), 1, "never polled");
        let suspended = start();
        yield_now().await;
        assert!(!suspended.is_finished());
        suspended.cancel();
        assert_eq!(Rc::strong_count(&held), 1, "suspended");
        let done = spawn(async { 3 });
        yield_now().await;
        assert!(done.is_finished());
        done.cancel();
        // One that cancels itself is dropped when it next suspends.
        let slot = Rc::new(RefCell::new(None::<ring::JoinHandle<()>>));
        let task = {
            let (slot, held) = (Rc::clone(&slot), Rc::clone(&held));
            spawn(async move {
                if let Some(me) = slot.take() {
                    me.cancel();
                }
                pending::<()>().await;
                drop(held);
            })
        };
        *slot.borrow_mut() = Some(task);
        yield_now().await;
        assert_eq!(Rc::strong_count(&held), 1, "itself");
    });
}

fn detached_tasks_run_on(ring: &Ring) {
    ring.block_on(async {
        let done = Rc::new(Cell::new(false));
        let inside = Rc::clone(&done);
        drop(spawn(async move {
            sleep(Duration::from_millis(1)).await;
            inside.set(true);
        }));
        while !done.get() {
            sleep(Duration::from_millis(1)).await;
        }
    });
}

fn a_panic_goes_to_whoever_joins(ring: &Ring) {
    ring.block_on(async {
        let other = spawn(async {
            yield_now().await;
            "alive"
        });
        let task = spawn(async { panic!("on purpose") });
        drop(spawn(async { panic!("on purpose, detached") }));
        yield_now().await;
        let joined = AssertUnwindSafe(task);
        let panic = futures_util::FutureExt::catch_unwind(joined).await.map(|(): ()| ()).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
        assert_eq!(other.await, "alive");
    });
    // A panic of the main future passes through, and the ring still works.
    let panicked = catch_unwind(AssertUnwindSafe(|| ring.block_on(async { panic!("on purpose, main") })));
    assert!(panicked.is_err());
    assert_eq!(ring.block_on(async { 1 }), 1);
}

fn wakes_from_other_threads(ring: &Ring) {
    ring.block_on(async {
        let tasks: Vec<_> = (0..50)
            .map(|number| {
                spawn(async move {
                    let mut thread = None;
                    poll_fn(|cx| match thread.take() {
                        None => {
                            let waker = cx.waker().clone();
                            thread = Some(thread::spawn(move || {
                                // Both before and after the ring has gone to sleep.
                                thread::sleep(Duration::from_micros(number * 50));
                                waker.wake();
                            }));
                            Poll::Pending
                        }
                        Some(running) => {
                            if running.is_finished() {
                                Poll::Ready(())
                            } else {
                                // Woken by its last instructions.
                                running.join().unwrap();
                                Poll::Ready(())
                            }
                        }
                    })
                    .await;
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        // The main future too.
        let mut started = false;
        poll_fn(|cx| {
            if started {
                return Poll::Ready(());
            }
            started = true;
            let waker = cx.waker().clone();
            thread::spawn(move || waker.wake());
            Poll::Pending
        })
        .await;
    });
}

fn blocking_work_runs_elsewhere(ring: &Ring) {
    ring.block_on(async {
        let here = thread::current().id();
        assert_ne!(unblock(move || thread::current().id()).await, here);
        let tasks: Vec<_> = (0..100).map(|number| spawn(unblock(move || number * 3))).collect();
        for (number, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await, number * 3);
        }
        // Given up: the closure still runs.
        let (sender, receiver) = std::sync::mpsc::channel();
        let given_up = spawn(unblock(move || sender.send(1).unwrap()));
        yield_now().await;
        given_up.cancel();
        assert_eq!(receiver.recv(), Ok(1));
    });
}

fn a_panic_of_blocking_work_goes_on_here(ring: &Ring) {
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        ring.block_on(async { unblock(|| panic!("on purpose, blocking")).await });
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref::<&str>(), Some(&"on purpose, blocking"));
}

fn tasks_left_over_go_on_later(ring: &Ring) {
    let steps = Rc::new(Cell::new(0));
    let mut task = None;
    ring.block_on(async {
        let steps = Rc::clone(&steps);
        task = Some(spawn(async move {
            loop {
                steps.set(steps.get() + 1);
                yield_now().await;
            }
        }));
    });
    assert_eq!(steps.get(), 0);
    ring.block_on(yield_now());
    assert!(steps.get() > 0);
    task.unwrap().cancel();
    assert_eq!(Rc::strong_count(&steps), 1);
}

fn a_busy_task_starves_no_timer(ring: &Ring) {
    ring.block_on(async {
        let busy = spawn(async {
            loop {
                yield_now().await;
            }
        });
        sleep(Duration::from_millis(2)).await;
        busy.cancel();
    });
}
