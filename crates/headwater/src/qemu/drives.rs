//! `-drive`, `-hda` and their like: which are ours, what they ask of us, and what QEMU gets in their place.
//!
//! **Invariant.** A drive keeps everything that QEMU is to know of it (where the guest sees it, its id, caches, errors, rates); only
//! where its bytes are is exchanged. One that is not ours stays as it was written.

use super::line::{Line, Opt};
use super::nodes::{not_understood, tree};
use control::CacheMode;
use control::joined::RECONNECT_DELAY;
use image::Format;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::path::Path;

/// What of a drive is QEMU's business. (`cache` is both's.)
const KEPT: [&str; 18] = [
    "addr",
    "aio",
    "auto-read-only",
    "bus",
    "cache",
    "detect-zeroes",
    "discard",
    "group",
    "if",
    "index",
    "iops_size",
    "media",
    "node-name",
    "read-only",
    "readonly",
    "rerror",
    "unit",
    "werror",
];

/// Families of keys that are QEMU's business, too.
const KEPT_FAMILIES: [&str; 6] = ["cache.", "throttling", "bps", "iops", "stats-", "copy-on-read."];

/// Interfaces whose drives may pause the guest on errors.
const PAUSING: [&str; 4] = ["ide", "scsi", "virtio", "none"];

/// A drive that we serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Drive {
    /// Its name, for QEMU and for us.
    pub(super) id: String,
    /// The node name of QEMU's NBD client.
    pub(super) client: String,
    pub(super) file: String,
    pub(super) format: Option<Format>,
    pub(super) cache: CacheMode,
    pub(super) read_only: bool,
    pub(super) copy_on_read: bool,
    pub(super) snapshot: bool,
    pub(super) stream: bool,
    /// Virtqueues, where the guest reaches it over vhost-user; else it is over NBD.
    pub(super) queues: Option<u16>,
    kept: Map<String, Value>,
}

/// What becomes of a drive.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// We serve it.
    Ours(Box<Drive>),
    /// QEMU has it, as it is; and why, where its user may have thought otherwise.
    Emulators(Option<String>),
}

/// What a drive may say that is to be reached over vhost-user: there QEMU has no part in caches, errors and rates.
const PLAIN: [&str; 9] = ["addr", "aio", "cache", "discard", "if", "index", "media", "read-only", "readonly"];

impl Drive {
    /// The device's path in QEMU, where the guest reaches the disk over vhost-user.
    pub(super) fn device_path(&self) -> String {
        format!("/machine/peripheral/{}", self.client)
    }

    /// QEMU's words for a device that reaches the disk over vhost-user on `socket`.
    pub(super) fn device(&self, socket: &Path, queues: u16) -> [String; 4] {
        let (id, path) = (&self.client, socket.to_string_lossy().replace(',', ",,"));
        let address = self.kept.get("addr").and_then(Value::as_str);
        let address = address.map(|address| format!(",addr={address}")).unwrap_or_default();
        [
            "-chardev".to_owned(),
            format!("socket,id={id},path={path}"),
            "-device".to_owned(),
            format!("vhost-user-blk-pci,id={id},chardev={id},num-queues={queues}{address}"),
        ]
    }

    /// What QEMU's `-drive` takes, for an export under the drive's id on `socket`.
    pub(super) fn option(&self, socket: &Path) -> String {
        let mut parts: Vec<String> = Vec::new();
        let mut put = |key: &str, value: &str| parts.push(format!("{key}={}", value.replace(',', ",,")));
        for (key, value) in &self.kept {
            put(key, value.as_str().unwrap_or_default());
        }
        put("id", &self.id);
        if !self.kept.contains_key("node-name") {
            put("node-name", &self.client);
        }
        let interface = self.kept.get("if").and_then(Value::as_str).unwrap_or("ide");
        for key in ["werror", "rerror"] {
            if !self.kept.contains_key(key) && PAUSING.contains(&interface) {
                put(key, "stop");
            }
        }
        // What is written to a snapshot's disk is in a file of ours.
        put("snapshot", "off");
        put("driver", "nbd");
        put("server.type", "unix");
        put("server.path", &socket.to_string_lossy());
        put("export", &self.id);
        put("reconnect-delay", &RECONNECT_DELAY.to_string());
        parts.join(",")
    }
}

