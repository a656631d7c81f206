//! `img create` (and plain `headwater create`): the flags of `qemu-img create`.
//!
//! A backing file whose format nobody stated is looked at once, here; what was found is said and recorded, so that it is never
//! guessed again.

use super::option_help;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, format_named, on_ring};
use crate::size;
use crate::tool;
use disk::chain::Opener;
use graph::{Objects, Sources};
use image::create::{CreateOptions, Preallocation, create, validate};
use image::{BackingRef, Format, Passphrase, qcow2};
use layout::GuestOffset;
use serde_json::json;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use store::file::{FileStore, OpenOptions};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Format of the new image: qcow2, qed or raw
    #[arg(short, long, default_value = "raw", value_name = "FMT")]
    format: String,
    /// Backing file, relative to the new image's folder
    #[arg(short, long, value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Options as key=value, separated by commas: size, backing_file, backing_fmt, cluster_size; qed: table_size; qcow2: compat,
    /// refcount_bits, lazy_refcounts, extended_l2, compression_type, data_file, data_file_raw, encrypt.*
    #[arg(short, long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Something that options refer to: secret,id=…
    #[arg(long = "object", value_name = "OBJECT")]
    objects: Vec<String>,
    /// Do not open the backing file (then its format and the size must be given)
    #[arg(short = 'u', long = "backing-unsafe", alias = "unsafe")]
    unchecked: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The new image
    #[arg(default_value = "", hide_default_value = true)]
    file: String,
    /// Its size in bytes, or with a suffix k, M, G, T, P or E; by default the backing file's
    size: Option<String>,
}

/// What the command line asked for, each thing stated at most once.
#[derive(Default)]
pub(crate) struct Wanted {
    pub(crate) size: Option<u64>,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) cluster_size: Option<u64>,
    pub(crate) table_size: Option<u32>,
    pub(crate) qcow2: qcow2::Options,
    /// QCOW2: name of its data file, and whether that is to be raw.
    pub(crate) data_file: Option<String>,
    pub(crate) data_file_raw: bool,
    pub(crate) preallocation: Preallocation,
    /// Which secret unlocks it.
    pub(crate) key_secret: Option<String>,
    /// How long a passphrase shall take to try.
    pub(crate) iteration_time: Option<Duration>,
    /// The version, as it was written.
    compat: Option<String>,
}

/// What to do where the backing file's format was not stated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guess {
    /// Look, say what was found, and record it: plain `create`, as the first streaming patches used it.
    Once,
    /// Refuse, as qemu-img does.
    Never,
}

pub(crate) fn run(args: Args, guess: Guess) -> Outcome {
    let format = format_named(&args.format).map_err(|e| format!("{}: {e}", args.file))?;
    if option_help::is_asked(&args.options) {
        print!("{}", option_help::text(format));
        return Ok(Exit::Ok);
    }
    if args.file.is_empty() {
        return Err("Expecting image file name".into());
    }
    let wanted = gather(&args, format).map_err(|e| format!("{}: {e}", args.file))?;
    on_ring(make(&args, format, wanted, guess))?;
    Ok(Exit::Ok)
}

fn gather(args: &Args, format: Format) -> Result<Wanted, String> {
    let wanted = Wanted::gather(&args.options, format)?;
    let size = args.size.as_deref().map(size::parse).transpose()?;
    let wanted = Wanted {
        size: wanted.size.or(size),
        backing: wanted.backing.or_else(|| args.backing.clone()),
        backing_format: wanted.backing_format.or_else(|| args.backing_format.clone()),
        ..wanted
    };
    if wanted.backing.is_none() && wanted.backing_format.is_some() {
        return Err("Backing format cannot be used without backing file".into());
    }
    wanted.check()?;
    if format == Format::Raw && wanted.backing.is_some() {
        return Err("Backing file not supported for file format 'raw'".into());
    }
    Ok(wanted)
}

