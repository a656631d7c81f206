//! Chains of real files: names, folders, mistakes in them, and what a stream records.

extern crate headwater_disk as disk;

use disk::chain::{ChainOptions, FileOpener, MAX_DEPTH, open_chain};
use disk::{Disk, DiskOptions, ErrorKind, Layer, Result, StreamBase};
use image::create::{CreateOptions, create};
use image::{BackingRef, Format};
use layout::GuestOffset;
use ring::{Config, Iov, Ring};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use store::file::{FileStore, OpenOptions};

const SIZE: u64 = 1 << 20;

/// Runs `test` in a folder of its own, on a real ring.
fn in_folder(test: impl AsyncFn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    Ring::new(Config::default()).unwrap().block_on(test(dir.path()));
}

fn raw(path: &Path, fill: u8) {
    std::fs::write(path, vec![fill; SIZE as usize]).unwrap();
}

async fn qed(path: &Path, backing: &str, format: Option<Format>) {
    let store = FileStore::create(path, OpenOptions::default()).await.unwrap();
    let backing = Some(BackingRef { name: backing.to_owned(), format });
    let options = CreateOptions { backing, ..CreateOptions::new(Format::Qed, SIZE) };
    create(store.clone(), &options).await.unwrap();
    store::Store::close(&*store).await.unwrap();
}

async fn open(path: &Path) -> Result<Vec<Layer>> {
    open_chain(&FileOpener::default(), path.to_str().unwrap(), ChainOptions::default()).await
}

async fn first_byte(disk: &Disk) -> u8 {
    let into = Iov::zeroed(1);
    disk.read(GuestOffset::ZERO, into.clone()).await.unwrap();
    into.to_vec()[0]
}

async fn message(path: &Path) -> String {
    let error = open(path).await.err().expect("it must not open");
    assert_eq!(error.kind(), ErrorKind::Chain, "{error}");
    error.to_string()
}

/// Three folders: `vm/top.qed` over `templates/middle.qed` over `templates/deep/base.img`.
async fn house(root: &Path) -> PathBuf {
    std::fs::create_dir_all(root.join("vm")).unwrap();
    std::fs::create_dir_all(root.join("templates/deep")).unwrap();
    raw(&root.join("templates/deep/base.img"), 7);
    qed(&root.join("templates/middle.qed"), "deep/base.img", Some(Format::Raw)).await;
    qed(&root.join("vm/top.qed"), "file:../templates/middle.qed", Some(Format::Qed)).await;
    root.join("vm/top.qed")
}

