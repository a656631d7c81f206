//! Trees of options: from `key=value,…` and dotted keys, and taking them apart.
//!
//! **Invariant.** Taking a tree apart ends with [`Keys::finish`]: what nobody has taken is an error.

use crate::wrong;
use image::Error;
use serde_json::{Map, Value};

/// A key's parts at most: deeper trees are nobody's disk.
const DEEPEST: usize = 32;

/// Reads `key=value,…`: a comma within a value is written twice. The first part may be a bare value, for the key `implied`; others
/// without a value are switched on, as in QEMU.
pub fn keyval(text: &str, implied: Option<&str>) -> Result<Map<String, Value>, Error> {
    let mut flat = Map::new();
    let (mut rest, mut first) = (text, true);
    while !rest.is_empty() {
        let mut part = String::new();
        loop {
            let Some(at) = rest.find(',') else {
                part.push_str(rest);
                rest = "";
                break;
            };
            part.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            match rest.strip_prefix(',') {
                Some(after) => {
                    part.push(',');
                    rest = after;
                }
                None => break,
            }
        }
        let (key, value) = match (part.split_once('='), implied.filter(|_| first)) {
            (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
            (None, Some(implied)) => (implied.to_owned(), part),
            (None, None) => (part, "on".to_owned()),
        };
        first = false;
        flat.insert(key, Value::String(value));
    }
    Ok(flat)
}

/// Dotted keys become trees, at any depth: `{"file.filename": "a"}` and `{"file": {"filename": "a"}}` are the same.
pub fn nest(flat: Map<String, Value>) -> Result<Map<String, Value>, Error> {
    let mut tree = Map::new();
    for (key, value) in flat {
        put(&mut tree, &key, &key, value, DEEPEST)?;
    }
    Ok(tree)
}

fn put(tree: &mut Map<String, Value>, whole: &str, key: &str, value: Value, left: usize) -> Result<(), Error> {
    if left == 0 {
        return Err(wrong(format!("the option '{whole}' is nested too deeply")));
    }
    match key.split_once('.') {
        Some((head, tail)) if !head.is_empty() && !tail.is_empty() => {
            let inner = tree.entry(head).or_insert_with(|| Value::Object(Map::new()));
            match inner {
                Value::Object(inner) => put(inner, whole, tail, value, left - 1),
                _ => Err(wrong(format!("Cannot mix scalar and non-scalar keys: '{whole}'"))),
            }
        }
        _ => {
            let value = match value {
                Value::Object(members) => {
                    let inner = tree.entry(key).or_insert_with(|| Value::Object(Map::new()));
                    let Value::Object(inner) = inner else {
                        return Err(wrong(format!("Cannot mix scalar and non-scalar keys: '{whole}'")));
                    };
                    for (member, value) in members {
                        put(inner, &format!("{whole}.{member}"), &member, value, left - 1)?;
                    }
                    return Ok(());
                }
                value => value,
            };
            match tree.insert(key.to_owned(), value) {
                None => Ok(()),
                Some(_) => Err(wrong(format!("The option '{whole}' is given twice"))),
            }
        }
    }
}

/// A tree that is taken apart, key by key.
pub(crate) struct Keys {
    tree: Map<String, Value>,
}

impl Keys {
    pub(crate) fn new(tree: Map<String, Value>) -> Self {
        Self { tree }
    }

    /// Whether there is such a key.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.tree.contains_key(key)
    }

    /// Whatever it is.
    pub(crate) fn any(&mut self, key: &str) -> Option<Value> {
        self.tree.shift_remove(key)
    }

    /// Takes keys away that are allowed and change nothing here.
    pub(crate) fn ignore(&mut self, keys: &[&str]) {
        self.tree.retain(|key, _| !keys.contains(&key.as_str()));
    }

    fn mistaken(key: &str, wanted: &str) -> Error {
        wrong(format!("Invalid parameter type for '{key}', expected: {wanted}"))
    }

    /// A string; a number where a string is meant is one, too.
    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.any(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => Err(Self::mistaken(key, "string")),
        }
    }

    /// A switch.
    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>, Error> {
        match self.any(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(Value::String(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(wrong(format!("Parameter '{key}' expects 'on' or 'off'"))),
            },
            Some(_) => Err(Self::mistaken(key, "boolean")),
        }
    }

    /// A number of bytes or of anything else; in a string it may have a suffix (`64k`).
    pub(crate) fn number(&mut self, key: &str) -> Result<Option<u64>, Error> {
        match self.any(key) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_u64() {
                Some(number) => Ok(Some(number)),
                None => Err(Self::mistaken(key, "uint64")),
            },
            Some(Value::String(text)) => match sized(&text) {
                Some(number) => Ok(Some(number)),
                None => Err(wrong(format!(
                    "Parameter '{key}' expects a non-negative number below 2^64, perhaps with a suffix k, M, G, T, P or E"
                ))),
            },
            Some(_) => Err(Self::mistaken(key, "uint64")),
        }
    }

    /// A tree within this one.
    pub(crate) fn tree(&mut self, key: &str) -> Result<Option<Self>, Error> {
        match self.any(key) {
            None => Ok(None),
            Some(Value::Object(tree)) => Ok(Some(Self::new(tree))),
            Some(_) => Err(Self::mistaken(key, "object")),
        }
    }

    /// A list of trees, or a tree whose keys count from 0.
    pub(crate) fn trees(&mut self, key: &str) -> Result<Vec<Self>, Error> {
        let listed = match self.any(key) {
            None => Vec::new(),
            Some(Value::Array(items)) => items,
            Some(Value::Object(mut members)) => {
                let count = members.len();
                let items: Vec<_> = (0..count).filter_map(|n| members.shift_remove(&n.to_string())).collect();
                if items.len() < count {
                    return Err(Self::mistaken(key, "array"));
                }
                items
            }
            Some(_) => return Err(Self::mistaken(key, "array")),
        };
        let tree = |item| match item {
            Value::Object(tree) => Ok(Self::new(tree)),
            _ => Err(Self::mistaken(key, "object")),
        };
        listed.into_iter().map(tree).collect()
    }

    /// The first key that nobody has taken, with its parts joined by dots.
    pub(crate) fn left(&self) -> Option<String> {
        let (mut name, mut value) = self.tree.iter().next()?;
        let mut whole = name.clone();
        while let Value::Object(inner) = value
            && let Some((key, next)) = inner.iter().next()
        {
            (name, value) = (key, next);
            whole = format!("{whole}.{name}");
        }
        Some(whole)
    }

    /// Refuses what is left; `who` is what does not know it: `Block format 'qcow2'`.
    pub(crate) fn finish(self, who: &str, not: &str) -> Result<(), Error> {
        match self.left() {
            None => Ok(()),
            Some(key) => Err(wrong(format!("{who} {not} support the option '{key}'"))),
        }
    }
}

