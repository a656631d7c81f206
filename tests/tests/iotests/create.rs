//! New images: 026 (in part), 049, 054, 061 (in part), 079, 098, 115, 125 (in part), 135, 143, 172, 175, 178, 190, 215, 243, 249, 272, 303, 312.

use crate::{ALL, COW};
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 049: sizes and options as they may be written, and what is said of those that may not.
#[test]
fn sizes_and_options_are_read_as_qemu_img_reads_them() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sizes = [
        "1024",
        "1024b",
        "1k",
        "1K",
        "1M",
        "1G",
        "1T",
        "1024.0",
        "1024.0b",
        "1.5k",
        "1.5K",
        "1.5M",
        "1.5G",
        "1.5T",
        "0",
        "1025",
        "-1024",
        "-1k",
        "1kilobyte",
        "foobar",
        "0x80",
        "1 k",
        "",
        "1e3",
        "8E",
        "99999999999999999999",
        "7E",
        "1.",
        ".5k",
        "1.5",
    ];
    let lines = sizes.map(|size| format!("img create -f $F t \"{size}\"\nimg create -f $F -o size=\"{size}\" t\n"));
    Script::in_each(&["qcow2"], &lines.concat())?;
    let options = [
        "cluster_size=1234",
        "cluster_size=64k",
        "cluster_size=1k",
        "cluster_size=4M",
        "cluster_size=2M",
        "cluster_size=0",
        "compat=0.10",
        "compat=1.1",
        "compat=0.42",
        "compat=foobar",
        "compat=v2",
        "compat=v3",
        "preallocation=metadata",
        "preallocation=1234",
        "compat=0.10,lazy_refcounts=off",
        "compat=0.10,lazy_refcounts=on",
        "lazy_refcounts=1",
        "refcount_bits=16",
        "refcount_bits=3",
        "refcount_bits=0",
        "refcount_bits=128",
        "refcount_bits=1",
        "compat=0.10,refcount_bits=1",
        "extended_l2=on",
        "extended_l2=on,cluster_size=8k",
        "compat=0.10,extended_l2=on",
        "compression_type=zstd",
        "compression_type=none",
    ];
    let lines = options.map(|option| format!("img create -f $F -o {option} t 64M\n")).concat();
    Script::in_each(&["qcow2"], &lines)?;
    let options =
        ["cluster_size=4k", "cluster_size=1k", "cluster_size=128M", "table_size=1", "table_size=3", "table_size=32"];
    let lines = options.map(|option| format!("img create -f $F -o {option} t 64M\n")).concat();
    Script::in_each(&["qed"], &lines)
}

/// 054, 079: disks too large for their clusters, and clusters of any size with what is preallocated.
#[test]
fn the_largest_disks_are_made_or_refused() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=512 t 128G
         img create -f $F -o cluster_size=512 t 129G
         img create -f $F -o cluster_size=4k t 1T
         img create -f $F -o cluster_size=64k t 2P
         img create -f $F u 1E
         img create -f $F -o cluster_size=2M v 4E
         img create -f $F -o cluster_size=2M w 2E
         io w: write -P 1 1E 64k; read -P 1 1E 64k
         img info w",
    )?;
    let lines = ["4k", "8k", "16k", "32k", "64k", "1M"]
        .map(|size| format!("img create -f $F -o preallocation=metadata,cluster_size={size} t 4M\nmap t\nsame t\n"));
    Script::in_each(&["qcow2"], &lines.concat())
}

/// 115, 175, 178, 217: what is allocated ahead: whole, in the file, or only in tables; what that takes.
#[test]
fn what_is_preallocated_is_there() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o preallocation=metadata t 8M
         map t
         img check t
         img create -f $F -o preallocation=falloc t 8M
         map t
         img create -f $F -o preallocation=full t 8M
         map t
         img create -f $F -o preallocation=full,compat=0.10 t 8M
         map t
         io t: read -P 0 0 8M; write -P 1 1M 1M
         same t
         img create -f raw base 8M
         img create -f $F -b base -F raw -o preallocation=metadata t
         img convert -f raw -O $F -o preallocation=full base u
         map u
         same u
         img convert -f raw -O $F -o preallocation=metadata base u
         map u",
    )?;
    Script::in_each(
        &["raw"],
        "img create -f raw -o preallocation=falloc t 1M
         img create -f raw -o preallocation=full t 1M
         img create -f raw -o preallocation=metadata t 1M
         img create -f raw -o preallocation=foo t 1M",
    )
}

/// 178: how large an image would be.
#[test]
fn sizes_are_measured() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img measure
         img measure --size 5 a
         img measure --size 2G -O raw
         img measure --size 2G -O $F
         img measure --size 0 -O $F
         img measure --size 12345 -O $F
         img measure --size 7E -O $F
         img measure --size 9E -O raw
         img measure --size -1 -O raw
         img measure -O nosuch --size 1G
         img measure -O qed --size 1G
         img measure -O $F --size 2G -o cluster_size=2M
         img measure -O $F --size 2G -o cluster_size=1000
         img measure -O $F --size 2G -o compat=0.10
         img measure -O $F --size 2G -o refcount_bits=1
         img measure -O $F --size 2G -o preallocation=full
         img measure -O $F --size 2G -o preallocation=metadata
         img measure -O $F --size 2G -o extended_l2=on
         img measure -O $F --size 2G -o backing_file=foo,backing_fmt=raw
         img create -f $F t 8M
         io t: write 0 1M; write 3M 100k; write -z 5M 1M; write 7M 1
         img measure -O $F t
         img measure -O raw t
         img measure -O $F -o cluster_size=4k t
         img create -f $F -b t -F $F u 10M
         io u: write 9M 64k
         img measure -O $F u
         raw r 3M 4
         img measure -f raw -O $F r
         img measure -f raw -O raw r
         img measure a b",
    )
}

/// 061 (in part), 036, 303: what the header says, in both versions.
#[test]
fn new_images_are_described_alike() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 64M
         img info -f $F t
         img info t
         img check -f $F t
         img snapshot -l -f $F t",
    )?;
    Script::in_each(
        &COW,
        "img create -f $F -o cluster_size=128k t 64M
         img info -f $F t
         img create -f raw base 3M
         img create -f $F -b base -F raw t
         img info t
         img create -f $F -b base -F raw t 10M
         img info t
         img create -f $F -b base t",
    )
}

/// 249, 312: `-n`, `-B`, `-u` and their like where they make no sense.
#[test]
fn creating_over_what_is_there_starts_afresh() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 4M
         io t: write -P 1 0 4M
         img create -f $F t 2M
         io t: read -P 0 0 2M
         same t
         img create -q -f $F t 1M
         img create -f $F nosuchfolder/t 1M
         img create -f $F t
         img create -f $F",
    )
}
