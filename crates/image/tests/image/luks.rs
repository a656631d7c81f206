//! Encrypted images: LUKS by itself and within QCOW2. What the reference writes we read, what we write it accepts; no key, no data.

use crate::guest::Guest;
use crate::reference::{lab, ok, tool};
use image::create::CreateOptions;
use image::{ErrorKind, Format, Image, OpenOptions, Passphrase, Repair, Surroundings, qcow2};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use store::Store;
use store::memory::MemoryStore;

const SECRET: &[u8] = b"open sesame";

fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(17).block_on(test)
}

async fn open(
    store: Rc<MemoryStore>,
    format: Format,
    read_only: bool,
    secret: Option<&[u8]>,
) -> image::Result<Rc<dyn Image>> {
    let surroundings = Surroundings { passphrase: secret, ..Surroundings::default() };
    image::open_in(store, format, OpenOptions { read_only, for_check: false }, surroundings).await
}

fn options(format: Format, size: u64) -> CreateOptions {
    CreateOptions {
        passphrase: Some(Passphrase::new(SECRET)),
        iteration_time: Some(Duration::ZERO),
        qcow2: qcow2::Options { encrypted: format == Format::Qcow2, ..qcow2::Options::default() },
        ..CreateOptions::new(format, size)
    }
}

/// How the reference names it.
fn named(format: &str, file: &str) -> String {
    let key = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
    format!("driver={format},{key}=s,file.filename={file}")
}

const OBJECT: &str = "secret,id=s,data=open sesame";

fn check(folder: &Path, file: &str) {
    ok(folder, &["qemu-img", "check", "-q", "--object", OBJECT, "--image-opts", &named("qcow2", file)]);
}

#[test]
fn what_the_reference_wrote_is_read_and_written_on() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for (format, made) in [
        ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
        (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,cluster_size=4k",
        ),
        ("luks", "key-secret=s,iter-time=10"),
        ("luks", "key-secret=s,iter-time=10,hash-alg=sha512,cipher-alg=aes-192"),
        ("luks", "key-secret=s,iter-time=10,hash-alg=sha1,cipher-mode=cbc,ivgen-alg=plain64"),
    ] {
        let _ = std::fs::remove_file(folder.join("a"));
        ok(folder, &["qemu-img", "create", "-q", "--object", OBJECT, "-f", format, "-o", made, "a", "8M"]);
        let theirs = named(format, "a");
        let io = |commands: &[&str]| {
            let mut line = vec!["qemu-io", "--object", OBJECT, "--image-opts"];
            for command in commands {
                line.extend(["-c", command]);
            }
            line.push(&theirs);
            ok(folder, &line);
        };
        io(&["write -P 5 0 64k", "write -P 6 1M 100k", "write -P 7 3000k 5k"]);
        let bytes = std::fs::read(folder.join("a")).unwrap();
        let wanted = Format::from_name(format).unwrap();
        let after = in_sim(async {
            let store = MemoryStore::from_bytes("a", &bytes);
            assert_eq!(image::probe::probe(&*store).await.unwrap(), wanted);
            let image = open(store.clone(), wanted, false, Some(SECRET)).await.unwrap();
            assert_eq!(image.size(), 8 << 20, "{format} {made}");
            let guest = Guest::new(image, &[]);
            assert!(guest.read(0, 64 << 10).await.unwrap().iter().all(|b| *b == 5), "{format} {made}");
            assert!(guest.read(1 << 20, 100 << 10).await.unwrap().iter().all(|b| *b == 6));
            assert!(guest.read(3000 << 10, 5 << 10).await.unwrap().iter().all(|b| *b == 7));
            if format == "qcow2" {
                assert!(guest.read(5 << 20, 1 << 20).await.unwrap().iter().all(|b| *b == 0));
                assert!(guest.image.info().encrypted);
            }
            guest.write(10_000, &[8; 3000]).await.unwrap();
            guest.write(6 << 20, &vec![9; 70_000]).await.unwrap();
            guest.image.close().await.unwrap();
            store.to_vec()
        });
        std::fs::write(folder.join("a"), after).unwrap();
        if format == "qcow2" {
            check(folder, "a");
        }
        io(&["read -P 5 0 10000", "read -P 8 10000 3000", "read -P 5 13000 50000", "read -P 9 6M 70000"]);
        if format == "qcow2" {
            io(&["read -P 0 6361456 60000"]);
        }
    }
}

