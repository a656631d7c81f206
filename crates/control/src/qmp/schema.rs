//! What commands take and events carry: the one description, which arguments are checked against and `query-qmp-schema` is made of.
//!
//! **Invariant.** A command that is called has arguments of the kinds that its description says, and none that it does not name.

use super::arguments::{missing, no_size, unexpected, wrong_type};
use crate::Failure;
use serde_json::{Map, Value, json};

/// The kind of a value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// A string.
    Text,
    /// True or false.
    Flag,
    /// An integer of 64 bits.
    Integer,
    /// An unsigned one; its sign is not looked at.
    Size,
    /// One of these words.
    Word(&'static [&'static str]),
    /// An object with these members.
    Object(&'static [Member]),
    /// A list.
    List(&'static Kind),
    /// An object with these members and whatever its first one asks for; or a string that names one.
    Open(&'static [Member]),
    /// Anything.
    Any,
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) needed: bool,
}

/// A member that must be there.
pub(crate) const fn needs(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, needed: true }
}

/// A member that may be left out.
pub(crate) const fn may(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, needed: false }
}

/// What a command takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Takes {
    pub(crate) members: &'static [Member],
    /// Others, too: whoever carries it out knows which.
    pub(crate) open: bool,
}

/// A kind's name in messages.
fn expected(kind: Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::Word(_) => "string",
        Kind::Flag => "boolean",
        Kind::Integer | Kind::Size => "integer",
        Kind::Object(_) | Kind::Open(_) => "object",
        Kind::List(_) => "array",
        Kind::Any => "any",
    }
}

fn check_value(path: &str, kind: Kind, value: &Value) -> Result<(), Failure> {
    let fits = match kind {
        Kind::Text | Kind::Word(_) => value.is_string(),
        Kind::Flag => value.is_boolean(),
        Kind::Integer => value.as_i64().is_some(),
        Kind::Size => value.is_i64() || value.is_u64(),
        Kind::Object(_) => value.is_object(),
        Kind::Open(_) | Kind::Any => true,
        Kind::List(_) => value.is_array(),
    };
    if !fits && matches!(kind, Kind::Size) {
        return Err(no_size(path));
    }
    if !fits {
        return Err(wrong_type(path, expected(kind)));
    }
    match (kind, value) {
        (Kind::Word(words), Value::String(word)) if !words.contains(&word.as_str()) => {
            // Here QEMU gives the last name of the path only.
            let name = path.rsplit('.').next().unwrap_or(path);
            Err(Failure::generic(format!("Parameter '{name}' does not accept value '{word}'")))
        }
        (Kind::Object(members), Value::Object(tree)) => check_members(&format!("{path}."), members, tree, false),
        (Kind::List(inner), Value::Array(items)) => {
            let mut items = items.iter().enumerate();
            items.try_for_each(|(at, item)| check_value(&format!("{path}[{at}]"), *inner, item))
        }
        _ => Ok(()),
    }
}

fn check_members(prefix: &str, members: &[Member], tree: &Map<String, Value>, open: bool) -> Result<(), Failure> {
    for member in members {
        let path = format!("{prefix}{}", member.name);
        match tree.get(member.name) {
            Some(value) => check_value(&path, member.kind, value)?,
            None if member.needed => return Err(missing(&path)),
            None => {}
        }
    }
    match tree.keys().find(|key| members.iter().all(|member| member.name != *key)) {
        Some(stray) if !open => Err(unexpected(&format!("{prefix}{stray}"))),
        _ => Ok(()),
    }
}

/// Refuses arguments that are not as described, in the words of QEMU's monitor.
pub(crate) fn check(takes: Takes, arguments: &Map<String, Value>) -> Result<(), Failure> {
    check_members("", takes.members, arguments, takes.open)
}

/// The same for arguments within others: `prefix` is what names are put behind in messages.
pub(crate) fn check_at(prefix: &str, members: &[Member], arguments: &Map<String, Value>) -> Result<(), Failure> {
    check_members(prefix, members, arguments, false)
}

/// Puts `SchemaInfo`s together.
#[derive(Default)]
pub(crate) struct Schema {
    entries: Vec<Value>,
    /// Names of types are numbers, as QEMU has it: nobody is to rely on them.
    types: usize,
    builtins: Vec<&'static str>,
}

impl Schema {
    fn named(&mut self, mut entry: Value) -> String {
        let name = self.types.to_string();
        self.types += 1;
        entry["name"] = json!(name);
        self.entries.push(entry);
        name
    }

