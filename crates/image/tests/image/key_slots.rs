//! Passphrases come and go: those that stay open the volume at every instant, those that are gone do so no more, and the
//! data are the same throughout.

use crate::crash::cut_everywhere;
use crate::guest::Guest;
use crate::reference::{lab, ok, tool};
use image::create::CreateOptions;
use image::{ErrorKind, Format, Image, OpenOptions, Passphrase, Result, SlotChange, Surroundings, qcow2};
use layout::HostOffset;
use layout::luks::Slot;
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use std::time::Duration;
use store::Store;
use store::fault::FaultStore;
use store::memory::{MemoryStore, Snapshot};

const SIZE: u64 = 1 << 20;

async fn open(store: Rc<dyn Store>, format: Format, secret: &str) -> Result<Rc<dyn Image>> {
    let surroundings = Surroundings { passphrase: Some(secret.as_bytes()), ..Surroundings::default() };
    image::open_in(store, format, OpenOptions { read_only: false, for_check: false }, surroundings).await
}

fn passphrase(secret: &str) -> Passphrase {
    Passphrase::new(secret.as_bytes())
}

fn add(slot: Option<usize>, secret: &str) -> SlotChange {
    SlotChange::Add { slot, passphrase: passphrase(secret), deriving: Some(Duration::ZERO) }
}

async fn change(store: Rc<dyn Store>, format: Format, with: &str, change: &SlotChange, force: bool) -> Result<()> {
    let image = open(store, format, with).await?;
    let changed = image.key_slots().unwrap().change(change, force).await;
    image.close().await?;
    changed
}

/// A volume under the passphrase `a` that says 7 from 100000 on.
async fn made(format: Format) -> Rc<MemoryStore> {
    let store = MemoryStore::new("volume.img", 0);
    let options = CreateOptions {
        passphrase: Some(passphrase("a")),
        iteration_time: Some(Duration::ZERO),
        qcow2: qcow2::Options { encrypted: format == Format::Qcow2, ..qcow2::Options::default() },
        ..CreateOptions::new(format, SIZE)
    };
    image::create::create(store.clone(), &options).await.unwrap();
    let guest = Guest::new(open(store.clone(), format, "a").await.unwrap(), &[]);
    guest.write(100_000, &vec![7; 50_000]).await.unwrap();
    guest.image.close().await.unwrap();
    store
}

/// Whether the passphrase opens it. If it does, what was written is there.
async fn opens(store: Rc<dyn Store>, format: Format, secret: &str) -> bool {
    match open(store, format, secret).await {
        Ok(image) => {
            let guest = Guest::new(image, &[]);
            assert!(guest.read(100_000, 50_000).await.unwrap().iter().all(|b| *b == 7), "{format} {secret}");
            guest.image.close().await.unwrap();
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            assert!(error.to_string().contains("Invalid password"), "{error}");
            false
        }
    }
}

