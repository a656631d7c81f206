//! QMP monitors of the line: their places become ours, and QEMU gets private ones instead.
//!
//! **Invariant.** A monitor that cannot be taken over (its place is of a kind that is not known here, or shared with something else)
//! stays QEMU's, and its user is told.

use super::line::Line;
use super::nodes::tree;
use control::qmp::Place;
use serde_json::{Map, Value};
use std::os::fd::RawFd;

/// Where a monitor is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seat {
    Listen(String),
    ListenTcp(String, u16),
    Connect(String),
    ConnectTcp(String, u16),
    /// A descriptor that was handed down; whether it listens.
    Inherited(RawFd, bool),
    Standard,
}

/// A monitor that we take over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Monitor {
    /// The option that is exchanged.
    pub(super) at: usize,
    pub(super) seat: Seat,
    pub(super) pretty: bool,
    /// QEMU does not go on before a client is there.
    pub(super) wait: bool,
    /// The chardev's name; `None` where `-qmp` made one.
    pub(super) chardev: Option<String>,
}

/// The monitors of a line.
#[derive(Debug, Default)]
pub(super) struct Monitors {
    pub(super) ours: Vec<Monitor>,
    pub(super) notes: Vec<String>,
}

impl Seat {
    /// Takes it.
    pub(super) fn place(&self) -> Result<Place, String> {
        Ok(match self {
            Self::Listen(path) => Place::Listen(path.into()),
            Self::ListenTcp(host, port) => Place::ListenTcp(host.clone(), *port),
            Self::Connect(path) => Place::Connect(path.into()),
            Self::ConnectTcp(host, port) => Place::ConnectTcp(host.clone(), *port),
            Self::Standard => Place::Standard,
            Self::Inherited(number, listens) => {
                let failed = |error| format!("descriptor {number} cannot be used: {error}");
                let fd = ring::inherited(*number).map_err(failed)?;
                if *listens { Place::Listening(fd) } else { Place::Connected(fd) }
            }
        })
    }
}

/// A chardev's place, and whether it waits for its client. Its id and kind are taken already.
fn seat(kind: &str, mut keys: Map<String, Value>) -> Result<(Seat, bool), String> {
    let mut take = |key: &str| match keys.shift_remove(key) {
        Some(Value::String(text)) => Some(text),
        Some(Value::Bool(on)) => Some(if on { "on" } else { "off" }.to_owned()),
        Some(other) => Some(other.to_string()),
        None => None,
    };
    let on = |value: Option<String>| value.map(|value| matches!(value.as_str(), "on" | "yes" | "true"));
    let server = on(take("server")).unwrap_or(false);
    let no_wait = on(take("nowait")).unwrap_or(false);
    let wait = on(take("wait")).unwrap_or(!no_wait) && server;
    for harmless in ["nodelay", "ipv4", "ipv6", "signal", "reconnect", "reconnect-ms"] {
        take(harmless);
    }
    let port = |text: String| text.parse::<u16>().map_err(|_| format!("'{text}' is no number of a TCP port"));
    let seat = match kind {
        "stdio" => Seat::Standard,
        "socket" => match (take("path"), take("port"), take("fd")) {
            (Some(path), None, None) if server => Seat::Listen(path),
            (Some(path), None, None) => Seat::Connect(path),
            (None, Some(number), None) => {
                let host = take("host").filter(|host| !host.is_empty());
                let number = port(number)?;
                if server {
                    Seat::ListenTcp(host.unwrap_or_else(|| "0.0.0.0".to_owned()), number)
                } else {
                    Seat::ConnectTcp(host.unwrap_or_else(|| "localhost".to_owned()), number)
                }
            }
            (None, None, Some(fd)) => {
                Seat::Inherited(fd.parse().map_err(|_| format!("'{fd}' is no number of a descriptor"))?, server)
            }
            _ => return Err("it says no place, or more than one".to_owned()),
        },
        other => return Err(format!("a chardev of kind '{other}'")),
    };
    match keys.keys().next() {
        Some(key) => Err(format!("a chardev with '{key}'")),
        None => Ok((seat, wait)),
    }
}

/// What `-qmp` takes, in its own short form.
fn short(text: &str) -> Result<(Seat, bool), String> {
    let (place, options) = text.split_once(',').unwrap_or((text, ""));
    let mut keys = graph::keyval(options, None).map_err(|error| error.to_string())?;
    let mut put = |key: &str, value: &str| keys.insert(key.to_owned(), Value::String(value.to_owned()));
    if place == "stdio" {
        return seat("stdio", keys);
    }
    if let Some(path) = place.strip_prefix("unix:") {
        put("path", path);
        return seat("socket", keys);
    }
    let Some((host, port)) = place.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')) else {
        return Err(format!("'{place}'"));
    };
    put("host", host.trim_matches(['[', ']']));
    put("port", port);
    seat("socket", keys)
}

