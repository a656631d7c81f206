//! blkdebug's file of rules: sections `[inject-error]` and `[set-state]` with `key = "value"` lines.

use crate::node::{inject_error, set_state};
use crate::options::Keys;
use crate::wrong;
use image::Error;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use store::debug::Rules;

/// Longer files are no rules.
const LONGEST: u64 = 1 << 20;

/// Reads the rules in the file `path`.
pub(crate) fn read(path: &str) -> Result<Rules, Error> {
    let unread = |error: std::io::Error| {
        let text = error.to_string();
        let said = text.split(" (os error").next().unwrap_or(&text);
        wrong(format!("Could not read blkdebug config file: {said}"))
    };
    let mut text = String::new();
    File::open(path).map_err(unread)?.take(LONGEST).read_to_string(&mut text).map_err(unread)?;
    parse(path, &text)
}

fn parse(path: &str, text: &str) -> Result<Rules, Error> {
    let mut sections: Vec<(&str, Map<String, Value>)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = || wrong(format!("{path}:{}: parse error", number + 1));
        if let Some(head) = line.strip_prefix('[') {
            let head = head.strip_suffix(']').ok_or_else(bad)?;
            let kind = head.split_whitespace().next().ok_or_else(bad)?;
            sections.push((kind, Map::new()));
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(bad)?;
        let value = value.trim().strip_prefix('"').and_then(|value| value.strip_suffix('"')).ok_or_else(bad)?;
        let (_, section) = sections.last_mut().ok_or_else(bad)?;
        section.insert(key.trim().to_owned(), Value::String(value.to_owned()));
    }
    let mut rules = Rules::default();
    for (kind, section) in sections {
        match kind {
            "inject-error" => rules.inject_error.push(inject_error(Keys::new(section))?),
            "set-state" => rules.set_state.push(set_state(Keys::new(section))?),
            other => return Err(wrong(format!("{path}: There is no option group '{other}'"))),
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::debug::Event;

    #[test]
    fn sections_are_rules() {
        let text = "# a comment\n[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\n\n[set-state]\nevent=\"write_aio\"\n\
                    state = \"1\"\nnew_state = \"2\"\n[inject-error]\nevent = \"l2_load\"\nonce = \"on\"\n";
        let rules = parse("c", text).unwrap();
        assert_eq!((rules.inject_error.len(), rules.set_state.len()), (2, 1));
        assert_eq!((rules.inject_error[0].event, rules.inject_error[0].errno), (Some(Event::Read), 28));
        for bad in ["x = \"1\"", "[inject-error\n", "[inject-error]\nevent = read_aio", "[tea]\n", "[inject-error]\n"] {
            assert!(parse("c", bad).is_err(), "{bad}");
        }
    }
}
