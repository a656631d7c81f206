//! What a tree of options means: one node, and the names of its children.
//!
//! Children are names again (`json:{…}`), so that each is understood when it is opened.

use crate::config;
use crate::name::has_protocol;
use crate::options::{Keys, nest};
use crate::wrong;
use image::{Error, ErrorKind, Format};
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::time::Duration;
use store::debug::{Event, InjectError, Rules, SetState};
use store::nbd::{Address, PORT};
use store::{Operation, nbd::Target};

/// Bytes of `null-co` when nothing is said.
const NULL_SIZE: u64 = 1 << 30;

/// Options of every node that say nothing to who has one user: QEMU's monitor and guests do.
pub(crate) const EVERYWHERE: [&str; 5] = ["node-name", "auto-read-only", "detect-zeroes", "discard", "force-share"];

/// Options that tune how QEMU keeps tables in memory or talks to the kernel; ours have no such knobs.
pub(crate) const TUNING: [&str; 13] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "prealloc-align",
    "prealloc-size",
];

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Node {
    /// A file or a block device.
    File { path: PathBuf, how: How },
    /// Nothing.
    Null { size: u64, latency: Duration },
    /// An export of an NBD server.
    Nbd(Target),
    /// A store that fails as its user wishes.
    Debug { rules: Rules, file: Child },
    /// A store that keeps to the rates of a group.
    Throttle { group: String, file: Child },
    /// A disk that keeps what is read from below.
    CopyOnRead { file: Child, bottom: Option<String> },
    /// An image.
    Format { format: Option<Format>, file: Child, below: Backing, key_secret: Option<String>, how: How, part: Part },
}

impl Node {
    /// How its file is opened.
    pub(crate) fn how(&self) -> How {
        match self {
            Self::File { how, .. } | Self::Format { how, .. } => *how,
            _ => How::default(),
        }
    }

    /// The throttle group, if it has one.
    pub(crate) fn group(&self) -> Option<String> {
        match self {
            Self::Throttle { group, .. } => Some(group.clone()),
            _ => None,
        }
    }

    /// The same, opened as its caller has it.
    pub(crate) fn plain(&self) -> Self {
        let mut plain = self.clone();
        if let Self::File { how, .. } | Self::Format { how, .. } = &mut plain {
            *how = How { locking: how.locking, ..How::default() };
        }
        plain
    }
}

/// A child, as a tree has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Child {
    /// What this name stands for.
    Name(String),
    /// The node that is called so.
    Node(String),
}

/// What lies below an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// What its header names.
    Header,
    /// Nothing.
    Nothing,
    /// This.
    Child(Child),
}