#[test]
fn what_we_make_the_reference_opens() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for (format, cluster) in [
        (Format::Qcow2, Some(65536)),
        (Format::Qcow2, Some(512)),
        (Format::Qcow2, Some(256 << 10)),
        (Format::Luks, None),
    ] {
        let mut model = vec![0_u8; 4 << 20];
        let bytes = in_sim(async {
            let store = MemoryStore::new("a", 0);
            let options = CreateOptions { cluster_size: cluster, ..options(format, 4 << 20) };
            image::create::create(store.clone(), &options).await.unwrap();
            let image = open(store.clone(), format, false, Some(SECRET)).await.unwrap();
            let guest = Guest::new(image, &[]);
            let mut state = 3_u64;
            for n in 0..40_u8 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (state >> 20) as usize % (3 << 20);
                let len = (state >> 50) as usize % 9000 + 1;
                model[at..at + len].fill(n + 1);
                guest.write(at as u64, &vec![n + 1; len]).await.unwrap();
            }
            let zeros = GuestRange::new(GuestOffset(1 << 20), 2 << 20);
            if format == Format::Qcow2 {
                guest.image.write_zeroes(zeros, true, false).await.unwrap();
                model[1 << 20..3 << 20].fill(0);
            }
            assert!(guest.read_all().await.unwrap() == model, "{format} {cluster:?}");
            guest.image.close().await.unwrap();
            store.to_vec()
        });
        // Nothing of it can be read without the key.
        assert!(
            !bytes
                .windows(64)
                .step_by(32)
                .any(|window| window[0] > 0 && window[0] <= 40 && window.iter().all(|b| *b == window[0]))
        );
        std::fs::write(folder.join("a"), bytes).unwrap();
        std::fs::write(folder.join("m.raw"), &model).unwrap();
        let name = format.name();
        if format == Format::Qcow2 {
            check(folder, "a");
        }
        ok(
            folder,
            &[
                "qemu-img",
                "compare",
                "--object",
                OBJECT,
                "--image-opts",
                &named(name, "a"),
                "driver=raw,file.filename=m.raw",
            ],
        );
    }
}

#[test]
fn without_the_key_there_are_no_data_and_the_rest_can_be_looked_at() {
    in_sim(async {
        let store = MemoryStore::new("ours", 0);
        image::create::create(store.clone(), &options(Format::Qcow2, 4 << 20)).await.unwrap();
        let guest = Guest::new(open(store.clone(), Format::Qcow2, false, Some(SECRET)).await.unwrap(), &[]);
        guest.write(0, &vec![7; 100_000]).await.unwrap();
        guest.image.close().await.unwrap();
        let wrong = open(store.clone(), Format::Qcow2, true, Some(b"open barley")).await.map(drop).unwrap_err();
        assert!(wrong.to_string().contains("Invalid password, cannot unlock any keyslot"), "{wrong}");
        let locked = open(store.clone(), Format::Qcow2, true, None).await.unwrap();
        assert!(locked.info().encrypted && locked.size() == 4 << 20);
        let report = locked.check(Repair::None).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        let refused = Guest::new(locked, &[]).read(0, 512).await.unwrap_err();
        assert!(refused.to_string().contains("passphrase"), "{refused}");
        let packed = open(store.clone(), Format::Qcow2, false, Some(SECRET)).await.unwrap();
        let refused = packed.pack(GuestOffset(2 << 20), ring::Iov::zeroed(65536)).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        packed.close().await.unwrap();
        let volume = MemoryStore::new("ours", 0);
        image::create::create(volume.clone(), &options(Format::Luks, 1 << 20)).await.unwrap();
        let refused = open(volume, Format::Luks, true, None).await.map(drop).unwrap_err();
        assert!(refused.to_string().contains("key-secret"), "{refused}");
        let mut bare = options(Format::Qcow2, 1 << 20);
        bare.passphrase = None;
        let refused = image::create::create(MemoryStore::new("ours", 0), &bare).await.unwrap_err();
        assert!(refused.to_string().contains("encrypt.key-secret"), "{refused}");
    });
}

#[test]
fn damaged_headers_are_errors_with_a_place_and_take_no_time() {
    let sound = in_sim(async {
        let store = MemoryStore::new("ours", 0);
        image::create::create(store.clone(), &options(Format::Luks, 1 << 20)).await.unwrap();
        store.to_vec()
    });
    let mut state = 5_u64;
    for round in 0..150 {
        let mut bytes = sound.clone();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 33) as usize % 590;
        // Numbers of rounds may be large and sound: they are tried, for minutes if it must be.
        if (164..168).contains(&at) || at >= 208 && ((at - 208) % 48) / 4 == 1 {
            continue;
        }
        bytes[at] ^= (state >> 20) as u8 | 1;
        if round % 9 == 0 {
            bytes.truncate(at * 100);
        }
        in_sim(async {
            let store = MemoryStore::from_bytes("ours", &bytes);
            if let Err(error) = open(store.clone(), Format::Luks, true, Some(SECRET)).await {
                assert!(error.to_string().contains("ours"), "{error}");
            }
            store.close().await.unwrap();
        });
    }
}

#[test]
fn a_wrong_secret_is_told_as_the_reference_tells_it() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let made = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    ok(folder, &["qemu-img", "create", "-q", "--object", OBJECT, "-f", "qcow2", "-o", made, "a", "1M"]);
    let wrong =
        tool(folder, &["qemu-img", "map", "--object", "secret,id=s,data=x", "--image-opts", &named("qcow2", "a")]);
    let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(said.contains("Invalid password, cannot unlock any keyslot"), "{said}");
}
