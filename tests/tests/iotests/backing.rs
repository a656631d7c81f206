//! Chains: 017 to 020, 024, 025, 028, 038, 040 (in part), 043, 074, 089, 090, 095, 097, 110, 114, 133, 143, 158, 191, 252, 273, 305, 313, 314.

use crate::COW;
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 017, 018, 038: an overlay shows its base where it has nothing of its own, and past the end of the base zeros.
#[test]
fn an_overlay_shows_what_it_has_and_what_is_below() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F base 6M
         io base: write -P 1 0 1M; write -P 2 3M 64k; write -P 3 5M 1M
         img create -f $F -b base -F $F t 8M
         io t: write -P 4 100k 3k; write -P 5 5000k 200k; writev -P 6 6200k 4k 4k; aio_write -q -P 7 3080k 4k; aio_write -q -P 8 3100k 4k; aio_flush
         io t: read -P 1 0 100k; read -P 4 100k 3k; read -P 1 103k 900k; read -P 3 5200k 900k; read -P 0 6208k 1900k; read -P 0 6M 50k
         same t
         map t
         img convert -f $F -O raw t flat
         img compare -f $F -F raw t flat",
    )
}

/// 019, 020, 097, 274: what an overlay has goes into its base, with -d it stays; bases are as large as they must be.
#[test]
fn an_overlay_is_committed() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F base 4M
         io base: write -P 1 0 4M
         img create -f $F -b base -F $F mid 6M
         io mid: write -P 2 1M 64k; write -z 2M 100k; write -P 3 5M 100k
         img create -f $F -b mid -F $F t 7M
         io t: write -P 4 1100k 64k; write -P 5 6500k 10k; write -z 5M 64k
         img convert -f $F -O raw t before
         img commit -f $F t
         same base
         same mid
         img compare -f $F -F raw mid before
         img compare -f $F -F raw t before
         io t: write -P 6 0 100k
         img commit -d -f $F t
         same t
         same mid
         img commit -b base -f $F t
         same base
         img commit -q -f $F base
         img commit -f $F -b nosuch t",
    )
}

/// 024, 028: another base shows through, and nothing changes for the guest, also where bases are shorter than the overlay.
#[test]
fn another_base_changes_nothing_for_the_guest() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F old 4M
         img create -f $F new 5M
         io old: write -P 1 0 64k; write -P 2 64k 64k; write -P 3 128k 64k; write -P 9 3M 1M
         io new: write -P 1 0 64k; write -P 7 64k 64k; write -P 7 192k 64k; write -P 7 4500k 64k
         img create -f $F -b old -F $F t 6M
         io t: write -P 4 256k 64k; write -P 5 300k 3k; write -z 320k 64k
         img convert -f $F -O raw t before
         img rebase -f $F -b new -F $F t
         img compare -f $F -F raw t before
         same t
         img rebase -f $F -b \"\" t
         img compare -f $F -F raw t before
         same t
         img rebase -u -f $F -b old -F $F t
         same t
         img rebase -f $F -u t
         same t
         img rebase -f $F -b nosuch -F $F t
         img rebase -f $F t
         img rebase -f $F -b new -F nosuch t",
    )?;
    Script::in_each(
        &["qcow2"],
        "raw old 4M 1
         raw new 4M 2
         img create -f $F -b old -F raw t
         img rebase -c -f $F -b new -F raw t
         img compare -f $F -F raw t old
         same t
         img rebase -c -f $F -b old -F raw t
         img compare -f $F -F raw t old
         same t",
    )
}

/// 043, 110, 191: what is said of a chain, each image in its turn; names relative to the image that says them.
#[test]
fn chains_are_described() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f $F a 1M
         img create -f $F -b a -F $F b
         img create -f $F -b ./b -F $F c
         img info -f $F c
         img info --backing-chain -f $F c
         io c: write -P 1 0 64k
         map c
         img rebase -u -f $F -b c -F $F a
         img info -f $F a
         img info --backing-chain -f $F a
         io a: read 0 64k
         img rebase -u -f $F -b nosuch -F $F a
         img info -f $F a
         img info --backing-chain -f $F c
         img convert -f $F -O raw c x",
    )
}

/// 114, 133, 158: a base in a format that nobody knows, or that a protocol is named for.
#[test]
fn names_of_bases_that_make_no_sense_are_told() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &COW,
        "img create -f raw base 1M
         img create -f $F -b base -F nosuch t
         img create -f $F -b nosuch -F raw t
         img create -f $F -b t -F $F t
         img create -u -f $F -b nosuch -F raw t 1M
         img info -f $F t
         io t: read 0 64k
         img rebase -u -f $F -b foo:bar -F raw t
         img info -f $F t
         img map -f $F t",
    )
}

/// 252: zeros of an overlay stay zeros when its base goes.
#[test]
fn zeros_stay_when_the_base_goes() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F base 2M
         io base: write -P 1 0 2M
         img create -f $F -b base -F $F t 3M
         io t: write -z 0 1M; write -z 1500k 10k
         img rebase -f $F -b \"\" t
         io t: read -P 0 0 1M; read -P 1 1M 476k; read -P 0 1500k 10k; read -P 0 2M 1M
         same t",
    )
}
