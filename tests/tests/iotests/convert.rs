//! Copies and comparisons: 042, 048, 053, 066, 072, 082 (in part), 089, 106, 122, 150, 159, 160, 170, 171, 173, 221, 241, 259, 265, 268, 270, 285, 301, 309.

use crate::{ALL, COW};
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 042, 053: disks of no bytes, and of a few.
#[test]
fn the_smallest_disks_are_copied() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 0
         img info -f $F t
         img convert -f $F -O raw t x
         img convert -f $F -O qcow2 t y
         img compare -f $F -F raw t x
         img create -f $F u 512
         io u: write -P 3 0 512
         img convert -f $F -O $F u v
         same v
         img convert -c -f $F -O qcow2 u w
         same w qcow2",
    )?;
    Script::in_each(
        &["qcow2"],
        "img create -f raw s 1536
         io -f raw s: write -P 9 0 1536
         img convert -c -f raw -O $F -o cluster_size=1k s t
         io t: read -P 9 0 1536
         same t",
    )
}

/// 048: what `compare` says, and how it ends.
#[test]
fn compare_tells_what_differs() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F a 3M
         img create -f $F b 3M
         img compare -f $F -F $F a b
         img compare -s -f $F -F $F a b
         io a: write -P 0 1M 64k
         img compare -f $F -F $F a b
         io a: write -P 1 2M 64k
         img compare -f $F -F $F a b
         img compare -q -f $F -F $F a b
         io b: write -P 1 2M 64k; write -P 1 2200k 1
         img compare -f $F -F $F a b
         img create -f $F c 5M
         io c: write -P 1 2M 64k
         img compare -f $F -F $F a c
         img compare -s -f $F -F $F a c
         img compare -f $F -F $F c a
         io c: write -P 5 4M 1k
         img compare -f $F -F $F a c
         img compare -f $F -F $F a nosuch
         img compare -f nosuch -F $F a b",
    )
}

/// 122: what is copied, with packing and holes, into new images and into ones that are there.
#[test]
fn what_a_copy_has_is_what_it_must_have() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F base 8M
         io base: write -P 0x11 0 8M
         img create -f $F -b base -F $F t
         io t: write -P 0x22 0 3M
         img convert -O $F -B base -o backing_fmt=$F t u
         map u
         img create -f $F -b base -F $F t
         io t: write -P 0 0 3M
         img convert -O $F -B base -F $F t u
         io u: read -P 0 0 3M
         img convert -O $F -c -B base -F $F t u
         io u: read -P 0 0 3M
         io t: write -z 0 3M
         img convert -O $F -B base -F $F t u
         io u: read -P 0 0 3M
         same u
         img convert -O $F -c -B base -F $F t u
         same u
         img create -f $F one 1023k -o cluster_size=1024
         img create -f $F two 1023k -o cluster_size=1024
         io one: write -P 0x11 16k 16k; write -P 0x22 130k 130k; write -P 0x33 1022k 1k
         io two: write -P 0x44 0 1k
         img convert -c -O $F one two both
         map both
         same both
         img convert -O $F -B base -F $F one two both",
    )?;
    Script::in_each(
        &["qcow2"],
        "img create -f $F t 8M
         io t: write -P 0x22 0 3M; write -P 0 3M 3M
         img convert -O $F -S 0 t u
         map u
         img convert -O $F -c -S 0 t u
         map u
         same u
         img create -f $F base 4M
         io base: write -P 0x11 0 3M
         img create -f $F -b base -F $F t 8M
         io t: write -P 0x22 0 1M
         img convert -O $F -S 0 t u
         map u
         img create -f $F t 64M -o cluster_size=1k
         io t: write -P 0 0 64k; write 0 1k; write 8k 1k; write 17k 1k
         img convert -O $F -o cluster_size=1k -S 4k t u
         map u
         img convert -O $F -o cluster_size=1k -S 8k t u
         map u
         img convert -O $F -o cluster_size=1k -c -S 4k t u
         map u
         img convert -O $F -o cluster_size=1k -c -S 8k t u
         map u",
    )
}

/// 122, 173, 241: into an image that is there: its other content does not shine through; with a backing file zeros are written.
#[test]
fn a_target_that_is_there_is_written_over() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for version in ["0.10", "1.1"] {
        Script::in_each(
            &["qcow2"],
            &format!(
                "img create -f $F t 8M
                 img create -f $F -o compat={version} u 8M
                 io u: write -P 42 0 64k
                 img convert -O $F -n t u
                 img compare t u
                 img create -f $F -o compat={version} u 8M
                 img convert -O $F -n t u
                 same u
                 img create -f $F base 8M
                 io base: write -P 7 0 1M
                 img create -f $F -o compat={version} -b base -F $F u
                 img convert -O $F -n t u
                 same u
                 img compare t u
                 img create -f $F v 8M
                 img convert -O $F -B base -n t v
                 img convert -O $F -n -o preallocation=metadata t v
                 img create -f $F w 4M
                 img convert -O $F -n t w
                 img convert -n -O raw t nosuch"
            ),
        )?;
    }
    Ok(())
}