impl Wanted {
    /// Whether the options go together.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.backing.is_some() && self.preallocation != Preallocation::Off {
            return Err("Backing file and preallocation cannot be used at the same time".into());
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err("data-file-raw requires data-file".into());
        }
        Ok(())
    }

    /// What `-o` says, of an image of this format.
    pub(crate) fn gather(lists: &[String], format: Format) -> Result<Self, String> {
        let mut wanted = Self::default();
        if let Some(list) = lists.iter().find(|list| !is_list(list)) {
            return Err(format!("Invalid option list: {list}"));
        }
        for pair in lists.iter().flat_map(|list| split_options(list)) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| format!("Invalid parameter '{pair}': key=value is expected"))?;
            match (key, format) {
                ("size", _) => wanted.size = Some(size::parse(value)?),
                ("backing_file", Format::Qed | Format::Qcow2) => wanted.backing = Some(value.to_owned()),
                ("backing_fmt", Format::Qed | Format::Qcow2) => wanted.backing_format = Some(value.to_owned()),
                ("cluster_size", Format::Qed | Format::Qcow2) => wanted.cluster_size = Some(size::parse(value)?),
                ("table_size", Format::Qed) => {
                    let clusters = size::parse(value)?;
                    wanted.table_size =
                        Some(u32::try_from(clusters).map_err(|_| format!("Invalid table_size '{value}'"))?);
                }
                ("encrypt.format", Format::Qcow2) if value == "luks" => wanted.qcow2.encrypted = true,
                ("encrypt.format", Format::Qcow2) => {
                    return Err(format!("encrypt.format '{value}' is not there: luks is"));
                }
                ("encrypt.key-secret", Format::Qcow2) | ("key-secret", Format::Luks) => {
                    wanted.key_secret = Some(value.to_owned());
                }
                ("encrypt.iter-time", Format::Qcow2) | ("iter-time", Format::Luks) => {
                    let ms = value.parse().map_err(|_| format!("Parameter '{key}' expects a number"))?;
                    wanted.iteration_time = Some(Duration::from_millis(ms));
                }
                (_, Format::Qcow2 | Format::Luks) if is_the_only_cipher(key, value)? => {}
                ("preallocation", Format::Qcow2 | Format::Raw) => wanted.preallocation = preallocation(value)?,
                ("compat", Format::Qcow2) => {
                    wanted.compat = Some(value.to_owned());
                    qcow2_option(&mut wanted.qcow2, key, value)?;
                }
                ("data_file", Format::Qcow2) => wanted.data_file = Some(value.to_owned()),
                ("data_file_raw", Format::Qcow2) => wanted.data_file_raw = switch(key, value)?,
                (_, Format::Qcow2) => qcow2_option(&mut wanted.qcow2, key, value)?,
                _ => return Err(format!("Invalid parameter '{key}'")),
            }
        }
        Ok(wanted)
    }
}

/// Whether it is an option of ciphers; only one is made.
fn is_the_only_cipher(key: &str, value: &str) -> Result<bool, String> {
    let made = match key.strip_prefix("encrypt.").unwrap_or(key) {
        "cipher-alg" => "aes-256",
        "cipher-mode" => "xts",
        "ivgen-alg" => "plain64",
        "hash-alg" => "sha256",
        _ => return Ok(false),
    };
    if value == made { Ok(true) } else { Err(format!("Parameter '{key}' has only one value here: {made}")) }
}

/// A mode of preallocation, as users write it.
pub(crate) fn preallocation(value: &str) -> Result<Preallocation, String> {
    Preallocation::from_name(value).ok_or_else(|| format!("Parameter 'preallocation' does not accept value '{value}'"))
}

/// On or off, as users write it.
pub(crate) fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
    }
}

