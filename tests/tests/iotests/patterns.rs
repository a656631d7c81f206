//! Reads and writes: 001 to 005, 008 to 016, 021, 029, 032, 046, 047, 052, 069, 073, 095.

use crate::{ALL, COW};
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 001, 002, 003: aligned, odd and vectored requests, far apart, read back.
#[test]
fn what_is_written_is_read_again() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 128M
         io t: read 0 128M; write -P 0xa 0 16M; read -P 0xa 0 16M; write -P 0xb 64k 64k; read -P 0xb 64k 64k; read -P 0xa 0 64k
         io t: write -P 1 1 511; write -P 2 1023 1026; read -v 0 512; read -P 2 1023 1026; read -P 0xa 2049 1000
         io t: writev -P 3 5M 512 1k 3k 100; readv -P 3 5M 4k 636; readv 127M 1M; writev -P 4 133693440 64k 64k
         io t: write -P 5 134217216 512; read -P 5 134217216 512
         same t",
    )
}

/// 004, 005: requests past the end are refused whole; disks may be very large.
#[test]
fn requests_past_the_end_are_refused() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 3M
         io t: read 3M 1; read 2M 2M; write 3M 1; write 2M 2M; readv 3145216 1k; write -z 2M 2M; read 5E 512; aio_read 3M 512; aio_flush; aio_write 2M 2M; aio_flush
         io t: read 3145216 512; write 3145216 512; read -P 0xcd 3145216 512
         io t: discard 3M 64k
         same t",
    )?;
    Script::in_each(
        &["qcow2", "raw"],
        "img create -f $F t 5000M
         io t: write 4999M 64k; read 4095M 2M; write -P 3 4294965248 4k; read -P 3 4294965248 4k
         img resize -f $F t 5001M
         same t",
    )
}

/// 008 to 014: many requests under way at once, neighbours and overlapping runs, into clusters that are there and that are not.
#[test]
fn requests_side_by_side_end_as_one_by_one() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 64M
         io t: aio_write -q -P 1 0 64k; aio_write -q -P 2 64k 64k; aio_write -q -P 3 128k 3k; aio_write -q -P 4 200k 100k; aio_flush
         io t: aio_read -q -P 1 0 64k; aio_read -q -P 2 64k 64k; aio_read -q -P 4 200k 100k; aio_flush; read -P 0 131k 64k
         io t: aio_write -q -P 5 1M 4k; aio_write -q -P 5 1028k 4k; aio_write -q -P 5 1032k 4k; aio_write -q -P 5 1036k 52k; aio_flush
         io t: read -P 5 1M 64k; read -P 0 1088k 64k; aio_write -q -z 1M 32k; aio_flush; read -P 0 1M 32k; read -P 5 1056k 32k
         same t",
    )
}

/// 012, 016, 021: images that are read only, and reads past the end of what the file holds.
#[test]
fn images_that_are_read_only_are_not_written() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 1M
         io -r t: read 0 1M; write 0 512; write -z 0 64k; discard 0 64k
         io t: reopen -r; write 0 1k; reopen -w; write -P 7 0 1k; read -P 7 0 1k
         same t",
    )
}

/// 046: allocating requests that meet in one cluster, over a backing file: each byte is one of those written or the base's.
#[test]
fn requests_that_meet_in_a_cluster_lose_nothing() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F base 6M
         io base: write -P 1 0 64k; write -P 2 64k 64k; write -P 3 128k 256k; write -P 4 1M 4M
         img create -f $F -b base -F $F t
         io t: aio_write -q -P 10 12k 4k; aio_write -q -P 11 20k 4k; aio_write -q -P 12 40k 512; aio_flush
         io t: aio_write -q -P 20 1100k 8k; aio_write -q -P 21 1116k 100k; aio_write -q -P 22 1240k 8k; aio_flush
         io t: aio_write -q -P 30 2M 64k; aio_write -q -P 31 2112k 4k; aio_write -q -P 32 2176k 64k; aio_flush
         io t: read -P 1 0 12k; read -P 10 12k 4k; read -P 1 16k 4k; read -P 11 20k 4k; read -P 4 1108k 8k; read -P 31 2112k 4k
         same t
         map t",
    )
}

/// 047, 073: a refcount block or table that fills up under a write, and the clusters behind.
#[test]
fn counts_are_kept_while_the_image_grows() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=512,refcount_bits=64 t 8M
         io t: write -P 1 0 3M; write -P 2 5M 100k; write -P 3 3M 2M
         same t
         map t
         img create -f $F -o cluster_size=1k,refcount_bits=1 u 8M
         io u: write -P 1 0 3M; write -P 2 5M 100k; write -P 3 3M 2M; discard 1M 2M; write -P 9 1500k 100k
         same u
         img check u",
    )
}

/// 052: what is written with a temporary overlay is gone with it.
#[test]
fn a_temporary_overlay_leaves_nothing() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 1M
         io t: write -P 1 0 64k
         io -s t: write -P 2 0 32k; read -P 2 0 32k; read -P 1 32k 32k
         io t: read -P 1 0 64k
         same t",
    )
}
