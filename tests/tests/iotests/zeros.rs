//! Zeros and discards: 033, 034, 050, 097, 154, 177, 179, 188, 204, 250, 271, 290, 292.

use crate::{ALL, COW};
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 033: zeros at odd places leave their neighbours alone.
#[test]
fn zeros_at_odd_places_are_exact() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 128M
         io t: write -P 0xa 0 256k; write -z 1k 2k; write -z 100 300; write -z 65000 1000; write -z 128k 64k; write -z -u 192k 64k
         io t: read -P 0xa 0 100; read -P 0 100 300; read -P 0xa 400 624; read -P 0 1k 2k; read -P 0 65000 1000; read -P 0xa 66000 65072; read -P 0 128k 128k
         io t: write -z 120M 8M; read -P 0 120M 8M; write -P 3 134217216 512; write -z 134217000 216; read -P 3 134217216 512
         same t",
    )
}

/// 034, 154: over a backing file zeros hide what is below, and only that; what is below in part is kept.
#[test]
fn zeros_hide_what_is_below() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F base 1M
         io base: write -P 0x11 0 1M
         img create -f $F -b base -F $F t
         io t: write -z 0 64k; write -z 66k 3k; write -z 127k 130k; write -z 300k 512; write -z 320000 1; write -z 1000k 24k
         io t: read -P 0 0 64k; read -P 0x11 64k 2k; read -P 0 66k 3k; read -P 0x11 69k 58k; read -P 0 127k 130k; read -P 0x11 257k 43k; read -P 0 1000k 24k
         same t",
    )?;
    // What is zero below need not be written.
    Script::in_each(
        &["qcow2"],
        "img create -f $F base 4M
         img create -f $F -b base -F $F t 8M
         io t: write -z 10k 2k; write -z 130k 2k; write -z 4100k 1k; write -P 0 300k 1k; write -z 4064k 64k
         io t: write -P 0x22 10k 1k; read -P 0 0 10k; read -P 0x22 10k 1k; read -P 0 11k 53k
         same t",
    )
}

/// 177: discards and zeros of any alignment.
#[test]
fn discards_at_odd_places_are_harmless() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2", "raw"],
        "img create -f $F t 8M
         io t: write -P 5 0 8M; discard 1k 100k; discard 1M 1M; discard 3000k 1; discard 4M 64k; discard 7M 1M; write -z -u 5000001 300000
         io t: read -P 0 1M 1M; read -P 5 0 1k; read -P 5 101k 800k; read -P 0 7M 1M; read -P 0 5000001 300000
         same t",
    )
}

/// 250: clusters that are given back in the middle of a file are used again.
#[test]
fn what_is_given_back_is_used_again() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=4k t 8M
         io t: write -P 1 0 4M; discard 0 2M; write -P 2 4M 2M; read -P 2 4M 2M; read -P 0 0 2M; discard 2M 4M; write -P 3 0 8M
         same t
         map t",
    )
}

/// 290: a discard makes the image say zeros, or forget what it had, as its version can.
#[test]
fn a_discard_over_a_backing_file_reads_as_zeros_or_not_at_all() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for version in ["0.10", "1.1"] {
        Script::in_each(
            &["qcow2"],
            &format!(
                "img create -f raw base 1M
                 io -f raw base: write -P 1 0 1M
                 img create -f $F -o compat={version} t 1M
                 io t: write -P 2 0 256k; discard 64k 64k; read -P 0 64k 64k; discard 0 256k; read -P 0 0 256k
                 img check -f $F t
                 same t"
            ),
        )?;
    }
    Ok(())
}

/// 204, 188: the very end of a disk that is no multiple of a cluster.
#[test]
fn the_last_part_of_a_cluster_is_zeroed_and_grown() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F -o cluster_size=64k t 1000k
         io t: write -P 1 900k 100k; write -z 960k 40k; read -P 1 900k 60k; read -P 0 960k 40k
         img resize -f $F t 2000k
         io t: read -P 0 960k 1040k; write -P 2 1990k 10k; write -z 1984k 16k; read -P 0 1984k 16k
         same t",
    )
}

/// 271: images with subclusters: written, zeroed, given back and packed in parts.
#[test]
fn subclusters_are_written_zeroed_and_given_back() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "raw base 2133504 3
         img create -f $F -o extended_l2=on -b base -F raw t
         io t: write -P 1 0 1k; write -P 2 3k 512; write -P 3 5k 1k; write -P 4 6k 2k; write -P 5 8k 6k; write -P 6 15k 4k; write -P 7 32k 1k; write -P 8 63k 4k
         same t
         io t: write -z 2k 2k
         same t
         io t: write -z 0 64k; write -P 9 0 64k; write -z -u 0 32k
         same t
         io t: write -z -u 0 64k; write -P 1 3k 512; write -P 2 0 64k; discard 0 64k
         same t
         io t: write -c -P 3 0 64k; write -P 4 3k 512; read -P 3 0 3k; read -P 4 3k 512
         same t
         io t: write -z 192k 192k; write -z 416k 128k; write -z 607k 128k
         same t
         io t: write -c -P 5 1152k 64k; write -c -P 6 1216k 64k; write -z 1184k 64k; write -z 2048k 35k
         same t",
    )
}
