//! What `--object` makes: secrets and throttle groups.
//!
//! **Invariant.** A secret's bytes are in no message and no `Debug` output, and are wiped when it goes.

use crate::options::{Keys, keyval, nest};
use crate::{json, wrong};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use image::{Error, ErrorKind};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::rc::Rc;
use store::throttle::{Group, Rate, Rates};
use zeroize::Zeroizing;

/// A secret is no longer than this, in bytes.
const LONGEST_SECRET: u64 = 1 << 20;

/// The objects of a process, by their ids.
#[derive(Default)]
pub struct Objects {
    secrets: RefCell<HashMap<String, Zeroizing<Vec<u8>>>>,
    groups: RefCell<HashMap<String, Rc<Group>>>,
    /// Those that say nothing here.
    others: RefCell<HashSet<String>>,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (secrets, groups) = (self.secrets.borrow(), self.groups.borrow());
        f.debug_struct("Objects")
            .field("secrets", &secrets.keys())
            .field("groups", &groups.keys())
            .finish_non_exhaustive()
    }
}

impl Objects {
    /// Makes what each of `texts` (values of `--object`: `TYPE,id=…,…` or JSON) describes.
    ///
    /// # Errors
    /// Unknown types and options, missing ids, ids that are there already, in QEMU's words.
    pub fn new<T: AsRef<str>>(texts: &[T]) -> Result<Self, Error> {
        let objects = Self::default();
        for text in texts {
            objects.add(text.as_ref())?;
        }
        Ok(objects)
    }

    /// Makes one more.
    pub fn add(&self, text: &str) -> Result<(), Error> {
        let flat = if text.trim_start().starts_with('{') {
            match json::parse(text.as_bytes()).map_err(wrong)? {
                Value::Object(tree) => tree,
                _ => return Err(wrong("Invalid JSON object given")),
            }
        } else {
            keyval(text, Some("qom-type"))?
        };
        self.add_tree(flat)
    }

    /// Makes one more, of a tree.
    pub fn add_tree(&self, tree: Map<String, Value>) -> Result<(), Error> {
        let mut keys = Keys::new(nest(tree)?);
        let kind = keys.text("qom-type")?.ok_or_else(|| wrong("Parameter 'qom-type' is missing"))?;
        let id = keys.text("id")?.ok_or_else(|| wrong("Parameter 'id' is missing"))?;
        let taken = self.secrets.borrow().contains_key(&id)
            || self.groups.borrow().contains_key(&id)
            || self.others.borrow().contains(&id);
        if taken {
            return Err(wrong(format!("attempt to add duplicate property '{id}' to object (type 'container')")));
        }
        match kind.as_str() {
            "secret" => {
                let secret = secret(keys)?;
                self.secrets.borrow_mut().insert(id, secret);
            }
            "throttle-group" => {
                let group = Group::new(rates(keys)?);
                self.groups.borrow_mut().insert(id, group);
            }
            "iothread" | "main-loop" => {
                // Which of QEMU's threads serves what: ours are given out by disk.
                keys.ignore(&[
                    "poll-max-ns",
                    "poll-grow",
                    "poll-shrink",
                    "aio-max-batch",
                    "thread-pool-min",
                    "thread-pool-max",
                ]);
                keys.finish(&format!("'{kind}'"), "does not")?;
                self.others.borrow_mut().insert(id);
            }
            other => {
                let what = format!(
                    "Invalid parameter '{other}': secret, throttle-group and iothread are the objects there are"
                );
                return Err(Error::new(ErrorKind::Unsupported, "", None, what));
            }
        }
        Ok(())
    }

    /// Takes one away; who uses it already goes on.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let found = self.secrets.borrow_mut().remove(id).is_some()
            || self.groups.borrow_mut().remove(id).is_some()
            || self.others.borrow_mut().remove(id);
        if found { Ok(()) } else { Err(wrong(format!("object '{id}' not found"))) }
    }

    /// The bytes of the secret `id`.
    pub fn secret(&self, id: &str) -> Result<Zeroizing<Vec<u8>>, Error> {
        let secrets = self.secrets.borrow();
        secrets.get(id).cloned().ok_or_else(|| wrong(format!("No secret with id '{id}'")))
    }

    /// The throttle group `id`.
    pub fn group(&self, id: &str) -> Result<Rc<Group>, Error> {
        let groups = self.groups.borrow();
        groups.get(id).cloned().ok_or_else(|| wrong(format!("Throttle group '{id}' does not exist")))
    }
}

