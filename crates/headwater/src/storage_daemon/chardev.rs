//! Where a monitor can be: sockets that listen or connect, descriptors that were inherited, standard input and output.
//!
//! A place is taken when the line comes to it, and where it is said to wait (or nothing is said), the rest of the line waits for the
//! first client.

use control::qmp::{Open, Place, open};
use control::{Engine, Failure};
use serde_json::{Map, Value};
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

/// A place as the line describes it.
#[derive(Debug)]
pub(super) struct Chardev {
    id: String,
    place: Place,
    /// What somebody is told who has to wait for the first client.
    waits: Option<String>,
    /// A client that is not there, or not any more, is sought again.
    again: Option<Duration>,
}

/// What QEMU's has besides.
const OTHERS: [&str; 11] =
    ["pty", "file", "udp", "memory", "ringbuf", "null", "parallel", "pipe", "mux", "serial", "hub"];

/// A descriptor that whoever started the process handed down.
fn inherited(text: &str) -> Result<OwnedFd, String> {
    let number: RawFd = text.parse().map_err(|_| format!("Unable to parse FD number {text}"))?;
    ring::inherited(number).map_err(|_| format!("File descriptor '{number}' is not a socket"))
}

/// What of an option's tree was not taken yet.
struct Rest(Map<String, Value>);

impl Rest {
    fn take(&mut self, key: &str) -> Option<String> {
        Some(match self.0.shift_remove(key)? {
            Value::String(text) => text,
            Value::Bool(on) => if on { "on" } else { "off" }.to_owned(),
            other => other.to_string(),
        })
    }

    fn switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        }
    }

    fn number(&mut self, key: &str) -> Result<Option<u64>, String> {
        let number = self.take(key).map(|text| text.parse());
        number.transpose().map_err(|_| format!("Parameter '{key}' expects a number"))
    }
}

/// Whether QEMU takes `id` for one.
fn is_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

impl Chardev {
    /// From its tree.
    pub(super) fn read(tree: Map<String, Value>) -> Result<Self, String> {
        let mut rest = Rest(tree);
        let id = rest.take("id").ok_or("chardev: no id specified")?;
        if !is_id(&id) {
            let rule = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";
            return Err(format!("Parameter 'id' expects an identifier\n{rule}"));
        }
        let kind = rest.take("backend").ok_or("chardev: missing backend")?;
        let chardev = match kind.as_str() {
            "stdio" => {
                rest.switch("signal")?;
                Self { id, place: Place::Standard, waits: None, again: None }
            }
            "socket" => Self::socket(id, &mut rest)?,
            other if OTHERS.contains(&other) => {
                return Err(format!("chardev: '{other}' is not there: socket and stdio are"));
            }
            other => return Err(format!("'{other}' is not a valid char driver name")),
        };
        match rest.0.keys().next() {
            Some(key) => Err(format!("Invalid parameter '{key}'")),
            None => Ok(chardev),
        }
    }

    fn socket(id: String, rest: &mut Rest) -> Result<Self, String> {
        let server = rest.switch("server")?.unwrap_or(false);
        let wait = rest.switch("wait")?;
        let again = match (rest.number("reconnect")?, rest.number("reconnect-ms")?) {
            (Some(_), Some(_)) => return Err("'reconnect' and 'reconnect-ms' are mutually exclusive".to_owned()),
            (Some(seconds), None) => Some(Duration::from_secs(seconds)),
            (None, millis) => millis.map(Duration::from_millis),
        };
        if server && again.is_some() {
            return Err("'reconnect' option is incompatible with socket in server listen mode".to_owned());
        }
        if !server && wait.is_some() {
            return Err("'wait' option is incompatible with socket in client connect mode".to_owned());
        }
        let (place, called) = match (rest.take("path"), rest.take("host"), rest.take("fd")) {
            (Some(path), None, None) => {
                let called = format!("unix:{path}");
                (if server { Place::Listen(path.into()) } else { Place::Connect(path.into()) }, called)
            }
            (None, Some(host), None) => {
                let port = rest.take("port").ok_or("chardev: socket: no port given")?;
                let called = format!("tcp:{host}:{port}");
                let port = port.parse().map_err(|_| format!("'{port}' is no number of a TCP port"))?;
                for key in ["nodelay", "ipv4", "ipv6", "to"] {
                    rest.take(key);
                }
                let host = if host.is_empty() { "0.0.0.0".to_owned() } else { host };
                (if server { Place::ListenTcp(host, port) } else { Place::ConnectTcp(host, port) }, called)
            }
            (None, None, Some(fd)) => {
                let descriptor = inherited(&fd)?;
                let place = if server { Place::Listening(descriptor) } else { Place::Connected(descriptor) };
                (place, format!("fd:{fd}"))
            }
            (None, None, None) => return Err("Unable to parse FD number ".to_owned()),
            _ => return Err("None or one of 'path', 'fd' or 'host' option required.".to_owned()),
        };
        let waits = (server && wait.unwrap_or(true))
            .then(|| format!("info: QEMU waiting for connection on: disconnected:{called},server=on"));
        Ok(Self { id, place, waits, again: again.filter(|after| !after.is_zero()) })
    }

    /// Takes the place, and waits there if it is to; its id. `option` is what the line calls it.
    pub(super) async fn take(self, option: &str) -> Result<(String, Open), Failure> {
        if let Some(after) = self.again {
            return Ok((self.id, Open::again(self.place, after)));
        }
        let mut taken = open(self.place).await?;
        if let Some(text) = self.waits {
            eprintln!("{}: {option}: {text}", crate::tool::name());
            taken.wait().await?;
        }
        Ok((self.id, taken))
    }
}

/// Puts a monitor at a place.
pub(super) fn serve(place: Open, engine: &Engine, pretty: bool) {
    place.serve(engine.clone(), pretty);
}