/// 150: a disk whose source is zeros is copied in no time and takes none.
#[test]
fn zeros_take_no_place() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f raw z 16M
         img convert -f raw -O $F z t
         map t
         io -f raw z: write -P 0 1M 1M
         img convert -f raw -O $F z t
         map t
         img convert -f raw -O raw -S 0 z x
         img compare -f raw -F raw z x",
    )
}

/// 159, 160, 170, 173: blocks of every size, skipped and counted, into every format.
#[test]
fn dd_copies_what_it_is_told() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sizes = ["512", "1k", "5k", "1000", "64k", "513", "1M"];
    let dd = |size| {
        ["", "count=3", "skip=2"]
            .map(|more| format!("img dd bs={size} {more} -f $F -O $F if=t of=o\nsame o"))
            .join("\n")
    };
    let lines = ["raw m 3M 5\nimg convert -f raw -O $F m t".to_owned()].into_iter().chain(sizes.map(dd));
    let lines = lines.collect::<Vec<_>>().join("\n");
    let more = "img dd bs=1M skip=3 -f $F -O $F if=t of=o
              same o
              img dd bs=1M skip=4 -f $F -O $F if=t of=o
              same o
              img dd bs=1M skip=400 -f $F -O $F if=t of=o
              img dd count=0 -f $F -O $F if=t of=o
              img dd bs=1M count=40 -f $F -O $F if=t of=o
              same o
              img dd if=t of=o of=p -f $F
              img dd if=t
              img dd of=t
              img dd bs=x if=t of=o
              img dd bs=0 if=t of=o
              img dd count=x if=t of=o
              img dd seek=1 if=t of=o
              img dd conv=notrunc if=t of=o
              img dd foo if=t of=o
              img dd -f $F if=nosuch of=o";
    Script::in_each(&ALL, &format!("{lines}\n{more}"))
}

/// 221: a raw file that ends inside of a sector.
#[test]
fn a_raw_file_may_end_anywhere() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["raw"],
        "img create -f raw t 65537
         img info -f raw t
         cut t 65537
         io t: read 65536 1; write -P 7 65536 1; write -P 8 0 512; read 65537 1
         img convert -f raw -O qcow2 t u
         img info u
         same u qcow2
         img measure -f raw -O qcow2 t",
    )
}

/// 268, 285, 301, 287: how clusters are packed, what it takes, and that it is read again.
#[test]
fn packed_clusters_are_read_again() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "raw m 4M 6
         img convert -c -f raw -O $F -o compression_type=zstd m t
         img info t
         img compare -f raw -F $F m t
         same t
         map t
         img convert -c -f raw -O $F -o compression_type=zlib,cluster_size=4k m t
         same t
         map t
         io t: write -c -P 1 0 4k; write -P 2 100k 1k; discard 1M 1M; write -c -P 3 1M 64k; read -P 3 1M 64k
         same t
         img convert -c -f raw -O $F -o compression_type=lz4 m u
         img convert -c -f raw -O $F -o compat=0.10,compression_type=zstd m u
         img convert -c -f raw -O qed m u
         img convert -c -f raw -O raw m u",
    )
}

/// 082: options said twice, and in lists.
#[test]
fn options_come_in_lists_and_the_last_one_counts() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=4k -o lazy_refcounts=on t 8M
         img info t
         img create -f $F -o cluster_size=4k -o lazy_refcounts=on -o cluster_size=8k t 8M
         img info t
         img create -f $F -o cluster_size=4k,cluster_size=8k t 8M
         img info t
         img create -f raw -f $F t 8M
         img info t
         img convert -O $F -o cluster_size=4k -o lazy_refcounts=on t u
         img info u
         img convert -O raw -O $F -o cluster_size=4k,cluster_size=8k t u
         img info u
         img convert -O $F -o backing_file=t,backing_fmt=$F,,help t u
         img convert -O $F -o backing_file=t, t u
         img create -f $F -o backing_file=t,,foo,backing_fmt=$F u 8M
         img create -f $F -o nosuch=1 t 8M
         img create -f $F -o cluster_size t 8M
         img create -f $F -o , t 8M
         img resize t",
    )
}

/// 244, 288 (in part): a copy whose data are in a file of their own; that file is not the source's.
#[test]
fn a_copy_may_have_a_data_file() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "raw m 5M 12
         img convert -f raw -O qcow2 -o data_file=d.raw m t
         img map --output=json t
         img compare m t
         img convert -f raw -O qcow2 -o data_file=e.raw,data_file_raw=on m u
         img map --output=json u
         img check t
         img check u
         img compare -f raw m e.raw
         img compare m u
         io u: write -P 7 1M 64k
         img compare -f raw -F qcow2 e.raw u
         img convert -O qcow2 u v
         same v
         img convert -c -f raw -O qcow2 -o data_file=f.raw m w
         img convert -f raw -O qcow2 -o data_file_raw=on m w
         img convert -f raw -O qcow2 -o data_file=m m w
         img convert -f raw -O qcow2 -o data_file=w m w
         img compare -f raw m e.raw
         img compare m t",
    )
}
