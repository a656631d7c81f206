//! The image tool under the name `qemu-img`: the same command lines, given to it and to QEMU's, in folders of their own with the
//! same files in them, say the same, end the same, and leave images that hold the same.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use headwater_tests::qemu::qemu_io;
use headwater_tests::sides::{Sides, master};
use headwater_tests::{Result, peer};

const SIZE: u64 = 12 << 20;

#[test]
fn convert_reads_and_writes_what_qemu_imgs_does() -> Result {
    peer!("headwater", "qemu-img");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), SIZE + 512, 1))?;
    for (options, format) in [
        ("-O qcow2", "qcow2"),
        ("-O qcow2 -o compat=0.10", "qcow2"),
        ("-O qcow2 -o cluster_size=2M", "qcow2"),
        ("-O qcow2 -o cluster_size=512", "qcow2"),
        ("-O qcow2 -o extended_l2=on,cluster_size=32k", "qcow2"),
        ("-O qed", "qed"),
        ("-O raw", "raw"),
        ("-O qcow2 -c", "qcow2"),
        ("-O qcow2 -c -o compression_type=zstd,cluster_size=4k", "qcow2"),
        ("-O qcow2 -S 0", "qcow2"),
        ("-O qcow2 -m 1 -W -S 64k", "qcow2"),
    ] {
        sides.same(&format!("convert -f raw {options} m.raw there"))?;
        sides.hold_the_same("there", format)?;
        sides.same(&format!("convert -f {format} -O raw there back.raw"))?;
        sides.hold_the_same("back.raw", "raw")?;
        sides.same(&format!("compare -f raw -F {format} m.raw there"))?;
        let ours = fs::read(sides.ours.join("back.raw"))?;
        assert!(ours == fs::read(sides.ours.join("m.raw"))?, "{options}");
    }
    // Holes stay holes.
    let blocks = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        Ok::<_, std::io::Error>(fs::metadata(sides.ours.join(name))?.blocks())
    };
    assert!(blocks("back.raw")? <= blocks("m.raw")?);
    // One behind the other, into what is there already, and over a backing file.
    sides.both(|dir| master(&dir.join("n.raw"), 3 << 20, 2))?;
    sides.same("convert -f raw -O qcow2 m.raw n.raw both.qcow2")?;
    sides.hold_the_same("both.qcow2", "qcow2")?;
    sides.same("convert -n -f raw -O qcow2 n.raw both.qcow2")?;
    sides.hold_the_same("both.qcow2", "qcow2")?;
    sides.same("create -q -f qcow2 -b m.raw -F raw top.qcow2")?;
    sides.both(|dir| qemu_io("qcow2", &dir.join("top.qcow2"), &["write -P 9 1M 200k", "write -z 3M 1M"]).map(drop))?;
    sides.same("convert -f qcow2 -O qcow2 -B m.raw -F raw top.qcow2 copy.qcow2")?;
    sides.hold_the_same("copy.qcow2", "qcow2")?;
    assert!(fs::metadata(sides.ours.join("copy.qcow2"))?.len() < 4 << 20, "only what the top has");
    let progress = sides.run("convert -p -f raw -O qcow2 m.raw p.qcow2")?.0;
    let said = String::from_utf8_lossy(&progress.stdout).into_owned();
    assert!(said.contains("(0.00/100%)\r") && said.ends_with("(100.00/100%)\n"), "{said:?}");
    Ok(())
}