    fn builtin(&mut self, name: &'static str, json_type: &'static str) -> String {
        if !self.builtins.contains(&name) {
            self.builtins.push(name);
            self.entries.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
        }
        name.to_owned()
    }

    fn kind(&mut self, kind: Kind) -> String {
        match kind {
            Kind::Text => self.builtin("str", "string"),
            Kind::Flag => self.builtin("bool", "boolean"),
            Kind::Integer | Kind::Size => self.builtin("int", "int"),
            Kind::Any => self.builtin("any", "value"),
            Kind::Word(words) => {
                let members: Vec<Value> = words.iter().map(|word| json!({ "name": word })).collect();
                self.named(json!({ "meta-type": "enum", "values": words, "members": members }))
            }
            Kind::Object(members) | Kind::Open(members) => self.object(members),
            Kind::List(inner) => {
                let element = self.kind(*inner);
                let name = format!("[{element}]");
                if !self.entries.iter().any(|entry| entry["name"] == json!(name)) {
                    self.entries.push(json!({ "name": name, "meta-type": "array", "element-type": element }));
                }
                name
            }
        }
    }

    fn object(&mut self, members: &[Member]) -> String {
        let mut described = Vec::new();
        for member in members {
            let mut entry = json!({ "name": member.name, "type": self.kind(member.kind) });
            if !member.needed {
                entry["default"] = Value::Null;
            }
            described.push(entry);
        }
        self.named(json!({ "meta-type": "object", "members": described }))
    }

    /// Describes a command.
    pub(crate) fn command(&mut self, name: &str, takes: Takes, gives: Kind, out_of_band: bool) {
        let (takes, gives) = (self.object(takes.members), self.kind(gives));
        let mut entry = json!({ "name": name, "meta-type": "command", "arg-type": takes, "ret-type": gives });
        if out_of_band {
            entry["allow-oob"] = json!(true);
        }
        self.entries.push(entry);
    }

    /// Describes an event.
    pub(crate) fn event(&mut self, name: &str, carries: &[Member]) {
        let carries = self.object(carries);
        self.entries.push(json!({ "name": name, "meta-type": "event", "arg-type": carries }));
    }

    /// All of it.
    pub(crate) fn finish(self) -> Value {
        Value::Array(self.entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Kind = Kind::Object(&[needs("type", Kind::Word(&["unix", "inet"])), may("data", Kind::Any)]);
    const TAKES: Takes = Takes {
        members: &[
            needs("id", Kind::Text),
            may("speed", Kind::Integer),
            may("addr", ADDRESS),
            may("all", Kind::List(&Kind::Flag)),
        ],
        open: false,
    };

    fn said(value: &Value) -> Result<(), String> {
        check(TAKES, value.as_object().unwrap()).map_err(|failure| failure.desc)
    }

    #[test]
    fn arguments_are_checked_in_qemus_words() {
        assert_eq!(said(&json!({"id": "a", "speed": 1, "addr": {"type": "unix"}, "all": [true]})), Ok(()));
        for (value, text) in [
            (json!({}), "Parameter 'id' is missing"),
            (json!({"id": 7}), "Invalid parameter type for 'id', expected: string"),
            (json!({"id": "a", "x": 1}), "Parameter 'x' is unexpected"),
            (json!({"id": "a", "addr": {}}), "Parameter 'addr.type' is missing"),
            (json!({"id": "a", "addr": {"type": "tea"}}), "Parameter 'type' does not accept value 'tea'"),
            (json!({"id": "a", "addr": {"type": "unix", "y": 1}}), "Parameter 'addr.y' is unexpected"),
            (json!({"id": "a", "all": [1]}), "Invalid parameter type for 'all[0]', expected: boolean"),
        ] {
            assert_eq!(said(&value), Err(text.to_owned()));
        }
    }

    #[test]
    fn every_type_that_is_referred_to_is_described() {
        let mut schema = Schema::default();
        schema.command("x", TAKES, Kind::List(&ADDRESS), false);
        schema.event("Y", TAKES.members);
        let Value::Array(entries) = schema.finish() else { panic!("no list") };
        let names: Vec<&str> = entries.iter().filter_map(|entry| entry["name"].as_str()).collect();
        for entry in &entries {
            let referred = ["arg-type", "ret-type", "element-type"].iter().filter_map(|key| entry[*key].as_str());
            let members =
                entry["members"].as_array().into_iter().flatten().filter_map(|member| member["type"].as_str());
            for name in referred.chain(members) {
                assert!(names.contains(&name), "{name} in {entry}");
            }
        }
    }
}
