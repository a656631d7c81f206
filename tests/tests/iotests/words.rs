//! Command lines that make no sense: 082, 113, 178, 179, 211, 217, 259 and others, each in part: exit codes and on which stream.

use headwater_tests::script::Script;
use headwater_tests::{Result, peer};

#[test]
fn lines_that_make_no_sense_end_with_1() -> Result {
    peer!("headwater", "qemu-img");
    let lines = [
        "compare",
        "compare t",
        "compare --foo t t",
        "info",
        "foo",
        "convert",
        "convert t",
        "create",
        "resize t",
        "check",
        "snapshot",
        "snapshot -c",
        "snapshot -l -c x t",
        "snapshot -a x -c x t",
        "map",
        "commit",
        "rebase t",
        "rebase -b x",
        "dd",
        "dd foo=t",
        "measure",
        "info -U",
        "info t t",
        "create -f",
        "create -f qcow2 x 1G 2G",
        "create -f raw x -1",
        "create -f raw x 1Q",
        "convert -m 99 t x",
        "convert -m 0 t x",
        "convert -S 1 t x",
        "convert -S 17M t x",
        "convert -t foo t x",
        "convert -T foo t x",
        "convert -n -o foo=1 t x",
        "convert -F raw t x",
        "convert --target-is-zero t x",
        "convert --target-image-opts t x",
        "convert -O foo t x",
        "info --output=foo t",
        "info -f foo t",
        "check -r foo t",
        "resize t --foo 1M",
        "map --output=foo t",
        "map --start-offset=-1 t",
        "measure --size=1M t",
        "bench",
        "bench -c 0 t",
        "bench -d 0 t",
        "bench -s 0 t",
        "commit t",
        "commit -t foo t",
        "rebase -c -b t -F raw t",
        "dd bs=0 if=t of=o",
        "dd bs=3G if=t of=o",
        "dd count=foo if=t of=o",
        "dd if=t",
        "dd of=t",
        "compare -T foo t t",
        "bitmap",
        "bitmap --add t",
    ];
    let script = Script::new("raw")?;
    script.run("img create -f raw t 1M")?;
    lines.iter().try_for_each(|line| script.run(&format!("img {line}")))
}

/// The long names are those of later releases than the one that is compared with, so only ours is asked.
#[test]
fn long_names_of_switches_are_known() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let script = Script::new("qcow2")?;
    let lines = "create --format $F --options cluster_size=4k t 4M
         convert --source-format $F --target-format $F --target-options cluster_size=8k --parallel 2 --oob-writes t u
         convert --compress --source-cache none --target-cache writeback --sparse-size 8k --quiet --target-format $F t u
         compare --a-format $F --b-format $F --strict --cache writeback --quiet t t
         create --backing t --backing-format $F --format $F v
         rebase --backing u --backing-format $F --backing-cache none --cache writeback --compress v
         commit --format $F --base u --rate 100M --drop v
         snapshot --create one t
         snapshot --apply one t
         snapshot --delete one t
         snapshot --list t
         resize --format $F --quiet t 5M
         measure --target-format $F --size 1M
         measure -s 1M -O $F
         dd --format $F --output-format raw if=t of=w
         info --format $F --backing-chain v
         info -b v
         map --format $F --start-offset 1M --max-length 1M t
         check --format $F --cache none t
         convert --target-format $F --rate 100M --salvage t u
         convert --source-image-opts driver=$F,file.filename=t x
         create -o help --format $F
         convert -O $F -o help t x";
    lines.lines().try_for_each(|line| script.ours(line.trim()))
}

/// A rate is kept: 3 MiB of data at 4 MiB a second take half a second and more.
#[test]
fn a_rate_is_kept() -> Result {
    peer!("headwater", "qemu-img");
    let script = Script::new("raw")?;
    script.run(
        "img create -f raw t 4M
         io t: write -P 1 0 4M",
    )?;
    let began = std::time::Instant::now();
    script.ours("convert -r 4M -O raw t u")?;
    assert!(began.elapsed().as_millis() > 500, "{:?}", began.elapsed());
    Ok(())
}
