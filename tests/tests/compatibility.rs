//! `docs/compatibility.md` against what both storage daemons say of themselves.
//!
//! **Invariant.** The page has a row for everything that the real daemon has, and none for what nobody has; what it calls `absent` is
//! refused here, and what it does not call so is there. A command that is `same` takes every argument that QEMU's takes; one that
//! `differs` names those that it does not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use headwater_tests::process::{Daemon, finish, run};
use headwater_tests::qmp::Qmp;
use headwater_tests::{Result, error, peer};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../docs/compatibility.md");

/// One row: the verdict and what is said of it.
type Rows = BTreeMap<String, (String, String)>;

/// The rows under a heading.
fn rows(heading: &str) -> Result<Rows> {
    let section = PAGE.split("\n## ").find(|section| section.starts_with(heading)).ok_or("no such heading")?;
    let mut rows = Rows::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let [_, name, verdict, note, _] = line.split('|').map(str::trim).collect::<Vec<_>>()[..] else {
            return Err(error!("no row: {line}"));
        };
        assert!(["same", "differs", "absent"].contains(&verdict), "{line}");
        assert!(verdict == "same" || !note.is_empty(), "how, or why: {line}");
        let before = rows.insert(name.trim_matches('`').to_owned(), (verdict.to_owned(), note.to_owned()));
        assert!(before.is_none(), "twice: {line}");
    }
    Ok(rows)
}

/// What a daemon says of itself.
struct Described {
    /// Commands or events, each with the arguments it takes or carries.
    names: BTreeMap<String, BTreeSet<String>>,
    /// The words of an argument that chooses.
    drivers: BTreeSet<String>,
}

struct Storage {
    qmp: Qmp,
    _daemon: Daemon,
}

fn start(program: &Path, first: &[&str], dir: &Path, name: &str) -> Result<Storage> {
    let socket = dir.join(name);
    let chardev = format!("socket,id=m,path={},server=on,wait=off", socket.display());
    let mut command = Command::new(program);
    command.args(first).args(["--chardev", &chardev, "--monitor", "chardev=m"]);
    let mut daemon = Daemon::spawn(name, command)?;
    daemon.listening(&socket)?;
    Ok(Storage { qmp: Qmp::connect(&socket)?, _daemon: daemon })
}

fn described(storage: &mut Storage, meta_type: &str) -> Result<Described> {
    let schema = storage.qmp.command("query-qmp-schema", json!({}))??;
    let entries = schema.as_array().ok_or("no list")?;
    let types: BTreeMap<&str, &Value> =
        entries.iter().filter_map(|entry| Some((entry["name"].as_str()?, entry))).collect();
    let members = |entry: &Value| {
        let members = types.get(entry["arg-type"].as_str()?)?["members"].as_array()?;
        Some(members.clone())
    };
    let mut described = Described { names: BTreeMap::new(), drivers: BTreeSet::new() };
    for entry in entries.iter().filter(|entry| entry["meta-type"] == meta_type) {
        let name = entry["name"].as_str().ok_or("no name")?;
        let members = members(entry).unwrap_or_default();
        if name == "blockdev-add" {
            let driver = members.iter().find(|member| member["name"] == "driver").ok_or("no driver")?;
            let words =
                driver["type"].as_str().and_then(|name| types.get(name)).and_then(|kind| kind["values"].as_array());
            described.drivers = words.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        }
        let members = members.iter().filter_map(|member| member["name"].as_str()).map(str::to_owned).collect();
        described.names.insert(name.to_owned(), members);
    }
    Ok(described)
}

fn both(dir: &Path) -> Result<(Storage, Storage)> {
    let ours = start(&peer::headwater()?, &["storage-daemon"], dir, "ours")?;
    let theirs = start(&peer::find("qemu-storage-daemon")?, &[], dir, "theirs")?;
    Ok((ours, theirs))
}

fn names(rows: &Rows) -> BTreeSet<String> {
    rows.keys().cloned().collect()
}

/// The rows that are not `absent`.
fn present(rows: &Rows) -> BTreeSet<String> {
    rows.iter().filter(|(_, (verdict, _))| verdict != "absent").map(|(name, _)| name.clone()).collect()
}

/// Arguments that only the real one takes are named in the row, and rows that say `same` leave none to name.
fn arguments_are_told(rows: &Rows, ours: &Described, theirs: &Described) {
    for (name, (verdict, note)) in rows {
        let (Some(ours), Some(theirs)) = (ours.names.get(name), theirs.names.get(name)) else { continue };
        let lacking: Vec<&String> = theirs.difference(ours).collect();
        assert!(verdict != "same" || lacking.is_empty(), "{name} is called the same and does not take {lacking:?}");
        for argument in lacking {
            assert!(
                note.contains(&format!("`{argument}`")),
                "{name} does not take {argument}, and the page does not say so"
            );
        }
    }
}

