//! Trace points: what disks, jobs and exports do, told as it happens. They are chosen while it runs, by name or pattern (`--trace`,
//! `trace-event-set-state`, HMP's `trace-event`).
//!
//! A point is a `tracing` event whose target is its name, so that `HEADWATER_LOG` knows them, too. **Invariants.**
//! * While none is on, a point costs its caller one relaxed load: the level of what anybody listens to lies below it.
//! * Every point in the code stands in [`POINTS`], and every row of that in the code.

use crate::Failure;
use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Metadata, callsite};
use tracing_subscriber::layer::{Context, Filter};

/// A place in the code that tells what happens there.
#[derive(Debug)]
pub struct Point {
    /// What patterns match.
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    on: AtomicBool,
}

const fn point(name: &'static str, what: &'static str) -> Point {
    Point { name, what, on: AtomicBool::new(false) }
}

/// All there are.
pub static POINTS: [Point; 14] = [
    point("disk_request", "a guest's request (or a client's) begins"),
    point("disk_request_done", "it has ended well"),
    point("disk_request_failed", "it has failed, and how"),
    point("disk_request_held", "a source does not answer; the request waits for it"),
    point("disk_fetch", "clusters are fetched from below"),
    point("disk_fetch_done", "they were kept, or somebody else was there first"),
    point("disk_fetch_failed", "nothing was kept of a fetch"),
    point("image_commit", "tables are made durable"),
    point("image_commit_failed", "they could not be"),
    point("image_poisoned", "an image refuses writes from now on"),
    point("job_status", "a job has another status"),
    point("job_step", "a job begins with a part of its work"),
    point("job_error", "a job has met an error; what it does about it"),
    point("store_failed", "a file could not be read, written or made durable"),
];

/// Whether `pattern` (`*` stands for anything, `?` for one character) matches all of `name`.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|skipped| matches(rest, &name[skipped..])),
        (Some((b'?', pattern)), Some((_, name))) => matches(pattern, name),
        (Some((a, pattern)), Some((b, name))) if a == b => matches(pattern, name),
        _ => false,
    }
}

fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?'])
}

/// The points that `pattern` means; an unknown name is an error, a pattern that matches none is not.
///
/// # Errors
/// In QEMU's words.
pub fn find(pattern: &str) -> Result<Vec<&'static Point>, Failure> {
    // Runs of stars mean what one does, and cost what many do.
    let mut pattern = pattern.to_owned();
    while pattern.contains("**") {
        pattern = pattern.replace("**", "*");
    }
    let stars = pattern.bytes().filter(|byte| *byte == b'*').count();
    if pattern.len() > 256 || stars > 8 {
        return Err(Failure::generic("a pattern of trace events has 256 characters and 8 stars at most"));
    }
    let found: Vec<&Point> = POINTS.iter().filter(|point| matches(pattern.as_bytes(), point.name.as_bytes())).collect();
    if found.is_empty() && !is_pattern(&pattern) {
        return Err(Failure::generic(format!("unknown event \"{pattern}\"")));
    }
    Ok(found)
}

impl Point {
    /// Whether it tells.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
}

/// Turns points on or off.
pub fn set(points: &[&Point], on: bool) {
    for point in points {
        point.on.store(on, Ordering::Relaxed);
    }
    callsite::rebuild_interest_cache();
}

fn of(metadata: &Metadata<'_>) -> Option<&'static Point> {
    POINTS.iter().find(|point| point.name == metadata.target())
}

/// Lets the points through that are on, and nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub struct Points;

impl<S> Filter<S> for Points {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        of(metadata).is_some_and(Point::is_on)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if of(metadata).is_some_and(Point::is_on) { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if POINTS.iter().any(Point::is_on) { LevelFilter::TRACE } else { LevelFilter::OFF })
    }
}

/// Where the log goes, if not to standard error.
static FILE: OnceLock<Mutex<File>> = OnceLock::new();

/// The log's other end: a file, if one was named, or standard error.
#[derive(Debug)]
pub struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match FILE.get() {
            Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match FILE.get() {
            Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).flush(),
            None => io::stderr().flush(),
        }
    }
}

/// Turns on what a `--trace` option says: `[enable=]PATTERN[,events=FILE][,file=FILE]`. Returns the names that nothing has.
///
/// # Errors
/// Where the option makes no sense or a file cannot be used.
pub fn from_option(option: &str) -> Result<Vec<String>, String> {
    let mut patterns = Vec::new();
    for (number, part) in option.split(',').enumerate() {
        match part.split_once('=') {
            None if number == 0 => patterns.push(part.to_owned()),
            Some(("enable", pattern)) => patterns.push(pattern.to_owned()),
            Some(("events", path)) => {
                let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
                patterns.extend(lines.map(str::to_owned));
            }
            Some(("file", path)) => {
                let file = File::create(path).map_err(|error| format!("{path}: {error}"))?;
                if FILE.set(Mutex::new(file)).is_err() {
                    return Err("the log goes to one file".to_owned());
                }
            }
            _ => return Err(format!("Invalid parameter '{}'", part.split('=').next().unwrap_or(part))),
        }
    }
    let mut unknown = Vec::new();
    for pattern in patterns {
        let (name, on) = pattern.strip_prefix('-').map_or((pattern.as_str(), true), |name| (name, false));
        match find(name) {
            Ok(points) => set(&points, on),
            Err(_) => unknown.push(name.to_owned()),
        }
    }
    Ok(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn patterns_match_what_they_say() {
        for (pattern, names) in [
            ("disk_fetch", &["disk_fetch"][..]),
            ("disk_fetch*", &["disk_fetch", "disk_fetch_done", "disk_fetch_failed"]),
            ("*_poisoned", &["image_poisoned"]),
            ("job_ste?", &["job_step"]),
            ("qed_*", &[]),
        ] {
            let found: Vec<_> = find(pattern).unwrap().iter().map(|point| point.name).collect();
            assert_eq!(found, names, "{pattern}");
        }
        assert_eq!(find("nope").unwrap_err().desc, "unknown event \"nope\"");
        assert_eq!(find("*").unwrap().len(), POINTS.len());
        assert!(find(&"*a".repeat(9)).is_err());
        assert!(find(&"*".repeat(100)).is_ok());
    }

    /// The table and the code say the same.
    #[test]
    fn every_point_stands_in_the_code_once_at_least_and_no_other_does() {
        fn gather(folder: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    gather(&path, found);
                } else if path.extension().is_some_and(|ext| ext == "rs") && !path.ends_with("control/src/trace.rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let calls = text.split("tracing::trace!(").skip(1);
                    found.extend(calls.map(|call| {
                        let name = call.split('"').nth(1).unwrap_or_default();
                        assert!(
                            call.trim_start().starts_with("target:"),
                            "{}: a trace event without a name",
                            path.display()
                        );
                        name.to_owned()
                    }));
                }
            }
        }
        let mut found = Vec::new();
        gather(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut found);
        found.sort();
        found.dedup();
        let mut listed: Vec<_> = POINTS.iter().map(|point| point.name.to_owned()).collect();
        listed.sort();
        assert_eq!(found, listed);
    }
}
