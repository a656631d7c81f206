//! The command line, read before anything is done: options keep their order, and what makes no sense is found first.

use serde_json::{Map, Value};
use std::path::PathBuf;

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    Blockdev(Map<String, Value>),
    Chardev(Map<String, Value>),
    Export(Map<String, Value>),
    Monitor { chardev: String, pretty: bool },
    NbdServer(Map<String, Value>),
    Object(Map<String, Value>),
}

/// Everything the line says.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) help: bool,
    pub(super) version: bool,
    pub(super) daemonize: bool,
    pub(super) pid_file: Option<PathBuf>,
    /// What is to be told.
    pub(super) traces: Vec<String>,
    /// Each with the option it came from, as messages name it.
    pub(super) actions: Vec<(String, Action)>,
}

/// Options that take something, and the key that a bare first word stands for.
const OPTIONS: [(&str, &str); 9] = [
    ("--blockdev", "driver"),
    ("--chardev", "backend"),
    ("--export", "type"),
    ("--monitor", "chardev"),
    ("--nbd-server", ""),
    ("--object", "qom-type"),
    ("--pidfile", ""),
    ("--trace", ""),
    ("-T", ""),
];

/// A tree from JSON or from `key=value,…`.
fn tree(text: &str, implied: &str) -> Result<Map<String, Value>, String> {
    if text.trim_start().starts_with('{') {
        return match graph::json::parse(text.as_bytes()) {
            Ok(Value::Object(tree)) => Ok(tree),
            Ok(_) => Err("Invalid JSON object given".to_owned()),
            Err(_) if graph::json::is_cut_short(text.as_bytes()) => Err("JSON parse error, premature EOI".to_owned()),
            Err(error) => Err(error),
        };
    }
    let flat = graph::keyval(text, (!implied.is_empty()).then_some(implied)).map_err(|error| error.to_string())?;
    graph::nested(flat).map_err(|error| error.to_string())
}

/// What of a tree from a command line are words becomes switches and numbers, where monitors have those.
fn typed(tree: &mut Map<String, Value>, flags: &[&str], numbers: &[&str]) {
    for (key, value) in tree.iter_mut() {
        let Value::String(text) = &*value else { continue };
        if flags.contains(&key.as_str()) {
            match text.as_str() {
                "on" | "yes" | "true" | "y" => *value = Value::Bool(true),
                "off" | "no" | "false" | "n" => *value = Value::Bool(false),
                _ => {}
            }
        } else if numbers.contains(&key.as_str())
            && let Ok(number) = text.parse::<i64>()
        {
            *value = Value::from(number);
        }
    }
}

impl Line {
    /// Takes the descriptors that it names, before anything could be open under their numbers. What cannot be taken is told when it is
    /// used.
    pub(super) fn hand_over(&self) {
        for (_, action) in &self.actions {
            let number = match action {
                Action::Chardev(tree) => tree.get("fd"),
                Action::NbdServer(tree) => {
                    tree.get("addr").filter(|addr| addr["type"] == "fd").and_then(|addr| addr.get("str"))
                }
                _ => None,
            };
            // Trees that are JSON may have it as a number.
            let text = number.map(|number| number.as_str().map_or_else(|| number.to_string(), str::to_owned));
            if let Some(number) = text.and_then(|text| text.parse().ok()) {
                let _ = ring::hand_over(number);
            }
        }
    }