#[test]
fn what_makes_no_sense_is_said_and_ends_as_with_qemu_img() -> Result {
    peer!("headwater", "qemu-img");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), SIZE, 1))?;
    sides.same("create -f qcow2 a.qcow2 12M")?;
    for line in [
        "convert -O nosuchformat m.raw x",
        "convert -O qcow2 nosuchfile.raw x",
        "convert -c -O raw m.raw x",
        "convert -n -O qcow2 m.raw nosuchfile.qcow2",
        "create -f qcow2 x",
        "create -f qcow2 -b m.raw x",
        "create -f qcow2 -o cluster_size=1000 x 1M",
        "create -f qcow2 -o refcount_bits=3 x 1M",
        "create -f qcow2 -o compat=0.10,refcount_bits=8 x 1M",
        "create -f qcow2 -o nosuchoption=1 x 1M",
        "info nosuchfile",
        "resize -f qcow2 a.qcow2 1M",
        "resize -f qcow2 a.qcow2 -50M",
        "rebase -b nosuchfile -F raw a.qcow2",
        "commit a.qcow2",
        "snapshot -a nosuchsnapshot a.qcow2",
        "snapshot -c name m.raw",
        "dd if=m.raw",
    ] {
        sides.fails(line, 1)?;
    }
    sides.fails("compare m.raw nosuchfile", 2)?;
    Ok(())
}

#[test]
fn compare_tells_the_same_differences() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("a.raw"), SIZE, 3))?;
    sides.same("convert -f raw -O qcow2 a.raw a.qcow2")?;
    assert_eq!(sides.same("compare a.raw a.qcow2")?, "Images are identical.\n");
    sides.both(|dir| qemu_io("qcow2", &dir.join("a.qcow2"), &["write -P 200 5000k 512"]).map(drop))?;
    assert_eq!(sides.same("compare a.raw a.qcow2")?, "Content mismatch at offset 5120000!\n");
    sides.same("create -q -f raw b.raw 14M")?;
    sides.same("create -q -f qcow2 c.qcow2 12M")?;
    sides.same("compare b.raw c.qcow2")?;
    sides.same("compare -s b.raw c.qcow2")?;
    sides.same("compare -q a.raw b.raw")?;
    Ok(())
}

#[test]
fn rebase_keeps_what_the_disk_shows() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for format in ["qcow2", "qed"] {
        let sides = Sides::new("qemu-img")?;
        sides.both(|dir| master(&dir.join("old.raw"), SIZE, 4))?;
        sides.both(|dir| master(&dir.join("new.raw"), SIZE - (2 << 20), 5))?;
        let make = || -> Result {
            sides.same(&format!("create -q -f {format} -b old.raw -F raw top"))?;
            sides.both(|dir| qemu_io(format, &dir.join("top"), &["write -P 9 1M 200k", "write -z 3M 1M"]).map(drop))?;
            sides.same(&format!("convert -f {format} -O raw top before.raw")).map(drop)
        };
        for line in [
            format!("rebase -f {format} -b new.raw -F raw top"),
            format!("rebase -f {format} -b  top").replace("-b  top", "-b= top"),
        ] {
            make()?;
            if line.contains("-b=") {
                // No backing file: an empty word, which this test's lines cannot hold.
                for (tool, dir) in [(sides.tool.as_path(), &sides.ours), (Path::new("qemu-img"), &sides.theirs)] {
                    let args = ["rebase", "-f", format, "-b", "", "top"];
                    assert!(Command::new(tool).args(args).current_dir(dir).status()?.success());
                }
            } else {
                sides.same(&line)?;
            }
            sides.hold_the_same("top", format)?;
            sides.same(&format!("convert -f {format} -O raw top after.raw"))?;
            assert!(fs::read(sides.ours.join("before.raw"))? == fs::read(sides.ours.join("after.raw"))?, "{line}");
        }
        // Without a look: the disk shows what the new one has.
        make()?;
        sides.same(&format!("rebase -u -f {format} -b new.raw -F raw top"))?;
        sides.hold_the_same("top", format)?;
    }
    Ok(())
}