/// What is done, under which passphrase, whether by force, and which open the volume before and after.
type Step = (SlotChange, &'static str, bool, &'static [&'static str], &'static [&'static str]);

#[test]
fn slots_are_filled_and_emptied_and_the_power_may_go_at_any_moment() {
    let steps: [Step; 5] = [
        (add(None, "b"), "a", false, &["a"], &["a", "b"]),
        (add(Some(5), "c"), "b", false, &["a", "b"], &["a", "b", "c"]),
        (add(Some(1), "d"), "a", true, &["a", "b", "c"], &["a", "c", "d"]),
        (SlotChange::Erase(5, Some(passphrase("c"))), "a", false, &["a", "c", "d"], &["a", "d"]),
        (SlotChange::Forget(passphrase("a")), "d", false, &["a", "d"], &["d"]),
    ];
    for format in [Format::Luks, Format::Qcow2] {
        Sim::new(9).block_on(async {
            let mut store = made(format).await;
            // Within QCOW2 only the place is another.
            let count = if format == Format::Luks { steps.len() } else { 2 };
            for (what, with, force, before, after) in &steps[..count] {
                let act = async |fault: Rc<FaultStore>| {
                    change(fault, format, with, what, *force).await.unwrap();
                };
                let look = async |state: Snapshot, moment: &str| {
                    let store = MemoryStore::from_snapshot("after-the-cut.img", state);
                    for secret in ["a", "b", "c", "d"] {
                        let (was, is) = (before.contains(&secret), after.contains(&secret));
                        let opened = opens(store.clone(), format, secret).await;
                        assert!(opened == was || opened == is, "{format}: {what:?}: {moment}: {secret}: {opened}");
                    }
                };
                cut_everywhere(store.snapshot(), 1, act, look).await;
                let next = MemoryStore::from_snapshot("next.img", store.snapshot());
                change(next.clone(), format, with, what, *force).await.unwrap();
                for secret in ["a", "b", "c", "d"] {
                    assert_eq!(
                        opens(next.clone(), format, secret).await,
                        after.contains(&secret),
                        "{what:?}: {secret}"
                    );
                }
                store = next;
            }
        });
    }
}

#[test]
fn what_would_lose_the_key_is_refused_and_changes_nothing() {
    Sim::new(10).block_on(async {
        let store = made(Format::Luks).await;
        change(store.clone(), Format::Luks, "a", &add(Some(1), "b"), false).await.unwrap();
        let before = store.to_vec();
        for (what, text) in [
            (add(Some(1), "c"), "Refusing to overwrite active keyslot 1 - please erase it first"),
            (add(Some(8), "c"), "Invalid keyslot 8 specified, must be between 0 and 7"),
            (SlotChange::Erase(8, None), "Invalid keyslot 8 specified, must be between 0 and 7"),
            (SlotChange::Erase(3, None), "Given keyslot 3 is already erased (inactive)"),
            (
                SlotChange::Erase(0, Some(passphrase("b"))),
                "Given keyslot 0 doesn't contain the given old password for erase operation",
            ),
            (SlotChange::Forget(passphrase("c")), "No keyslots match given (old) password for erase operation"),
        ] {
            let error = change(store.clone(), Format::Luks, "a", &what, false).await.unwrap_err();
            assert!(error.to_string().contains(text), "{what:?}: {error}");
            assert!(store.to_vec() == before, "{what:?}");
        }
        change(store.clone(), Format::Luks, "a", &SlotChange::Erase(1, None), false).await.unwrap();
        let before = store.to_vec();
        for (what, text) in [
            (SlotChange::Erase(0, None), "Attempt to erase the only active keyslot 0"),
            (SlotChange::Forget(passphrase("a")), "All the active keyslots match the (old) password"),
        ] {
            let error = change(store.clone(), Format::Luks, "a", &what, false).await.unwrap_err();
            assert!(error.to_string().contains(text), "{what:?}: {error}");
            assert!(store.to_vec() == before, "{what:?}");
        }
        for n in 1..8 {
            change(store.clone(), Format::Luks, "a", &add(None, &format!("p{n}")), false).await.unwrap();
        }
        let error = change(store.clone(), Format::Luks, "p3", &add(None, "p8"), false).await.unwrap_err();
        assert!(error.to_string().contains("all keyslots are in use"), "{error}");
        assert!(opens(store.clone(), Format::Luks, "p7").await);
        // With force, what was asked for: the last ones, too.
        change(store.clone(), Format::Luks, "p7", &SlotChange::Forget(passphrase("a")), false).await.unwrap();
        assert!(!opens(store.clone(), Format::Luks, "a").await);
        for n in (1..8).rev() {
            let error = change(store.clone(), Format::Luks, "p1", &SlotChange::Erase(n, None), n == 1).await.err();
            assert!(error.is_none(), "{n}: {error:?}");
        }
        assert!(!opens(store, Format::Luks, "p1").await);
    });
}

/// An inactive slot may say anything: nothing is written over the header, over another slot or over the data.
#[test]
fn a_slot_that_leads_elsewhere_is_not_written_to() {
    Sim::new(11).block_on(async {
        for format in [Format::Luks, Format::Qcow2] {
            let base = made(format).await;
            let bytes = base.to_vec();
            let header = bytes.windows(6).position(|six| six == b"LUKS\xba\xbe").unwrap() as u64;
            for sector in [0_u32, 1, 8, 0x7fff_ffff, u32::MAX, 4096 + 8] {
                let store = MemoryStore::from_bytes("hostile.img", &bytes);
                let at = HostOffset(header + Slot::place(3) + 40);
                store.write(at, Iov::from_slice(&sector.to_be_bytes()), false).await.unwrap();
                let before = store.to_vec();
                let error = change(store.clone(), format, "a", &add(Some(3), "b"), false).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                assert!(store.to_vec() == before, "{format} {sector}");
            }
        }
    });
}

/// The reference opens with what we put in, and not with what we took; and the other way round.
#[test]
fn the_reference_agrees() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let objects = ["secret,id=a,data=a", "secret,id=b,data=b", "secret,id=c,data=c"];
    for (format, key) in [(Format::Luks, "key-secret"), (Format::Qcow2, "encrypt.key-secret")] {
        let named = |secret: &str| format!("driver={format},{key}={secret},file.filename=v");
        let line = |words: &[&str], last: &str| {
            let mut line = words.to_vec();
            for object in &objects {
                line.extend(["--object", object]);
            }
            line.extend(["--image-opts", last]);
            line.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        let ok = |words: &[&str], last: &str| {
            let line = line(words, last);
            ok(folder, &line.iter().map(String::as_str).collect::<Vec<_>>());
        };
        let refused = |secret: &str| {
            let line = line(&["qemu-io", "-c", "read 0 512"], &named(secret));
            let output = tool(folder, &line.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(String::from_utf8_lossy(&output.stderr).contains("Invalid password"), "{secret}: {output:?}");
        };
        let read = ["qemu-io", "-c", "read -P 7 100000 50000"];
        let ours = |with: &'static str, what: SlotChange| {
            let bytes = std::fs::read(folder.join("v")).unwrap();
            let after = Sim::new(12).block_on(async {
                let store = MemoryStore::from_bytes("v", &bytes);
                change(store.clone(), format, with, &what, false).await.unwrap();
                store.to_vec()
            });
            std::fs::write(folder.join("v"), after).unwrap();
        };
        let made = Sim::new(12).block_on(async { made(format).await.to_vec() });
        std::fs::write(folder.join("v"), made).unwrap();
        ours("a", add(None, "b"));
        ok(&read, &named("a"));
        ok(&read, &named("b"));
        ours("b", SlotChange::Erase(0, None));
        refused("a");
        ok(&read, &named("b"));
        let prefix = if format == Format::Luks { "" } else { "encrypt." };
        let options = format!("{prefix}state=active,{prefix}new-secret=c,{prefix}iter-time=10,{prefix}keyslot=0");
        ok(&["qemu-img", "amend", "-o", &options], &named("b"));
        ours("c", SlotChange::Forget(passphrase("b")));
        refused("b");
        ok(&read, &named("c"));
    }
}
