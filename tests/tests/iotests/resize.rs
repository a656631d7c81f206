//! New sizes: 025, 102, 106, 125, 163, 214, 220, 226, 245 (in part), 302.

use crate::{ALL, COW};
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 025: disks grow, and what is new reads as zeros.
#[test]
fn disks_grow_by_zeros() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 5M
         io t: write -P 1 0 5M
         io t: truncate 6M; length; read -P 0 5M 1M; write -P 2 5500k 200k
         img resize -f $F t +1M
         img resize -f $F t 500M
         io t: read -P 0 6M 1M; write -P 3 499M 64k; read -P 1 0 5M
         img resize -f $F t 500M
         same t
         img resize -f $F t -1000M
         img resize -f $F t -x
         img resize -f $F t +
         img resize -f $F t 8E
         img resize -f $F nosuch 8M
         img resize -f $F t 100M
         img info -f $F t",
    )
}

/// 102, 163: disks shrink where that is asked for, and give back what was behind the end.
#[test]
fn disks_shrink_where_that_is_asked_for() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2", "raw"],
        "img create -f $F t 64M
         io t: write -P 1 0 2M; write -P 2 30M 1M; write -P 3 63M 1M
         img resize -f $F t 31M
         img resize --shrink -f $F t 31M
         io t: read -P 2 30M 1M; read 31M 512
         img resize --shrink -f $F t -30M
         io t: read -P 1 0 1M
         same t
         map t
         img resize -f $F t 64M
         io t: read -P 0 1M 63M
         same t
         img resize --shrink -f $F t 1000k
         io t: read -P 1 0 1000k
         same t",
    )?;
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=512 t 64M
         io t: write -P 1 0 2M; write -P 2 30M 1M
         img resize --shrink -f $F t 1536
         same t
         img resize -f $F t 64M
         io t: write -P 1 0 2M
         same t
         img create -f raw base 64M
         io -f raw base: write -P 9 0 64M
         img create -f $F -b base -F raw t
         io t: write -P 3 20M 1M
         img resize --shrink -f $F t 10M
         img resize -f $F t 30M
         io t: read -P 9 0 10M; read -P 0 10M 20M
         same t",
    )?;
    Script::in_each(
        &["qed"],
        "img create -f $F t 4M
         img resize --shrink -f $F t 2M
         same t",
    )
}

/// 214, 220: sizes between sectors, and of disks with snapshots.
#[test]
fn sizes_between_sectors_are_rounded_up() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F t 1000
         img info -f $F t
         img resize -f $F t 2000
         img info -f $F t
         img resize -f $F t +1
         img info -f $F t
         same t",
    )
}

/// 106, 125: what is new has its place already.
#[test]
fn what_is_new_may_have_its_place_already() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for how in ["metadata", "falloc", "full", "off", "nosuch"] {
        Script::in_each(
            &["qcow2"],
            &format!(
                "img create -f $F -o cluster_size=4k t 1000k
                 io t: write -P 1 900k 100k
                 img resize --preallocation={how} -f $F t 5M
                 io t: read -P 1 900k 100k; read -P 0 1000k 4120k
                 map t
                 same t
                 img resize --preallocation={how} -f $F t 9M
                 io t: write -P 2 8M 64k; write -P 3 6M 64k
                 same t
                 img resize --shrink --preallocation={how} -f $F t 1M
                 raw base 1900k 4
                 img create -f $F -b base -F raw u 1M
                 io u: write -P 5 100k 100k
                 img resize --preallocation={how} -f $F u 2M
                 same u"
            ),
        )?;
        Script::in_each(
            &["raw", "qed"],
            &format!(
                "img create -f $F t 1000k
                 io t: write -P 1 900k 100k
                 img resize --preallocation={how} -f $F t 5M
                 img info -f $F t
                 io t: read -P 1 900k 100k
                 same t"
            ),
        )?;
    }
    Ok(())
}