#[test]
fn commit_brings_it_down() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for format in ["qcow2", "qed"] {
        let sides = Sides::new("qemu-img")?;
        sides.both(|dir| master(&dir.join("m.raw"), SIZE, 6))?;
        sides.same(&format!("convert -f raw -O {format} m.raw base"))?;
        sides.same(&format!("create -q -f {format} -b base -F {format} middle"))?;
        sides.same(&format!("create -q -f {format} -b middle -F {format} top 14M"))?;
        let change = |name: &'static str, commands: &'static [&'static str]| {
            sides.both(|dir| qemu_io(format, &dir.join(name), commands).map(drop))
        };
        change("middle", &["write -P 7 2M 300k", "write -z 5M 1M"])?;
        change("top", &["write -P 8 2100k 100k", "write -P 9 13M 3k"])?;
        sides.same(&format!("convert -f {format} -O raw top before.raw"))?;
        sides.same(&format!("commit -f {format} top"))?;
        for name in ["top", "middle", "base"] {
            sides.hold_the_same(name, format)?;
        }
        change("top", &["write -P 10 100k 100k"])?;
        sides.same(&format!("commit -f {format} -b base top"))?;
        sides.hold_the_same("base", format)?;
        sides.same(&format!("commit -q -d -f {format} middle"))?;
        sides.hold_the_same("top", format)?;
    }
    Ok(())
}

#[test]
fn disks_grow_and_shrink() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for format in ["qcow2", "qed", "raw"] {
        let sides = Sides::new("qemu-img")?;
        sides.both(|dir| master(&dir.join("m.raw"), SIZE, 7))?;
        sides.same(&format!("convert -f raw -O {format} m.raw a"))?;
        sides.same(&format!("resize -f {format} a +5M"))?;
        sides.hold_the_same("a", format)?;
        sides.same(&format!("resize -f {format} a 1G"))?;
        sides.hold_the_same("a", format)?;
        if format != "qed" {
            sides.same(&format!("resize --shrink -f {format} a 7M"))?;
            sides.hold_the_same("a", format)?;
            sides.same(&format!("resize -f {format} a 12M"))?;
            sides.hold_the_same("a", format)?;
        }
    }
    // What a longer backing file holds behind the old end stays hidden.
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), SIZE, 7))?;
    sides.same("create -q -f qcow2 -b m.raw -F raw short 3M")?;
    sides.same("resize -q -f qcow2 short 11M")?;
    sides.hold_the_same("short", "qcow2")?;
    // QEMU refuses this of version 2, which has no marks for zeros.
    let (ours, _) = sides.run("create -q -f qcow2 -o compat=0.10 -b m.raw -F raw old 3M")?;
    assert!(ours.status.success() && sides.run("resize -q -f qcow2 old 11M")?.0.status.success());
    fs::copy(sides.theirs.join("short"), sides.theirs.join("old"))?;
    sides.hold_the_same("old", "qcow2")?;
    Ok(())
}

#[test]
fn snapshots_are_listed_taken_applied_and_deleted() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), SIZE, 8))?;
    sides.same("convert -f raw -O qcow2 m.raw a.qcow2")?;
    let change = |commands: &'static [&'static str]| {
        sides.both(|dir| qemu_io("qcow2", &dir.join("a.qcow2"), commands).map(drop))
    };
    sides.same("snapshot -c one a.qcow2")?;
    change(&["write -P 1 1M 3M"])?;
    sides.same("snapshot -c two a.qcow2")?;
    change(&["write -P 2 2M 3M"])?;
    sides.hold_the_same("a.qcow2", "qcow2")?;
    sides.same("resize -q -f qcow2 a.qcow2 20M")?;
    sides.same("snapshot -a one a.qcow2")?;
    sides.hold_the_same("a.qcow2", "qcow2")?;
    sides.same("snapshot -d one a.qcow2")?;
    sides.same("snapshot -a 2 a.qcow2")?;
    sides.hold_the_same("a.qcow2", "qcow2")?;
    // The same table, but for the moment.
    let (ours, theirs) = sides.run("snapshot -l a.qcow2")?;
    let shape = |output: &Output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(|line| line.split(char::is_whitespace).filter(|w| !w.contains([':', '-'])).count()).collect()
    };
    let (ours, theirs): (Vec<usize>, Vec<usize>) = (shape(&ours), shape(&theirs));
    assert_eq!(ours, theirs);
    sides.same("snapshot -d two a.qcow2")?;
    assert_eq!(sides.same("snapshot -l a.qcow2")?, "");
    sides.hold_the_same("a.qcow2", "qcow2")?;
    Ok(())
}

