//! Rings and shards from the outside: posting, calling, stopping.

use ring::{Backend, Closed, Config, File, Iov, Ring, Shard, sleep, spawn};
use std::future::pending;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

on_both! {
    a_shard_answers
    messages_keep_their_order
    posting_under_load_from_many_threads
    a_full_inbox_blocks_others_but_not_its_own_thread
    a_panic_in_a_message_takes_nothing_down
    a_panic_in_a_call_goes_to_the_caller
    stopping_drops_tasks_and_drains_operations
    stopping_ends_waits_that_would_last_forever
    a_stopped_shard_is_closed
    a_wake_after_the_end_is_harmless
    dropping_a_ring_drops_what_is_left
    a_shard_may_drop_itself
}

fn shard(ring: &Ring, inbox: usize) -> Shard {
    Shard::start("test-shard", Config { backend: ring.backend(), inbox, ..Config::default() }).unwrap()
}

fn a_shard_answers(ring: &Ring) {
    let shard = shard(ring, 16);
    let name = shard.handle().call(|| async { thread::current().name().map(str::to_owned) }).wait();
    assert_eq!(name.unwrap().as_deref(), Some("test-shard"));
    assert!(!shard.handle().is_local());
    // From another ring, and with a future that is not `Send`.
    let sum = ring.block_on(shard.handle().call(|| async {
        let rc = Rc::new(2);
        sleep(Duration::from_millis(1)).await;
        *rc + 3
    }));
    assert_eq!(sum, Ok(5));
    shard.stop();
}

fn messages_keep_their_order(ring: &Ring) {
    let shard = shard(ring, 4);
    let seen = Arc::new(Mutex::new(Vec::new()));
    for number in 0..1000 {
        let seen = Arc::clone(&seen);
        shard.handle().post(move || seen.lock().unwrap().push(number)).unwrap();
    }
    shard.handle().call(|| async {}).wait().unwrap();
    assert!(*seen.lock().unwrap() == (0..1000).collect::<Vec<_>>());
}

fn posting_under_load_from_many_threads(ring: &Ring) {
    const THREADS: usize = 8;
    const EACH: usize = 5000;
    let shard = shard(ring, 32);
    let count = Arc::new(AtomicUsize::new(0));
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (handle, count) = (shard.handle().clone(), Arc::clone(&count));
            scope.spawn(move || {
                for step in 0..EACH {
                    let count = Arc::clone(&count);
                    if step % 100 == number {
                        // Lets the shard fall asleep now and then.
                        handle.call(move || async move { count.fetch_add(1, Ordering::Relaxed) }).wait().unwrap();
                    } else {
                        handle.post(move || _ = count.fetch_add(1, Ordering::Relaxed)).unwrap();
                    }
                }
            });
        }
    });
    shard.handle().call(|| async {}).wait().unwrap();
    assert_eq!(count.load(Ordering::Relaxed), THREADS * EACH);
}

fn a_full_inbox_blocks_others_but_not_its_own_thread(ring: &Ring) {
    let handle = ring.handle();
    let posted = Arc::new(AtomicUsize::new(0));
    // Not served yet, and far past the bound.
    for _ in 0..5000 {
        let posted = Arc::clone(&posted);
        handle.post(move || _ = posted.fetch_add(1, Ordering::Relaxed)).unwrap();
    }
    let through = Arc::new(AtomicBool::new(false));
    let other = {
        let through = Arc::clone(&through);
        thread::spawn(move || {
            handle.post(|| {}).unwrap();
            through.store(true, Ordering::Release);
        })
    };
    thread::sleep(Duration::from_millis(20));
    assert!(!through.load(Ordering::Acquire), "the inbox is full, so a thread waits");
    ring.block_on(async {
        while !through.load(Ordering::Acquire) {
            sleep(Duration::from_millis(1)).await;
        }
    });
    other.join().unwrap();
    assert_eq!(posted.load(Ordering::Relaxed), 5000);
}

fn a_panic_in_a_message_takes_nothing_down(ring: &Ring) {
    let shard = shard(ring, 16);
    shard.handle().post(|| panic!("on purpose, message")).unwrap();
    assert_eq!(shard.handle().call(|| async { 1 }).wait(), Ok(1));
}

fn a_panic_in_a_call_goes_to_the_caller(ring: &Ring) {
    let shard = shard(ring, 16);
    let reply = shard.handle().call(|| async { panic!("on purpose, call") });
    let panic = catch_unwind(AssertUnwindSafe(|| reply.wait().map(|(): ()| ()))).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose, call"));
    // Nobody takes this one.
    drop(shard.handle().call(|| async { panic!("on purpose, reply dropped") }));
    assert_eq!(shard.handle().call(|| async { 1 }).wait(), Ok(1));
}

