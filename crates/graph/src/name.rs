//! File names with a protocol: what they mean, and how a tree is shown as a name.

use crate::node::{EVERYWHERE, Node, TUNING, as_name, understand};
use crate::options::{Keys, keyval, nest};
use crate::{json, wrong};
use image::Error;
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use store::nbd::{Address, PORT, Target};

/// What a name means.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Meaning {
    /// A local file's, as it stands.
    Local,
    /// A node; whether its driver was stated (then nothing is probed).
    Node { node: Node, stated: bool },
}

/// What `name` means. Names with a protocol that is not known here are left to whoever opens files: it refuses them.
pub(crate) fn meaning(name: &str) -> Result<Meaning, Error> {
    if let Some(text) = name.strip_prefix("json:") {
        let tree = parse_json(text)?;
        let stated = tree.contains_key("driver");
        return Ok(Meaning::Node { node: understand(tree)?, stated });
    }
    let tree = if let Some(rest) = name.strip_prefix("blkdebug:") {
        let (config, image) =
            rest.split_once(':').ok_or_else(|| wrong("blkdebug requires both config file and image path"))?;
        let image =
            if has_protocol(image) { protocol_tree(image)? } else { json!({"driver": "file", "filename": image}) };
        json!({"driver": "blkdebug", "config": config, "image": image})
    } else if name.starts_with("null-co://") || name.starts_with("null-aio://") {
        json!({"driver": "null-co"})
    } else if name.starts_with("nbd:")
        || name.starts_with("nbd+")
        || name.starts_with("nbds:")
        || name.starts_with("nbds+")
    {
        let target = nbd_target(name)?;
        return Ok(Meaning::Node { node: Node::Nbd(target), stated: false });
    } else {
        return Ok(Meaning::Local);
    };
    let Value::Object(tree) = tree else { return Ok(Meaning::Local) };
    Ok(Meaning::Node { node: understand(tree)?, stated: false })
}

fn parse_json(text: &str) -> Result<Map<String, Value>, Error> {
    let text = text.trim_start();
    match json::parse(text.as_bytes()) {
        Ok(Value::Object(tree)) => nest(tree),
        Ok(_) => Err(wrong("Invalid JSON object given")),
        Err(_) if json::is_cut_short(text.as_bytes()) => {
            Err(wrong("Could not parse the JSON options: JSON parse error, premature EOI"))
        }
        Err(error) => Err(wrong(format!("Could not parse the JSON options: {error}"))),
    }
}

/// Whether a name is more than a file's.
pub(crate) fn has_protocol(name: &str) -> bool {
    ["json:", "nbd:", "nbd+", "null-co:", "null-aio:", "blkdebug:"].iter().any(|protocol| name.starts_with(protocol))
}

/// The tree that any name stands for.
pub(crate) fn protocol_tree_of(name: &str) -> Result<Map<String, Value>, Error> {
    let tree = if has_protocol(name) { protocol_tree(name)? } else { json!({"driver": "file", "filename": name}) };
    match tree {
        Value::Object(tree) => Ok(tree),
        _ => Err(wrong("Invalid JSON object given")),
    }
}

/// The tree that a name with a protocol stands for.
fn protocol_tree(name: &str) -> Result<Value, Error> {
    if let Some(text) = name.strip_prefix("json:") {
        return parse_json(text).map(Value::Object);
    }
    if name.starts_with("null-") {
        return Ok(json!({"driver": "null-co"}));
    }
    if let Some(rest) = name.strip_prefix("blkdebug:") {
        let _ = rest;
        return Err(wrong("blkdebug within blkdebug: write it as json:{…}"));
    }
    let Target { address, export, .. } = nbd_target(name)?;
    let server = match address {
        Address::Unix(path) => json!({"type": "unix", "path": path.to_string_lossy()}),
        Address::Tcp(host, port) => json!({"type": "inet", "host": host, "port": port.to_string()}),
    };
    Ok(json!({"driver": "nbd", "server": server, "export": export}))
}