    /// Reads it. Of several mistakes the first counts.
    pub(super) fn read(words: &[String]) -> Result<Self, String> {
        let mut line = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-h" | "--help" => line.help = true,
                "-V" | "--version" => line.version = true,
                "--daemonize" => line.daemonize = true,
                word if word.starts_with('-') => {
                    let (name, given) = match word.split_once('=') {
                        Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
                        _ => (word, None),
                    };
                    let known = OPTIONS.iter().find(|(option, _)| *option == name);
                    let (name, implied) = known.ok_or_else(|| format!("unrecognized option '{word}'"))?;
                    let needs = || format!("option '{name}' requires an argument");
                    let value = given.or_else(|| words.next().cloned()).ok_or_else(needs)?;
                    let option = format!("{name} {value}");
                    line.take(name, &value, implied).map_err(|error| format!("{option}: {error}"))?;
                }
                stray => return Err(format!("{stray}: Unexpected argument")),
            }
        }
        Ok(line)
    }

    fn take(&mut self, name: &str, value: &str, implied: &str) -> Result<(), String> {
        let action = match name {
            "--trace" | "-T" => {
                self.traces.push(value.to_owned());
                return Ok(());
            }
            "--pidfile" => {
                self.pid_file = Some(PathBuf::from(value));
                return Ok(());
            }
            "--blockdev" => Action::Blockdev(tree(value, implied)?),
            "--object" => Action::Object(tree(value, implied)?),
            "--chardev" => Action::Chardev(tree(value, implied)?),
            "--nbd-server" => {
                let mut tree = tree(value, implied)?;
                typed(&mut tree, &[], &["max-connections"]);
                Action::NbdServer(tree)
            }
            "--export" => {
                let mut tree = tree(value, implied)?;
                let flags = ["writable", "writethrough", "fixed-iothread", "allow-inactive", "allocation-depth"];
                typed(&mut tree, &flags, &["num-queues", "logical-block-size"]);
                Action::Export(tree)
            }
            _ => {
                let mut tree = tree(value, implied)?;
                typed(&mut tree, &["pretty"], &[]);
                let Some(Value::String(chardev)) = tree.shift_remove("chardev") else {
                    return Err("Parameter 'chardev' is missing".to_owned());
                };
                match tree.shift_remove("mode") {
                    None => {}
                    Some(Value::String(mode)) if mode == "control" => {}
                    _ => return Err("Only mode=control is there: a QMP monitor".to_owned()),
                }
                let pretty = tree.shift_remove("pretty") == Some(Value::Bool(true));
                tree.shift_remove("id");
                if let Some(key) = tree.keys().next() {
                    return Err(format!("Parameter '{key}' is unexpected"));
                }
                Action::Monitor { chardev, pretty }
            }
        };
        self.actions.push((format!("{name} {value}"), action));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(words: &[&str]) -> Result<Line, String> {
        Line::read(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_keep_their_order_and_both_forms_are_read() {
        let line = read(&[
            "--blockdev",
            "file,node-name=f,filename=a,,b",
            "--blockdev={\"driver\":\"raw\",\"node-name\":\"r\",\"file\":\"f\"}",
            "--export",
            "nbd,id=e,node-name=r,writable=on",
            "--monitor",
            "m,pretty=on",
            "--pidfile",
            "p",
        ]);
        let line = line.unwrap();
        let trees: Vec<Value> = line
            .actions
            .iter()
            .map(|(_, action)| match action {
                Action::Blockdev(tree) | Action::Export(tree) => Value::Object(tree.clone()),
                Action::Monitor { chardev, pretty } => json!([chardev, pretty]),
                _ => Value::Null,
            })
            .collect();
        assert_eq!(
            trees,
            [
                json!({"driver": "file", "node-name": "f", "filename": "a,b"}),
                json!({"driver": "raw", "node-name": "r", "file": "f"}),
                json!({"type": "nbd", "id": "e", "node-name": "r", "writable": true}),
                json!(["m", true]),
            ]
        );
        assert_eq!(line.pid_file, Some("p".into()));
    }

    #[test]
    fn mistakes_are_told_in_qemus_words() {
        for (words, text) in [
            (&["--nope"][..], "unrecognized option '--nope'"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["foo"], "foo: Unexpected argument"),
            (&["--monitor", "foo=bar"], "--monitor foo=bar: Parameter 'chardev' is missing"),
            (&["--blockdev", "{\"driver\":"], "--blockdev {\"driver\":: JSON parse error, premature EOI"),
        ] {
            assert_eq!(read(words).unwrap_err(), text);
        }
    }
}
