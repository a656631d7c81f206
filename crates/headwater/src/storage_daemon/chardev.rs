//! Where a monitor can be: sockets that listen or connect, descriptors that were inherited, standard input and output.

use control::qmp::{Place, serve};
use control::{Engine, Failure};
use serde_json::{Map, Value};
use std::os::fd::{OwnedFd, RawFd};

/// A place, not taken yet.
#[derive(Debug)]
pub(super) struct Chardev {
    place: Place,
}

/// A descriptor that whoever started the process handed down.
fn inherited(text: &str) -> Result<OwnedFd, String> {
    let number: RawFd = text.parse().map_err(|_| format!("Unable to parse FD number {text}"))?;
    ring::inherited(number).map_err(|error| format!("descriptor {number} cannot be used: {error}"))
}

impl Chardev {
    /// From its tree; and its id.
    pub(super) fn read(mut tree: Map<String, Value>) -> Result<(String, Self), String> {
        let mut take = |key: &str| match tree.shift_remove(key) {
            Some(Value::String(text)) => Some(text),
            Some(Value::Bool(on)) => Some(if on { "on" } else { "off" }.to_owned()),
            Some(other) => Some(other.to_string()),
            None => None,
        };
        let id = take("id").ok_or("chardev: no id specified")?;
        let kind = take("backend").ok_or("chardev: missing backend")?;
        let switch =
            |value: Option<String>, default: bool| value.map_or(default, |text| text == "on" || text == "true");
        // A monitor that nobody has come to yet does not keep guests waiting here.
        let (server, _) = (switch(take("server"), false), take("wait"));
        let (_, _) = (take("reconnect"), take("reconnect-ms"));
        let place = match kind.as_str() {
            "stdio" => {
                take("signal");
                Place::Standard
            }
            "socket" => match (take("path"), take("host"), take("fd")) {
                (Some(path), None, None) if server => Place::Listen(path.into()),
                (Some(path), None, None) => Place::Connect(path.into()),
                (None, Some(host), None) => {
                    let port = take("port").ok_or("chardev: socket: no port given")?;
                    let port = port.parse().map_err(|_| format!("'{port}' is no number of a TCP port"))?;
                    for key in ["nodelay", "ipv4", "ipv6", "to", "telnet"] {
                        take(key);
                    }
                    let host = if host.is_empty() { "0.0.0.0".to_owned() } else { host };
                    if server { Place::ListenTcp(host, port) } else { Place::ConnectTcp(host, port) }
                }
                (None, None, Some(fd)) if server => Place::Listening(inherited(&fd)?),
                (None, None, Some(fd)) => Place::Connected(inherited(&fd)?),
                _ => return Err("chardev: socket: give one of path, host and fd".to_owned()),
            },
            other => return Err(format!("chardev: '{other}' is not there: socket and stdio are")),
        };
        match tree.keys().next() {
            Some(key) => Err(format!("Invalid parameter '{key}'")),
            None => Ok((id, Self { place })),
        }
    }

    /// Puts a monitor there.
    pub(super) async fn serve(self, engine: &Engine, pretty: bool) -> Result<(), Failure> {
        serve(engine.clone(), self.place, pretty).await
    }
}