#[test]
fn what_is_said_of_images_is_the_same() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = Sides::new("qemu-img")?;
    for line in [
        "create -f qcow2 a.qcow2 20M",
        "create -f qcow2 -o compat=0.10 b.qcow2 20M",
        "create -f qcow2 -o extended_l2=on,lazy_refcounts=on,refcount_bits=64,compression_type=zstd c.qcow2 20M",
        "create -f qcow2 -b a.qcow2 -F qcow2 d.qcow2",
        "create -f qcow2 -o preallocation=metadata,cluster_size=4k g.qcow2 20M",
        "create -f qcow2 -o preallocation=falloc h.qcow2 5M",
        "create -f qcow2 -o preallocation=full,extended_l2=on,cluster_size=16k i.qcow2 5M",
        "create -f raw -o preallocation=falloc j.raw 5M",
        "create -f raw -o preallocation=full k.raw 5M",
        "create -f qed -o cluster_size=4k e.qed 20M",
        "create -f raw f.raw 20M",
    ] {
        sides.same(line)?;
    }
    for (name, format) in [("g.qcow2", "qcow2"), ("h.qcow2", "qcow2"), ("i.qcow2", "qcow2"), ("k.raw", "raw")] {
        sides.hold_the_same(name, format)?;
    }
    // One tool's image, so that lengths are the same too.
    for name in ["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"] {
        fs::copy(sides.theirs.join(name), sides.ours.join(name))?;
    }
    for name in ["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"] {
        sides.same(&format!("info {name}"))?;
        sides.same(&format!("check {name}"))?;
        let json = |output: &Output| serde_json::from_slice::<serde_json::Value>(&output.stdout);
        for line in [format!("info --output json {name}"), format!("map --output json {name}")] {
            let (ours, theirs) = sides.run(&line)?;
            assert_eq!(json(&ours)?, json(&theirs)?, "{line}");
        }
    }
    for line in [
        "measure -O qcow2 --size 1G",
        "measure -O qcow2 --size 1T -o cluster_size=4k",
        "measure -O qcow2 --size 100M -o refcount_bits=1,cluster_size=512",
        "measure -O raw --size 1G",
        "measure --output json -O qcow2 --size 3G",
        "measure -O qcow2 a.qcow2",
    ] {
        let (ours, theirs) = sides.run(line)?;
        let numbers = |output: &Output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&ours), numbers(&theirs), "{line}");
    }
    Ok(())
}