/// The name for a tree given as `--image-opts` has it: `driver=qcow2,file.filename=a`.
///
/// # Errors
/// Trees that are none; a bare word is a node's name, and there are no nodes here.
pub fn from_image_options(text: &str) -> Result<String, Error> {
    let flat = keyval(text, Some(""))?;
    if let Some(Value::String(node)) = flat.get("") {
        return Err(wrong(format!("Cannot find device='{node}' nor node-name='{node}'")));
    }
    let tree = nest(flat)?;
    understand(tree.clone())?;
    Ok(as_name(&tree))
}

/// Which server and export a name is about: `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`,
/// `nbd:HOST:PORT[:exportname=EXPORT]`, `nbd:unix:PATH[:exportname=EXPORT]`.
///
/// # Errors
/// Names that are none of these.
pub fn nbd_target(name: &str) -> Result<Target, Error> {
    let bad = || wrong("No valid URL specified");
    let target = |address, export: String| Ok(Target { address, export, read_only: false });
    let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(|text| text.into_owned()).map_err(|_| bad());
    let Some((scheme, rest)) = name.split_once("://") else {
        let rest = name.strip_prefix("nbd:").ok_or_else(bad)?;
        let (place, export) = match rest.split_once(":exportname=") {
            Some((place, export)) => (place, export.to_owned()),
            None => (rest, String::new()),
        };
        if let Some(path) = place.strip_prefix("unix:") {
            return target(Address::Unix(path.into()), export);
        }
        let (host, port) = place.rsplit_once(':').ok_or_else(bad)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let port = port.parse().map_err(|_| bad())?;
        return target(Address::Tcp(host.to_owned(), port), export);
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = path.find('/').map_or((path, ""), |at| path.split_at(at));
    let export = decoded(path.strip_prefix('/').unwrap_or(path))?;
    match scheme {
        "nbd+unix" => {
            let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or_else(bad)?;
            if !authority.is_empty() || socket.is_empty() {
                return Err(bad());
            }
            target(Address::Unix(decoded(socket)?.into()), export)
        }
        "nbd" | "nbd+tcp" => {
            let (host, port) = match authority.rsplit_once(':') {
                Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| bad())?),
                _ => (authority, PORT),
            };
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            if host.is_empty() {
                return Err(bad());
            }
            target(Address::Tcp(host.to_owned(), port), export)
        }
        "nbds" | "nbds+tcp" | "nbds+unix" => Err(wrong("NBD over TLS is not there yet")),
        _ => Err(bad()),
    }
}

/// How a name is shown: a tree that is no more than a format over a file is shown as the file; others as QEMU writes JSON.
pub fn display_name(name: &str) -> String {
    let Some(text) = name.strip_prefix("json:") else { return name.to_owned() };
    let Ok(tree) = parse_json(text) else { return name.to_owned() };
    match plain(&tree) {
        Some(path) => path,
        None => {
            let mut shown = "json:".to_owned();
            spaced(&mut shown, &Value::Object(tree));
            shown
        }
    }
}

/// The file's name, if that and perhaps drivers are all that is said.
fn plain(tree: &Map<String, Value>) -> Option<String> {
    let mut keys = Keys::new(tree.clone());
    let driver = keys.text("driver").ok()?;
    let file = match keys.tree("file").ok()? {
        Some(file) if driver.as_deref() != Some("throttle") && driver.as_deref() != Some("copy-on-read") => Some(file),
        Some(_) => return None,
        None => None,
    };
    // What says nothing of which bytes they are.
    keys.ignore(&["read-only", "cache"]);
    keys.ignore(&EVERYWHERE);
    keys.ignore(&TUNING);
    let path = match file {
        None => keys.text("filename").ok()?,
        Some(mut file) => {
            let driver = file.text("driver").ok()?;
            if driver.is_some_and(|driver| driver != "file") {
                return None;
            }
            let path = file.text("filename").ok()?;
            file.left().is_none().then_some(path)?
        }
    };
    keys.left().is_none().then_some(path)?
}