/// Where drives are, as they are given places one after the other.
#[derive(Debug, Default)]
pub(super) struct Places {
    taken: Vec<(String, u32, u32)>,
    ids: Vec<String>,
    served: usize,
    /// IDE disks a bus.
    per_ide_bus: u32,
    /// Where a drive is that does not say it.
    default_interface: String,
    snapshot: bool,
    /// Objects that disks may refer to.
    objects: HashSet<String>,
    /// Virtqueues for virtio disks over vhost-user, where the guest's memory can be shared.
    queues: Option<u16>,
}

/// More processors than these are served over NBD.
const MOST_QUEUES: u16 = 64;

/// Whether the whole memory of a machine with PCI can be shared, and then a queue for each of its processors.
fn queues(line: &Line) -> Option<u16> {
    let on = |value: Option<&Value>| match value {
        Some(Value::Bool(on)) => *on,
        Some(Value::String(word)) => matches!(word.as_str(), "on" | "yes" | "true"),
        _ => false,
    };
    let said =
        |text: &str, implied: &str, key: &str| tree(text, implied)?.get(key).and_then(Value::as_str).map(str::to_owned);
    let machines = || line.values(&["M", "machine"]);
    let backend = machines().find_map(|machine| said(machine, "type", "memory-backend"))?;
    let without_pci = |name: String| name.contains("microvm") || name == "none" || name == "isapc";
    if machines().any(|machine| said(machine, "type", "type").is_some_and(without_pci)) {
        return None;
    }
    let shared = line.values(&["object"]).filter_map(|object| tree(object, "qom-type")).any(|object| {
        let is_it = object.get("id").and_then(Value::as_str) == Some(&backend);
        is_it && on(object.get("share"))
    });
    let processors = match line.values(&["smp"]).last() {
        None => Some(1),
        Some(text) => said(text, "cpus", "cpus").and_then(|count| count.parse().ok()),
    };
    processors.filter(|count| shared && (1..=MOST_QUEUES).contains(count))
}

impl Places {
    /// For a machine as `line` describes it, under an emulator of this name.
    pub(super) fn of(line: &Line, emulator: &str, objects: &HashSet<String>) -> Self {
        let pc = ["x86_64", "i386", "kvm"].iter().any(|kind| emulator.contains(kind));
        let q35 = line.values(&["M", "machine"]).any(|machine| machine.contains("q35"));
        Self {
            per_ide_bus: if q35 { 1 } else { 2 },
            default_interface: if pc { "ide" } else { "virtio" }.to_owned(),
            snapshot: line.has("snapshot"),
            objects: objects.clone(),
            queues: queues(line).filter(|_| pc),
            ..Self::default()
        }
    }

    /// Drives on a bus of this interface; 0: there are no buses.
    fn per_bus(&self, interface: &str) -> u32 {
        match interface {
            "ide" => self.per_ide_bus,
            "scsi" => 7,
            _ => 0,
        }
    }

    /// The name that QEMU gives a drive whose user gave it none.
    fn name(&mut self, interface: &str, keys: &Map<String, Value>) -> String {
        let number = |key: &str| keys.get(key).and_then(Value::as_str).and_then(|text| text.parse::<u32>().ok());
        let most = self.per_bus(interface);
        let (mut bus, mut unit) = (number("bus").unwrap_or(0), number("unit"));
        if let Some(index) = number("index") {
            (bus, unit) = index.checked_div(most).map_or((0, Some(index)), |bus| (bus, Some(index % most)));
        }
        let free = |bus: u32, unit: u32| !self.taken.iter().any(|at| *at == (interface.to_owned(), bus, unit));
        let unit = unit.unwrap_or_else(|| {
            let mut next = 0;
            // As many steps as there are drives, at most.
            while !free(bus, next) {
                next += 1;
                if most > 0 && next == most {
                    (bus, next) = (bus + 1, 0);
                }
            }
            next
        });
        self.taken.push((interface.to_owned(), bus, unit));
        let media = match (interface, keys.get("media").and_then(Value::as_str)) {
            ("ide" | "scsi", Some("cdrom")) => "-cd",
            ("ide" | "scsi", _) => "-hd",
            _ => "",
        };
        if most > 0 { format!("{interface}{bus}{media}{unit}") } else { format!("{interface}{media}{unit}") }
    }

