//! Rarer things: 031, 062, 063, 104, 113, 120, 174, 187, 171, 197, 309.

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

/// 171: a part of a raw file is a disk; nothing outside of it is touched.
#[test]
fn a_part_of_a_raw_file_is_a_disk() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let part = "driver=raw,offset=1M,size=1M,file.driver=file,file.filename=t";
    let rest = "driver=raw,offset=3M,file.filename=t";
    Script::in_each(
        &["raw"],
        &format!(
            "raw t 4M 3
             img convert --image-opts -O raw {part} x
             same x
             io --image-opts {part}: write -P 9 0 64k; read -P 9 0 64k; write 1M 1; read 1M 1; length; write -z 512k 512k; discard 100k 100k
             io --image-opts {rest}: length; write -P 8 1000k 24k; write 1M 512; write -z 1000k 24k; read -P 0 1000k 24k
             same t
             img compare --image-opts {part} driver=raw,file.filename=x
             img convert --image-opts -O qcow2 {rest} y
             same y qcow2
             img info --image-opts driver=raw,offset=5M,file.filename=t
             img info --image-opts driver=raw,offset=3M,size=2M,file.filename=t
             img info --image-opts driver=raw,offset=x,file.filename=t
             img info --image-opts driver=qcow2,offset=1M,file.filename=t
             img resize --image-opts {part} 3M
             same t"
        ),
    )
}
