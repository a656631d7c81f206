//! JSON as a monitor meets it on a stream: values with or without line ends between them, spread over lines, several in one
//! packet, strings in either kind of quotes.
//!
//! [`Framer`] finds where a value ends; [`parse`] reads it. Both are bounded: a value's length, its nesting, and what a client may
//! make the server hold. After a mistake the framer starts afresh, so that one bad message costs its sender one error.
//! Error texts are those QEMU's monitor answers.

use serde_json::{Map, Number, Value};

/// A message may be this long, in bytes: no command is anywhere near it, and all clients at once can make the server hold
/// only so much.
const LONGEST: usize = 4 << 20;

/// Objects and arrays within each other.
const DEEPEST: usize = 1024;

/// Cuts a byte stream into values.
#[derive(Debug, Default)]
pub struct Framer {
    value: Vec<u8>,
    depth: usize,
    quote: Option<u8>,
    escaped: bool,
}

/// What the framer found: a value, or the text of a mistake.
pub type Framed = Result<Value, String>;

impl Framer {
    /// Takes one byte in; a value that ends with it (or before it) is returned.
    pub fn take(&mut self, byte: u8) -> Option<Framed> {
        if self.value.len() >= LONGEST {
            return Some(self.mistake("JSON token size limit exceeded".into()));
        }
        if let Some(quote) = self.quote {
            return self.in_string(byte, quote);
        }
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {
                if self.depth == 0 {
                    return self.end();
                }
                self.value.push(byte);
                None
            }
            b'"' | b'\'' => {
                let before = if self.depth == 0 { self.end() } else { None };
                self.quote = Some(byte);
                self.value.push(byte);
                before
            }
            b'{' | b'[' => {
                let before = if self.depth == 0 { self.end() } else { None };
                self.depth += 1;
                self.value.push(byte);
                if self.depth > DEEPEST {
                    return Some(self.mistake("JSON nesting depth limit exceeded".into()));
                }
                before
            }
            b'}' | b']' => {
                self.value.push(byte);
                if self.depth == 0 {
                    return Some(self.mistake("JSON parse error, expecting value".into()));
                }
                self.depth -= 1;
                if self.depth == 0 { self.end() } else { None }
            }
            b':' | b',' | b'-' | b'+' | b'.' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
                self.value.push(byte);
                None
            }
            stray => {
                let text = if stray.is_ascii() { char::from(stray) } else { char::REPLACEMENT_CHARACTER };
                Some(self.mistake(format!("JSON parse error, stray '{text}'")))
            }
        }
    }

    /// Bytes taken in and not returned yet.
    pub fn held(&self) -> usize {
        self.value.len()
    }

    fn in_string(&mut self, byte: u8, quote: u8) -> Option<Framed> {
        // Bytes that UTF-8 does not have end everything wherever they come: that is how a client that has lost the thread
        // brings the server to a known state.
        if byte < 0x20 || matches!(byte, 0xc0 | 0xc1 | 0xf5..) {
            let tail = self.value.len().saturating_sub(16);
            let said = String::from_utf8_lossy(&self.value[tail..]);
            let stray = if byte.is_ascii() { char::from(byte) } else { char::REPLACEMENT_CHARACTER };
            let text = format!("JSON parse error, stray '{said}{stray}'");
            return Some(self.mistake(text));
        }
        self.value.push(byte);
        if self.escaped {
            self.escaped = false;
        } else if byte == b'\\' {
            self.escaped = true;
        } else if byte == quote {
            self.quote = None;
            if self.depth == 0 {
                return self.end();
            }
        }
        None
    }

    fn end(&mut self) -> Option<Framed> {
        if self.value.is_empty() {
            return None;
        }
        let value = std::mem::take(&mut self.value);
        *self = Self::default();
        Some(parse(&value))
    }

    fn mistake(&mut self, text: String) -> Framed {
        *self = Self::default();
        Err(text)
    }
}