    /// What becomes of an option; `None` for one that is no drive.
    pub(super) fn fate(&mut self, option: &Opt) -> Option<Fate> {
        let value = option.value();
        let with = |fixed: &[(&str, &str)]| {
            let mut keys = Map::new();
            for (key, value) in fixed {
                keys.insert((*key).to_owned(), json!(value));
            }
            keys.insert("file".to_owned(), json!(value.unwrap_or_default()));
            keys
        };
        let keys = match option.name.as_str() {
            "drive" => match graph::keyval(value?, None) {
                Ok(keys) => keys,
                Err(error) => return Some(Fate::Emulators(Some(error.to_string()))),
            },
            "" | "hda" => with(&[("index", "0"), ("media", "disk")]),
            "hdb" => with(&[("index", "1"), ("media", "disk")]),
            "hdc" => with(&[("index", "2"), ("media", "disk")]),
            "hdd" => with(&[("index", "3"), ("media", "disk")]),
            "cdrom" => with(&[("index", "2"), ("media", "cdrom")]),
            _ => return None,
        };
        // An option without its word is QEMU's to refuse.
        if value.is_none() {
            return Some(Fate::Emulators(None));
        }
        Some(self.drive(keys))
    }

    fn drive(&mut self, mut keys: Map<String, Value>) -> Fate {
        let interface = keys.get("if").and_then(Value::as_str).unwrap_or(&self.default_interface).to_owned();
        let named = self.name(&interface, &keys);
        let mut take = |key: &str| match keys.shift_remove(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let on = |value: Option<String>| value.is_some_and(|value| value == "on" || value == "yes" || value == "true");
        let id = take("id");
        let (stream, copy_on_read) = (on(take("stream")), on(take("copy-on-read")));
        let snapshot = take("snapshot").map_or(self.snapshot, |value| on(Some(value)));
        let file = take("file");
        let format = take("format").or_else(|| take("driver"));
        let wanted = stream || copy_on_read;
        let mut kept = Map::new();
        let mut own = Map::new();
        for (key, value) in keys {
            let family = KEPT_FAMILIES.iter().any(|family| key.starts_with(family));
            if family || KEPT.contains(&key.as_str()) { &mut kept } else { &mut own }.insert(key, value);
        }
        let said = |key: &str| kept.get(key).and_then(Value::as_str);
        let removable =
            said("media") == Some("cdrom") || matches!(interface.as_str(), "floppy" | "pflash" | "mtd" | "sd");
        if (removable && !wanted) || (file.is_none() && own.is_empty() && format.as_deref().is_none_or(is_image)) {
            return Fate::Emulators(None);
        }
        let id = id.unwrap_or(named);
        if self.ids.contains(&id) {
            // QEMU says so in its own words.
            return Fate::Emulators(None);
        }
        let (file, format) = match whole_name(file, format, own) {
            Ok(name) => name,
            Err(why) => return not_ours(&id, &why),
        };
        match graph::serves_name(&file) {
            Ok(refers) => {
                if let Some(object) = refers.objects.iter().find(|object| !self.objects.contains(*object)) {
                    return not_ours(&id, &not_understood(object));
                }
            }
            Err(error) => return not_ours(&id, &error.to_string()),
        }
        let cache = match cache_mode(&kept) {
            Ok(cache) => cache,
            Err(why) => return not_ours(&id, &why),
        };
        let read_only = ["readonly", "read-only"].iter().any(|key| matches!(said(key), Some("on" | "yes" | "true")));
        let client = said("node-name").map_or_else(|| format!("headwater-{}", self.served), str::to_owned);
        self.served += 1;
        self.ids.push(id.clone());
        let plain = interface == "virtio" && !removable && kept.keys().all(|key| PLAIN.contains(&key.as_str()));
        let queues = self.queues.filter(|_| plain);
        let drive = Drive { id, client, file, format, cache, read_only, copy_on_read, snapshot, stream, queues, kept };
        Fate::Ours(Box::new(drive))
    }
}

fn not_ours(id: &str, why: &str) -> Fate {
    Fate::Emulators(Some(format!("drive '{id}' is left to QEMU: {why}")))
}

fn is_image(format: &str) -> bool {
    Format::from_name(format).is_some()
}

/// The name that stands for all that a drive says of its bytes, and its format where the name does not say it.
fn whole_name(
    file: Option<String>,
    format: Option<String>,
    own: Map<String, Value>,
) -> Result<(String, Option<Format>), String> {
    let known = format.as_deref().map(Format::from_name);
    match (file, known) {
        (Some(file), None) if own.is_empty() => Ok((file, None)),
        (Some(file), Some(Some(format))) if own.is_empty() => Ok((file, Some(format))),
        (file, _) => {
            let mut tree = graph::nested(own).map_err(|error| error.to_string())?;
            if let Some(file) = file {
                let below = tree.entry("file").or_insert_with(|| json!({}));
                if let Value::Object(below) = below {
                    below.insert("filename".to_owned(), json!(file));
                }
            }
            if let Some(format) = format {
                tree.insert("driver".to_owned(), json!(format));
            }
            Ok((format!("json:{}", Value::Object(tree)), None))
        }
    }
}

/// How our side meets the host's caches, from what the drive says in either form.
fn cache_mode(kept: &Map<String, Value>) -> Result<CacheMode, String> {
    let said = |key: &str| kept.get(key).and_then(Value::as_str);
    let named = match said("cache") {
        None => CacheMode::Writeback,
        Some("off") => CacheMode::None,
        Some(name) => CacheMode::from_name(name).ok_or_else(|| format!("invalid cache option '{name}'"))?,
    };
    let flag = |key: &str, default: bool| said(key).map_or(default, |value| matches!(value, "on" | "yes" | "true"));
    let direct = flag("cache.direct", named.direct());
    let write_back = flag("cache.writeback", !named.write_through());
    Ok(match (flag("cache.no-flush", named == CacheMode::Unsafe), direct, write_back) {
        (true, _, _) => CacheMode::Unsafe,
        (_, true, true) => CacheMode::None,
        (_, true, false) => CacheMode::Directsync,
        (_, false, true) => CacheMode::Writeback,
        (_, false, false) => CacheMode::Writethrough,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn line(words: &[&str]) -> Line {
        Line::read(words.iter().map(OsString::from)).unwrap()
    }

    fn fates(words: &[&str]) -> Vec<Fate> {
        let line = line(words);
        let mut places = Places::of(&line, "qemu-system-x86_64", &HashSet::new());
        line.options.iter().filter_map(|option| places.fate(option)).collect()
    }

    fn only(words: &[&str]) -> Drive {
        match fates(words).pop() {
            Some(Fate::Ours(drive)) => *drive,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_line_of_2011() {
        let drive = only(&["-m", "512", "-enable-kvm", "-drive", "if=virtio,file=my_fedora.qed,cache=none,stream=on"]);
        assert_eq!((drive.id.as_str(), drive.file.as_str(), drive.format), ("virtio0", "my_fedora.qed", None));
        assert!(drive.stream && !drive.copy_on_read && drive.cache == CacheMode::None);
        assert_eq!(
            drive.option(Path::new("/d/a,b")),
            "if=virtio,cache=none,id=virtio0,node-name=headwater-0,werror=stop,rerror=stop,snapshot=off,driver=nbd,\
             server.type=unix,server.path=/d/a,,b,export=virtio0,reconnect-delay=5"
        );
    }

    #[test]
    fn what_a_drive_says_reaches_the_one_it_is_for() {
        let drive = only(&[
            "-drive",
            "file=a.qcow2,format=qcow2,id=x,if=none,readonly=on,copy-on-read=on,snapshot=on,bps=7,rerror=report,discard=unmap",
        ]);
        assert!(drive.read_only && drive.copy_on_read && drive.snapshot && drive.format == Some(Format::Qcow2));
        let option = drive.option(Path::new("/s"));
        assert!(option.starts_with("if=none,readonly=on,bps=7,rerror=report,discard=unmap,id=x,"), "{option}");
        assert!(option.contains("werror=stop") && !option.contains("rerror=stop"), "{option}");
    }

    #[test]
    fn names_are_those_that_qemu_gives() {
        let names = |words: &[&str]| {
            let fates = fates(words);
            let name = |fate: Fate| match fate {
                Fate::Ours(drive) => drive.id,
                Fate::Emulators(why) => format!("{why:?}"),
            };
            fates.into_iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(&["-hda", "a", "-drive", "file=b", "-hdd", "c"]), ["ide0-hd0", "ide0-hd1", "ide1-hd1"]);
        assert_eq!(names(&["-M", "q35", "-hda", "a", "-hdb", "b"]), ["ide0-hd0", "ide1-hd0"]);
        assert_eq!(names(&["-drive", "if=virtio,file=a", "-drive", "if=virtio,file=b"]), ["virtio0", "virtio1"]);
        assert_eq!(names(&["-drive", "if=scsi,file=a,unit=3", "disk.img"]), ["scsi0-hd3", "ide0-hd0"]);
    }

    #[test]
    fn trees_in_dotted_keys_become_names() {
        let drive =
            only(&["-drive", "driver=qcow2,file.driver=file,file.filename=x,backing.file.filename=y,if=virtio"]);
        assert_eq!(
            drive.file,
            r#"json:{"file":{"driver":"file","filename":"x"},"backing":{"file":{"filename":"y"}},"driver":"qcow2"}"#
        );
        let drive = only(&["-drive", "file=a.qcow2,format=qcow2,l2-cache-size=1M"]);
        assert_eq!(drive.file, r#"json:{"l2-cache-size":"1M","file":{"filename":"a.qcow2"},"driver":"qcow2"}"#);
        assert_eq!(drive.format, None);
    }

    #[test]
    fn what_is_not_ours_stays_qemus() {
        for words in [
            &["-drive", "if=pflash,format=raw,file=code.fd"][..],
            &["-cdrom", "x.iso"],
            &["-drive", "if=none,id=cd"],
            &["-drive"],
        ] {
            assert!(fates(words).iter().all(|fate| *fate == Fate::Emulators(None)), "{words:?}");
        }
        for words in [
            &["-drive", "file=iscsi://h/t/0,if=virtio"][..],
            &["-drive", "file=x,format=nonsense"],
            &["-drive", "file=x,format=qcow2,no-such=1"],
            &["-drive", "file=x,cache=sometimes"],
            &["-hda", "fat:rw:dir"],
        ] {
            assert!(matches!(&fates(words)[..], [Fate::Emulators(Some(_))]), "{words:?}");
        }
        assert!(matches!(&fates(&["-drive", "media=cdrom,file=x.iso,stream=on"])[..], [Fate::Ours(_)]));
    }

    #[test]
    fn memory_that_is_shared_is_used() {
        let queues = |object: &str, machine: &str, more: &str, drive: &str| {
            only(&["-object", object, "-machine", machine, "-smp", more, "-drive", drive]).queues
        };
        let (memory, machine) = ("memory-backend-memfd,id=m,size=1G,share=on", "q35,memory-backend=m");
        let drive = "if=virtio,file=a,cache=none,stream=on";
        assert_eq!(queues(memory, machine, "4", drive), Some(4));
        assert_eq!(
            queues(r#"{"qom-type":"memory-backend-file","id":"m","share":true}"#, machine, "cpus=2", drive),
            Some(2)
        );
        assert_eq!(queues("memory-backend-memfd,id=m,size=1G,share=off", machine, "4", drive), None);
        assert_eq!(queues(memory, "q35", "4", drive), None);
        assert_eq!(queues(memory, machine, "sockets=2,cores=2", drive), None);
        for other in ["if=none,id=x,file=a", "if=virtio,file=a,bps=7", "if=virtio,file=a,werror=report", "file=a"] {
            assert_eq!(queues(memory, machine, "4", other), None, "{other}");
        }
        let words = only(&["-drive", "if=virtio,file=a,addr=0x7"]).device(Path::new("/s"), 2);
        assert_eq!(words[1], "socket,id=headwater-0,path=/s");
        assert_eq!(words[3], "vhost-user-blk-pci,id=headwater-0,chardev=headwater-0,num-queues=2,addr=0x7");
    }

    #[test]
    fn caches_in_either_form() {
        let mode = |options: &str| only(&["-drive", &format!("file=a,{options}")]).cache;
        assert_eq!(mode("cache=off"), CacheMode::None);
        assert_eq!(mode("cache.direct=on"), CacheMode::None);
        assert_eq!(mode("cache=none,cache.writeback=off"), CacheMode::Directsync);
        assert_eq!(mode("cache.no-flush=on"), CacheMode::Unsafe);
        assert_eq!(mode("cache=writethrough"), CacheMode::Writethrough);
    }

    #[test]
    fn all_are_snapshots_where_the_line_says_so() {
        assert!(only(&["-snapshot", "-hda", "a"]).snapshot);
        assert!(!only(&["-snapshot", "-drive", "file=a,snapshot=off"]).snapshot);
    }
}
