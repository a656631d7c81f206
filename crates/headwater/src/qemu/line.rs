//! QEMU's command line, cut into options. What they mean is for others; here only how many words belong together.
//!
//! **Invariant.** [`Line::words`] gives back exactly what was read (but for `--with`): what nobody touches reaches QEMU as it was
//! written, in its order, whatever bytes are in it.

use std::ffi::{OsStr, OsString};

/// Options that take nothing. Every other one takes the next word.
const BARE: [&str; 37] = [
    "h",
    "help",
    "version",
    "S",
    "s",
    "alt-grab",
    "ctrl-grab",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "jitdump",
    "localtime",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-kvm",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "nodefconfig",
    "old-param",
    "only-migratable",
    "perfmap",
    "portrait",
    "preconfig",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "win2k-hack",
    "xen-attach",
];

/// One option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opt {
    /// Its name without dashes; empty for a word that is no option (the image of the first disk).
    pub(super) name: String,
    words: Vec<OsString>,
}

impl Opt {
    /// What it takes, if that is text. (What is not is nobody's to understand.)
    pub(super) fn value(&self) -> Option<&str> {
        let value = if self.name.is_empty() { self.words.first() } else { self.words.get(1) };
        value.and_then(|value| value.to_str())
    }

    /// As it was written.
    pub(super) fn words(&self) -> &[OsString] {
        &self.words
    }
}

/// The whole line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    /// `--with PROGRAM`: the real QEMU.
    pub(super) with: Option<OsString>,
    pub(super) options: Vec<Opt>,
}

fn name_of(word: &OsStr) -> Option<String> {
    let text = word.to_str()?;
    let name = text.strip_prefix('-')?;
    let name = name.strip_prefix('-').unwrap_or(name);
    (!name.is_empty()).then(|| name.to_owned())
}

impl Line {
    /// Reads it.
    ///
    /// # Errors
    /// `--with` without a program; everything else is QEMU's to complain about.
    pub(super) fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut line = Self::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            if word == "--with" {
                line.with = Some(words.next().ok_or("--with: which program is QEMU?")?);
                continue;
            }
            let option = match name_of(&word) {
                None => Opt { name: String::new(), words: vec![word] },
                Some(name) if BARE.contains(&name.as_str()) => Opt { name, words: vec![word] },
                Some(name) => Opt { name, words: std::iter::once(word).chain(words.next()).collect() },
            };
            line.options.push(option);
        }
        Ok(line)
    }

    /// All of it for QEMU.
    pub(super) fn words(&self) -> impl Iterator<Item = &OsString> {
        self.options.iter().flat_map(|option| option.words.iter())
    }

    /// Whether there is an option of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option.name == name)
    }

    /// The values of options that have one of these names.
    pub(super) fn values<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = &'a str> {
        let wanted = self.options.iter().filter(|option| names.contains(&option.name.as_str()));
        wanted.filter_map(Opt::value)
    }

    /// Whether QEMU only says something and ends: no guest runs.
    pub(super) fn only_asks(&self) -> bool {
        self.options.iter().any(|option| {
            let help = option.value().is_some_and(|value| {
                // Files and texts may be called so.
                !matches!(option.name.as_str(), "" | "append" | "kernel" | "initrd" | "name")
                    && (value == "help" || value == "?" || value.ends_with(",help") || value.ends_with(",?"))
            });
            matches!(option.name.as_str(), "h" | "help" | "version") || help
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Line {
        Line::read(words.iter().map(OsString::from)).unwrap()
    }

    #[test]
    fn options_take_what_is_theirs() {
        let line =
            read(&["-m", "512", "-enable-kvm", "--drive", "if=virtio,file=a", "-S", "disk.img", "-append", "-x"]);
        let cut: Vec<(&str, Option<&str>)> =
            line.options.iter().map(|option| (option.name.as_str(), option.value())).collect();
        let expected = [
            ("m", Some("512")),
            ("enable-kvm", None),
            ("drive", Some("if=virtio,file=a")),
            ("S", None),
            ("", Some("disk.img")),
            ("append", Some("-x")),
        ];
        assert_eq!(cut, expected);
    }

    #[test]
    fn what_was_read_comes_out_again() {
        use std::os::unix::ffi::OsStringExt;
        let strange = OsString::from_vec(vec![b'-', 0xff]);
        let words: Vec<OsString> = ["-name", "a b", "-", "--", "-device"].map(OsString::from).into();
        let words: Vec<OsString> = words.into_iter().chain([strange]).collect();
        let line = Line::read(words.clone()).unwrap();
        assert_eq!(line.words().cloned().collect::<Vec<_>>(), words);
    }

    #[test]
    fn the_program_may_be_named() {
        let line = read(&["--with", "/opt/qemu", "-S"]);
        assert_eq!(line.with, Some("/opt/qemu".into()));
        assert_eq!(line.options.len(), 1);
        assert!(Line::read([OsString::from("--with")]).is_err());
    }

    #[test]
    fn questions_are_told_from_guests() {
        for words in [&["-version"][..], &["--help"], &["-M", "help"], &["-device", "virtio-blk,help"], &["-cpu", "?"]]
        {
            assert!(read(words).only_asks(), "{words:?}");
        }
        for words in [&["-S"][..], &["-append", "help"], &["help"], &["-name", "help"]] {
            assert!(!read(words).only_asks(), "{words:?}");
        }
    }
}
