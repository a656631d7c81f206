//! What an image says of itself, changed where it is: 061, 112 (in part), 082 (in part).

use headwater_tests::process::finish;
use headwater_tests::script::Script;
use headwater_tests::{Result, peer};
use std::process::Command;

/// 061: versions up and down, with clusters of zeros that version 2 cannot say.
#[test]
fn versions_go_up_and_down() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o compat=1.1,lazy_refcounts=on t 64M
         io t: write -P 1 0 1M; write -z 2M 1M; write -P 3 30M 200k; write -z 30M 64k
         img amend -o compat=0.10,lazy_refcounts=off t
         img info -f $F t
         same t
         img check t
         io t: read -P 0 2M 1M; write -P 5 2M 128k
         img amend -o compat=1.1 t
         img info -f $F t
         io t: write -z 0 64k
         same t
         img amend -o lazy_refcounts=on t
         img info -f $F t
         img amend -o compat=0.42 t
         img amend -o compat=0.10,size=128M t
         img info -f $F t
         img check t
         same t",
    )?;
    // What lies below does not come back.
    Script::in_each(
        &["qcow2"],
        "img create -f $F base 8M
         io base: write -P 7 0 8M
         img create -f $F -b base -F $F t
         io t: write -z 0 1M; write -P 3 2M 64k; write -z 4M 64k
         img amend -o compat=0.10 t
         io t: read -P 0 0 1M; read -P 7 1M 1M; read -P 3 2M 64k; read -P 0 4M 64k
         img info -f $F t
         same t
         img check t",
    )
}

/// 112: refcounts of every width, as far as what is counted allows.
#[test]
fn refcounts_get_another_width() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F -o cluster_size=4k t 64M
         io t: write -P 1 0 1M
         img amend -o refcount_bits=1 t
         img check t
         img info -f $F t
         img amend -o refcount_bits=64 t
         img check t
         img amend -o refcount_bits=8 t
         io t: write -P 2 10M 3M
         same t
         img check t
         img amend -o refcount_bits=7 t
         img amend -o refcount_bits=128 t
         img amend -o compat=0.10 t
         img amend -o compat=0.10,refcount_bits=16 t
         img info -f $F t
         img check t
         img amend -o refcount_bits=8 t
         same t",
    )
}

/// What is for new images only, or for another command, or for no format at all.
#[test]
fn what_cannot_be_changed_is_told() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    Script::in_each(
        &["qcow2"],
        "img create -f $F t 64M
         img amend -f $F -o cluster_size=4k t
         img amend -f $F -o preallocation=full t
         img amend -f $F -o backing_file=x t
         img amend -f $F -o foo=bar t
         img amend -f $F -o data_file=x t
         img amend -f $F -o data_file_raw=on t
         img amend -f $F -o lazy_refcounts=maybe t
         img amend -f $F -o refcount_bits=many t
         img amend -f $F t
         img amend -f $F -o size=65M t
         img amend -f $F -o size=1000M t
         img info -f $F t
         img check t",
    )?;
    Script::in_each(&["raw", "qed"], "img create -f $F t 1M\n img amend -f $F -o size=2M t")
}

/// 244 (in part): a data file that has moved is named anew.
#[test]
fn a_data_file_that_has_moved_is_named_anew() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let run = |program: &std::path::Path, line: &str| {
        finish(Command::new(program).args(line.split(' ')).current_dir(dir.path()))
    };
    let (ours, qemu_img) = (peer::headwater()?, peer::find("qemu-img")?);
    run(&qemu_img, "create -q -f qcow2 -o data_file=d.raw,data_file_raw=on t 4M")?.ok()?;
    finish(Command::new("qemu-io").args(["-c", "write -P 9 1M 64k", "t"]).current_dir(dir.path()))?.ok()?;
    std::fs::rename(dir.path().join("d.raw"), dir.path().join("e.raw"))?;
    assert_eq!(run(&ours, "img amend -o lazy_refcounts=on t")?.code()?, 1);
    run(&ours, "img amend -o data_file=e.raw t")?.ok()?;
    finish(Command::new("qemu-io").args(["-c", "read -P 9 1M 64k", "t"]).current_dir(dir.path()))?.ok()?;
    run(&ours, "img amend -o data_file_raw=off t")?.ok()?;
    let info = run(&qemu_img, "info t")?.ok()?;
    assert!(info.contains("data file: e.raw") && info.contains("data file raw: false"), "{info}");
    run(&qemu_img, "check -q t")?.ok()?;
    Ok(())
}