/// JSON with a space after colons and commas.
fn spaced(out: &mut String, value: &Value) {
    let mut list = |open: char, close: char, items: Vec<(Option<&String>, &Value)>| {
        out.push(open);
        for (number, (key, value)) in items.into_iter().enumerate() {
            if number > 0 {
                out.push_str(", ");
            }
            if let Some(key) = key {
                // Writing to a string does not fail.
                let _ = write!(out, "{}: ", Value::String(key.clone()));
            }
            spaced(out, value);
        }
        out.push(close);
    };
    match value {
        Value::Object(members) => list('{', '}', members.iter().map(|(key, value)| (Some(key), value)).collect()),
        Value::Array(items) => list('[', ']', items.iter().map(|value| (None, value)).collect()),
        other => {
            let _ = write!(out, "{other}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nbd_names_in_all_their_forms() {
        let tcp = |host: &str, port| Address::Tcp(host.into(), port);
        for (name, address, export) in [
            ("nbd://h", tcp("h", 10809), ""),
            ("nbd://h:1/", tcp("h", 1), ""),
            ("nbd+tcp://h:1/a%20b", tcp("h", 1), "a b"),
            ("nbd://[::1]:2/x", tcp("::1", 2), "x"),
            ("nbd://[::1]/x", tcp("::1", 10809), "x"),
            ("nbd+unix:///e?socket=/a%2fb", Address::Unix("/a/b".into()), "e"),
            ("nbd+unix://?socket=/s", Address::Unix("/s".into()), ""),
            ("nbd:h:7:exportname=x:y", tcp("h", 7), "x:y"),
            ("nbd:unix:/s:exportname=e", Address::Unix("/s".into()), "e"),
            ("nbd:unix:/s", Address::Unix("/s".into()), ""),
        ] {
            assert_eq!(
                nbd_target(name).unwrap(),
                Target { address, export: export.into(), read_only: false },
                "{name}"
            );
        }
        for bad in
            ["nbd:", "nbd:h", "nbd:h:x", "nbd://", "nbd+unix://", "nbd+unix://h?socket=/s", "nbds://h", "nbd+x://h"]
        {
            assert!(nbd_target(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn trees_are_shown_as_qemu_shows_them() {
        for (name, shown) in [
            ("a.img", "a.img"),
            (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#, "a"),
            (r#"json:{"driver":"qcow2","file.filename":"a"}"#, "a"),
            (r#"json:{"driver":"file","filename":"a"}"#, "a"),
            ("json:{'driver':'null-co','size':65536}", r#"json:{"driver": "null-co", "size": 65536}"#),
        ] {
            assert_eq!(display_name(name), shown);
        }
        assert_eq!(from_image_options("driver=qcow2,file.filename=a").map(|name| display_name(&name)).unwrap(), "a");
        let error = from_image_options("foo").unwrap_err();
        assert_eq!(error.to_string(), "Cannot find device='foo' nor node-name='foo'");
    }

    #[test]
    fn mistakes_in_json_are_told_apart() {
        let said = |name: &str| meaning(name).unwrap_err().to_string();
        assert_eq!(said("json:[1]"), "Invalid JSON object given");
        let cut = "Could not parse the JSON options: JSON parse error, premature EOI";
        assert_eq!(said(r#"json:{"driver":"qcow2","#), cut);
        assert!(said("json:{1}").starts_with("Could not parse the JSON options: JSON parse error"));
    }

    proptest! {
        #[test]
        fn no_name_makes_it_panic(name in "(json:|nbd:|nbd\\+unix:|blkdebug:|null-co:)?[-a-z0-9\\[\\]{}\"',.:/%?=]{0,40}") {
            let _ = meaning(&name);
            let _ = nbd_target(&name);
            let _ = display_name(&name);
            let _ = from_image_options(&name);
        }
    }
}
