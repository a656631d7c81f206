//! `-blockdev` and the `-device`s that use nodes: which trees are ours, as a whole, and which nodes QEMU needs a client for.
//!
//! **Invariant.** What hangs together stays together: a node, what lies below it and what lies on it are all ours or all QEMU's.

use super::line::{Line, Opt};
use control::joined::can_pause;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;

/// One `-blockdev`.
#[derive(Debug)]
struct Tree {
    /// Which option it is.
    at: usize,
    content: Map<String, Value>,
    /// Names it gives, and names it refers to.
    names: Vec<String>,
    /// Why it cannot be ours.
    why_not: Option<String>,
}

/// What is ours.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// Trees to add, by the options that say them.
    pub(super) ours: HashMap<usize, Map<String, Value>>,
    /// Nodes that QEMU needs a client for, by the option that makes them.
    pub(super) lent: HashMap<usize, Vec<String>>,
    /// Devices that use them, by their options, as QEMU is to have them.
    pub(super) devices: HashMap<usize, Vec<OsString>>,
    /// Ids of those devices, and their nodes.
    pub(super) used_by: Vec<(String, String)>,
    /// What its user may want to know.
    pub(super) notes: Vec<String>,
}

/// Text of an option as a tree.
pub(super) fn tree(text: &str, implied: &str) -> Option<Map<String, Value>> {
    if text.trim_start().starts_with('{') {
        return match graph::json::parse(text.as_bytes()) {
            Ok(Value::Object(tree)) => Some(tree),
            _ => None,
        };
    }
    graph::keyval(text, Some(implied)).ok()
}

/// An object that only QEMU knows.
pub(super) fn not_understood(object: &str) -> String {
    format!("the object '{object}' is not understood here")
}

/// Every string in a tree: among them the names of nodes it refers to.
fn strings(value: &Value, found: &mut HashSet<String>) {
    match value {
        Value::String(text) => {
            found.insert(text.clone());
        }
        Value::Array(items) => items.iter().for_each(|item| strings(item, found)),
        Value::Object(tree) => tree.values().for_each(|value| strings(value, found)),
        _ => {}
    }
}

/// The node that a `-device` has for its drive.
fn drive_of(option: &Opt) -> Option<(Map<String, Value>, String)> {
    let device = tree(option.value()?, "driver")?;
    let drive = device.get("drive")?.as_str()?.to_owned();
    Some((device, drive))
}

impl Nodes {
    /// Reads the line.
    pub(super) fn of(line: &Line, objects: &HashSet<String>) -> Self {
        let mut trees: Vec<Tree> = Vec::new();
        for (at, option) in line.options.iter().enumerate().filter(|(_, option)| option.name == "blockdev") {
            let Some(found) = option.value().and_then(|text| tree(text, "driver")) else { continue };
            let Ok(found) = graph::nested(found) else { continue };
            let (names, why_not) = match graph::serves_tree(&found) {
                Ok(refers) => {
                    let missing = refers.objects.iter().find(|object| !objects.contains(*object));
                    (refers.names, missing.map(|object| not_understood(object)))
                }
                Err(error) => {
                    let own = found.get("node-name").and_then(Value::as_str);
                    (own.map(str::to_owned).into_iter().collect(), Some(error.to_string()))
                }
            };
            trees.push(Tree { at, content: found, names, why_not });
        }
        let mut groups = grouped(&trees);
        let devices: Vec<_> = line.options.iter().enumerate().filter(|(_, option)| option.name == "device").collect();
        let used: HashSet<String> =
            devices.iter().filter_map(|(_, option)| drive_of(option)).map(|(_, node)| node).collect();
        // Whatever else names a node (flash memory of a machine) is QEMU's own use of it.
        let mut elsewhere = HashSet::new();
        for text in line.values(&["M", "machine", "global", "object"]) {
            if let Some(found) = tree(text, "type") {
                strings(&Value::Object(found), &mut elsewhere);
            }
        }
        let mut nodes = Self::default();
        for group in groups.drain(..) {
            let names = || group.iter().flat_map(|index| trees[*index].names.iter());
            if names().any(|name| elsewhere.contains(name)) {
                continue;
            }
            if let Some(why) = group.iter().find_map(|index| trees[*index].why_not.as_ref()) {
                let all: Vec<&str> = names().map(String::as_str).collect();
                nodes.notes.push(format!("node '{}' is left to QEMU: {why}", all.join("', '")));
                continue;
            }
            for index in group {
                let one = &trees[index];
                nodes.ours.insert(one.at, one.content.clone());
                let wanted: Vec<String> = one.names.iter().filter(|name| used.contains(*name)).cloned().collect();
                if !wanted.is_empty() {
                    nodes.lent.insert(one.at, wanted);
                }
            }
        }
        let lent: HashSet<&String> = nodes.lent.values().flatten().collect();
        for (at, option) in devices {
            let Some((device, node)) = drive_of(option).filter(|(_, node)| lent.contains(node)) else { continue };
            if let Some(id) = device.get("id").and_then(Value::as_str) {
                nodes.used_by.push((id.to_owned(), node));
            }
            if let Some(value) = pausing(option.value().unwrap_or_default(), &device) {
                nodes.devices.insert(at, vec![option.words()[0].clone(), value.into()]);
            }
        }
        nodes
    }