fn secret(mut keys: Keys) -> Result<Zeroizing<Vec<u8>>, Error> {
    let data = keys.text("data")?.map(|data| Zeroizing::new(data.into_bytes()));
    let file = keys.text("file")?;
    let format = keys.text("format")?;
    if keys.has("keyid") || keys.has("iv") {
        let what = "secrets that are themselves encrypted ('keyid', 'iv') are not supported: use file=PATH";
        return Err(Error::new(ErrorKind::Unsupported, "", None, what));
    }
    keys.finish("'secret'", "does not")?;
    let mut bytes = match (data, file) {
        (Some(_), Some(_)) => return Err(wrong("'file' and 'data' are mutually exclusive")),
        (None, None) => return Err(wrong("Must provide 'file' or 'data'")),
        (Some(data), None) => data,
        (None, Some(path)) => {
            let mut bytes = Zeroizing::new(Vec::new());
            let read = File::open(&path).and_then(|file| file.take(LONGEST_SECRET).read_to_end(&mut bytes));
            read.map_err(|error| wrong(format!("Unable to read {path}: {error}")))?;
            bytes
        }
    };
    match format.as_deref() {
        None | Some("raw") => {
            if std::str::from_utf8(&bytes).is_err() {
                return Err(wrong("Data from secret is not valid UTF-8"));
            }
        }
        Some("base64") => {
            let text: Zeroizing<Vec<u8>> =
                Zeroizing::new(bytes.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect());
            let decoded = BASE64_STANDARD.decode(&*text).map_err(|_| wrong("Base64 data is not valid"))?;
            bytes = Zeroizing::new(decoded);
        }
        Some(other) => return Err(wrong(format!("Parameter 'format' does not accept value '{other}'"))),
    }
    Ok(bytes)
}

fn rates(mut keys: Keys) -> Result<Rates, Error> {
    let mut limits = keys.tree("limits")?;
    // The older spelling: `x-bps-total`; within `limits`: `bps-total`.
    let mut number = |name: &str| -> Result<u64, Error> {
        let within = match &mut limits {
            Some(limits) => limits.number(name)?,
            None => None,
        };
        Ok(match within {
            Some(number) => number,
            None => keys.number(&format!("x-{name}"))?.unwrap_or(0),
        })
    };
    let mut rate = |name: &str| -> Result<Rate, Error> {
        let (average, burst) = (number(name)?, number(&format!("{name}-max"))?);
        Ok(Rate { average, burst, burst_seconds: number(&format!("{name}-max-length"))? })
    };
    let bytes = [rate("bps-total")?, rate("bps-read")?, rate("bps-write")?];
    let operations = [rate("iops-total")?, rate("iops-read")?, rate("iops-write")?];
    let rates = Rates { bytes, operations, operation_bytes: number("iops-size")? };
    if let Some(limits) = limits {
        limits.finish("'limits'", "does not")?;
    }
    keys.finish("'throttle-group'", "does not")?;
    rates.check().map_err(wrong)?;
    Ok(rates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_come_from_words_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "aGVsbG8=\n").unwrap();
        let from_file = format!("secret,id=f,file={},format=base64", path.display());
        let objects =
            Objects::new(&["secret,id=d,data=a,,b", &from_file, r#"{"qom-type":"secret","id":"j","data":"x"}"#]);
        let objects = objects.unwrap();
        assert_eq!(**objects.secret("d").unwrap(), *b"a,b");
        assert_eq!(**objects.secret("f").unwrap(), *b"hello");
        assert_eq!(**objects.secret("j").unwrap(), *b"x");
        assert_eq!(objects.secret("nope").unwrap_err().to_string(), "No secret with id 'nope'");
        assert!(!format!("{objects:?}").contains("hello"));
        assert!(objects.add("secret,id=d,data=z").is_err());
        for bad in [
            "secret,data=x",
            "secret,id=x",
            "secret,id=x,data=y,file=z",
            "tea,id=x",
            "secret,id=x,data=?,format=base64",
        ] {
            assert!(Objects::new(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn groups_have_rates_in_both_spellings() {
        let objects =
            Objects::new(&["throttle-group,id=g,x-bps-total=1M", "throttle-group,id=h,limits.iops-read=7"]).unwrap();
        assert_eq!(objects.group("g").unwrap().rates().bytes[0].average, 1 << 20);
        assert_eq!(objects.group("h").unwrap().rates().operations[1].average, 7);
        assert!(Objects::new(&["throttle-group,id=g,x-bps-total-max=5"]).is_err());
    }
}