/// A number with a suffix, powers of 1024.
fn sized(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return None,
    };
    let number: u64 =
        if digits.bytes().all(|digit| digit.is_ascii_digit()) { digits.parse().ok()? } else { return None };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn tree(value: Value) -> Map<String, Value> {
        let Value::Object(tree) = value else { panic!("no object") };
        tree
    }

    #[test]
    fn keys_and_values_with_commas() {
        let read = |text| Value::Object(keyval(text, Some("file")).unwrap());
        assert_eq!(read("a=1,b=x,,y,c"), json!({"a": "1", "b": "x,y", "c": "on"}));
        assert_eq!(read("x,,y,b=2"), json!({"file": "x,y", "b": "2"}));
        assert_eq!(read("a=b=c"), json!({"a": "b=c"}));
        assert_eq!(read(""), json!({}));
    }

    #[test]
    fn dotted_keys_are_trees() {
        let nested = nest(tree(json!({"a.b.c": 1, "a.b.d": 2, "e": {"f.g": 3, "h": {"i": 4}}, "e.f.x": 5}))).unwrap();
        let expected = json!({"a": {"b": {"c": 1, "d": 2}}, "e": {"f": {"g": 3, "x": 5}, "h": {"i": 4}}});
        assert_eq!(Value::Object(nested), expected);
        assert!(nest(tree(json!({"a": 1, "a.b": 2}))).is_err());
        assert!(nest(tree(json!({"a.b": 1, "a": {"b": 2}}))).is_err());
        let deep = vec!["a"; 100].join(".");
        assert!(nest(tree(json!({deep: 1}))).is_err());
    }

    #[test]
    fn what_is_left_is_named() {
        let mut keys = Keys::new(tree(json!({"a": "64k", "b": true, "c": {"d": {"e": 1}}, "l": {"0": {}, "1": {}}})));
        assert_eq!(keys.number("a").unwrap(), Some(65536));
        assert_eq!(keys.flag("b").unwrap(), Some(true));
        assert_eq!(keys.trees("l").unwrap().len(), 2);
        let error = keys.finish("Block format 'qcow2'", "does not").unwrap_err();
        assert_eq!(error.to_string(), "Block format 'qcow2' does not support the option 'c.d.e'");
        assert!(Keys::new(tree(json!({"l": {"0": {}, "2": {}}}))).trees("l").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-c.,=0]{0,40}") {
            let flat = keyval(&text, None).unwrap();
            let _ = nest(flat);
        }
    }
}