impl Monitors {
    /// Reads the line.
    pub(super) fn of(line: &Line) -> Self {
        let mut monitors = Self::default();
        for (at, option) in line.options.iter().enumerate() {
            let Some(value) = option.value() else { continue };
            let (chardev, pretty) = match option.name.as_str() {
                "qmp" | "qmp-pretty" => match value.strip_prefix("chardev:") {
                    Some(chardev) => (chardev.to_owned(), option.name == "qmp-pretty"),
                    None if matches!(value, "none" | "null") => continue,
                    None => {
                        let pretty = option.name == "qmp-pretty";
                        match short(value) {
                            Ok((seat, wait)) => {
                                monitors.ours.push(Monitor { at, seat, pretty, wait, chardev: None });
                            }
                            Err(why) => monitors.left(value, &why),
                        }
                        continue;
                    }
                },
                "mon" => {
                    let Some(keys) = tree(value, "chardev") else { continue };
                    let said = |key: &str| keys.get(key).and_then(Value::as_str).unwrap_or_default();
                    if said("mode") != "control" {
                        continue;
                    }
                    (said("chardev").to_owned(), matches!(said("pretty"), "on" | "yes" | "true"))
                }
                _ => continue,
            };
            match taken_over(line, &chardev) {
                Ok((at, seat, wait)) => {
                    monitors.ours.push(Monitor { at, seat, pretty, wait, chardev: Some(chardev) });
                }
                Err(why) => monitors.left(&chardev, &why),
            }
        }
        monitors
    }

    fn left(&mut self, what: &str, why: &str) {
        self.notes.push(format!("the monitor at '{what}' is QEMU's own ({why}): block jobs are not to be seen there"));
    }
}

/// The chardev of this name, if nothing but one monitor uses it: its option, its place, and whether it waits.
fn taken_over(line: &Line, chardev: &str) -> Result<(usize, Seat, bool), String> {
    let users = line
        .options
        .iter()
        .filter(|option| option.name != "chardev" && option.value().is_some_and(|value| names_chardev(value, chardev)));
    if users.count() > 1 {
        return Err("its chardev is shared".to_owned());
    }
    for (at, option) in line.options.iter().enumerate().filter(|(_, option)| option.name == "chardev") {
        let Some(mut keys) = option.value().and_then(|text| tree(text, "backend")) else { continue };
        if keys.get("id").and_then(Value::as_str) != Some(chardev) {
            continue;
        }
        keys.shift_remove("id");
        let kind = match keys.shift_remove("backend") {
            Some(Value::String(kind)) => kind,
            _ => String::new(),
        };
        let (seat, wait) = seat(&kind, keys)?;
        return Ok((at, seat, wait));
    }
    Err("there is no such chardev".to_owned())
}

/// Whether an option's value refers to a chardev.
fn names_chardev(value: &str, chardev: &str) -> bool {
    value == chardev
        || value.strip_prefix("chardev:").is_some_and(|name| name == chardev)
        || tree(value, "chardev").is_some_and(|keys| keys.get("chardev").and_then(Value::as_str) == Some(chardev))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn monitors(words: &[&str]) -> Monitors {
        Monitors::of(&Line::read(words.iter().map(OsString::from)).unwrap())
    }

    #[test]
    fn the_one_that_libvirt_opens() {
        let found = monitors(&[
            "-chardev",
            "socket,id=charmonitor,fd=25,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
        ]);
        let chardev = Some("charmonitor".to_owned());
        let seat = Seat::Inherited(25, true);
        assert_eq!(found.ours, [Monitor { at: 0, seat, pretty: false, wait: false, chardev }]);
    }

    #[test]
    fn short_forms() {
        let seat = |value| {
            let found = monitors(&["-qmp", value]);
            found.ours.first().map(|monitor| (monitor.seat.clone(), monitor.wait))
        };
        assert_eq!(seat("unix:/m,server=on,wait=off"), Some((Seat::Listen("/m".into()), false)));
        assert_eq!(seat("unix:/m,server,nowait"), Some((Seat::Listen("/m".into()), false)));
        assert_eq!(seat("unix:/m,server"), Some((Seat::Listen("/m".into()), true)));
        assert_eq!(seat("unix:/m"), Some((Seat::Connect("/m".into()), false)));
        assert_eq!(
            seat("tcp:localhost:4444,server=on,wait=off"),
            Some((Seat::ListenTcp("localhost".into(), 4444), false))
        );
        assert_eq!(seat("tcp::4444,server=on,wait=off"), Some((Seat::ListenTcp("0.0.0.0".into(), 4444), false)));
        assert_eq!(seat("stdio"), Some((Seat::Standard, false)));
        assert_eq!(seat("pty"), None);
        assert_eq!(seat("none"), None);
        assert!(monitors(&["-qmp", "none"]).notes.is_empty());
        assert!(!monitors(&["-qmp", "pty"]).notes.is_empty());
    }

    #[test]
    fn what_is_shared_or_for_people_stays_qemus() {
        let chardev = "stdio,id=c,signal=off";
        assert!(monitors(&["-chardev", chardev, "-mon", "chardev=c,mode=readline"]).ours.is_empty());
        let shared = monitors(&["-chardev", chardev, "-mon", "chardev=c,mode=control", "-serial", "chardev:c"]);
        assert!(shared.ours.is_empty() && shared.notes.len() == 1);
        let mux = monitors(&["-chardev", "stdio,id=c,mux=on", "-mon", "c,mode=control"]);
        assert!(mux.ours.is_empty() && mux.notes.len() == 1);
        let plain = monitors(&["-mon", "c,mode=control,pretty=on", "-chardev", chardev]);
        assert!(plain.ours[0].pretty && plain.ours[0].at == 1);
    }
}
