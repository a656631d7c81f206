//! Scripts of image tools' lines, carried out for our programs and for QEMU's, in folders of their own, and compared line by line.
//!
//! A line is one of
//! * `img WORDS`: `qemu-img WORDS`: same exit code, same words on standard output;
//! * `io FILE: COMMAND; COMMAND…`: `qemu-io` on the file, the same (times are not compared); `io -r …`: switches in front;
//! * `same FILE`: both hold the same, as QEMU reads it, and QEMU's check finds ours sound;
//! * `map FILE`: and the same is allocated, as QEMU sees it;
//! * `theirs FILE`: from here on both have QEMU's;
//! * `poke FILE OFFSET HEX`: bytes of the file become these, on both sides;
//! * `cut FILE SIZE`: the file is made as long;
//! * `raw FILE SIZE SEED`: a raw file with data, zeros and holes.
//!
//! `$F` is the format under test. Words may be quoted with `"`; `#` begins a comment.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::sides::{Sides, master};
use crate::{Result, error};

/// Lines of output that are each tool's own affair.
const OWN: [&str; 6] = ["disk size", "file length", "Image end offset", "% fragmented", " ops; ", " ops/sec"];

/// Both sides, and the format under test.
#[derive(Debug)]
pub struct Script {
    sides: Sides,
    io: PathBuf,
    format: String,
}

impl Script {
    /// In this format.
    ///
    /// # Errors
    /// Where our program is missing, or a folder cannot be made.
    pub fn new(format: &str) -> Result<Self> {
        let sides = Sides::new("qemu-img")?;
        let io = sides.tool.with_file_name("qemu-io");
        std::os::unix::fs::symlink(&sides.tool, &io)?;
        Ok(Self { sides, io, format: format.to_owned() })
    }

    /// Carries out a script in each of these formats.
    ///
    /// # Errors
    /// Of a line.
    ///
    /// # Panics
    /// Where the sides differ.
    pub fn in_each(formats: &[&str], lines: &str) -> Result {
        formats.iter().try_for_each(|format| Self::new(format)?.run(lines))
    }