/// Whether `text` is only the beginning of a value: nothing in it is wrong, and something is missing.
pub fn is_cut_short(text: &[u8]) -> bool {
    let mut framer = Framer::default();
    text.iter().all(|byte| framer.take(*byte).is_none()) && framer.held() > 0
}

/// Reads one whole value.
pub fn parse(text: &[u8]) -> Framed {
    let mut reader = Reader { text, at: 0, depth: 0 };
    let value = reader.value()?;
    reader.space();
    if reader.at < text.len() { Err("JSON parse error, expecting value".into()) } else { Ok(value) }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

fn expecting(what: &str) -> String {
    format!("JSON parse error, {what}")
}

impl Reader<'_> {
    fn space(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn value(&mut self) -> Framed {
        self.space();
        match self.peek() {
            Some(b'{') => self.nested(Self::object),
            Some(b'[') => self.nested(Self::array),
            Some(quote @ (b'"' | b'\'')) => self.string(quote).map(Value::String),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'a'..=b'z' | b'A'..=b'Z' | b'_') => self.keyword(),
            _ => Err(expecting("expecting value")),
        }
    }

    fn nested(&mut self, read: impl FnOnce(&mut Self) -> Framed) -> Framed {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err("JSON nesting depth limit exceeded".into());
        }
        self.at += 1;
        let value = read(self);
        self.depth -= 1;
        value
    }

    fn object(&mut self) -> Framed {
        let mut members = Map::new();
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Object(members));
        }
        loop {
            self.space();
            let key = match self.peek() {
                Some(quote @ (b'"' | b'\'')) => self.string(quote)?,
                _ => return Err(expecting("key is not a string in object")),
            };
            self.space();
            if self.peek() != Some(b':') {
                return Err(expecting("missing : in object pair"));
            }
            self.at += 1;
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err(expecting("duplicate key"));
            }
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(Value::Object(members));
                }
                _ => return Err(expecting("expected separator in dict")),
            }
        }
    }

    fn array(&mut self) -> Framed {
        let mut items = Vec::new();
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(Value::Array(items));
                }
                _ => return Err(expecting("expected separator in list")),
            }
        }
    }

    fn string(&mut self, quote: u8) -> Result<String, String> {
        self.at += 1;
        let mut bytes = Vec::new();
        loop {
            let Some(byte) = self.peek() else { return Err(expecting("unterminated string")) };
            self.at += 1;
            match byte {
                byte if byte == quote => break,
                b'\\' => self.escape(&mut bytes)?,
                byte => bytes.push(byte),
            }
        }
        String::from_utf8(bytes).map_err(|_| expecting("invalid UTF-8 sequence in string"))
    }

    fn escape(&mut self, bytes: &mut Vec<u8>) -> Result<(), String> {
        let byte = self.peek().ok_or_else(|| expecting("unterminated string"))?;
        self.at += 1;
        let plain = match byte {
            b'"' | b'\'' | b'\\' | b'/' => byte,
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                let character = self.unicode()?;
                bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            other => return Err(expecting(&format!("invalid escape sequence '\\{}'", char::from(other)))),
        };
        bytes.push(plain);
        Ok(())
    }

    fn unicode(&mut self) -> Result<char, String> {
        let first = self.hex()?;
        let bad = |code: u32| expecting(&format!("\\u{code:04x} is not a valid Unicode character"));
        if !(0xd800..0xdc00).contains(&first) {
            return char::from_u32(first).ok_or_else(|| bad(first));
        }
        if self.text.get(self.at..self.at + 2) != Some(b"\\u") {
            return Err(bad(first));
        }
        self.at += 2;
        let second = self.hex()?;
        if !(0xdc00..0xe000).contains(&second) {
            return Err(bad(first));
        }
        char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)).ok_or_else(|| bad(first))
    }

    fn hex(&mut self) -> Result<u32, String> {
        let digits = self.text.get(self.at..self.at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let code = code.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        self.at += 4;
        code.ok_or_else(|| expecting("invalid escape sequence '\\u'"))
    }

    fn word(&mut self) -> String {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.' | b'_'))
        {
            self.at += 1;
        }
        String::from_utf8_lossy(&self.text[start..self.at]).into_owned()
    }

    fn number(&mut self) -> Framed {
        let word = self.word();
        let digits = word.strip_prefix('-').unwrap_or(&word);
        let leading_zero = digits.len() > 1 && digits.starts_with('0') && digits.as_bytes()[1].is_ascii_digit();
        let stray = || expecting(&format!("stray '{word}'"));
        if leading_zero {
            return Err(stray());
        }
        if let Ok(number) = serde_json::from_str::<Number>(&word) {
            return Ok(Value::Number(number));
        }
        // Beyond what fits: a number all the same, of a type that no integer parameter takes.
        match word.parse::<f64>() {
            Ok(number) if digits.as_bytes().first().is_some_and(u8::is_ascii_digit) => {
                Ok(Number::from_f64(number).map_or_else(|| Value::from(f64::MAX), Value::Number))
            }
            _ => Err(stray()),
        }
    }

    fn keyword(&mut self) -> Framed {
        let word = self.word();
        match word.as_str() {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            _ => Err(expecting(&format!("invalid keyword '{word}'"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn all(text: &[u8]) -> Vec<Framed> {
        let mut framer = Framer::default();
        text.iter().filter_map(|byte| framer.take(*byte)).collect()
    }

    #[test]
    fn values_need_no_line_ends_and_may_span_lines() {
        let found = all(b"{'execute'\n:\"a\"\n}{\"b\":[1,null,1.5]} 7 ");
        assert_eq!(found, [Ok(json!({"execute": "a"})), Ok(json!({"b": [1, null, 1.5]})), Ok(json!(7))]);
        assert_eq!(all(br"{'id':'x\'y\u00e9\ud83d\ude00'}"), [Ok(json!({"id": "x'yé😀"}))]);
    }

    #[test]
    fn one_mistake_costs_one_error_and_the_next_value_is_read() {
        let good = Ok(json!({"a": 1}));
        for (bad, text) in [
            (&b"}"[..], "expecting value"),
            (b"xyz\n", "invalid keyword 'xyz'"),
            (b"\xff", "stray '\u{fffd}'"),
            (b"{\"a\":}", "expecting value"),
            (b"{\"a\":1,\"a\":2}", "duplicate key"),
            (b"['\n", "stray '['\n'"),
            (b"{\"a\":\"\\ud800\"}", "not a valid Unicode character"),
            (b"{\"a\":00}", "stray '00'"),
            (b"{'a' 1}", "missing : in object pair"),
            (b"[1 2]", "expected separator in list"),
        ] {
            let mut text_and_good = bad.to_vec();
            text_and_good.extend_from_slice(b"{\"a\":1}");
            let found = all(&text_and_good);
            assert_eq!(found.len(), 2, "{bad:?}: {found:?}");
            assert!(found[0].as_ref().is_err_and(|e| e.contains(text)), "{:?} for {bad:?}", found[0]);
            assert_eq!(found[1], good);
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let found = all(&[b'['; 1025]);
        assert_eq!(found, [Err("JSON nesting depth limit exceeded".to_owned())]);
        let mut deep = vec![b'['; 1024];
        deep.extend(vec![b']'; 1024]);
        assert!(matches!(all(&deep)[..], [Ok(_)]));
    }

    #[test]
    fn integers_keep_their_type() {
        assert_eq!(parse(b"9223372036854775807"), Ok(json!(i64::MAX)));
        assert_eq!(parse(b"18446744073709551615"), Ok(json!(u64::MAX)));
        assert!(parse(b"99999999999999999999").is_ok_and(|value| value.as_i64().is_none() && value.as_u64().is_none()));
        assert!(parse(b"1e999").is_ok_and(|value| value.is_f64()));
        assert!(parse(b"-").is_err());
    }
}
