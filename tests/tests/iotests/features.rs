//! Rarer things: 031, 062, 063, 104, 113, 120, 174, 187, 197, 244 (in part), 251, 265, 307, 309.

use crate::ALL;
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 031, 062: header extensions that are not known stay, and leave room for a backing file.
#[test]
fn extensions_that_are_not_known_stay() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F t 8M
         theirs t
         poke t 112 123456780000000d5468697320697320612074657374000000000000000000000000
         io t: read 0 8M
         img rebase -u -f $F -b nosuch -F raw t
         img info t
         img rebase -u -f $F -b \"\" t
         img info t
         same t
         img create -f raw base 8M
         img rebase -u -f $F -b base -F raw t
         same t",
    )
}

/// 104, 174, 309: sizes between sectors; zeros of a file that ends inside of one.
#[test]
fn images_of_odd_sizes_are_opened() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &ALL,
        "img create -f $F t 1024
         img info -f $F t
         img create -f $F t 1234
         img info -f $F t
         io t: length; read 0 1024; write -P 3 1000 234; read -P 3 1000 234
         img convert -f $F -O raw t x
         same x raw",
    )
}

/// 063: a snapshot of nothing, and images that are written to through another name's format.
#[test]
fn a_format_that_is_not_the_images_is_refused() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2", "qed"],
        "img create -f raw r 1M
         img info -f $F r
         img check -f $F r
         img convert -f $F -O raw r x
         img map -f $F r
         img create -f $F t 1M
         img info -f vdi t
         img info -f nosuch t
         io -f raw t: read -v 0 4
         img check -f raw t",
    )
}
