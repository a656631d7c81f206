//! What the line comes to: disks and nodes of ours, monitors to join, and QEMU's own line with places left open for what is only
//! known when those stand.

use super::drives::{Drive, Fate, Places};
use super::line::Line;
use super::monitors::{Monitor, Monitors, Seat};
use super::nodes::{Nodes, tree};
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A part of QEMU's line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// As it is.
    Words(Vec<OsString>),
    /// The client of the drive of this index.
    Drive(usize),
    /// The client of a node.
    Client(String),
    /// What stands for the monitor of this index.
    Monitor(usize),
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) drives: Vec<Drive>,
    /// Trees of nodes, in their order.
    pub(super) trees: Vec<Map<String, Value>>,
    /// Devices that have a node of ours, and which.
    pub(super) used_by: Vec<(String, String)>,
    pub(super) monitors: Vec<Monitor>,
    /// Objects that nodes and disks may refer to.
    pub(super) objects: Vec<String>,
    pub(super) parts: Vec<Part>,
    pub(super) pid_file: Option<PathBuf>,
    pub(super) daemonize: bool,
    pub(super) notes: Vec<String>,
}

impl Plan {
    /// Takes the descriptors of its monitors, before anything of ours could be open under their numbers. What cannot be taken is told
    /// when it is used.
    pub(super) fn hand_over(&self) {
        for monitor in &self.monitors {
            if let Seat::Inherited(number, _) = monitor.seat {
                let _ = ring::hand_over(number);
            }
        }
    }

    /// Reads the line, for an emulator of this name.
    pub(super) fn of(line: &Line, emulator: &Path) -> Self {
        let name = emulator.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let objects: Vec<&str> = line.values(&["object"]).filter(|object| is_for_disks(object)).collect();
        let known = objects.iter().filter_map(|object| id_of(object)).collect();
        let mut places = Places::of(line, name, &known);
        let mut nodes = Nodes::of(line, &known);
        let Monitors { ours: monitors, notes } = Monitors::of(line);
        let mut plan = Self { notes: std::mem::take(&mut nodes.notes), ..Self::default() };
        plan.objects = objects.into_iter().map(str::to_owned).collect();
        for (at, option) in line.options.iter().enumerate() {
            let words = || Part::Words(option.words().to_vec());
            if let Some(fate) = places.fate(option) {
                match fate {
                    Fate::Ours(drive) => {
                        plan.parts.push(Part::Drive(plan.drives.len()));
                        plan.drives.push(*drive);
                    }
                    Fate::Emulators(why) => {
                        plan.notes.extend(why);
                        plan.parts.push(words());
                    }
                }
            } else if let Some(tree) = nodes.ours.remove(&at) {
                plan.trees.push(tree);
                plan.parts.extend(nodes.lent.get(&at).into_iter().flatten().cloned().map(Part::Client));
            } else if let Some(device) = nodes.devices.remove(&at) {
                plan.parts.push(Part::Words(device));
            } else if let Some(index) = monitors.iter().position(|monitor| monitor.at == at) {
                plan.parts.push(Part::Monitor(index));
            } else if option.name == "daemonize" {
                plan.daemonize = true;
            } else if option.name == "pidfile" {
                plan.pid_file = option.value().map(PathBuf::from);
            } else {
                plan.parts.push(words());
            }
        }
        if !plan.drives.is_empty() || !nodes.is_empty() {
            plan.notes.extend(notes);
        }
        plan.monitors = monitors;
        plan.used_by = std::mem::take(&mut nodes.used_by);
        plan.nothing_is_ours(nodes.is_empty());
        plan
    }

    fn nothing_is_ours(&mut self, no_nodes: bool) {
        if no_nodes {
            // Nodes that no device has would be nobody's; the line is handed on as it is, and QEMU has them.
            self.trees.retain(|_| !self.drives.is_empty());
        }
    }

    /// Whether there is nothing for us to do.
    pub(super) fn is_empty(&self) -> bool {
        self.drives.is_empty() && self.trees.is_empty()
    }
}

/// Whether disks may refer to an object, and we know what it is.
fn is_for_disks(text: &str) -> bool {
    ["secret", "throttle-group"].iter().any(|kind| text.contains(kind))
        && graph::Objects::new(&[text.to_owned()]).is_ok()
}

fn id_of(object: &str) -> Option<String> {
    tree(object, "qom-type")?.get("id")?.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Plan {
        let line = Line::read(words.iter().map(OsString::from)).unwrap();
        Plan::of(&line, Path::new("/usr/bin/qemu-system-x86_64"))
    }

    #[test]
    fn what_libvirt_probes_with_is_nothing_for_us() {
        let words = "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg \
                     -qmp unix:/q,server=on,wait=off -pidfile /p -daemonize";
        assert!(plan(&words.split_whitespace().collect::<Vec<_>>()).is_empty());
        let cd = ["-blockdev", "driver=file,filename=x,node-name=n", "-S"];
        assert!(plan(&cd).is_empty());
        assert!(plan(&["-drive", "if=pflash,file=x", "-cdrom", "y", "-qmp", "pty"]).is_empty());
    }

    #[test]
    fn the_rest_of_a_line_keeps_its_order() {
        let plan = plan(&[
            "-m",
            "512",
            "-hda",
            "a",
            "-qmp",
            "unix:/q,server=on,wait=off",
            "-S",
            "-pidfile",
            "p",
            "-name",
            "x",
        ]);
        let word = |words: &[&str]| Part::Words(words.iter().map(OsString::from).collect());
        let expected = [word(&["-m", "512"]), Part::Drive(0), Part::Monitor(0), word(&["-S"]), word(&["-name", "x"])];
        assert_eq!(plan.parts, expected);
        assert_eq!(plan.pid_file, Some("p".into()));
        assert!(!plan.is_empty() && !plan.daemonize);
    }

    #[test]
    fn objects_that_disks_refer_to_are_both_sides() {
        let plan =
            plan(&["-object", "secret,id=s,data=x", "-object", "rng-random,id=r,filename=/dev/urandom", "-hda", "a"]);
        assert_eq!(plan.objects, ["secret,id=s,data=x"]);
        assert_eq!(plan.parts.len(), 3);
    }
}