/// There is no node of that name.
pub(crate) fn no_node(name: &str) -> Error {
    wrong(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

impl Child {
    /// Its name, where there are no nodes.
    pub(crate) fn name(&self) -> Result<&str, Error> {
        match self {
            Self::Name(name) => Ok(name),
            Self::Node(node) => Err(no_node(node)),
        }
    }
}

/// Which part of its file an image is: from where, and how long.
pub(crate) type Part = Option<(u64, Option<u64>)>;

/// What a node says of how files are opened; `None`: as the caller has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct How {
    pub(crate) direct: Option<bool>,
    pub(crate) no_flush: Option<bool>,
    pub(crate) locking: Option<bool>,
    pub(crate) read_only: Option<bool>,
}

/// The tree as a name.
pub(crate) fn as_name(tree: &Map<String, Value>) -> String {
    format!("json:{}", Value::Object(tree.clone()))
}

/// The name of a child's tree. Where no driver is stated, its file name says which protocol it is.
fn child_name(mut tree: Map<String, Value>) -> String {
    if !tree.contains_key("driver")
        && let Some(Value::String(file)) = tree.get("filename")
    {
        if tree.len() == 1 && has_protocol(file) {
            return file.clone();
        }
        tree.insert("driver".to_owned(), Value::String("file".to_owned()));
    }
    as_name(&tree)
}

/// The name of a child.
fn child(keys: &mut Keys, key: &str) -> Result<Option<Child>, Error> {
    match keys.any(key) {
        None => Ok(None),
        Some(Value::Object(tree)) => Ok(Some(Child::Name(child_name(tree)))),
        Some(Value::String(node)) => Ok(Some(Child::Node(node))),
        Some(_) => Err(wrong(format!("Invalid parameter type for '{key}', expected: BlockdevRef"))),
    }
}

fn needed(child: Option<Child>, key: &str) -> Result<Child, Error> {
    child.ok_or_else(|| wrong(format!("A block device must be specified for \"{key}\"")))
}

/// What the driver of a protocol or filter does not know.
fn finish_protocol(keys: Keys, driver: &str) -> Result<(), Error> {
    keys.finish(&format!("Block protocol '{driver}'"), "doesn't")
}

/// What `tree` means. `strict` trees are from JSON: the options of a file may be strings in both.
pub(crate) fn understand(tree: Map<String, Value>) -> Result<Node, Error> {
    let mut keys = Keys::new(nest(tree)?);
    let driver = keys.text("driver")?;
    if driver.is_none() && !keys.has("file") {
        return Err(wrong("Must specify either driver or file"));
    }
    keys.ignore(&EVERYWHERE);
    let mut how = How { read_only: keys.flag("read-only")?, ..How::default() };
    if let Some(mut cache) = keys.tree("cache")? {
        how.direct = cache.flag("direct")?;
        how.no_flush = cache.flag("no-flush")?;
        // Whether writes become durable at once is the business of whoever writes.
        cache.ignore(&["writeback"]);
        cache.finish("'cache'", "does not")?;
    }
    let driver = driver.unwrap_or_default();
    match driver.as_str() {
        "file" | "host_device" | "host_cdrom" => file(keys, how, &driver),
        "null-co" | "null-aio" => null(keys, &driver),
        "nbd" => nbd(keys, how),
        "blkdebug" => debug(keys),
        "throttle" => throttle(keys),
        "copy-on-read" => copy_on_read(keys),
        _ => format(keys, &driver, how),
    }
}

fn file(mut keys: Keys, mut how: How, driver: &str) -> Result<Node, Error> {
    let missing = || wrong(format!("The '{driver}' block driver requires a file name"));
    let path = keys.text("filename")?.filter(|path| !path.is_empty()).ok_or_else(missing)?;
    how.locking = match keys.text("locking")?.as_deref() {
        None | Some("auto") => None,
        Some("on") => Some(true),
        Some("off") => Some(false),
        Some(other) => return Err(wrong(format!("Parameter 'locking' does not accept value '{other}'"))),
    };
    // Which way QEMU talks to the kernel: ours is its own.
    keys.ignore(&["aio", "aio-max-batch", "drop-cache", "x-check-cache-dropped"]);
    finish_protocol(keys, driver)?;
    let path = path.strip_prefix("file:").map(str::to_owned).unwrap_or(path);
    Ok(Node::File { path: PathBuf::from(path), how })
}

fn null(mut keys: Keys, driver: &str) -> Result<Node, Error> {
    let size = keys.number("size")?.unwrap_or(NULL_SIZE);
    let latency = Duration::from_nanos(keys.number("latency-ns")?.unwrap_or(0));
    // Reads are zeros either way: memory that nobody filled is nobody's to see.
    keys.flag("read-zeroes")?;
    finish_protocol(keys, driver)?;
    Ok(Node::Null { size, latency })
}

fn port(text: &str) -> Result<u16, Error> {
    text.parse().map_err(|_| wrong(format!("'{text}' is no number of a TCP port")))
}

fn nbd(mut keys: Keys, how: How) -> Result<Node, Error> {
    let export = keys.text("export")?.unwrap_or_default();
    let address = if let Some(mut server) = keys.tree("server")? {
        let kind = server.text("type")?.unwrap_or_default();
        let address = match kind.as_str() {
            "unix" => Address::Unix(server.text("path")?.ok_or_else(|| wrong("Parameter 'path' is missing"))?.into()),
            "inet" => {
                let host = server.text("host")?.ok_or_else(|| wrong("Parameter 'host' is missing"))?;
                let number = server.text("port")?.ok_or_else(|| wrong("Parameter 'port' is missing"))?;
                server.ignore(&["numeric", "ipv4", "ipv6", "to", "keep-alive", "mptcp"]);
                Address::Tcp(host, port(&number)?)
            }
            other => return Err(wrong(format!("Parameter 'server.type' does not accept value '{other}'"))),
        };
        server.finish("A server's address", "does not")?;
        address
    } else if let Some(path) = keys.text("path")? {
        Address::Unix(path.into())
    } else if let Some(host) = keys.text("host")? {
        let number = keys.text("port")?;
        Address::Tcp(host, number.as_deref().map_or(Ok(PORT), port)?)
    } else {
        return Err(wrong("NBD server address missing"));
    };
    if keys.has("tls-creds") {
        return Err(Error::new(ErrorKind::Unsupported, "", None, "NBD over TLS is not there yet"));
    }
    // How long QEMU keeps requests while a server is away; here whoever asks holds and asks again.
    keys.ignore(&["reconnect-delay", "open-timeout"]);
    finish_protocol(keys, "nbd")?;
    Ok(Node::Nbd(Target { address, export, read_only: how.read_only == Some(true) }))
}

fn event(name: &str) -> Result<Event, Error> {
    Event::from_name(name).ok_or_else(|| wrong(format!("Invalid event name \"{name}\"")))
}

fn state(keys: &mut Keys) -> Result<Option<u32>, Error> {
    let state = keys.number("state")?.filter(|state| *state != 0);
    state.map(|state| u32::try_from(state).map_err(|_| wrong("'state' is too large"))).transpose()
}

/// A rule of blkdebug, as its file or a tree has it.
pub(crate) fn inject_error(mut keys: Keys) -> Result<InjectError, Error> {
    let event = match keys.text("event")?.ok_or_else(|| wrong("Missing event name for rule"))?.as_str() {
        "none" => None,
        name => Some(event(name)?),
    };
    let operations = match keys.text("iotype")?.as_deref() {
        None => Vec::new(),
        Some("read") => vec![Operation::Read],
        Some("write") => vec![Operation::Write],
        Some("write-zeroes" | "discard") => vec![Operation::Zero],
        Some("flush") => vec![Operation::Flush],
        Some("block-status") => vec![Operation::Extent],
        Some(other) => return Err(wrong(format!("Parameter 'iotype' does not accept value '{other}'"))),
    };
    let errno = keys.number("errno")?.map_or(Ok(5), i32::try_from).map_err(|_| wrong("'errno' is too large"))?;
    let sector = keys.text("sector")?.filter(|sector| sector != "-1");
    let sector = sector.map(|sector| sector.parse().map_err(|_| wrong("'sector' is no number"))).transpose()?;
    let once = keys.flag("once")?.unwrap_or(false);
    // Whether a failure comes before or after the caller has gone on: ours always comes when it is awaited.
    keys.flag("immediately")?;
    let rule = InjectError { event, state: state(&mut keys)?, operations, errno, sector, once };
    keys.finish("A rule 'inject-error'", "does not")?;
    Ok(rule)
}

/// The other kind of rule.
pub(crate) fn set_state(mut keys: Keys) -> Result<SetState, Error> {
    let event = event(&keys.text("event")?.ok_or_else(|| wrong("Missing event name for rule"))?)?;
    let new_state = keys.number("new_state")?.ok_or_else(|| wrong("Parameter 'new_state' is missing"))?;
    let new_state = u32::try_from(new_state).map_err(|_| wrong("'new_state' is too large"))?;
    let rule = SetState { event, state: state(&mut keys)?, new_state };
    keys.finish("A rule 'set-state'", "does not")?;
    Ok(rule)
}

fn debug(mut keys: Keys) -> Result<Node, Error> {
    let mut rules = match keys.text("config")? {
        Some(path) if !path.is_empty() => config::read(&path)?,
        _ => Rules::default(),
    };
    for rule in keys.trees("inject-error")? {
        rules.inject_error.push(inject_error(rule)?);
    }
    for rule in keys.trees("set-state")? {
        rules.set_state.push(set_state(rule)?);
    }
    if let Some(align) = keys.number("align")?.filter(|align| *align > 0) {
        let sound = u32::try_from(align).ok().filter(|align| align.is_power_of_two());
        rules.align = Some(sound.ok_or_else(|| wrong(format!("Cannot meet constraints with align {align}")))?);
    }
    let file = needed(child(&mut keys, "image")?, "image")?;
    finish_protocol(keys, "blkdebug")?;
    Ok(Node::Debug { rules, file })
}

fn throttle(mut keys: Keys) -> Result<Node, Error> {
    let group = keys.text("throttle-group")?.ok_or_else(|| wrong("Please specify a throttle group"))?;
    let file = needed(child(&mut keys, "file")?, "file")?;
    finish_protocol(keys, "throttle")?;
    Ok(Node::Throttle { group, file })
}

fn copy_on_read(mut keys: Keys) -> Result<Node, Error> {
    let file = needed(child(&mut keys, "file")?, "file")?;
    let bottom = keys.text("bottom")?;
    finish_protocol(keys, "copy-on-read")?;
    Ok(Node::CopyOnRead { file, bottom })
}

fn format(mut keys: Keys, driver: &str, how: How) -> Result<Node, Error> {
    let format = match driver {
        "" => None,
        name => Some(Format::from_name(name).ok_or_else(|| wrong(format!("Unknown driver '{name}'")))?),
    };
    let file = needed(child(&mut keys, "file")?, "file")?;
    let below = match keys.any("backing") {
        None => Backing::Header,
        Some(Value::Null) => Backing::Nothing,
        Some(Value::String(none)) if none.is_empty() => Backing::Nothing,
        Some(Value::Object(tree)) => Backing::Child(Child::Name(child_name(tree))),
        Some(Value::String(node)) => Backing::Child(Child::Node(node)),
        Some(_) => return Err(wrong("Invalid parameter type for 'backing', expected: BlockdevRefOrNull")),
    };
    let mut key_secret = keys.text("key-secret")?;
    if let Some(mut encrypt) = keys.tree("encrypt")? {
        key_secret = encrypt.text("key-secret")?.or(key_secret);
        encrypt.ignore(&["format"]);
        encrypt.finish("'encrypt'", "does not")?;
    }
    let mut part = None;
    if format == Some(Format::Raw) {
        let (offset, size) = (keys.number("offset")?, keys.number("size")?);
        part = (offset.is_some() || size.is_some()).then_some((offset.unwrap_or(0), size));
    }
    keys.ignore(&TUNING);
    keys.finish(&format!("Block format '{}'", format.map_or("?", Format::name)), "does not")?;
    Ok(Node::Format { format, file, below, key_secret, how, part })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Node, String> {
        let Value::Object(tree) = value else { panic!("no object") };
        understand(tree).map_err(|error| error.to_string())
    }

    #[test]
    fn an_image_in_a_file() {
        let node = read(json!({"driver": "qcow2", "file": {"driver": "file", "filename": "a"}, "backing": null}));
        let file = Child::Name(r#"json:{"driver":"file","filename":"a"}"#.to_owned());
        let (format, below, how) = (Some(Format::Qcow2), Backing::Nothing, How::default());
        assert_eq!(node.unwrap(), Node::Format { format, file, below, key_secret: None, how, part: None });
    }

    #[test]
    fn the_messages_are_qemus() {
        for (tree, text) in [
            (json!({}), "Must specify either driver or file"),
            (json!({"driver": "file"}), "The 'file' block driver requires a file name"),
            (json!({"driver": "nonsense", "file": {}}), "Unknown driver 'nonsense'"),
            (json!({"driver": "qcow2"}), "A block device must be specified for \"file\""),
            (
                json!({"driver": "file", "filename": "a", "x": 1}),
                "Block protocol 'file' doesn't support the option 'x'",
            ),
            (
                json!({"driver": "qcow2", "file.filename": "a", "foo": "bar"}),
                "Block format 'qcow2' does not support the option 'foo'",
            ),
            (json!({"driver": "nbd"}), "NBD server address missing"),
        ] {
            assert_eq!(read(tree).unwrap_err(), text);
        }
    }

    #[test]
    fn an_nbd_server_in_either_form() {
        let flat = read(json!({"driver": "nbd", "host": "h", "export": "x"})).unwrap();
        let tree =
            read(json!({"driver": "nbd", "server": {"type": "inet", "host": "h", "port": "10809"}, "export": "x"}));
        assert_eq!(flat, tree.unwrap());
    }

    #[test]
    fn rules_of_blkdebug() {
        let node = read(json!({
            "driver": "blkdebug", "align": 4096, "image": {"driver": "file", "filename": "a"},
            "inject-error.0.event": "read_aio", "inject-error.0.sector": "8", "inject-error.0.once": "on",
            "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
        }));
        let Ok(Node::Debug { rules, .. }) = node else { panic!("{node:?}") };
        assert_eq!(rules.inject_error[0].sector, Some(8));
        assert_eq!((rules.set_state[0].new_state, rules.align), (2, Some(4096)));
    }
}