/// Formats that are only read: what QEMU makes, both say the same of.
#[test]
fn what_is_said_of_masters_is_the_same() -> Result {
    peer!("headwater", "qemu-img");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), SIZE, 1))?;
    for (options, format) in [
        ("-o subformat=monolithicSparse", "vmdk"),
        ("-o subformat=streamOptimized", "vmdk"),
        ("-o subformat=monolithicFlat", "vmdk"),
        ("-o subformat=twoGbMaxExtentSparse", "vmdk"),
        ("-o subformat=twoGbMaxExtentFlat", "vmdk"),
        ("-o nocow=off", "qcow"),
        ("-o static=off", "vdi"),
        ("-o static=on", "vdi"),
        ("-o force_size=on", "vpc"),
        ("-o block_size=1M", "vhdx"),
        ("-o subformat=fixed", "vhdx"),
    ] {
        let line = format!("convert -f raw -O {format} {options} m.raw a.{format}");
        let made = Command::new("qemu-img").current_dir(&sides.theirs).args(line.split(' ')).output()?;
        assert!(made.status.success(), "{line}: {made:?}");
        for entry in fs::read_dir(&sides.theirs)? {
            let path = entry?.path();
            fs::copy(&path, sides.ours.join(path.file_name().ok_or("a file has a name")?))?;
        }
        let json = |output: &Output| serde_json::from_slice::<serde_json::Value>(&output.stdout);
        let (ours, theirs) = sides.run(&format!("info --output json a.{format}"))?;
        // A copied file may take up another number of blocks.
        let without_blocks = |mut value: serde_json::Value| {
            value.as_object_mut().map(|fields| fields.remove("actual-size"));
            for child in value["children"].as_array_mut().into_iter().flatten() {
                child["info"].as_object_mut().map(|fields| fields.remove("actual-size"));
            }
            value
        };
        assert_eq!(without_blocks(json(&ours)?), without_blocks(json(&theirs)?), "{options}");
        // Of holes where disks lie plainly QEMU says that they are data, and zeros; of VHDX it says nothing.
        if !["Flat", "static=on", "fixed"].iter().any(|plain| options.contains(plain)) && format != "vhdx" {
            let (ours, theirs) = sides.run(&format!("map --output json a.{format}"))?;
            assert_eq!(json(&ours)?, json(&theirs)?, "{options}");
        }
        sides.same(&format!("compare -f {format} -F raw a.{format} m.raw"))?;
        sides.same(&format!("convert -O qcow2 a.{format} b.qcow2"))?;
        sides.hold_the_same("b.qcow2", "qcow2")?;
    }
    Ok(())
}

#[test]
fn dd_copies_blocks() -> Result {
    peer!("headwater", "qemu-img");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("m.raw"), SIZE, 9))?;
    for (line, format) in [
        ("dd if=m.raw of=o1", "raw"),
        ("dd bs=1M count=5 -O qcow2 if=m.raw of=o2", "qcow2"),
        ("dd -f raw -O qed bs=4k skip=100 if=m.raw of=o3", "qed"),
        ("dd bs=512 count=3 if=m.raw of=o4", "raw"),
    ] {
        sides.same(line)?;
        let name = line.split("of=").nth(1).ok_or("no name")?;
        sides.hold_the_same(name, format)?;
    }
    // With both, QEMU's counts what it skips; its manual says "number of input blocks to copy", which is what ours does.
    let (ours, _) = sides.run("dd bs=1M count=5 skip=2 if=m.raw of=part")?;
    assert!(ours.status.success());
    let (all, part) = (fs::read(sides.ours.join("m.raw"))?, fs::read(sides.ours.join("part"))?);
    assert!(part == all[2 << 20..7 << 20]);
    Ok(())
}

#[test]
fn bench_sends_what_it_says() -> Result {
    peer!("headwater", "qemu-img");
    let sides = Sides::new("qemu-img")?;
    sides.both(|dir| master(&dir.join("b.raw"), 1 << 20, 5))?;
    for line in [
        "bench -c 100 -w -f raw -d 4 -s 4k --pattern 7 --flush-interval 10 b.raw",
        "bench -c 100 -w -f raw -d 4 --no-drain --flush-interval 10 --pattern 7 -o 512k b.raw",
        "bench -c 300 -f raw -S 100k b.raw",
    ] {
        let (ours, theirs) = sides.run(line)?;
        let said = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes)
                .lines()
                .filter(|l| l.starts_with("Sending"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(said(&ours.stdout), said(&theirs.stdout), "{line}");
        assert_eq!((ours.status.code(), theirs.status.code()), (Some(0), Some(0)), "{line}");
    }
    sides.hold_the_same("b.raw", "raw")?;
    sides.fails("bench -c 5 -o 5M -f raw b.raw", 1)?;
    sides.fails("bench -c 5 -f raw --flush-interval 7 b.raw", 1)?;
    sides.fails("bench -w -c 5 -f raw --flush-interval 7 b.raw", 1)?;
    Ok(())
}