    /// Carries out a script.
    ///
    /// # Errors
    /// Of a line.
    ///
    /// # Panics
    /// Where the sides differ.
    pub fn run(&self, lines: &str) -> Result {
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            self.line(&line.replace("$F", &self.format))?;
        }
        Ok(())
    }

    fn line(&self, line: &str) -> Result {
        let (verb, rest) = line.split_once(' ').ok_or_else(|| error!("no line: {line}"))?;
        let words = words(rest);
        let word = |number: usize| words.get(number).map(String::as_str).ok_or_else(|| error!("no line: {line}"));
        let both = |change: &dyn Fn(&Path) -> Result| self.sides.both(change);
        match verb {
            "img" => self.compare(line, "qemu-img", &words),
            "io" => {
                let (files, commands) = rest.split_once(':').ok_or_else(|| error!("no line: {line}"))?;
                let mut words = self::words(files);
                let file = words.pop().unwrap_or_default();
                let stated = words.iter().any(|word| word == "-f" || word == "--image-opts");
                if !stated {
                    words.extend(["-f".to_owned(), self.format.clone()]);
                }
                for command in commands.split(';') {
                    words.extend(["-c".to_owned(), command.trim().to_owned()]);
                }
                words.push(file);
                self.compare(line, "qemu-io", &words)
            }
            "same" => self.sides.hold_the_same(word(0)?, words.get(1).unwrap_or(&self.format)),
            "map" => self.map(line, word(0)?, words.get(1).unwrap_or(&self.format)),
            "theirs" => {
                std::fs::copy(self.sides.theirs.join(word(0)?), self.sides.ours.join(word(0)?))?;
                Ok(())
            }
            "poke" => {
                let (at, hex) = (number(word(1)?)?, word(2)?);
                let bytes: Vec<u8> = (0..hex.len() / 2)
                    .map(|n| u8::from_str_radix(&hex[n * 2..n * 2 + 2], 16))
                    .collect::<std::result::Result<_, _>>()?;
                both(&|dir| {
                    let file = OpenOptions::new().write(true).open(dir.join(&words[0]))?;
                    Ok(file.write_all_at(&bytes, at)?)
                })
            }
            "cut" => {
                let size = number(word(1)?)?;
                both(&|dir| Ok(OpenOptions::new().write(true).open(dir.join(&words[0]))?.set_len(size)?))
            }
            "raw" => {
                let (size, seed) = (number(word(1)?)?, number(word(2)?)?);
                both(&|dir| master(&dir.join(&words[0]), size, seed))
            }
            _ => Err(error!("no line: {line}")),
        }
    }

    /// `qemu-img` ends well on both sides, or on neither, whatever is said (`because` of what comes in front of it).
    ///
    /// # Errors
    /// Where a program cannot be run.
    ///
    /// # Panics
    /// Where they end differently.
    pub fn ends_alike(&self, line: &str, because: &str) -> Result {
        let (ours, theirs) = self.outputs("qemu-img", &words(line))?;
        let failed = || format!("{because}: {line}\nours: {ours:?}\ntheirs: {theirs:?}");
        assert_eq!(ours.status.success(), theirs.status.success(), "{}", failed());
        Ok(())
    }

    /// A damaged image is found so by both, and where QEMU's repair leaves nothing that it finds, so does ours.
    ///
    /// # Errors
    /// Where a program cannot be run.
    ///
    /// # Panics
    /// Where that is not so.
    pub fn mends(&self, file: &str, repair: &str, because: &str) -> Result {
        self.ends_alike(&format!("check -f {} {file}", self.format), because)?;
        let (ours, theirs) =
            self.outputs("qemu-img", &words(&format!("check -r {repair} -f {} {file}", self.format)))?;
        let judged =
            |dir: &Path| Command::new("qemu-img").args(["check", "-f", &self.format, file]).current_dir(dir).output();
        let (mended, theirs_mended) = (judged(&self.sides.ours)?, judged(&self.sides.theirs)?);
        let failed = || format!("{because}: {repair}\nours: {ours:?} {mended:?}\ntheirs: {theirs:?} {theirs_mended:?}");
        assert!(mended.status.success() || !theirs_mended.status.success(), "{}", failed());
        Ok(())
    }

    /// Ours ends with 1; what it said.
    ///
    /// # Errors
    /// Where a program cannot be run.
    ///
    /// # Panics
    /// Where it does not.
    pub fn refused(&self, tool: &str, words: &[&str]) -> Result<String> {
        let own = if tool == "qemu-io" { &self.io } else { &self.sides.tool };
        let ours = Command::new(own).args(words).current_dir(&self.sides.ours).output()?;
        assert_eq!(ours.status.code(), Some(1), "{words:?}: {ours:?}");
        Ok(String::from_utf8_lossy(&ours.stderr).into_owned())
    }

    /// Ours ends well, whatever QEMU's knows of it.
    ///
    /// # Errors
    /// Where a program cannot be run.
    ///
    /// # Panics
    /// Where it does not.
    pub fn ours(&self, line: &str) -> Result {
        let words = words(&line.replace("$F", &self.format));
        let ours = Command::new(&self.sides.tool).args(&words).current_dir(&self.sides.ours).output()?;
        assert!(ours.status.success(), "{line}: {ours:?}");
        Ok(())
    }

    /// The same words for both tools.
    fn compare(&self, line: &str, tool: &str, words: &[String]) -> Result {
        let (ours, theirs) = self.outputs(tool, words)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let failed = || format!("{line} ({})\nours: {ours:?}\ntheirs: {theirs:?}", self.format);
        assert_eq!(ours.status.code(), theirs.status.code(), "{}", failed());
        // QEMU's says what it is about to make even where it then finds that this cannot be.
        let said = |output: &Output| {
            let lines = told(&text(&output.stdout));
            let begun = |line: &&str| output.status.success() || !line.starts_with("Formatting");
            lines.lines().filter(begun).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(said(&ours), said(&theirs), "{}", failed());
        if ours.status.code() == Some(1) && !theirs.stderr.is_empty() && tool == "qemu-img" {
            assert!(text(&ours.stderr).starts_with(tool), "{}", failed());
        }
        Ok(())
    }

    fn outputs(&self, tool: &str, words: &[String]) -> Result<(Output, Output)> {
        let own = if tool == "qemu-io" { &self.io } else { &self.sides.tool };
        let ours = Command::new(own).args(words).current_dir(&self.sides.ours).env("TZ", "UTC").output()?;
        let theirs = Command::new(tool).args(words).current_dir(&self.sides.theirs).env("TZ", "UTC").output()?;
        Ok((ours, theirs))
    }

    fn map(&self, line: &str, file: &str, format: &str) -> Result {
        let map = |dir: &Path| -> Result<Vec<String>> {
            let args = ["map", "--output=json", "-f", format, file];
            let output = Command::new("qemu-img").args(args).current_dir(dir).output()?;
            let runs: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
            // Where the bytes are is each side's own affair, and so is what only differs in that.
            let mut joined: Vec<(u64, String)> = Vec::new();
            for run in runs {
                let len = run["length"].as_u64().unwrap_or(0);
                let what =
                    ["depth", "present", "zero", "data", "compressed"].map(|field| format!("{field}={}", run[field]));
                let what = what.join(" ");
                match joined.last_mut() {
                    Some((total, last)) if *last == what => *total += len,
                    _ => joined.push((len, what)),
                }
            }
            Ok(joined.into_iter().map(|(len, what)| format!("{len}: {what}")).collect())
        };
        assert_eq!(map(&self.sides.ours)?, map(&self.sides.theirs)?, "{line} ({format})");
        Ok(())
    }
}

/// What both say alike.
fn told(text: &str) -> String {
    text.lines().filter(|line| !OWN.iter().any(|own| line.contains(own))).collect::<Vec<_>>().join("\n")
}

fn number(text: &str) -> Result<u64> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        _ => (text, 0),
    };
    Ok(digits.parse::<u64>()? << shift)
}

/// The words of a line; quotes keep together what they hold.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut open, mut quoted) = (String::new(), false, false);
    for c in line.chars() {
        match c {
            '"' => {
                open = true;
                quoted = !quoted;
            }
            ' ' if !quoted => {
                if open {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            c => {
                open = true;
                word.push(c);
            }
        }
    }
    if open {
        words.push(word);
    }
    words
}