#[test]
fn names_are_relative_to_the_folder_of_who_holds_them() {
    in_folder(async |root| {
        let top = house(root).await;
        let chain = open(&top).await.unwrap();
        assert_eq!(chain.len(), 3);
        assert_eq!(chain[1].name, "file:../templates/middle.qed");
        assert_eq!(chain[2].name, "deep/base.img");
        assert_eq!(chain.iter().map(|layer| layer.image.read_only()).collect::<Vec<_>>(), [false, true, true]);
        let nodes: std::collections::HashSet<_> = chain.iter().map(|layer| layer.node.clone()).collect();
        assert_eq!(nodes.len(), 3);
        let disk = Disk::new("house", chain, DiskOptions::default());
        assert_eq!(first_byte(&disk).await, 7);
        let middle = StreamBase::Node(disk.chain()[1].node.clone());
        let base = StreamBase::Node(disk.chain()[2].node.clone());
        let opened = disk.chain()[2].image.store().name().to_owned();
        for name in ["deep/base.img", "file:deep/base.img", &opened, &disk.chain()[2].node] {
            assert_eq!(disk.find_base(name), Some(base.clone()), "{name}");
        }
        assert_eq!(disk.find_base("../templates/middle.qed"), Some(middle));
        assert_eq!(disk.find_base("base.img"), None);
        assert_eq!(disk.find_base(top.to_str().unwrap()), None, "the top is no base");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_base_in_another_folder_is_recorded_so_that_it_is_found() {
    in_folder(async |root| {
        let top = house(root).await;
        let disk = Disk::new("house", open(&top).await.unwrap(), DiskOptions::default());
        let base = disk.find_base("deep/base.img").unwrap();
        disk.finish_stream(&base, None).await.unwrap();
        assert_eq!(disk.chain()[1].name, "../templates/deep/base.img");
        // What is let go of can be changed by others at once.
        let locked = FileStore::open(&root.join("templates/middle.qed"), OpenOptions::default()).await.unwrap();
        store::Store::close(&*locked).await.unwrap();
        disk.close().await.unwrap();
        std::fs::remove_file(root.join("templates/middle.qed")).unwrap();
        let chain = open(&top).await.unwrap();
        let backing = chain[0].image.backing().unwrap();
        assert_eq!(backing, BackingRef { name: "../templates/deep/base.img".to_owned(), format: Some(Format::Raw) });
        let disk = Disk::new("house", chain, DiskOptions::default());
        assert_eq!(first_byte(&disk).await, 7);
        let base = disk.find_base("../templates/deep/base.img").unwrap();
        disk.finish_stream(&base, Some("/elsewhere/base.img")).await.unwrap();
        assert_eq!(disk.chain()[0].image.backing().unwrap().name, "/elsewhere/base.img", "as the user said");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_missing_backing_file_is_named_with_who_names_it() {
    in_folder(async |root| {
        qed(&root.join("top.qed"), "gone.img", Some(Format::Raw)).await;
        let said = message(&root.join("top.qed")).await;
        assert!(said.contains("top.qed") && said.contains("'gone.img'") && said.contains("No such file"), "{said}");
        // The failure left no lock behind.
        raw(&root.join("gone.img"), 1);
        let chain = open(&root.join("top.qed")).await.unwrap();
        Disk::new("x", chain, DiskOptions::default()).close().await.unwrap();
    });
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    in_folder(async |root| {
        std::os::unix::fs::symlink(root, root.join("again")).unwrap();
        qed(&root.join("a.qed"), "b.qed", Some(Format::Qed)).await;
        qed(&root.join("b.qed"), "again/a.qed", Some(Format::Qed)).await;
        let said = message(&root.join("a.qed")).await;
        assert!(said.contains("b.qed") && said.contains("'again/a.qed'"), "{said}");
        qed(&root.join("self.qed"), "self.qed", Some(Format::Qed)).await;
        message(&root.join("self.qed")).await;
    });
}

#[test]
fn a_chain_that_is_too_deep_is_refused() {
    in_folder(async |root| {
        raw(&root.join("0"), 1);
        for i in 1..=MAX_DEPTH {
            let format = if i == 1 { Format::Raw } else { Format::Qed };
            qed(&root.join(i.to_string()), &(i - 1).to_string(), Some(format)).await;
        }
        let chain = open(&root.join((MAX_DEPTH - 1).to_string())).await.unwrap();
        assert_eq!(chain.len(), MAX_DEPTH);
        let disk = Disk::new("deep", chain, DiskOptions::default());
        assert_eq!(first_byte(&disk).await, 1);
        disk.close().await.unwrap();
        let said = message(&root.join(MAX_DEPTH.to_string())).await;
        assert!(said.contains("200"), "{said}");
    });
}

#[test]
fn protocols_that_are_not_served_are_no_files() {
    in_folder(async |root| {
        for name in ["nbd://host/x", "http://host/x.img", "json:{\"driver\":\"raw\"}"] {
            qed(&root.join("top.qed"), name, Some(Format::Raw)).await;
            let said = message(&root.join("top.qed")).await;
            assert!(said.contains(name), "{said}");
        }
        raw(&root.join("a:b.img"), 5);
        qed(&root.join("top.qed"), "./a:b.img", Some(Format::Raw)).await;
        let disk = Disk::new("x", open(&root.join("top.qed")).await.unwrap(), DiskOptions::default());
        assert_eq!(first_byte(&disk).await, 5);
        disk.close().await.unwrap();
    });
}

#[test]
fn without_its_backing_file_a_disk_is_not_written() {
    in_folder(async |root| {
        raw(&root.join("base"), 5);
        qed(&root.join("top.qed"), "base", Some(Format::Raw)).await;
        let options = ChainOptions { no_backing: true, ..ChainOptions::default() };
        let name = root.join("top.qed");
        let chain = open_chain(&FileOpener::default(), name.to_str().unwrap(), options).await.unwrap();
        assert_eq!(chain.len(), 1);
        let disk = Disk::new("x", chain, DiskOptions::default());
        assert!(disk.read_only());
        let error = disk.write(GuestOffset::ZERO, Iov::zeroed(512), false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(
            disk.finish_stream(&StreamBase::Nothing, None).await.is_err(),
            "the backing file is not dropped unread"
        );
        disk.flush().await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_read_only_disk_is_read_and_flushed() {
    in_folder(async |root| {
        let top = house(root).await;
        let options = ChainOptions { read_only: true, ..ChainOptions::default() };
        let chain = open_chain(&FileOpener::default(), top.to_str().unwrap(), options).await.unwrap();
        let before = std::fs::read(&top).unwrap();
        let disk = Disk::new("x", chain, DiskOptions { copy_on_read: true, ..DiskOptions::default() });
        assert_eq!(first_byte(&disk).await, 7);
        disk.flush().await.unwrap();
        disk.prefetch(GuestOffset::ZERO.range(SIZE)).await.unwrap();
        for result in [
            disk.write(GuestOffset::ZERO, Iov::zeroed(512), false).await,
            disk.write_zeroes(GuestOffset::ZERO.range(512), true, false).await,
            disk.discard(GuestOffset::ZERO.range(SIZE)).await,
            disk.resize(2 * SIZE).await,
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
        }
        disk.close().await.unwrap();
        assert_eq!(std::fs::read(&top).unwrap(), before);
    });
}

#[test]
fn a_stream_over_files_leaves_an_image_that_stands_alone() {
    in_folder(async |root| {
        let top = house(root).await;
        let disk = Disk::new("x", open(&top).await.unwrap(), DiskOptions::default());
        disk.write(GuestOffset(100), Iov::from_slice(&[9; 100]), false).await.unwrap();
        let all = GuestOffset::ZERO.range(SIZE);
        disk.populate(all, &StreamBase::Nothing).await.unwrap();
        disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
        std::fs::remove_dir_all(root.join("templates")).unwrap();
        disk.close().await.unwrap();
        let disk = Disk::new("x", open(&top).await.unwrap(), DiskOptions::default());
        let into = Iov::zeroed(SIZE as usize);
        disk.read(GuestOffset::ZERO, into.clone()).await.unwrap();
        let mut expected = vec![7; SIZE as usize];
        expected[100..200].fill(9);
        assert!(into.to_vec() == expected);
        let disk = Rc::clone(&disk);
        disk.close().await.unwrap();
    });
}

/// A VMDK of one flat extent, `NAME.flat`.
fn vmdk(folder: &Path, name: &str, cid: u32, parent: Option<(&str, u32)>) {
    let (hint, parent_cid) = match parent {
        Some((hint, cid)) => (format!("parentFileNameHint=\"{hint}\"\n"), cid),
        None => (String::new(), u32::MAX),
    };
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:x}\nparentCID={parent_cid:x}\n{hint}RW {} FLAT \"{name}.flat\" 0\n",
        SIZE / 512
    );
    std::fs::write(folder.join(name), text).unwrap();
    raw(&folder.join(format!("{name}.flat")), cid as u8);
}

#[test]
fn images_of_several_files_are_found_beside_them_and_a_changed_parent_is_noticed() {
    in_folder(async |root| {
        std::fs::create_dir(root.join("base")).unwrap();
        vmdk(&root.join("base"), "base.vmdk", 7, None);
        vmdk(root, "top.vmdk", 9, Some(("base/base.vmdk", 7)));
        let top = root.join("top.vmdk");
        let options = || ChainOptions { read_only: true, ..ChainOptions::default() };
        let open = || async { open_chain(&FileOpener::default(), top.to_str().unwrap(), options()).await };
        let disk = Disk::new("vmdk", open().await.unwrap(), DiskOptions::default());
        assert_eq!((disk.chain().len(), first_byte(&disk).await), (2, 9));
        disk.close().await.unwrap();
        vmdk(&root.join("base"), "base.vmdk", 8, None);
        let error = open().await.map(drop).unwrap_err();
        assert!(
            error.kind() == ErrorKind::Chain && error.to_string().contains("base/base.vmdk' was changed"),
            "{error}"
        );
        std::fs::remove_file(root.join("base/base.vmdk.flat")).unwrap();
        let error = open().await.map(drop).unwrap_err();
        assert!(error.to_string().contains("base.vmdk.flat"), "{error}");
    });
}
