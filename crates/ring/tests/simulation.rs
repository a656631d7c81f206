//! The deterministic executor: same seed, same interleaving.

extern crate headwater_ring as ring;

use ring::sim::Sim;
use ring::sync::{Event, Mutex, Semaphore};
use ring::{Config, File, Iov, Ring, now, sleep, spawn, timeout, unblock, yield_now};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::pending;
use std::io;
use std::panic::catch_unwind;
use std::rc::Rc;
use std::time::Duration;

/// What ten tasks did, in order, when they took three steps each.
fn interleaving(seed: u64) -> Vec<(usize, usize)> {
    let trace = Rc::new(RefCell::new(Vec::new()));
    Sim::new(seed).block_on(async {
        let event = Event::new();
        let tasks: Vec<_> = (0..10)
            .map(|task| {
                let (trace, event) = (Rc::clone(&trace), event.clone());
                spawn(async move {
                    trace.borrow_mut().push((task, 0));
                    yield_now().await;
                    trace.borrow_mut().push((task, 1));
                    let wait = event.wait();
                    sleep(Duration::from_secs(task as u64 % 3)).await;
                    event.notify_one();
                    timeout(Duration::from_secs(5), wait).await;
                    trace.borrow_mut().push((task, 2));
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    });
    trace.take()
}

#[test]
fn the_seed_decides_the_order() {
    let mut seen = BTreeSet::new();
    for seed in 0..50 {
        let first = interleaving(seed);
        assert_eq!(first.len(), 30);
        assert_eq!(first, interleaving(seed), "same seed, same interleaving");
        seen.insert(first);
    }
    assert_eq!(seen.len(), 50, "other seeds, other interleavings");
}

#[test]
fn every_order_of_three_tasks_comes_up() {
    let orders: BTreeSet<_> = (0..200)
        .map(|seed| {
            let order = Rc::new(RefCell::new(Vec::new()));
            Sim::new(seed).block_on(async {
                for task in 0..3 {
                    let order = Rc::clone(&order);
                    drop(spawn(async move { order.borrow_mut().push(task) }));
                }
                yield_now().await;
            });
            order.take()
        })
        .collect();
    assert_eq!(orders.len(), 6, "and the main future came after all of them: {orders:?}");
}

#[test]
fn time_is_virtual_and_jumps() {
    let sim = Sim::new(1);
    sim.block_on(async {
        let start = now();
        let order = Rc::new(RefCell::new(Vec::new()));
        for (number, hours) in [3, 1, 2].into_iter().enumerate() {
            let order = Rc::clone(&order);
            drop(spawn(async move {
                sleep(Duration::from_hours(hours)).await;
                order.borrow_mut().push(number);
            }));
        }
        sleep(Duration::from_hours(4)).await;
        assert_eq!(now().since(start), Duration::from_hours(4), "to the nanosecond");
        assert_eq!(*order.borrow(), [1, 2, 0]);
        assert_eq!(timeout(Duration::from_secs(1), pending::<()>()).await, None);
        yield_now().await;
        assert_eq!(now().since(start), Duration::from_secs(4 * 3600 + 1), "work takes no time");
    });
}

#[test]
fn a_deadlock_is_told() {
    let panic = catch_unwind(|| Sim::new(0).block_on(Event::new().wait())).unwrap_err();
    let text = panic.downcast_ref::<String>().cloned().or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    assert!(text.unwrap().contains("deadlock"));
}

#[test]
fn files_are_refused_and_blocking_work_runs_in_place() {
    let file = File::new(tempfile::tempfile().unwrap().into());
    Sim::new(0).block_on(async {
        file.register();
        let iov = Iov::alloc(1);
        assert_eq!(file.read_at(0, &iov).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(file.recv(&iov).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(file.sync_all().await.unwrap_err().kind(), io::ErrorKind::Unsupported);
        let here = std::thread::current().id();
        assert_eq!(unblock(move || std::thread::current().id()).await, here);
    });
}

#[test]
fn dropping_a_simulation_drops_its_tasks() {
    let sim = Sim::new(0);
    let held = Rc::new(());
    let inside = Rc::clone(&held);
    sim.block_on(async move {
        drop(spawn(async move {
            pending::<()>().await;
            drop(inside);
        }));
        yield_now().await;
    });
    assert_eq!(Rc::strong_count(&held), 2);
    drop(sim);
    assert_eq!(Rc::strong_count(&held), 1);
}

#[test]
fn a_mutex_excludes_under_every_order() {
    for seed in 0..100 {
        Sim::new(seed).block_on(async {
            let mutex = Rc::new(Mutex::new(0));
            let tasks: Vec<_> = (0..8)
                .map(|number| {
                    let mutex = Rc::clone(&mutex);
                    spawn(async move {
                        let locking = async {
                            let mut guard = mutex.lock().await;
                            let before = *guard;
                            yield_now().await;
                            sleep(Duration::from_millis(2)).await;
                            *guard = before + 1;
                        };
                        // Some give up in line, some while they hold it.
                        timeout(Duration::from_millis(number * 2 + 1), locking).await.is_some()
                    })
                })
                .collect();
            let mut done = 0;
            for task in tasks {
                done += u32::from(task.await);
            }
            assert_eq!(*mutex.try_lock().expect("nobody holds it any more"), done);
        });
    }
}

#[test]
fn a_semaphore_never_gives_more_than_it_has_and_gets_all_back() {
    struct InUse<'a>(&'a Cell<usize>, usize);
    impl Drop for InUse<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - self.1);
        }
    }
    for seed in 0..100 {
        Sim::new(seed).block_on(async {
            let semaphore = Semaphore::new(10);
            let in_use = Rc::new(Cell::new(0));
            let tasks: Vec<_> = (0..30_usize)
                .map(|number| {
                    let (semaphore, in_use) = (semaphore.clone(), Rc::clone(&in_use));
                    spawn(async move {
                        let units = number % 10 + 1;
                        let working = async {
                            let permit = semaphore.acquire(units).await;
                            let used = InUse(&in_use, permit.units());
                            in_use.set(in_use.get() + permit.units());
                            assert!(in_use.get() <= 10);
                            // Some are dropped here, with what they hold.
                            sleep(Duration::from_millis(number as u64 % 2)).await;
                            drop((used, permit));
                        };
                        timeout(Duration::from_millis(if number % 3 == 0 { 1 } else { 1000 }), working).await;
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            assert_eq!((semaphore.available(), in_use.get()), (10, 0));
        });
    }
}

#[test]
fn those_in_line_are_served_in_order() {
    for seed in 0..50 {
        Sim::new(seed).block_on(async {
            let semaphore = Semaphore::new(3);
            let all = semaphore.acquire(3).await;
            let (arrived, served) = (Rc::new(RefCell::new(Vec::new())), Rc::new(RefCell::new(Vec::new())));
            let tasks: Vec<_> = (0..10_usize)
                .map(|number| {
                    let semaphore = semaphore.clone();
                    let (arrived, served) = (Rc::clone(&arrived), Rc::clone(&served));
                    spawn(async move {
                        arrived.borrow_mut().push(number);
                        // One at a time, so that the order of service can be seen.
                        let _all = semaphore.acquire(3 + number % 2).await;
                        served.borrow_mut().push(number);
                        yield_now().await;
                    })
                })
                .collect();
            while arrived.borrow().len() < 10 {
                yield_now().await;
            }
            drop(all);
            for task in tasks {
                task.await;
            }
            assert_eq!(*arrived.borrow(), *served.borrow());
        });
    }
}

#[test]
fn a_simulation_inside_a_ring_gives_the_ring_back() {
    let ring = Ring::new(Config::default()).unwrap();
    ring.block_on(async {
        Sim::new(0).block_on(sleep(Duration::from_secs(1_000_000)));
        let file = File::new(tempfile::tempfile().unwrap().into());
        assert_eq!(file.write_at(0, &Iov::zeroed(3), false).await.unwrap(), 3);
    });
}
