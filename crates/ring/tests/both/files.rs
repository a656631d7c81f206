//! Operations on files.

use ring::lock::{self, Lock};
use ring::{AllocateMode, Events, File, Iov, Ring, spawn, yield_now};
use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::rc::Rc;
use std::time::Duration;

on_both! {
    bytes_come_back
    lists_of_segments_move_as_one
    more_segments_than_the_kernel_takes_do_less
    reads_are_short_at_the_end_of_the_file
    durable_writes_and_flushes
    allocating_and_freeing_space
    the_length_can_be_set
    errors_are_the_kernels
    offsets_beyond_any_file_are_refused
    many_operations_at_once
    more_operations_than_the_queue_has_room_for
    a_registered_descriptor_works_and_closes
    locks_go_with_the_last_clone
    a_dropped_future_keeps_its_buffer_alive
    direct_io
    regular_files_are_always_ready
    a_file_as_a_stream
}

fn temp() -> (File, fs::File) {
    let file = tempfile::tempfile().unwrap();
    (File::new(file.try_clone().unwrap().into()), file)
}

fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|at| ((at * 7 + at / 251 + salt) % 256) as u8).collect()
}

/// Memory in segments of these lengths.
fn segmented(lens: &[usize]) -> Iov {
    lens.iter().fold(Iov::empty(), |list, len| list.join(&Iov::alloc(*len)))
}

fn bytes_come_back(ring: &Ring) {
    let (file, plain) = temp();
    ring.block_on(async {
        let bytes = pattern(10_000, 1);
        assert_eq!(file.write_at(5, &Iov::from_slice(&bytes), false).await.unwrap(), bytes.len());
        let mut seen = vec![0; bytes.len()];
        plain.read_exact_at(&mut seen, 5).unwrap();
        assert!(seen == bytes);
        let iov = Iov::alloc(bytes.len());
        assert_eq!(file.read_at(5, &iov).await.unwrap(), bytes.len());
        assert!(iov.to_vec() == bytes);
        assert_eq!(file.read_at(0, &Iov::empty()).await.unwrap(), 0);
        assert_eq!(file.write_at(0, &Iov::empty(), false).await.unwrap(), 0);
    });
}

fn lists_of_segments_move_as_one(ring: &Ring) {
    let (file, _plain) = temp();
    ring.block_on(async {
        let bytes = pattern(9000, 2);
        let from = segmented(&[1, 4096, 3, 900, 4000]);
        assert_eq!(from.segments(), 5);
        from.write(0, &bytes);
        assert_eq!(file.write_at(100, &from, false).await.unwrap(), 9000);
        let into = segmented(&[5000, 4000]);
        assert_eq!(file.read_at(100, &into).await.unwrap(), 9000);
        assert!(into.to_vec() == bytes);
        assert_eq!(file.write_at(0, &from.slice(1..9000), true).await.unwrap(), 8999);
    });
}

fn more_segments_than_the_kernel_takes_do_less(ring: &Ring) {
    let (file, _plain) = temp();
    ring.block_on(async {
        let memory = Iov::alloc(4096);
        // Every second byte, so that nothing can be joined.
        let from = (0..1500).fold(Iov::empty(), |list, at| list.join(&memory.slice(at * 2..at * 2 + 1)));
        assert_eq!(from.segments(), 1500);
        from.write(0, &pattern(1500, 3));
        let mut done = 0;
        while done < from.len() {
            let count = file.write_at(done as u64, &from.slice(done..from.len()), false).await.unwrap();
            assert!(count > 0);
            done += count;
        }
        let into = Iov::alloc(1500);
        assert_eq!(file.read_at(0, &into).await.unwrap(), 1500);
        assert!(into.to_vec() == pattern(1500, 3));
    });
}

fn reads_are_short_at_the_end_of_the_file(ring: &Ring) {
    let (file, plain) = temp();
    plain.write_all_at(b"0123456789", 0).unwrap();
    ring.block_on(async {
        let iov = Iov::zeroed(100);
        assert_eq!(file.read_at(4, &iov).await.unwrap(), 6);
        assert_eq!(iov.slice(0..7).to_vec(), b"456789\0");
        assert_eq!(file.read_at(4, &segmented(&[3, 3, 3])).await.unwrap(), 6);
        assert_eq!(file.read_at(10, &iov).await.unwrap(), 0);
        assert_eq!(file.read_at(1 << 40, &iov).await.unwrap(), 0);
    });
}

fn durable_writes_and_flushes(ring: &Ring) {
    let (file, plain) = temp();
    ring.block_on(async {
        assert_eq!(file.write_at(0, &Iov::from_slice(b"durable"), true).await.unwrap(), 7);
        file.sync_data().await.unwrap();
        file.sync_all().await.unwrap();
    });
    let mut seen = [0; 7];
    plain.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"durable");
}