fn stopping_drops_tasks_and_drains_operations(ring: &Ring) {
    struct OnDrop(Arc<AtomicBool>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let shard = shard(ring, 16);
    let file = tempfile::tempfile().unwrap();
    let copy = file.try_clone().unwrap();
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = OnDrop(Arc::clone(&dropped));
    let reply = shard.handle().call(move || async move {
        let file = File::new(copy.into());
        for at in 0..200_u64 {
            let file = file.clone();
            drop(spawn(async move {
                let iov = Iov::alloc(65_536);
                iov.fill(at as u8 + 1);
                file.write_at(at * 65_536, &iov, at % 8 == 0).await.unwrap();
            }));
        }
        drop(spawn(async move {
            let _guard = guard;
            pending::<()>().await;
        }));
        // All have started, none may have ended.
        ring::yield_now().await;
    });
    reply.wait().unwrap();
    shard.stop();
    assert!(dropped.load(Ordering::Acquire), "tasks are dropped");
    let bytes = std::os::unix::fs::FileExt::read_at;
    for at in 0..200_u64 {
        let mut byte = [0];
        bytes(&file, &mut byte, at * 65_536 + 65_535).unwrap();
        assert_eq!(byte[0], at as u8 + 1, "operations are drained");
    }
}

fn stopping_ends_waits_that_would_last_forever(ring: &Ring) {
    let shard = shard(ring, 16);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (unread, unwritten) = UnixStream::pair().unwrap();
    shard
        .handle()
        .call(move || async move {
            let ours = File::new(ours.into());
            let unread = File::new(unread.into());
            for _ in 0..3 {
                let ours = ours.clone();
                drop(spawn(async move { ours.recv(&Iov::alloc(10)).await }));
            }
            drop(spawn(async move { unread.send_all(&Iov::zeroed(10 << 20)).await }));
            ring::yield_now().await;
        })
        .wait()
        .unwrap();
    shard.stop();
    drop(unwritten);
    let mut theirs = theirs;
    assert_eq!(std::io::Read::read(&mut theirs, &mut [0]).unwrap(), 0, "its descriptors are closed");
}

fn a_stopped_shard_is_closed(ring: &Ring) {
    let shard = shard(ring, 2);
    let handle = shard.handle().clone();
    let forever = handle.call(|| async { pending::<()>().await });
    // Waits for room in an inbox that nobody will empty.
    let (gate, hold) = std::sync::mpsc::channel::<()>();
    handle.post(move || _ = hold.recv()).unwrap();
    let stuck: Vec<_> = (0..4)
        .map(|_| {
            let handle = handle.clone();
            thread::spawn(move || handle.post(|| {}))
        })
        .collect();
    thread::sleep(Duration::from_millis(10));
    let stopping = thread::spawn(move || shard.stop());
    thread::sleep(Duration::from_millis(10));
    drop(gate);
    stopping.join().unwrap();
    for thread in stuck {
        // Taken or refused, but not stuck.
        let _ = thread.join().unwrap();
    }
    assert_eq!(forever.wait(), Err(Closed));
    assert_eq!(handle.post(|| {}), Err(Closed));
    assert_eq!(handle.call(|| async {}).wait(), Err(Closed));
}

fn a_wake_after_the_end_is_harmless(ring: &Ring) {
    let own = Ring::new(crate::config(ring.backend())).unwrap();
    let mut kept = None;
    own.block_on(async {
        let (sender, receiver) = std::sync::mpsc::channel();
        drop(spawn(std::future::poll_fn(move |cx| {
            sender.send(cx.waker().clone()).unwrap();
            std::task::Poll::<()>::Pending
        })));
        ring::yield_now().await;
        kept = Some(receiver.recv().unwrap());
    });
    drop(own);
    let kept = kept.unwrap();
    thread::spawn(move || {
        kept.wake_by_ref();
        drop(kept);
    })
    .join()
    .unwrap();
}

fn dropping_a_ring_drops_what_is_left(ring: &Ring) {
    let own = Ring::new(crate::config(ring.backend())).unwrap();
    let held = Rc::new(());
    own.block_on(async {
        for _ in 0..10 {
            let held = Rc::clone(&held);
            drop(spawn(async move {
                struct SpawnsInDrop(Rc<()>);
                impl Drop for SpawnsInDrop {
                    fn drop(&mut self) {
                        // It must neither run nor leak.
                        let held = Rc::clone(&self.0);
                        drop(spawn(async move { drop(held) }));
                    }
                }
                let _held = SpawnsInDrop(held);
                pending::<()>().await;
            }));
        }
        ring::yield_now().await;
        assert_eq!(Rc::strong_count(&held), 11);
    });
    drop(own);
    assert_eq!(Rc::strong_count(&held), 1);
}

fn a_shard_may_drop_itself(ring: &Ring) {
    let shard = shard(ring, 16);
    let handle = shard.handle().clone();
    let inside = handle.clone();
    assert!(inside.post(move || drop(shard)).is_ok());
    // It closes before it goes.
    while handle.call(|| async {}).wait().is_ok() {
        thread::yield_now();
    }
}

#[test]
fn auto_takes_threads_where_io_uring_is_refused() {
    // The filter binds the calling thread only, and it cannot be taken off again.
    thread::spawn(|| {
        refuse_io_uring();
        let error = Ring::new(crate::config(Backend::Uring)).err().expect("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        if std::env::var_os("HEADWATER_RING").is_some() {
            println!("skipped: HEADWATER_RING is set, so Auto means that");
            return;
        }
        let ring = Ring::new(crate::config(Backend::Auto)).unwrap();
        assert_eq!(ring.backend(), Backend::Threads);
        let file = File::new(tempfile::tempfile().unwrap().into());
        ring.block_on(async {
            assert_eq!(file.write_at(0, &Iov::from_slice(b"abc"), true).await.unwrap(), 3);
        });
    })
    .join()
    .unwrap();
}

/// Does what a container's profile does: `io_uring_setup` answers `EPERM` on this thread.
fn refuse_io_uring() {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0);
    let equal = libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: 1,
        k: libc::SYS_io_uring_setup as u32,
    };
    let refuse = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
    let allow = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW);
    let mut filter = [load, equal, refuse, allow];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its statements are valid for both calls, and the kernel copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}
