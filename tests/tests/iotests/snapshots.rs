//! Internal snapshots: 015, 029, 058, 080 (in part), 130, 139, 176, 191, 217, 261, 267, 279, 288.

use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// 015, 029: taken, written over, applied, deleted, with clusters of several sizes and counts of several widths.
#[test]
fn what_was_taken_comes_back() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for options in
        ["cluster_size=64k", "cluster_size=1k", "refcount_bits=2", "compat=0.10", "extended_l2=on,cluster_size=16k"]
    {
        Script::in_each(
            &["qcow2"],
            &format!(
                "img create -f $F -o {options} t 12M
                 io t: write -P 1 0 1M; write -P 2 5M 100k
                 img snapshot -c a t
                 io t: write -P 3 0 1M; write -z 5M 64k; write -P 4 8M 1M
                 img snapshot -c b t
                 io t: discard 0 500k; write -P 5 8M 100k
                 same t
                 img snapshot -a a t
                 io t: read -P 1 0 1M; read -P 2 5M 100k; read -P 0 8M 1M
                 same t
                 img snapshot -d a t
                 img snapshot -a b t
                 io t: read -P 3 0 1M; read -P 0 5M 64k; read -P 4 8M 1M
                 same t
                 img snapshot -d b t
                 img snapshot -d b t
                 same t"
            ),
        )?;
    }
    Ok(())
}

/// 058, 267: by id, by name, with names that look like ids.
#[test]
fn they_are_found_by_id_or_by_name() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F t 4M
         io t: write -P 1 0 1M
         img snapshot -c 2 t
         io t: write -P 2 0 1M
         img snapshot -c 1 t
         io t: write -P 3 0 1M
         img convert -l 1 -O raw t x
         same x raw
         img convert -l 2 -O raw t x
         same x raw
         img convert -l snapshot.name=2 -O raw t x
         same x raw
         img convert -l snapshot.name=1,snapshot.id=2 -O raw t x
         same x raw
         img snapshot -a 1 t
         same t
         img snapshot -d 2 t
         same t
         img snapshot -c again t
         img snapshot -c again t
         img snapshot -d again t
         same t
         img snapshot -c t
         img snapshot -a nosuch t
         img snapshot -l nosuch
         img snapshot -l -c x t
         img snapshot -q -c y t",
    )
}

/// A refcount of one bit counts no snapshot; formats without them say so.
#[test]
fn where_there_can_be_none_it_is_told() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o refcount_bits=1 t 4M
         io t: write -P 1 0 1M
         img snapshot -c a t
         same t
         img snapshot -l t",
    )?;
    Script::in_each(
        &["qed", "raw"],
        "img create -f $F t 4M
         img snapshot -c a -f $F t
         img snapshot -l -f $F t
         img snapshot -a a -f $F t
         img snapshot -d a -f $F t
         same t",
    )
}

/// 176, 191: over a backing file, and of a disk that has grown since.
#[test]
fn they_keep_what_lies_below_and_the_size() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "raw base 4M 8
         img create -f $F -b base -F raw t
         io t: write -P 1 1M 100k
         img snapshot -c a t
         img resize -q t 600M
         io t: write -P 2 590M 1M; write -P 3 0 64k
         img snapshot -c b t
         img snapshot -a a t
         img info --output=json nosuch
         same t
         map t
         img snapshot -a b t
         same t
         img snapshot -d a t
         img snapshot -d b t
         same t",
    )
}
