//! The image tool beside qemu-img: whole commands, from start to end, on the same files.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use headwater_tests::qemu::qemu_img;
use headwater_tests::random::Random;
use headwater_tests::{Result, error, peer};

use crate::files::Files;
use crate::side::Side;
use crate::workload::Sample;

/// What a tool does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tool {
    /// Raw into QCOW2.
    Convert,
    /// And back.
    Back,
    /// Raw into packed QCOW2.
    Pack(&'static str),
    /// And back.
    Unpack(&'static str),
    /// A fully allocated QCOW2 image of 256 GiB (sparse-made).
    Check,
    /// The same.
    Map,
    /// A new image of 64 GiB, every cluster in its place.
    Create,
}

const MIB: u64 = 1 << 20;

impl Tool {
    /// One round of one side. Its files are warm, and so is the memory; what it makes is new.
    pub(crate) fn measure(self, side: Side, files: &Files) -> Result<Sample> {
        let (source, made) = (mixed(files)?, files.path("made"));
        let (line, bytes): (Vec<&str>, Option<u64>) = match self {
            Tool::Convert => (vec!["convert", "-f", "raw", "-O", "qcow2"], Some(files.size())),
            Tool::Back | Tool::Unpack(_) => (vec!["convert", "-f", "qcow2", "-O", "raw"], Some(files.size())),
            Tool::Pack(how) => (vec!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", how], Some(files.size())),
            Tool::Check => (vec!["check", "-q", "-f", "qcow2"], None),
            Tool::Map => (vec!["map", "-f", "qcow2"], None),
            Tool::Create => (vec!["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"], None),
        };
        let mut operands: Vec<PathBuf> = match self {
            Tool::Convert | Tool::Pack(_) => vec![source, made.clone()],
            Tool::Back => vec![kept(files, "mixed.qcow2", &["-O", "qcow2"])?, made.clone()],
            Tool::Unpack(how) => {
                vec![kept(files, &format!("{how}.qcow2"), &["-c", "-O", "qcow2", "-o", how])?, made.clone()]
            }
            Tool::Check | Tool::Map => vec![big(files)?],
            Tool::Create => vec![made.clone()],
        };
        if matches!(self, Tool::Create) {
            operands.push("64G".into());
        }
        let mut command = match side {
            Side::Headwater => {
                let mut command = Command::new(peer::headwater()?);
                command.arg("img");
                command
            }
            Side::Qsd => Command::new(peer::find("qemu-img")?),
        };
        command.args(line).args(&operands).stdout(Stdio::null());
        let mut once = || -> Result<(f64, f64)> {
            let _ = fs::remove_file(&made);
            headwater_tests::process::run("sync", [] as [&str; 0])?.ok()?;
            let (before, begin) = (children()?, Instant::now());
            let status = command.status()?;
            let seconds = begin.elapsed().as_secs_f64();
            if !status.success() {
                return Err(error!("{command:?}: {status}"));
            }
            Ok((seconds, children()? - before))
        };
        // What a virtual machine's memory has not been used for yet costs its host many times the copy. A run that is not counted
        // leaves memory behind that is.
        once()?;
        let (seconds, cpu) = once()?;
        let units = bytes.map_or(1.0, |bytes| (bytes / MIB) as f64);
        Ok(Sample { rate: units / seconds, cpu: cpu * 1e6 / units, latency: None })
    }
}

/// Seconds of processor time of the children that have ended, from the kernel's account (see proc(5): hundredths).
fn children() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // The name may hold anything, also spaces; fields are counted from behind it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    Ok((ticks(13) + ticks(14)) / 100.0)
}

/// A raw file like a disk: a quarter of it noise, a quarter a hole, half of it packs well.
fn mixed(files: &Files) -> Result<PathBuf> {
    let path = files.path("mixed.raw");
    if fs::metadata(&path).is_ok_and(|meta| meta.len() == files.size()) {
        return Ok(path);
    }
    let mut random = Random::new(7);
    let mut words = vec![0; 32 << 10];
    random.fill(&mut words);
    let mut file = File::create(&path)?;
    let mut bytes = vec![0; MIB as usize];
    for n in 0..files.size() / MIB {
        match n % 4 {
            0 => random.fill(&mut bytes),
            1 => {
                std::io::Seek::seek_relative(&mut file, i64::try_from(MIB)?)?;
                continue;
            }
            _ => {
                for word in bytes.chunks_mut(8) {
                    let at = random.below(words.len() as u64 / 8) as usize * 8;
                    word.copy_from_slice(&words[at..at + 8]);
                }
            }
        }
        file.write_all(&bytes)?;
    }
    file.set_len(files.size())?;
    file.sync_all()?;
    Ok(path)
}

fn kept(files: &Files, name: &str, how: &[&str]) -> Result<PathBuf> {
    let (path, source) = (files.path(name), mixed(files)?);
    if !path.exists() {
        let line = ["convert", "-f", "raw"].into_iter().chain(how.iter().copied()).map(Path::new);
        qemu_img(line.chain([source.as_path(), &path]))?.ok()?;
    }
    Ok(path)
}

fn big(files: &Files) -> Result<PathBuf> {
    let path = files.path("big.qcow2");
    if !path.exists() {
        let line = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"].map(Path::new);
        qemu_img(line.into_iter().chain([path.as_path(), Path::new("256G")]))?.ok()?;
    }
    Ok(path)
}
