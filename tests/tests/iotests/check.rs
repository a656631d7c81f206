//! Images that are damaged: 036, 037?, 039, 060, 080, 098, 108, 112 (in part), 121, 137 (in part), 138, 161, 261 (in part), 291?

use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

/// An image of QEMU's making with 64 KiB clusters: L1 at 0x30000, L2 at 0x40000, data from 0x50000, the refcount block at 0x20000.
const MADE: &str = "img create -f qcow2 t 4M
                    io t: write -P 1 0 128k; write -P 2 1M 64k
                    theirs t\n";

/// 060, 108, 138: each damage is found, and mended or refused, alike.
#[test]
fn damage_is_found_and_mended() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let damages = [
        // L1 entry leads to the refcount block; to nowhere; past the end; between clusters; with reserved bits.
        "poke t 196608 8000000000020000",
        "poke t 196608 8000000010000000",
        "poke t 196608 8000000000042a00",
        "poke t 196608 8100000000040001",
        // L2 entries: the same.
        "poke t 262144 8000000000020000",
        "poke t 262144 8000000000030000",
        "poke t 262144 8000000100000000",
        "poke t 262144 8000000000052a00",
        "poke t 262144 8100000000050000",
        "poke t 262144 0000000000050000",
        "poke t 262144 8000000000060000",
        "poke t 262144 4000000000000000",
        // Refcounts too low, too high; a block between clusters, past the end, twice; the table itself.
        "poke t 131082 0000",
        "poke t 131082 0002",
        "poke t 65536 0000000000020200",
        "poke t 65536 0000000100000000",
        "poke t 65544 0000000000020000",
        "poke t 131076 0000",
        // Leaks.
        "cut t 1M",
    ];
    for damage in damages {
        for repair in ["leaks", "all"] {
            // QEMU's sets flags right when it is asked for leaks alone.
            if repair == "leaks" && damage.ends_with(" 0000000000050000") {
                continue;
            }
            let script = Script::new("qcow2")?;
            script.run(MADE)?;
            script.run(damage)?;
            script.mends("t", repair, damage)?;
        }
    }
    Ok(())
}

/// 036, 061: feature bits that nobody knows.
#[test]
fn features_that_are_not_known_are_refused() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for poke in [
        "poke t 72 8000000000000000",
        "poke t 72 0000000000000020",
        "poke t 80 8000000000000000",
        "poke t 88 8000000000000000",
        "poke t 72 0000000000000002",
        "poke t 72 0000000000000001",
        "poke t 4 00000004",
        "poke t 4 00000000",
        "poke t 20 00000000",
        "poke t 20 00000008",
        "poke t 20 00000016",
        "poke t 24 ffffffffffffffff",
        "poke t 36 ffffffff",
        "poke t 40 0000000000000001",
        "poke t 40 ffffffffffff0000",
        "poke t 48 0000000000000001",
        "poke t 48 7fffffffffff0000",
        "poke t 56 ffffffff",
        "poke t 60 ffffffff",
        "poke t 96 00000007",
        "poke t 100 00000002",
        "poke t 100 00010001",
        "poke t 16 00001000",
        "cut t 100",
        "cut t 0",
    ] {
        let script = Script::new("qcow2")?;
        script.run(MADE)?;
        script.run(poke)?;
        script.ends_alike("info -f qcow2 t", poke)?;
        script.ends_alike("check -f qcow2 t", poke)?;
        script.ends_alike("convert -f qcow2 -O raw t x", poke)?;
        script.ends_alike("resize -f qcow2 t 8M", poke)?;
    }
    Ok(())
}

/// QED: the same for its header and tables.
#[test]
fn damaged_qed_images_are_found_and_mended() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for damage in [
        "poke t 65536 0000000001000000",
        "poke t 65536 0000000000000300",
        "poke t 65536 0100000000000000",
        "poke t 0 00000000",
        "poke t 4 01000000",
        "poke t 4 00000000",
        "poke t 8 20000000",
        "poke t 12 20000000",
        "poke t 16 0800000000000000",
        "poke t 16 0000010000000000",
        "poke t 40 0100000000000000",
        "poke t 48 ffffffffffffffff",
        "poke t 16 0200000000000000",
    ] {
        let script = Script::new("qed")?;
        script.run(
            "img create -f qed t 4M
             io t: write -P 1 0 128k; write -P 2 1M 64k
             theirs t",
        )?;
        script.run(damage)?;
        script.ends_alike("info -f qed t", damage)?;
        script.mends("t", "all", damage)?;
    }
    Ok(())
}

/// 039: an image that was not closed is mended when it is written to next, and read as it is.
#[test]
fn an_image_that_was_not_closed_is_mended() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o compat=1.1,lazy_refcounts=on t 8M
         io t: write -P 1 0 1M
         theirs t
         poke t 79 01
         img info t
         img check t
         io -r t: read -P 1 0 1M
         img info t
         io t: write -P 2 0 512
         img check t
         same t
         poke t 79 01
         img check -r all t
         img info t
         same t",
    )?;
    Script::in_each(
        &["qed"],
        "img create -f $F t 8M
         io t: write -P 1 0 1M
         theirs t
         poke t 16 02
         img check -f $F t
         io -r t: read -P 1 0 1M
         io t: write -P 2 0 512
         img check -f $F t
         same t",
    )
}

/// What is counted in a block, or a table, that lies past the end of the file is not free: it is not written over.
#[test]
fn refcounts_past_the_end_of_the_file_are_no_free_clusters() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for poke in ["poke t 65536 0000000100000000", "poke t 48 0000000100000000"] {
        let script = Script::new("qcow2")?;
        script.run(MADE)?;
        script.run(poke)?;
        let said = script.refused("qemu-io", &["-f", "qcow2", "-c", "write -P 9 3M 64k", "t"])?;
        assert!(said.contains("past the end of the file"), "{said}");
        script.mends("t", "all", poke)?;
        script.run("io t: read -P 1 0 128k; read -P 2 1M 64k; write -P 9 3M 64k; read -P 1 0 128k")?;
    }
    Ok(())
}