/// An option that only QCOW2 has.
fn qcow2_option(options: &mut qcow2::Options, key: &str, value: &str) -> Result<(), String> {
    let invalid = || format!("Invalid value '{value}' for parameter '{key}'");
    let on = || switch(key, value);
    match key {
        "compat" => {
            options.version = match value {
                "0.10" | "v2" => 2,
                "1.1" | "v3" => 3,
                _ => return Err(invalid()),
            }
        }
        "refcount_bits" => options.refcount_bits = value.parse().map_err(|_| invalid())?,
        "lazy_refcounts" => options.lazy_refcounts = on()?,
        "extended_l2" => options.extended_l2 = on()?,
        "compression_type" => {
            options.compression = match value {
                "zlib" => qcow2::Compression::Deflate,
                "zstd" => qcow2::Compression::Zstd,
                _ => return Err(invalid()),
            }
        }
        _ => return Err(format!("Invalid parameter '{key}'")),
    }
    Ok(())
}

/// Whether nothing is missing between commas at its ends.
fn is_list(list: &str) -> bool {
    let commas = list.len() - list.trim_end_matches(',').len();
    !list.is_empty() && (!list.starts_with(',') || list.starts_with(",,")) && commas.is_multiple_of(2)
}

/// Splits at commas; a doubled comma stands for one (as QEMU has it in file names).
pub(crate) fn split_options(list: &str) -> Vec<String> {
    let mut pairs = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                pairs[..].last_mut().expect("never empty").push(',');
            }
            ',' => pairs.push(String::new()),
            c => pairs[..].last_mut().expect("never empty").push(c),
        }
    }
    pairs.retain(|pair| !pair.is_empty());
    pairs
}

async fn make(args: &Args, format: Format, wanted: Wanted, guess: Guess) -> Result<(), String> {
    let file = &args.file;
    let objects = Rc::new(Objects::new(&args.objects).map_err(|error| error.to_string())?);
    let opener = images::sources(&Look { objects: Rc::clone(&objects), ..Look::default() });
    let stated = wanted.backing_format.as_deref().map(format_named).transpose().map_err(|e| format!("{file}: {e}"))?;
    let mut size = wanted.size;
    let mut backing = None;
    if let Some(name) = wanted.backing {
        if opener.identify(&name, Some(file)) == opener.identify(file, None) {
            return Err(format!("{file}: Error: Trying to create an image with the same filename as the backing file"));
        }
        let recorded = if args.unchecked {
            stated.ok_or_else(|| format!("{file}: -u leaves the backing file unopened, so state its format with -F"))?
        } else {
            let (found, below) = look_at_backing(&opener, &objects, &name, file, stated).await?;
            size = size.or(Some(below));
            if stated.is_none() && guess == Guess::Never {
                return Err(format!(
                    "{file}: Backing file specified without backing format\nDetected format of {found}."
                ));
            }
            if stated.is_none() && !args.quiet {
                // QED can record of its backing file that it is raw, and nothing else.
                let recorded = match found {
                    _ if format == Format::Qcow2 => format!("which is now recorded in '{file}'"),
                    Format::Raw => format!("which is now recorded in '{file}' and never probed again"),
                    _ => "which its first bytes will tell again whenever it is opened".to_owned(),
                };
                tool::complain(&format!(
                    "'{name}' has no stated format; it was found to be {found}, {recorded} (state it with -F {found})"
                ));
            }
            found
        };
        backing = Some(BackingRef { name, format: Some(recorded) });
    }
    let size = size.ok_or_else(|| format!("{file}: Image creation needs a size parameter"))?;
    let options = CreateOptions {
        format,
        size,
        backing,
        cluster_size: wanted.cluster_size,
        table_size: wanted.table_size,
        qcow2: wanted.qcow2,
        passphrase: passphrase(wanted.key_secret.as_deref(), &objects).map_err(|e| format!("{file}: {e}"))?,
        iteration_time: wanted.iteration_time,
    };
    let data_file = wanted.data_file.map(|name| qcow2::DataFile { name, raw: wanted.data_file_raw });
    let unlocking = wanted.key_secret.as_deref().map(|id| (id, &objects));
    if !args.quiet {
        let line = formatting_line(file, &options, data_file.as_ref(), wanted.preallocation, wanted.compat.as_deref());
        println!("{line}");
    }
    for warning in validate(&options).map_err(|e| format!("{file}: {e}"))? {
        if !args.quiet {
            tool::complain(&format!("warning: {warning}"));
        }
    }
    write_all(file, &options, data_file.as_ref(), wanted.preallocation, unlocking).await
}