    /// Whether any guest's disk is among them.
    pub(super) fn is_empty(&self) -> bool {
        self.lent.is_empty()
    }
}

/// Trees that hang together, in the order of their first ones.
fn grouped(trees: &[Tree]) -> Vec<Vec<usize>> {
    let mut group: Vec<usize> = (0..trees.len()).collect();
    let named: HashMap<&String, usize> =
        trees.iter().enumerate().flat_map(|(index, tree)| tree.names.iter().map(move |name| (name, index))).collect();
    for (index, tree) in trees.iter().enumerate() {
        let mut said = HashSet::new();
        strings(&Value::Object(tree.content.clone()), &mut said);
        for other in said.iter().filter_map(|name| named.get(name)) {
            let (from, to) = (group[*other].max(group[index]), group[*other].min(group[index]));
            for member in &mut group {
                if *member == from {
                    *member = to;
                }
            }
        }
    }
    let mut groups: Vec<Vec<usize>> = vec![Vec::new(); trees.len()];
    for (index, at) in group.into_iter().enumerate() {
        groups[at].push(index);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

/// A device that pauses the guest on errors, unless its user said something of that, or it cannot.
fn pausing(text: &str, device: &Map<String, Value>) -> Option<String> {
    let driver = device.get("driver").and_then(Value::as_str)?;
    let missing: Vec<&str> = ["werror", "rerror"].into_iter().filter(|key| !device.contains_key(*key)).collect();
    if !can_pause(driver) || missing.is_empty() {
        return None;
    }
    if text.trim_start().starts_with('{') {
        let mut device = device.clone();
        for key in missing {
            device.insert(key.to_owned(), json!("stop"));
        }
        return Some(Value::Object(device).to_string());
    }
    Some(missing.iter().fold(text.to_owned(), |text, key| format!("{text},{key}=stop")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(words: &[&str]) -> Nodes {
        Nodes::of(&Line::read(words.iter().map(OsString::from)).unwrap(), &HashSet::from(["known".to_owned()]))
    }

    const STORAGE: &str = r#"{"driver":"file","filename":"/x.qed","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}"#;
    const FORMAT: &str = r#"{"node-name":"libvirt-1-format","read-only":false,"driver":"qed","file":"libvirt-1-storage","backing":null}"#;
    const DEVICE: &str = r#"{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}"#;

    #[test]
    fn a_domain_as_libvirt_writes_it() {
        let nodes = nodes(&["-blockdev", STORAGE, "-blockdev", FORMAT, "-device", DEVICE]);
        assert_eq!(nodes.ours.len(), 2);
        assert_eq!(nodes.lent[&1], ["libvirt-1-format"]);
        let device = nodes.devices[&2][1].to_str().unwrap();
        assert!(device.ends_with(r#""bootindex":1,"werror":"stop","rerror":"stop"}"#), "{device}");
        assert!(nodes.notes.is_empty() && !nodes.is_empty());
    }

    #[test]
    fn flash_memory_stays_qemus() {
        let flash = r#"{"driver":"file","filename":"/code.fd","node-name":"libvirt-pflash0-storage"}"#;
        let format = r#"{"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}"#;
        let machine = "q35,usb=off,pflash0=libvirt-pflash0-format,acpi=on";
        let words = ["-blockdev", flash, "-blockdev", format, "-machine", machine, "-blockdev", STORAGE];
        let nodes = nodes(&words);
        assert_eq!(nodes.ours.keys().collect::<Vec<_>>(), [&3]);
        assert!(nodes.is_empty() && nodes.notes.is_empty());
    }

    #[test]
    fn one_that_cannot_be_ours_takes_the_others_along() {
        let base = r#"{"driver":"iscsi","portal":"p","target":"t","transport":"tcp","node-name":"s"}"#;
        let top = "driver=qcow2,node-name=f,file.driver=file,file.filename=x,backing=s";
        let nodes = nodes(&["-blockdev", base, "-blockdev", top, "-device", "virtio-blk-pci,drive=f"]);
        assert!(nodes.ours.is_empty() && nodes.devices.is_empty());
        assert!(nodes.notes[0].contains("'s', 'f'") && nodes.notes[0].contains("iscsi"), "{:?}", nodes.notes);
    }

    #[test]
    fn a_secret_that_is_not_understood_leaves_a_disk_to_qemu() {
        let tree =
            |secret: &str| format!("driver=luks,node-name=f,file.driver=file,file.filename=x,key-secret={secret}");
        let with = |secret: &str| nodes(&["-blockdev", &tree(secret), "-device", "virtio-blk-pci,drive=f"]);
        assert!(!with("known").is_empty());
        assert!(with("other").is_empty() && with("other").notes[0].contains("'other'"));
    }

    #[test]
    fn words_are_read_as_json_is() {
        let top = "driver=qcow2,node-name=f,file.driver=file,file.filename=x";
        let nodes = nodes(&["-blockdev", top, "-device", "scsi-hd,drive=f,rerror=report"]);
        assert_eq!(nodes.ours[&0]["file"]["filename"], "x");
        assert_eq!(nodes.devices[&1][1], "scsi-hd,drive=f,rerror=report,werror=stop");
        assert!(nodes.lent.contains_key(&0));
    }
}