fn allocating_and_freeing_space(ring: &Ring) {
    const MIB: u64 = 1 << 20;
    let (file, plain) = temp();
    ring.block_on(async {
        if let Err(error) = file.allocate(AllocateMode::Extend, 0, MIB).await {
            assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
            println!("skipped: the file system for temporary files cannot allocate");
            return;
        }
        assert_eq!(plain.metadata().unwrap().len(), MIB);
        file.allocate(AllocateMode::KeepSize, MIB, MIB).await.unwrap();
        assert_eq!(plain.metadata().unwrap().len(), MIB, "the length stays");

        file.write_at(0, &Iov::from_slice(&pattern(MIB as usize, 4)), false).await.unwrap();
        file.sync_all().await.unwrap();
        let before = plain.metadata().unwrap().blocks();
        file.allocate(AllocateMode::PunchHole, 0, MIB / 2).await.unwrap();
        file.sync_all().await.unwrap();
        assert!(plain.metadata().unwrap().blocks() < before, "space was freed");
        assert_eq!(plain.metadata().unwrap().len(), MIB);
        let iov = Iov::alloc(MIB as usize);
        assert_eq!(file.read_at(0, &iov).await.unwrap(), MIB as usize);
        assert!(iov.slice(0..MIB as usize / 2).is_zero());
        assert!(!iov.slice(MIB as usize / 2..MIB as usize).is_zero());

        match file.allocate(AllocateMode::ZeroRange, 0, MIB).await {
            Ok(()) => {
                file.read_at(0, &iov).await.unwrap();
                assert!(iov.is_zero());
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "tmpfs cannot"),
        }
        file.allocate(AllocateMode::Extend, 5, 0).await.unwrap();
    });
}

fn the_length_can_be_set(ring: &Ring) {
    let (file, plain) = temp();
    ring.block_on(async {
        file.set_len(12_345).await.unwrap();
        assert_eq!(plain.metadata().unwrap().len(), 12_345);
        file.set_len(10).await.unwrap();
        assert_eq!(plain.metadata().unwrap().len(), 10);
    });
}

fn errors_are_the_kernels(ring: &Ring) {
    let read_only = File::new(fs::File::open("/dev/null").unwrap().into());
    let directory = File::new(fs::File::open(std::env::temp_dir()).unwrap().into());
    ring.block_on(async {
        let iov = Iov::zeroed(512);
        let error = read_only.write_at(0, &iov, false).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        let error = directory.read_at(0, &iov).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EISDIR));
        assert!(read_only.set_len(5).await.is_err());
        assert!(read_only.allocate(AllocateMode::Extend, 0, 5).await.is_err());
        assert!(read_only.accept().await.is_err());
    });
}