#[test]
fn every_command_and_event_has_its_row() -> Result {
    peer!("headwater", "qemu-storage-daemon");
    let dir = tempfile::tempdir()?;
    let (mut ours, mut theirs) = both(dir.path())?;

    let (here, there) = (described(&mut ours, "command")?, described(&mut theirs, "command")?);
    let (rows_of_qemu, of_2011, of_ours) = (rows("Commands")?, rows("The API of 2011")?, rows("Ours")?);
    assert_eq!(names(&rows_of_qemu), there.names.keys().cloned().collect::<BTreeSet<_>>());
    let mut expected = present(&rows_of_qemu);
    expected.extend(present(&of_2011));
    expected.extend(names(&of_ours));
    assert_eq!(expected, here.names.keys().cloned().collect::<BTreeSet<_>>());
    arguments_are_told(&rows_of_qemu, &here, &there);

    // The schema and the list of commands are one.
    let listed = ours.qmp.command("query-commands", json!({}))??;
    let listed: BTreeSet<String> = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|command| command["name"].as_str())
        .map(str::to_owned)
        .collect();
    assert_eq!(listed, expected);

    let (here, there) = (described(&mut ours, "event")?, described(&mut theirs, "event")?);
    let events = rows("Events")?;
    let known: BTreeSet<String> = here.names.keys().chain(there.names.keys()).cloned().collect();
    assert_eq!(names(&events), known);
    assert_eq!(present(&events), here.names.keys().cloned().collect::<BTreeSet<_>>());
    arguments_are_told(&events, &here, &there);
    Ok(())
}

#[test]
fn every_driver_and_object_has_its_row() -> Result {
    peer!("headwater", "qemu-storage-daemon");
    let dir = tempfile::tempdir()?;
    let (mut ours, mut theirs) = both(dir.path())?;

    let drivers = rows("Drivers")?;
    assert_eq!(names(&drivers), described(&mut theirs, "command")?.drivers);
    for (driver, (verdict, _)) in &drivers {
        let answer = ours.qmp.command("blockdev-add", json!({ "driver": driver, "node-name": "n", "x": 1 }))?;
        let Err(refused) = answer else { return Err(error!("{driver} was added with nothing below it")) };
        assert_eq!(refused.desc.contains("does not accept value"), verdict == "absent", "{driver}: {refused}");
    }

    let objects = rows("Objects")?;
    let help = run("qemu-storage-daemon", ["--object", "help"])?.ok()?;
    let listed: BTreeSet<String> =
        help.lines().filter_map(|line| line.strip_prefix("  ")).map(|name| name.trim().to_owned()).collect();
    assert_eq!(names(&objects), listed);
    for (object, (verdict, _)) in &objects {
        let mut arguments = json!({ "qom-type": object, "id": object });
        if object == "secret" {
            arguments["data"] = json!("x");
        }
        let answer = ours.qmp.command("object-add", arguments)?;
        assert_eq!(answer.is_err(), verdict == "absent", "{object}: {answer:?}");
    }
    Ok(())
}

#[test]
fn every_option_and_kind_of_chardev_has_its_row() -> Result {
    peer!("headwater", "qemu-storage-daemon");
    let program = peer::headwater()?;
    let options = rows("Options")?;
    let help = |program: &Path, first: &[&str]| -> Result<BTreeSet<String>> {
        let text = finish(Command::new(program).args(first).arg("--help"))?.ok()?;
        let words = text.lines().filter(|line| line.starts_with("  -")).flat_map(|line| line.split([' ', ',']));
        Ok(words.filter(|word| word.starts_with("--")).map(str::to_owned).collect())
    };
    assert_eq!(names(&options), help(&peer::find("qemu-storage-daemon")?, &[])?);
    assert_eq!(present(&options), help(&program, &["storage-daemon"])?);

    let chardevs = rows("Chardevs")?;
    let text = run("qemu-storage-daemon", ["--chardev", "help"])?.ok()?;
    let listed: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("  ")).map(|name| name.trim().to_owned()).collect();
    assert_eq!(names(&chardevs), listed);
    for (kind, (verdict, _)) in &chardevs {
        // A key that no kind has: those that are there complain of it, and those that are not of themselves.
        let said = run(&program, ["storage-daemon", "--chardev", &format!("{kind},id=c,path=/x,nonsense=1")])?;
        assert_eq!(said.code()?, 1, "{said:?}");
        assert_eq!(said.stderr.contains("is not there"), verdict == "absent", "{kind}: {}", said.stderr);
    }
    Ok(())
}