/// Makes the image, with its data file if it has one, and gives its clusters their places as asked.
pub(crate) async fn write_all(
    file: &str,
    options: &CreateOptions,
    data_file: Option<&qcow2::DataFile>,
    preallocation: Preallocation,
    unlocking: Option<(&str, &Rc<Objects>)>,
) -> Result<(), String> {
    match data_file {
        Some(data) => super::data_file::create(file, options, data).await?,
        None => write(file, options).await?,
    }
    // A raw data file says what every cluster is: so each one has its place from the start.
    let preallocation = match preallocation {
        Preallocation::Off if data_file.is_some_and(|file| file.raw) => Preallocation::Metadata,
        how => how,
    };
    preallocate(file, options.format, preallocation, unlocking).await
}

/// What a secret holds.
pub(crate) fn passphrase(secret: Option<&str>, objects: &Objects) -> Result<Option<Passphrase>, String> {
    let secret = secret.map(|id| objects.secret(id)).transpose().map_err(|error| error.to_string())?;
    Ok(secret.map(|bytes| Passphrase::new(&bytes)))
}

/// How an image that was just made is opened: with the secret that unlocks it.
pub(crate) fn named(file: &str, format: Format, unlocking: Option<(&str, &Rc<Objects>)>) -> (String, Look) {
    let Some((secret, objects)) = unlocking else {
        return (file.to_owned(), Look { format: Some(format), ..Look::default() });
    };
    let key = if format == Format::Luks { "key-secret" } else { "encrypt.key-secret" };
    let tree = json!({ "driver": format.name(), "file": { "driver": "file", "filename": file }, key: secret });
    (format!("json:{tree}"), Look { objects: Rc::clone(objects), ..Look::default() })
}

/// Gives a new image's clusters their places.
pub(crate) async fn preallocate(
    file: &str,
    format: Format,
    how: Preallocation,
    unlocking: Option<(&str, &Rc<Objects>)>,
) -> Result<(), String> {
    if how == Preallocation::Off {
        return Ok(());
    }
    let (name, look) = named(file, format, unlocking);
    let look = Look { writable: true, no_backing: true, ..look };
    let chain = images::open(&name, &look).await?;
    let done = chain[0].image.preallocate(GuestOffset::ZERO, how).await.map_err(|error| format!("{file}: {error}"));
    images::close(&chain).await.and(done)
}

/// The backing file's format (stated or found) and the size a guest sees in it. Its own chain is opened too: an overlay over
/// something that cannot be read would only fail later.
async fn look_at_backing(
    opener: &Sources,
    objects: &Rc<Objects>,
    name: &str,
    file: &str,
    stated: Option<Format>,
) -> Result<(Format, u64), String> {
    let failed = |e: String| format!("{file}: {e}\nCould not open backing image.");
    let resolved = opener.identify(name, Some(file));
    let look = Look { format: stated, objects: Rc::clone(objects), ..Look::default() };
    let chain = images::open(&resolved, &look).await.map_err(failed)?;
    let top = chain.first().map(|layer| (layer.image.format(), layer.image.size()));
    images::close(&chain).await.map_err(failed)?;
    top.ok_or_else(|| failed(format!("'{name}' holds no image")))
}