fn offsets_beyond_any_file_are_refused(ring: &Ring) {
    let (file, _plain) = temp();
    ring.block_on(async {
        let iov = Iov::zeroed(1);
        for at in [u64::MAX, 1 << 63] {
            assert_eq!(file.read_at(at, &iov).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            assert_eq!(file.write_at(at, &iov, false).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            assert_eq!(file.set_len(at).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    });
}

fn many_operations_at_once(ring: &Ring) {
    let (file, plain) = temp();
    let bytes = pattern(64 * 4096, 5);
    plain.write_all_at(&bytes, 0).unwrap();
    ring.block_on(async {
        let tasks: Vec<_> = (0..2000_usize)
            .map(|at| {
                let file = file.clone();
                let at = (at * 37 % 64) * 4096;
                spawn(async move {
                    let iov = Iov::alloc(4096);
                    assert_eq!(file.read_at(at as u64, &iov).await.unwrap(), 4096);
                    (at, iov)
                })
            })
            .collect();
        for task in tasks {
            let (at, iov) = task.await;
            assert!(iov.to_vec() == bytes[at..at + 4096]);
        }
    });
}

fn more_operations_than_the_queue_has_room_for(ring: &Ring) {
    let small = Ring::new(ring::Config { backend: ring.backend(), entries: 8, inbox: 8 }).unwrap();
    many_operations_at_once(&small);
}

fn a_registered_descriptor_works_and_closes(ring: &Ring) {
    ring.block_on(async {
        let (reader, writer) = io::pipe().unwrap();
        let writer = File::new(writer.into());
        writer.register();
        writer.register();
        let reader = File::new(reader.into());
        reader.register();
        writer.send_all(&Iov::from_slice(b"through the table")).await.unwrap();
        let iov = Iov::alloc(17);
        reader.recv_exact(&iov).await.unwrap();
        assert_eq!(iov.to_vec(), b"through the table");
        // Once the table lets go of it too, the reader sees the end.
        drop(writer);
        assert_eq!(reader.recv(&iov).await.unwrap(), 0);
        // Places are used again: many more descriptors than a table holds.
        for _ in 0..3000 {
            let (file, _plain) = temp();
            file.register();
            assert_eq!(file.read_at(0, &iov).await.unwrap(), 0);
        }
    });
    // A descriptor may outlive the ring, and meet another.
    let (file, plain) = temp();
    plain.write_all_at(b"x", 0).unwrap();
    let other = Ring::new(crate::config(ring.backend())).unwrap();
    other.block_on(async { file.register() });
    ring.block_on(async { assert_eq!(file.read_at(0, &Iov::alloc(1)).await.unwrap(), 1) });
    drop(other);
    ring.block_on(async { assert_eq!(file.read_at(0, &Iov::alloc(1)).await.unwrap(), 1) });
}

fn locks_go_with_the_last_clone(ring: &Ring) {
    let path = tempfile::NamedTempFile::new().unwrap();
    let other = path.reopen().unwrap();
    ring.block_on(async {
        for round in 0..50 {
            let file = File::new(path.reopen().unwrap().into());
            if round % 2 == 0 {
                file.register();
            }
            assert!(lock::set(file.as_fd(), Lock::Exclusive, 100, 1).unwrap());
            assert!(lock::refused(other.as_fd(), Lock::Exclusive, 100, 1).unwrap());
            let task = {
                let file = file.clone();
                spawn(async move { file.write_at(0, &Iov::zeroed(4096), true).await })
            };
            task.await.unwrap();
            drop(file);
            // Nothing in the ring holds the file open any longer. (A kernel worker that has answered lets go of the file a moment
            // after its answer: that much is waited for.)
            let gone = || !lock::refused(other.as_fd(), Lock::Exclusive, 100, 1).unwrap();
            let began = std::time::Instant::now();
            while !gone() && began.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(gone(), "round {round}");
        }
    });
}

fn a_dropped_future_keeps_its_buffer_alive(ring: &Ring) {
    struct Owner {
        _memory: Box<[u8]>,
        gone: Rc<Cell<bool>>,
    }
    impl Drop for Owner {
        fn drop(&mut self) {
            self.gone.set(true);
        }
    }
    let (file, plain) = temp();
    plain.write_all_at(&pattern(4096, 6), 0).unwrap();
    let gone = Rc::new(Cell::new(false));
    ring.block_on(async {
        let mut memory = vec![0; 4096].into_boxed_slice();
        let segment = (memory.as_mut_ptr(), memory.len());
        // SAFETY: the box stays where it is until the owner is dropped.
        let iov = unsafe { Iov::from_raw([segment], Rc::new(Owner { _memory: memory, gone: Rc::clone(&gone) })) };
        let read = {
            let file = file.clone();
            let iov = iov.clone();
            spawn(async move { file.read_at(0, &iov).await })
        };
        drop((iov, file));
        // It starts, and is cancelled before anybody has looked for completions.
        yield_now().await;
        read.cancel();
        assert!(!gone.get(), "the operation holds on to it");
        while !gone.get() {
            ring::sleep(std::time::Duration::from_millis(1)).await;
        }
    });
}

fn direct_io(ring: &Ring) {
    let dir = tempfile::tempdir().unwrap();
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(dir.path().join("direct"));
    let plain = match opened {
        Ok(file) => file,
        Err(error) => {
            println!("skipped: the file system for temporary files has no direct I/O: {error}");
            return;
        }
    };
    let file = File::new(plain.into());
    ring.block_on(async {
        let bytes = pattern(65_536, 7);
        let from = Iov::from_slice(&bytes);
        assert!(from.is_aligned(4096));
        assert_eq!(file.write_at(4096, &from, true).await.unwrap(), 65_536);
        let into = segmented(&[4096, 8192, 53_248]);
        assert_eq!(file.read_at(4096, &into).await.unwrap(), 65_536);
        assert!(into.to_vec() == bytes);
    });
}

fn regular_files_are_always_ready(ring: &Ring) {
    let (file, _plain) = temp();
    ring.block_on(async {
        file.poll(Events::Readable).await.unwrap();
        file.poll(Events::Writable).await.unwrap();
    });
}

fn a_file_as_a_stream(ring: &Ring) {
    let (file, plain) = temp();
    ring.block_on(async {
        file.send_all(&Iov::from_slice(b"appended")).await.unwrap();
        let mut seen = [0; 8];
        plain.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"appended");
        assert_eq!(file.recv(&Iov::alloc(8)).await.unwrap(), 0, "the cursor is at the end");
    });
}
