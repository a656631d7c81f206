//! Images in real files, on a real ring, past and through the page cache.

use crate::guest::Guest;
use crate::subject::subjects;
use ring::{Backend, Config, Ring};
use store::Store;
use store::file::{FileStore, OpenOptions};

#[test]
fn images_live_in_files() {
    for backend in [Backend::Auto, Backend::Threads] {
        let ring = Ring::new(Config { backend, ..Config::default() }).unwrap();
        ring.block_on(async {
            for (number, subject) in subjects().into_iter().enumerate() {
                for direct in [false, true] {
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("image");
                    let options = OpenOptions { direct, ..OpenOptions::default() };
                    // tmpfs and the like know no direct I/O.
                    let Ok(store) = FileStore::create(&path, options.clone()).await else {
                        assert!(direct);
                        continue;
                    };
                    subject.create(store.clone(), 40 << 20, None).await;
                    let guest = Guest::new(subject.open(store).await.unwrap(), &[]);
                    let tasks: Vec<_> = (0..16u64)
                        .map(|n| {
                            let guest = guest.clone();
                            ring::spawn(async move {
                                guest.write(n * (2 << 20) + n * 100, &vec![n as u8 + 1; 150_000]).await.unwrap();
                                guest.image.commit().await.unwrap();
                            })
                        })
                        .collect();
                    for task in tasks {
                        task.await;
                    }
                    guest
                        .image
                        .write_zeroes(layout::GuestRange::new(layout::GuestOffset(0), 65536), true, true)
                        .await
                        .unwrap();
                    guest.image.close().await.unwrap();
                    let length = std::fs::metadata(&path).unwrap().len();
                    assert!(
                        length < 10 << 20 && length.is_multiple_of(subject.cluster_size.unwrap()),
                        "{number}: {length}"
                    );
                    let store = FileStore::open(&path, options).await.unwrap();
                    assert_eq!(store.size(), length);
                    let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
                    assert!(guest.read(0, 65536).await.unwrap().iter().all(|b| *b == 0));
                    for n in 1..16u64 {
                        let bytes = guest.read(n * (2 << 20) + n * 100, 150_000).await.unwrap();
                        assert!(bytes.iter().all(|b| *b == n as u8 + 1), "{} direct {direct}: write {n}", subject.name);
                    }
                    guest.image.close().await.unwrap();
                    let store = FileStore::open(&path, OpenOptions { read_only: true, ..OpenOptions::default() })
                        .await
                        .unwrap();
                    subject.assert_clean(store).await;
                }
            }
        });
    }
}
