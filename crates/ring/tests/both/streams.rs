//! Sockets, pipes, eventfds.

use ring::{Events, File, Iov, Ring, sleep, spawn, timeout, yield_now};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

on_both! {
    bytes_go_both_ways
    large_transfers_in_pieces
    a_stream_that_ends_early_says_so
    sending_to_nobody_is_an_error_not_a_signal
    connections_are_accepted_and_close_on_exec
    many_wait_on_one_listener
    non_blocking_descriptors_are_waited_for
    eventfds_count
    pipes_carry_bytes
    readiness
    a_dropped_wait_lets_go_of_the_descriptor
    a_dropped_accept_swallows_no_connection_for_good
    a_stream_that_is_always_ready_starves_nobody
    waiting_sockets_hold_up_no_files
}

/// Far longer than anything here takes; a test that gets there has failed.
const LONG: Duration = Duration::from_mins(1);

fn pair() -> (File, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (File::new(ours.into()), theirs)
}

fn pair_of_files() -> (File, File) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (File::new(ours.into()), File::new(theirs.into()))
}

fn bytes_go_both_ways(ring: &Ring) {
    let (ours, theirs) = pair_of_files();
    ring.block_on(async {
        let echo = spawn(async move {
            let iov = Iov::alloc(5);
            theirs.recv_exact(&iov).await.unwrap();
            theirs.send_all(&iov).await.unwrap();
        });
        ours.send_all(&Iov::from_slice(b"hello")).await.unwrap();
        let list = Iov::alloc(2).join(&Iov::alloc(3));
        assert_eq!(list.segments(), 2);
        ours.recv_exact(&list).await.unwrap();
        assert_eq!(list.to_vec(), b"hello");
        echo.await;
        assert_eq!(ours.recv(&Iov::alloc(1)).await.unwrap(), 0, "the end");
        assert_eq!(ours.recv(&Iov::empty()).await.unwrap(), 0);
        assert_eq!(ours.send(&Iov::empty()).await.unwrap(), 0);
    });
}

fn large_transfers_in_pieces(ring: &Ring) {
    let (ours, theirs) = pair_of_files();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at * 31 / 7) as u8).collect();
    ring.block_on(async {
        let from = bytes.chunks(70_001).fold(Iov::empty(), |list, part| list.join(&Iov::from_slice(part)));
        let sending = spawn(async move { ours.send_all(&from).await.unwrap() });
        let into = Iov::alloc(1_000_000).join(&Iov::alloc(2_000_000));
        theirs.recv_exact(&into).await.unwrap();
        sending.await;
        assert!(into.to_vec() == bytes);
    });
}

fn a_stream_that_ends_early_says_so(ring: &Ring) {
    let (ours, mut theirs) = pair();
    theirs.write_all(b"abc").unwrap();
    drop(theirs);
    ring.block_on(async {
        let error = ours.recv_exact(&Iov::alloc(10)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("3 of 10"), "{error}");
    });
}

