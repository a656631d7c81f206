//! Clusters of different kinds side by side, and many at once: 022, 023, 037, 063, 066, 073, 106, 138, 265, 290, 313.

use crate::{ALL, COW};
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 073: a read that runs from a cluster of one kind into one of another.
#[test]
fn a_read_runs_from_one_kind_of_cluster_into_the_next() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for options in ["compat=0.10", "compat=1.1", "extended_l2=on", "compression_type=zstd"] {
        // Each of two neighbours is plain, packed, zeros, or left to the base.
        let kinds = ["-P 1", "-c -P 2", "-z"];
        let pairs = (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).enumerate();
        let places = pairs.clone().flat_map(|(n, (a, b))| [(n * 3, a), (n * 3 + 1, b)]);
        let writes = places.filter_map(|(at, kind)| Some(format!("write -q {} {}k 64k", kinds.get(kind)?, at * 64)));
        let reads = pairs.map(|(n, _)| format!("read -v {}k 192; read {}k 192k", n * 192 + 63, n * 192));
        let (writes, reads) = (writes.collect::<Vec<_>>().join("; "), reads.collect::<Vec<_>>().join("; "));
        Script::in_each(
            &["qcow2"],
            &format!(
                "img create -f $F base 4M
                 io base: write -P 165 0 4M
                 img create -f $F -o {options} -b base -F $F t
                 io t: {writes}
                 io t: {reads}
                 same t
                 img convert -O $F t u
                 same u
                 img convert -c -O $F -B base -F $F t u
                 same u
                 img commit t
                 same base"
            ),
        )?;
    }
    Ok(())
}

/// 063: into an image that is there, in every format, and back; one that is too small stays what it was.
#[test]
fn images_that_are_there_are_copied_into() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "raw m 4M 12
         img convert -f raw -O $F m t
         img convert -f $F -O $F -n t nosuch
         img create -f $F u 4M
         io u: write -P 9 0 4M
         img convert -f $F -O $F -n t u
         same u
         img convert -f $F -O raw u back
         img compare -f raw -F raw back m
         img convert -f raw -O $F -n back t
         same t
         img create -f $F small 2M
         io small: write -P 8 0 2M
         img convert -f $F -O $F -n t small
         io small: read -P 8 0 2M
         same small",
    )
}

/// 066: zeros that have places are given back.
#[test]
fn zeros_that_have_places_are_given_back() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F t 64M
         io t: write 0 256k; write -z 0 256k; discard 0 256k; read -P 0 0 256k
         img check t
         same t
         img create -f $F -o preallocation=metadata t 8M
         io t: write -P 1 0 256k; write -z 0 256k; discard 0 256k; write -P 2 100k 100k; discard 1M 1M; write -P 3 1M 1M
         img snapshot -c a t
         io t: discard 0 8M; read -P 0 0 8M
         img snapshot -a a t
         io t: read -P 3 1M 1M; read -P 2 100k 100k
         same t",
    )
}

/// 265: written backwards, in parts of clusters, all at once.
#[test]
fn parts_of_clusters_written_backwards_are_all_there() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let writes: Vec<String> = (0..64).rev().map(|n| format!("aio_write -q -P 42 {}k 2k", n * 4 + 1)).collect();
    let reads: Vec<String> = (0..64)
        .map(|n| format!("read -P 0 {}k 1k; read -P 42 {}k 2k; read -P 0 {}k 1k", n * 4, n * 4 + 1, n * 4 + 3))
        .collect();
    Script::in_each(
        &COW,
        &format!(
            "img create -f $F -o cluster_size=4k t 1M
             io t: {}; aio_flush
             io t: {}
             same t
             map t",
            writes.join("; "),
            reads.join("; ")
        ),
    )
}

/// 313: an overlay full of zeros goes into a base with more refcount blocks than are kept in memory.
#[test]
fn zeros_are_committed_into_many_blocks() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=4k,refcount_bits=64 base 8M
         io base: write -P 1 0 8M
         img create -f $F -o cluster_size=4k,refcount_bits=64 -b base -F $F t
         io t: write -z 0 8M; write -P 2 4M 3k
         img commit t
         img check base
         io base: read -P 0 0 4M; read -P 2 4M 3k; read -P 0 5M 3M
         same base
         same t",
    )
}

/// 138: a cluster that lies very far behind the end of the file.
#[test]
fn a_cluster_far_behind_the_end_is_told() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let script = Script::new("qcow2")?;
    script.run(
        "img create -f $F -o cluster_size=512 t 512
         io t: write 0 512
         theirs t
         poke t 2048 8080000000000000",
    )?;
    script.ends_alike("check t", "32 PiB")?;
    script.mends("t", "all", "32 PiB")
}

/// 022, 023: every size of clusters, with snapshots, growth and odd ends.
#[test]
fn every_size_of_clusters_works() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for size in ["512", "1k", "8k", "256k", "2M"] {
        Script::in_each(
            &["qcow2"],
            &format!(
                "img create -f $F -o cluster_size={size} t 4097k
                 io t: write -P 1 0 1000k; write -z 300k 100k; write -P 2 4090k 7k
                 img snapshot -c a t
                 io t: write -P 3 500k 2M; discard 1M 512k
                 img resize -q t 9M
                 io t: write -P 4 8M 1M; read -P 0 4097k 1M; read -P 3 500k 100k
                 same t
                 img convert -l a -O raw t x
                 img snapshot -d a t
                 same t
                 img convert -c -O $F -o cluster_size={size} t u
                 same u"
            ),
        )?;
    }
    for size in ["4k", "64k", "1M"] {
        Script::in_each(
            &["qed"],
            &format!(
                "img create -f $F -o cluster_size={size},table_size=2 t 4097k
                 io t: write -P 1 0 1000k; write -z 300k 100k; write -P 2 4090k 7k
                 img resize -q -f $F t 9M
                 io t: write -P 4 8M 1M; read -P 0 4097k 1M
                 same t"
            ),
        )?;
    }
    Ok(())
}