pub(crate) async fn write(file: &str, options: &CreateOptions) -> Result<(), String> {
    let path = Path::new(file);
    let existed = path.exists();
    let store = FileStore::create(path, OpenOptions::default()).await.map_err(|e| format!("{file}: {e}"))?;
    let store: std::rc::Rc<dyn store::Store> = store;
    let made = create(store.clone(), options).await;
    let closed = store.close().await;
    if made.is_err() && !existed {
        // Half an image helps nobody; the failure itself is what gets reported.
        let _ = std::fs::remove_file(path);
    }
    made.map_err(|e| format!("{file}: {e}"))?;
    closed.map_err(|e| format!("{file}: {e}"))
}

fn formatting_line(
    file: &str,
    options: &CreateOptions,
    data_file: Option<&qcow2::DataFile>,
    preallocation: Preallocation,
    compat: Option<&str>,
) -> String {
    use std::fmt::Write;
    let mut line = format!("Formatting '{file}', fmt={} size={}", options.format, options.size);
    if let Some(backing) = &options.backing {
        let _ = write!(line, " backing_file={}", backing.name);
        if let Some(format) = backing.format {
            let _ = write!(line, " backing_fmt={format}");
        }
    }
    if options.format == Format::Qcow2 {
        return qcow2_line(file, options, data_file, preallocation, compat);
    }
    if options.format == Format::Qed {
        let _ = write!(line, " cluster_size={}", options.cluster_size.unwrap_or(65536));
        if let Some(clusters) = options.table_size {
            let _ = write!(line, " table_size={clusters}");
        }
    }
    line.push_str(&preallocation_word(preallocation));
    line
}

/// How `Formatting` shows a mode of preallocation.
fn preallocation_word(how: Preallocation) -> String {
    if how == Preallocation::Off { String::new() } else { format!(" preallocation={}", how.name()) }
}

/// The same for QCOW2, whose options come first.
fn qcow2_line(
    file: &str,
    options: &CreateOptions,
    data_file: Option<&qcow2::DataFile>,
    preallocation: Preallocation,
    compat: Option<&str>,
) -> String {
    use std::fmt::Write;
    let on = |on: bool| if on { "on" } else { "off" };
    let own = options.qcow2;
    let compression = match own.compression {
        qcow2::Compression::Deflate => "zlib",
        qcow2::Compression::Zstd => "zstd",
    };
    let mut line = format!(
        "Formatting '{file}', fmt=qcow2 cluster_size={} extended_l2={}{} compression_type={compression} size={}",
        options.cluster_size.unwrap_or(65536),
        on(own.extended_l2),
        preallocation_word(preallocation),
        options.size
    );
    if let Some(compat) = compat {
        let _ = write!(line, " compat={compat}");
    }
    if let Some(backing) = &options.backing {
        let _ = write!(line, " backing_file={}", backing.name);
        if let Some(format) = backing.format {
            let _ = write!(line, " backing_fmt={format}");
        }
    }
    if let Some(data) = data_file {
        let _ = write!(line, " data_file={}", data.name);
        line.push_str(if data.raw { " data_file_raw=on" } else { "" });
    }
    let _ = write!(line, " lazy_refcounts={} refcount_bits={}", on(own.lazy_refcounts), own.refcount_bits);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_separate_and_doubled_commas_stand_for_one() {
        assert_eq!(split_options("a=1,b=x,,y,c=3"), ["a=1", "b=x,y", "c=3"]);
        assert!(split_options("").is_empty());
    }

    #[test]
    fn the_formatting_line_is_qemu_imgs() {
        let options = CreateOptions {
            format: Format::Qed,
            size: 20 << 20,
            backing: Some(BackingRef { name: "master.img".into(), format: Some(Format::Raw) }),
            cluster_size: Some(131_072),
            table_size: Some(8),
            ..CreateOptions::new(Format::Qed, 20 << 20)
        };
        assert_eq!(
            formatting_line("my2.qed", &options, None, Preallocation::Off, None),
            "Formatting 'my2.qed', fmt=qed size=20971520 backing_file=master.img backing_fmt=raw cluster_size=131072 table_size=8"
        );
    }
}