fn sending_to_nobody_is_an_error_not_a_signal(ring: &Ring) {
    let (ours, theirs) = pair();
    drop(theirs);
    ring.block_on(async {
        for iov in [Iov::zeroed(10), Iov::zeroed(10).join(&Iov::zeroed(10))] {
            assert_eq!(ours.send(&iov).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
    });
}

fn connections_are_accepted_and_close_on_exec(ring: &Ring) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listener = File::new(listener.into());
    ring.block_on(async {
        let accepting = spawn(async move { listener.accept().await.unwrap() });
        let mut peer = ring::unblock(move || TcpStream::connect(address).unwrap()).await;
        let accepted = accepting.await;
        // SAFETY: no pointers are passed.
        let flags = unsafe { libc::fcntl(accepted.as_fd().as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        peer.write_all(b"hi").unwrap();
        let iov = Iov::alloc(2);
        accepted.recv_exact(&iov).await.unwrap();
        assert_eq!(iov.to_vec(), b"hi");
    });
}

fn many_wait_on_one_listener(ring: &Ring) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = File::new(UnixListener::bind(&path).unwrap().into());
    ring.block_on(async {
        let accepting: Vec<_> = (0..20)
            .map(|_| {
                let listener = listener.clone();
                spawn(async move { listener.accept().await.unwrap() })
            })
            .collect();
        yield_now().await;
        let peers: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
        for task in accepting {
            task.await.send_all(&Iov::from_slice(b"!")).await.unwrap();
        }
        for mut peer in peers {
            let mut byte = [0];
            peer.read_exact(&mut byte).unwrap();
            assert_eq!(byte, *b"!");
        }
    });
}

fn non_blocking_descriptors_are_waited_for(ring: &Ring) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = File::new(ours.into());
    ring.block_on(async {
        let receiving = spawn(async move {
            let iov = Iov::alloc(3);
            ours.recv_exact(&iov).await.unwrap();
            iov.to_vec()
        });
        sleep(Duration::from_millis(5)).await;
        theirs.write_all(b"abc").unwrap();
        assert_eq!(receiving.await, b"abc");
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = File::new(listener.into());
    ring.block_on(async {
        let accepting = spawn(async move { listener.accept().await.map(drop) });
        sleep(Duration::from_millis(5)).await;
        let _peer = UnixStream::connect(&path).unwrap();
        accepting.await.unwrap();
    });
}

fn eventfds_count(ring: &Ring) {
    for flags in [0, libc::EFD_NONBLOCK] {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::eventfd(0, flags | libc::EFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: just made, for us alone.
        let file = File::new(unsafe { OwnedFd::from_raw_fd(fd) });
        ring.block_on(async {
            let reader = file.clone();
            let reading = spawn(async move {
                let iov = Iov::alloc(8);
                assert_eq!(reader.recv(&iov).await.unwrap(), 8);
                u64::from_ne_bytes(iov.to_vec().try_into().unwrap())
            });
            yield_now().await;
            file.send_all(&Iov::from_slice(&7_u64.to_ne_bytes())).await.unwrap();
            assert_eq!(reading.await, 7);
        });
    }
}

fn pipes_carry_bytes(ring: &Ring) {
    let (reader, writer) = io::pipe().unwrap();
    let (reader, writer) = (File::new(reader.into()), File::new(writer.into()));
    let bytes: Vec<u8> = (0..500_000_u32).map(|at| (at % 253) as u8).collect();
    ring.block_on(async {
        let from = Iov::from_slice(&bytes[..100_000]).join(&Iov::from_slice(&bytes[100_000..]));
        let sending = spawn(async move { writer.send_all(&from).await.unwrap() });
        let into = Iov::alloc(bytes.len());
        reader.recv_exact(&into).await.unwrap();
        sending.await;
        assert!(into.to_vec() == bytes);
        assert_eq!(reader.recv(&into).await.unwrap(), 0, "the writer has gone");
    });
}

fn readiness(ring: &Ring) {
    let (ours, mut theirs) = pair();
    ring.block_on(async {
        ours.poll(Events::Writable).await.unwrap();
        assert!(timeout(Duration::from_millis(5), ours.poll(Events::Readable)).await.is_none());
        let waiting = {
            let ours = ours.clone();
            spawn(async move { ours.poll(Events::Readable).await })
        };
        yield_now().await;
        theirs.write_all(b"x").unwrap();
        waiting.await.unwrap();
        drop(theirs);
        ours.poll(Events::Readable).await.unwrap();
    });
}

fn a_dropped_wait_lets_go_of_the_descriptor(ring: &Ring) {
    ring.block_on(async {
        for registered in [false, true] {
            let (ours, theirs) = pair_of_files();
            if registered {
                ours.register();
            }
            let iov = Iov::alloc(1);
            assert!(timeout(Duration::from_millis(2), ours.recv(&iov)).await.is_none());
            assert!(timeout(Duration::from_millis(2), ours.poll(Events::Readable)).await.is_none());
            drop(ours);
            // The peer sees the end: nothing keeps the descriptor open.
            assert_eq!(timeout(LONG, theirs.recv(&iov)).await.expect("closed").unwrap(), 0);
        }
    });
}

fn a_dropped_accept_swallows_no_connection_for_good(ring: &Ring) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = File::new(UnixListener::bind(&path).unwrap().into());
    ring.block_on(async {
        for _ in 0..20 {
            let accepting = {
                let listener = listener.clone();
                spawn(async move { listener.accept().await.map(drop) })
            };
            yield_now().await;
            let peer = File::new(UnixStream::connect(&path).unwrap().into());
            accepting.cancel();
            // Either nobody has taken the connection, and the next one can, or it was taken and is closed.
            let iov = Iov::alloc(1);
            let closed = async { peer.recv(&iov).await.map(|_| ()) };
            let next = async { listener.accept().await.map(drop) };
            let (closed, next) = (std::pin::pin!(closed), std::pin::pin!(next));
            assert!(timeout(LONG, futures_util::future::select(closed, next)).await.is_some());
        }
    });
}

fn a_stream_that_is_always_ready_starves_nobody(ring: &Ring) {
    let zeros = File::new(std::fs::File::open("/dev/zero").unwrap().into());
    ring.block_on(async {
        let hungry = spawn(async move {
            let iov = Iov::alloc(16);
            loop {
                zeros.recv(&iov).await.unwrap();
            }
        });
        sleep(Duration::from_millis(5)).await;
        hungry.cancel();
    });
}

fn waiting_sockets_hold_up_no_files(ring: &Ring) {
    let pairs: Vec<_> = (0..50).map(|_| pair()).collect();
    ring.block_on(async {
        let waiting: Vec<_> = pairs
            .iter()
            .map(|(ours, _)| {
                let ours = ours.clone();
                spawn(async move { ours.recv(&Iov::alloc(1)).await.unwrap() })
            })
            .collect();
        yield_now().await;
        let file = File::new(tempfile::tempfile().unwrap().into());
        timeout(LONG, file.write_at(0, &Iov::zeroed(512), false)).await.expect("no thread is free").unwrap();
        assert_eq!(timeout(LONG, ring::unblock(|| 1)).await, Some(1));
        for (_, theirs) in &pairs {
            let mut theirs = theirs;
            theirs.write_all(b"x").unwrap();
        }
        for task in waiting {
            assert_eq!(task.await, 1);
        }
    });
}
