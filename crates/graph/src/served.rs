//! Whether a name or a tree is something that can be opened here, told without opening it: for those who have somebody else to ask
//! where it is not.
//!
//! **Invariant.** What is refused here would be refused when it is opened, too, with one exception: what is better left to whoever
//! owns the guest (a host's CD-ROM drive, descriptors that were handed to it).

use crate::name::{Meaning, has_protocol, meaning};
use crate::node::{Backing, Child, Node, understand};
use crate::nodes::known_driver;
use crate::options::nest;
use crate::wrong;
use image::Error;
use serde_json::{Map, Value};

/// What a tree says of nodes: its own name, and those it refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refers {
    /// Every node that the tree describes and names, itself first.
    pub names: Vec<String>,
    /// Nodes that must be there already.
    pub to: Vec<String>,
    /// Objects (secrets, throttle groups) that must be there already.
    pub objects: Vec<String>,
}

/// Where a guest's owner has something in mind that only it can open.
fn is_its_own(path: &str) -> bool {
    path.starts_with("/dev/fdset/") || path.starts_with("/dev/cdrom") || path.starts_with("/dev/sr")
}

/// Whether a file's name can be opened here, and what it refers to.
///
/// # Errors
/// Why not.
pub fn serves_name(name: &str) -> Result<Refers, Error> {
    let mut refers = Refers::default();
    name_is_served(name, &mut refers, 0)?;
    Ok(refers)
}

fn name_is_served(name: &str, refers: &mut Refers, depth: usize) -> Result<(), Error> {
    if let Some(text) = name.strip_prefix("json:") {
        return match crate::json::parse(text.trim_start().as_bytes()).map_err(wrong)? {
            Value::Object(tree) => tree_is_served(tree, refers, depth + 1),
            _ => Err(wrong("Invalid JSON object given")),
        };
    }
    if has_protocol(name) {
        return match meaning(name)? {
            Meaning::Node { node, .. } => node_is_served(&node, refers, depth),
            Meaning::Local => Ok(()),
        };
    }
    let path = name.strip_prefix("file:").unwrap_or(name);
    if is_its_own(path) {
        return Err(wrong(format!("'{path}' is the guest's owner's to open")));
    }
    match path.split_once(':') {
        // A colon in front of the first slash is a protocol's.
        Some((protocol, _)) if path == name && !protocol.contains('/') => {
            Err(wrong(format!("Unknown protocol '{protocol}'")))
        }
        _ => Ok(()),
    }
}

/// Whether a tree can be opened here, and which nodes it names and refers to.
///
/// # Errors
/// Why not.
pub fn serves_tree(tree: &Map<String, Value>) -> Result<Refers, Error> {
    let mut refers = Refers::default();
    tree_is_served(tree.clone(), &mut refers, 0)?;
    Ok(refers)
}

/// Trees within each other; a deeper one is nobody's disk.
const DEEPEST: usize = 32;

fn tree_is_served(tree: Map<String, Value>, refers: &mut Refers, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(wrong("the tree of nodes is nested too deeply"));
    }
    let mut tree = nest(tree)?;
    if let Some(Value::String(name)) = tree.get("node-name") {
        refers.names.push(name.clone());
    }
    if !tree.contains_key("driver") && tree.contains_key("filename") {
        tree.insert("driver".to_owned(), Value::String("file".to_owned()));
    }
    let driver = tree.get("driver").and_then(Value::as_str).unwrap_or_default();
    if !known_driver(driver) || driver == "host_cdrom" {
        return Err(wrong(format!("Unknown driver '{driver}'")));
    }
    node_is_served(&understand(tree)?, refers, depth)
}

fn child_is_served(child: &Child, refers: &mut Refers, depth: usize) -> Result<(), Error> {
    match child {
        Child::Node(name) => {
            refers.to.push(name.clone());
            Ok(())
        }
        Child::Name(name) => match name.strip_prefix("json:").map(|text| crate::json::parse(text.as_bytes())) {
            Some(Ok(Value::Object(tree))) => tree_is_served(tree, refers, depth + 1),
            Some(_) => Err(wrong("Invalid JSON object given")),
            None => name_is_served(name, refers, depth + 1),
        },
    }
}

fn node_is_served(node: &Node, refers: &mut Refers, depth: usize) -> Result<(), Error> {
    match node {
        Node::File { path, .. } => match path.to_str() {
            Some(path) if is_its_own(path) => Err(wrong(format!("'{path}' is the guest's owner's to open"))),
            _ => Ok(()),
        },
        Node::Null { .. } | Node::Nbd(_) => Ok(()),
        Node::Throttle { group, file } => {
            refers.objects.push(group.clone());
            child_is_served(file, refers, depth)
        }
        Node::Debug { file, .. } => child_is_served(file, refers, depth),
        Node::CopyOnRead { file, bottom } => {
            refers.to.extend(bottom.clone());
            child_is_served(file, refers, depth)
        }
        Node::Format { file, below, key_secret, .. } => {
            refers.objects.extend(key_secret.clone());
            child_is_served(file, refers, depth)?;
            match below {
                Backing::Child(child) => child_is_served(child, refers, depth),
                Backing::Header | Backing::Nothing => Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn told(tree: Value) -> Result<Refers, String> {
        let Value::Object(tree) = tree else { panic!("no object") };
        serves_tree(&tree).map_err(|error| error.to_string())
    }

    #[test]
    fn names_of_files_and_of_protocols() {
        for name in ["a.qed", "/a:b/c", "file:a", "nbd://h/x", "./x:y", "json:{\"driver\":\"null-co\"}"] {
            assert!(serves_name(name).is_ok(), "{name}");
        }
        for name in ["http://h/x", "iscsi://h/t/0", "rbd:pool/x", "fat:rw:dir", "/dev/fdset/3", "/dev/cdrom"] {
            assert!(serves_name(name).is_err(), "{name}");
        }
        assert!(serves_name("json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"http\",\"url\":\"x\"}}").is_err());
    }

    #[test]
    fn trees_say_which_nodes_they_name_and_need() {
        let refers = told(json!({"driver": "qcow2", "node-name": "f", "file": "s", "backing": "b"})).unwrap();
        assert_eq!(refers, Refers { names: vec!["f".into()], to: vec!["s".into(), "b".into()], objects: Vec::new() });
        let inner = json!({"driver": "file", "node-name": "s", "filename": "x", "aio": "native"});
        let refers = told(json!({"driver": "raw", "node-name": "f", "file": inner, "discard": "unmap"})).unwrap();
        assert_eq!((refers.names, refers.to), (vec!["f".into(), "s".into()], Vec::new()));
        let encrypted = json!({"driver": "luks", "node-name": "f", "file": {"filename": "x"}, "key-secret": "k"});
        assert_eq!(told(encrypted).unwrap().objects, ["k"]);
        assert!(told(json!({"driver": "iscsi", "node-name": "x", "portal": "p"})).is_err());
        assert!(told(json!({"driver": "raw", "file": {"driver": "host_cdrom", "filename": "/dev/sr0"}})).is_err());
        assert!(told(json!({"driver": "qcow2", "file": "s", "no-such-option": 1})).is_err());
    }

    #[test]
    fn depth_is_bounded() {
        let mut tree = json!({"driver": "null-co"});
        for _ in 0..60 {
            tree = json!({"driver": "raw", "file": tree});
        }
        assert!(told(tree).is_err());
    }
}
