//! `-o help`: which options an image of a format may have, in qemu-img's columns.

use super::create::split_options;
use image::Format;

/// What all that have tables and a backing file know.
const BACKING: [(&str, &str, &str); 2] =
    [("backing_file", "str", "File name of a base image"), ("backing_fmt", "str", "Image format of the base image")];

const SIZE: (&str, &str, &str) = ("size", "size", "Virtual disk size");

const PREALLOCATION: (&str, &str, &str) =
    ("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)");

const QED: [(&str, &str, &str); 2] =
    [("cluster_size", "size", "Cluster size (in bytes)"), ("table_size", "size", "L1/L2 table size (in clusters)")];

const QCOW2: [(&str, &str, &str); 6] = [
    ("cluster_size", "size", "qcow2 cluster size"),
    ("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("compression_type", "str", "Compression method used for image cluster compression (zlib, zstd)"),
    ("extended_l2", "bool (on/off)", "Extended L2 tables"),
    ("lazy_refcounts", "bool (on/off)", "Postpone refcount updates"),
    ("refcount_bits", "num", "Width of a reference count entry in bits"),
];

/// Whether a list of options asks for this.
pub(crate) fn is_asked(lists: &[String]) -> bool {
    lists.iter().flat_map(|list| split_options(list)).any(|word| matches!(word.as_str(), "help" | "?"))
}

/// The list.
pub(crate) fn text(format: Format) -> String {
    let options: Vec<_> = match format {
        Format::Raw => vec![PREALLOCATION, SIZE],
        Format::Qed => BACKING.into_iter().chain(QED).chain([SIZE]).collect(),
        Format::Qcow2 => BACKING.into_iter().chain(QCOW2).chain([PREALLOCATION, SIZE]).collect(),
        _ => Vec::new(),
    };
    lines(&format!("Supported {format} options:\n"), options)
}

fn lines(title: &str, options: impl IntoIterator<Item = (&'static str, &'static str, &'static str)>) -> String {
    use std::fmt::Write;
    let mut text = title.to_owned();
    for (name, kind, what) in options {
        let _ = writeln!(text, "  {:<22} - {what}", format!("{name}=<{kind}>"));
    }
    text
}

const AMENDING: [(&str, &str, &str); 5] = [
    ("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("data_file", "str", "File name of an external data file"),
    ("data_file_raw", "bool (on/off)", "The external data file must stay valid as a raw image"),
    ("lazy_refcounts", "bool (on/off)", "Postpone refcount updates"),
    ("refcount_bits", "num", "Width of a reference count entry in bits"),
];

/// What becomes of key slots: in QCOW2, and in LUKS by itself.
const KEY_SLOTS: [(&str, &str, &str, &str); 5] = [
    ("encrypt.iter-time", "iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    ("encrypt.keyslot", "keyslot", "num", "Select a single keyslot to modify explicitly"),
    ("encrypt.new-secret", "new-secret", "str", "New secret to set in the matching keyslots"),
    ("encrypt.old-secret", "old-secret", "str", "Select all keyslots that match this password"),
    ("encrypt.state", "state", "str", "Select new state of affected keyslots (active/inactive)"),
];

/// What `img amend` changes; nothing where it changes nothing.
pub(crate) fn amending(format: Format) -> Option<String> {
    let options: Vec<_> = match format {
        Format::Luks => KEY_SLOTS.map(|(_, key, kind, what)| (key, kind, what)).into(),
        Format::Qcow2 => {
            let keys = KEY_SLOTS.map(|(key, _, kind, what)| (key, kind, what));
            let mut options: Vec<_> = BACKING.into_iter().chain(AMENDING).chain(keys).chain([SIZE]).collect();
            options.sort_unstable();
            options
        }
        _ => return None,
    };
    Some(lines(&format!("Amend options for '{format}':\n"), options))
}
