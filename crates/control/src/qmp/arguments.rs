//! A command's arguments: taken one by one with their types, and what is left over at the end is a mistake.
//!
//! Refusals are in the words of QEMU's monitor, which programs have come to match on.

use crate::Failure;
use serde_json::{Map, Value};

/// The arguments of one command.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    members: Map<String, Value>,
}

pub(super) fn wrong_type(name: &str, expected: &str) -> Failure {
    Failure::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

impl Arguments {
    pub(crate) fn new(members: Map<String, Value>) -> Self {
        Self { members }
    }

    /// A string that may be left out.
    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.members.shift_remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "string")),
        }
    }

    /// Whatever it is, that may be left out.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.members.shift_remove(name)
    }

    /// A string that must be there.
    pub(crate) fn needed_string(&mut self, name: &str) -> Result<String, Failure> {
        self.string(name)?.ok_or_else(|| missing(name))
    }

    /// A truth value that may be left out.
    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Failure> {
        match self.members.shift_remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(wrong_type(name, "boolean")),
        }
    }

    /// An integer of 64 bits that may be left out.
    pub(crate) fn integer(&mut self, name: &str) -> Result<Option<i64>, Failure> {
        match self.members.shift_remove(name) {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| wrong_type(name, "integer")),
        }
    }

    /// An unsigned integer of 64 bits that may be left out; a negative one is taken for what its bits say, as QEMU does.
    pub(crate) fn size(&mut self, name: &str) -> Result<Option<u64>, Failure> {
        match self.members.shift_remove(name) {
            None => Ok(None),
            Some(value) => {
                let size = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
                size.map(Some).ok_or_else(|| no_size(name))
            }
        }
    }

    /// A speed in bytes a second that may be left out.
    pub(crate) fn speed(&mut self, name: &str) -> Result<Option<u64>, Failure> {
        self.integer(name)?.map(|speed| non_negative(name, speed)).transpose()
    }

    /// A speed in bytes a second that must be there.
    pub(crate) fn needed_speed(&mut self, name: &str) -> Result<u64, Failure> {
        self.speed(name)?.ok_or_else(|| missing(name))
    }

    /// A word that `known` knows, that may be left out.
    pub(crate) fn word<T>(&mut self, name: &str, known: impl Fn(&str) -> Option<T>) -> Result<Option<T>, Failure> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        let refused = || Failure::generic(format!("Parameter '{name}' does not accept value '{text}'"));
        known(&text).map(Some).ok_or_else(refused)
    }

    /// A list that may be left out.
    pub(crate) fn list(&mut self, name: &str) -> Result<Vec<Value>, Failure> {
        match self.members.shift_remove(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => Ok(items),
            Some(_) => Err(wrong_type(name, "array")),
        }
    }

    /// An object that must be there.
    pub(crate) fn object(&mut self, name: &str) -> Result<Map<String, Value>, Failure> {
        match self.members.shift_remove(name) {
            None => Err(missing(name)),
            Some(Value::Object(tree)) => Ok(tree),
            Some(_) => Err(wrong_type(name, "object")),
        }
    }

    /// All that is left, for whoever knows what it means.
    pub(crate) fn all(self) -> Map<String, Value> {
        self.members
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), Failure> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(unexpected(name)),
        }
    }
}

pub(super) fn no_size(name: &str) -> Failure {
    Failure::generic(format!("Parameter '{name}' expects uint64"))
}

pub(super) fn unexpected(name: &str) -> Failure {
    Failure::generic(format!("Parameter '{name}' is unexpected"))
}

pub(super) fn missing(name: &str) -> Failure {
    Failure::generic(format!("Parameter '{name}' is missing"))
}

fn non_negative(name: &str, value: i64) -> Result<u64, Failure> {
    u64::try_from(value).map_err(|_| Failure::generic(format!("Parameter '{name}' expects a non-negative value")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn arguments(value: Value) -> Arguments {
        match value {
            Value::Object(members) => Arguments::new(members),
            _ => Arguments::default(),
        }
    }

    #[test]
    fn refusals_are_in_qemus_words() {
        let said = |outcome: Result<Option<i64>, Failure>| outcome.map_err(|failure| failure.desc);
        assert_eq!(
            said(arguments(json!({"speed": "x"})).integer("speed")),
            Err("Invalid parameter type for 'speed', expected: integer".into())
        );
        assert_eq!(
            arguments(json!({"speed": -1})).speed("speed").map_err(|failure| failure.desc),
            Err("Parameter 'speed' expects a non-negative value".into())
        );
        assert!(arguments(json!({"speed": 1.5})).integer("speed").is_err());
        assert!(arguments(json!({"speed": u64::MAX})).integer("speed").is_err());
        let mut some = arguments(json!({"device": "d", "foo": 7, "bar": 1}));
        assert_eq!(some.needed_string("device"), Ok("d".into()));
        assert_eq!(some.end().map_err(|failure| failure.desc), Err("Parameter 'foo' is unexpected".into()));
    }
}
