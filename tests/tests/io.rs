//! The program under the name `qemu-io`: the same commands as QEMU's, the same answers (but for the speed), the same images.

use std::process::Output;

use headwater_tests::sides::{Sides, master};
use headwater_tests::{Result, peer};

/// What a tool said, without how fast it was.
fn said(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().map(|line| line.split("; ").next().unwrap_or_default().to_owned()).collect()
}

/// Runs commands on both sides; they answer alike and end alike.
fn same(sides: &Sides, format: &str, file: &str, commands: &[&str]) -> Result<Vec<String>> {
    let mut words = vec!["-f", format];
    for command in commands {
        words.extend(["-c", command]);
    }
    words.push(file);
    let (ours, theirs) = sides.run_words(&words)?;
    assert_eq!(said(&ours), said(&theirs), "{format} {commands:?}");
    assert_eq!(ours.status.code(), theirs.status.code(), "{format} {commands:?}");
    Ok(said(&ours))
}

#[test]
fn commands_do_and_say_the_same() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for format in ["qcow2", "qed", "raw"] {
        let sides = Sides::new("qemu-io")?;
        sides.both(|dir| master(&dir.join("m.raw"), 8 << 20, 11))?;
        sides.both(|dir| {
            let (from, to) = (dir.join("m.raw"), dir.join("a"));
            let args = ["convert", "-f", "raw", "-O", format].map(std::ffi::OsStr::new);
            headwater_tests::qemu::qemu_img(args.into_iter().chain([from.as_os_str(), to.as_os_str()]))?.ok().map(drop)
        })?;
        same(&sides, format, "a", &["write -P 3 0 64k", "read -P 3 0 64k", "read -P 0x3 -s 100 -l 100 0 1k"])?;
        same(
            &sides,
            format,
            "a",
            &["write 100k 3k", "read -P 0xcd 100k 3k", "writev -P 7 1M 4k 8k", "readv -P 7 1M 4k 8k"],
        )?;
        same(&sides, format, "a", &["write -z 2M 128k", "read -P 0 2M 128k", "write -z -u 3M 64k", "flush"])?;
        same(&sides, format, "a", &["aio_write -P 5 5M 64k", "aio_flush", "aio_read -P 5 5M 64k", "aio_flush"])?;
        same(&sides, format, "a", &["write -q -f -P 9 6M 512", "read -v 6M 48", "length", "alloc 0 64k", "alloc 6M"])?;
        same(&sides, format, "a", &["reopen -r", "read -P 9 6M 512"])?;
        if format != "qed" {
            // (QEMU's QED carries out none.)
            same(&sides, format, "a", &["discard 4M 1M", "read -P 0 4M 1M"])?;
        }
        // What goes wrong is said and ends with 1.
        same(&sides, format, "a", &["read -P 4 0 64k"])?;
        same(&sides, format, "a", &["read 100M 64k"])?;
        same(&sides, format, "a", &["write 100M 64k"])?;
        same(&sides, format, "a", &["read 0"])?;
        same(&sides, format, "a", &["read x 1"])?;
        same(&sides, format, "a", &["nosuchcommand"])?;
        same(&sides, format, "a", &["quit", "nosuchcommand"])?;
        if format != "qed" {
            same(&sides, format, "a", &["truncate 10M", "length", "read -P 0 9M 1M"])?;
        }
        if format == "qcow2" {
            same(&sides, format, "a", &["write -c -P 77 7M 64k", "read -P 77 7M 64k"])?;
        }
        sides.hold_the_same("a", format)?;
    }
    Ok(())
}

#[test]
fn what_cannot_be_opened_or_written_ends_with_1() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let sides = Sides::new("qemu-io")?;
    sides.both(|dir| master(&dir.join("m.raw"), 1 << 20, 12))?;
    for words in [&["-c", "length", "nosuchfile"][..], &["-r", "-f", "raw", "-c", "write 0 512", "m.raw"]] {
        let (ours, theirs) = sides.run_words(words)?;
        assert_eq!((ours.status.code(), theirs.status.code()), (Some(1), Some(1)), "{words:?}");
        let said = String::from_utf8_lossy(&ours.stderr).into_owned();
        assert!(said.starts_with("qemu-io: "), "{said}");
    }
    Ok(())
}