/// 293: passphrases of encrypted images come and go, in the reference's words.
#[test]
fn passphrases_come_and_go() -> Result {
    peer!("headwater", "qemu-img");
    let folder = tempfile::tempdir()?;
    let (mine, qemu_img) = (peer::headwater()?, peer::find("qemu-img")?);
    let line = |program: &std::path::Path, words: &[&str]| {
        let mut command = Command::new(program);
        command.current_dir(&folder).args(words);
        for secret in ["a", "b", "c"] {
            command.args(["--object", &format!("secret,id={secret},data={secret}{secret}")]);
        }
        command
    };
    for (format, prefix) in [("luks", ""), ("qcow2", "encrypt.")] {
        let kind = if format == "luks" { String::new() } else { "encrypt.format=luks,".to_owned() };
        let made = format!("{kind}{prefix}key-secret=a,{prefix}iter-time=10");
        for file in ["theirs", "ours"] {
            let mut create = line(&qemu_img, &["create", "-q", "-f", format, "-o", &made, file, "1M"]);
            finish(&mut create)?.ok()?;
        }
        let named =
            |file: &str, secret: &str| format!("driver={format},{prefix}key-secret={secret},file.filename={file}");
        for (with, options, force) in [
            ("a", "new-secret=b", false),
            ("a", "state=active", false),
            ("a", "state=foo", false),
            ("a", "state=active,new-secret=zz", false),
            ("a", "state=active,new-secret=b,keyslot=9", false),
            ("a", "state=active,new-secret=b,keyslot=0", false),
            ("a", "state=active,new-secret=a,old-secret=b", false),
            ("a", "state=inactive", false),
            ("a", "state=inactive,old-secret=b", false),
            ("a", "state=inactive,old-secret=a", false),
            ("a", "state=inactive,keyslot=0", false),
            ("a", "state=inactive,keyslot=3", false),
            ("a", "state=inactive,new-secret=b", false),
            ("a", "state=inactive,keyslot=0,iter-time=10", false),
            ("a", "keyslot=abc,state=inactive", false),
            ("a", "foo=1", false),
            ("a", "key-secret=b", false),
            ("a", "state=active,new-secret=b,iter-time=10", false),
            ("b", "state=active,new-secret=c,iter-time=10,keyslot=1", false),
            ("b", "state=active,new-secret=c,iter-time=10,keyslot=1", true),
            ("b", "state=inactive,keyslot=0", false),
            ("c", "state=inactive,keyslot=0,old-secret=c", false),
            ("c", "state=inactive,old-secret=a", false),
            ("a", "state=active,new-secret=a", false),
            ("c", "state=inactive,keyslot=1", true),
            ("c", "state=active,new-secret=a", false),
        ] {
            let options = options.split(',').map(|option| format!("{prefix}{option}")).collect::<Vec<_>>().join(",");
            let amend = |program: &std::path::Path, first: &[&str], file: &str| {
                let mut words = first.to_vec();
                words.extend(["amend", "-o", &options]);
                if force {
                    words.push("--force");
                }
                let named = named(file, with);
                words.extend(["--image-opts", &named]);
                let output = finish(&mut line(program, &words))?;
                let said = output.stderr.replace(file, "IMAGE").replace("qemu-img: ", "").replace("headwater: ", "");
                let said = said.replace("'IMAGE': ", "");
                // We say which image it is; the reference leaves a blank at the end of one of its texts.
                let said: Vec<String> = said.lines().map(|line| line.trim().to_owned()).collect();
                Ok::<_, headwater_tests::Error>((output.status.code(), said))
            };
            let theirs = amend(&qemu_img, &[], "theirs")?;
            let ours = amend(&mine, &["img"], "ours")?;
            assert_eq!(ours.0, theirs.0, "{options}: {ours:?} {theirs:?}");
            assert_eq!(ours.1, theirs.1, "{options}");
        }
    }
    Ok(())
}
