//! A command taken apart: its switches, what they say, and its numbers.

use super::number;

/// Most bytes of one request, as qemu-io has it.
const LONGEST: u64 = 0x7fff_fe00;

/// What a read or write is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    /// The byte to write, or to find.
    pub(crate) pattern: Option<u8>,
    /// Where, within a read, it is looked for.
    pub(crate) pattern_offset: u64,
    /// How much of a read is looked at.
    pub(crate) pattern_len: Option<u64>,
    /// What is read is printed.
    pub(crate) dump: bool,
    /// Print nothing.
    pub(crate) quiet: bool,
    /// No speed.
    pub(crate) terse: bool,
    /// Durable when it is done.
    pub(crate) fua: bool,
    /// Zeros.
    pub(crate) zero: bool,
    /// The space may be given back.
    pub(crate) unmap: bool,
    /// Packed.
    pub(crate) packed: bool,
    /// What is written comes from this file, again and again.
    pub(crate) file: Option<String>,
    /// Where.
    pub(crate) at: u64,
    /// How much.
    pub(crate) len: u64,
}

impl Request {
    /// Takes the words behind the command's name apart. `switches` are those it knows; `vector`: several lengths may follow.
    pub(crate) fn parse(name: &str, words: &[&str], switches: &str, vector: bool) -> Result<Self, String> {
        let mut request = Self::default();
        let mut words = words.iter().copied();
        let mut numbers: Vec<&str> = Vec::new();
        let writes = switches.contains('f');
        while let Some(word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                numbers.push(word);
                continue;
            };
            let mut letters = letters.chars();
            while let Some(letter) = letters.next() {
                if !switches.contains(letter) {
                    return Err(format!("{name}: invalid option -- '{letter}'"));
                }
                let mut value = || {
                    let rest: String = letters.by_ref().collect();
                    let value = if rest.is_empty() { words.next().map(str::to_owned) } else { Some(rest) };
                    value.ok_or_else(|| format!("{name}: option requires an argument -- '{letter}'"))
                };
                match letter {
                    'P' => request.pattern = Some(pattern(&value()?)?),
                    's' if writes => request.file = Some(value()?),
                    's' => request.pattern_offset = number::parse(&value()?)?,
                    'l' => request.pattern_len = Some(number::parse(&value()?)?),
                    'v' => request.dump = true,
                    'q' => request.quiet = true,
                    'C' => request.terse = true,
                    'f' => request.fua = true,
                    'z' => request.zero = true,
                    'u' => request.unmap = true,
                    'c' => request.packed = true,
                    // Of no consequence here: no bounce buffers, no state of machines, no registered buffers.
                    _ => {}
                }
            }
        }
        let (Some(at), true) = (numbers.first(), if vector { numbers.len() > 1 } else { numbers.len() == 2 }) else {
            return Err(format!("bad argument count {} to {name}, expected at least 2 arguments", numbers.len()));
        };
        request.at = number::parse(at)?;
        for len in &numbers[1..] {
            request.len = request.len.saturating_add(number::parse(len)?);
        }
        if request.len > LONGEST && !request.zero {
            return Err(format!("length cannot exceed {LONGEST}, given {}", numbers[1]));
        }
        if request.zero && request.pattern.is_some() {
            return Err("-z and -P cannot be specified at the same time".to_owned());
        }
        if request.unmap && !request.zero {
            return Err("-u requires -z to be specified".to_owned());
        }
        Ok(request)
    }
}

fn pattern(word: &str) -> Result<u8, String> {
    let value = number::parse(word).ok().and_then(|value| u8::try_from(value).ok());
    value.ok_or_else(|| format!("{word} is not a valid pattern byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: &str = "bcCfnpqrsuzP";

    #[test]
    fn switches_and_numbers_are_told_apart() {
        let request = Request::parse("write", &["-qP", "0x7", "-f", "1k", "64k"], WRITE, false).unwrap();
        assert_eq!(
            (request.pattern, request.quiet, request.fua, request.at, request.len),
            (Some(7), true, true, 1024, 65536)
        );
        let request = Request::parse("writev", &["-P5", "0", "1k", "2k"], WRITE, true).unwrap();
        assert_eq!((request.pattern, request.len), (Some(5), 3072));
        let refused = |words: &[&str]| Request::parse("write", words, WRITE, false).unwrap_err();
        assert_eq!(refused(&["0"]), "bad argument count 1 to write, expected at least 2 arguments");
        assert!(refused(&["-P", "256", "0", "1"]).contains("pattern byte"));
        assert!(refused(&["-u", "0", "1"]).contains("-z"));
        assert!(refused(&["-x", "0", "1"]).contains("invalid option"));
        assert!(refused(&["-P"]).contains("requires an argument"));
        assert!(refused(&["0", "4G"]).contains("exceed"));
    }
}
