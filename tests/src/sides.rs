//! The same command lines for our program, under another tool's name, and for that tool.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::qemu::check;
use crate::random::Random;
use crate::{Result, peer};

/// A folder for each side.
#[derive(Debug)]
pub struct Sides {
    _dir: TempDir,
    name: String,
    /// Ours.
    pub ours: PathBuf,
    /// The reference's.
    pub theirs: PathBuf,
    /// The link to our program.
    pub tool: PathBuf,
}

impl Sides {
    /// For the tool of this name.
    ///
    /// # Errors
    /// Where the release binary is missing, or a folder cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (ours, theirs, bin) = (dir.path().join("ours"), dir.path().join("theirs"), dir.path().join("bin"));
        for folder in [&ours, &theirs, &bin] {
            fs::create_dir(folder)?;
        }
        let tool = bin.join(name);
        std::os::unix::fs::symlink(fs::canonicalize(peer::headwater()?)?, &tool)?;
        Ok(Self { _dir: dir, name: name.to_owned(), ours, theirs, tool })
    }

    /// Runs a line of words on both sides.
    ///
    /// # Errors
    /// Where a program cannot be run.
    pub fn run(&self, line: &str) -> Result<(Output, Output)> {
        self.run_words(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs a line on both sides.
    ///
    /// # Errors
    /// Where a program cannot be run.
    pub fn run_words(&self, words: &[&str]) -> Result<(Output, Output)> {
        let ours = Command::new(&self.tool).args(words).current_dir(&self.ours).env("TZ", "UTC").output()?;
        let theirs = Command::new(&self.name).args(words).current_dir(&self.theirs).env("TZ", "UTC").output()?;
        Ok((ours, theirs))
    }

    /// Both end the same and say the same on standard output.
    ///
    /// # Errors
    /// Where a program cannot be run.
    ///
    /// # Panics
    /// Where they differ.
    pub fn same(&self, line: &str) -> Result<String> {
        let (ours, theirs) = self.run(line)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(
            ours.status.code(),
            theirs.status.code(),
            "{line}: {}\n{}",
            text(&ours.stderr),
            text(&theirs.stderr)
        );
        assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{line}");
        Ok(text(&ours.stdout))
    }

    /// Both fail with this exit code; ours says why, under the tool's name.
    ///
    /// # Errors
    /// Where a program cannot be run.
    ///
    /// # Panics
    /// Where they do not.
    pub fn fails(&self, line: &str, code: i32) -> Result<String> {
        let (ours, theirs) = self.run(line)?;
        assert_eq!((ours.status.code(), theirs.status.code()), (Some(code), Some(code)), "{line}: {ours:?} {theirs:?}");
        let said = String::from_utf8_lossy(&ours.stderr).into_owned();
        assert!(said.starts_with(&format!("{}: ", self.name)), "{line}: {said}");
        Ok(said)
    }

    /// The same change on both sides.
    ///
    /// # Errors
    /// Of the change.
    pub fn both(&self, change: impl Fn(&Path) -> Result) -> Result {
        change(&self.ours)?;
        change(&self.theirs)
    }

    /// An image holds the same on both sides, read by QEMU, which finds nothing wrong with ours.
    ///
    /// # Errors
    /// Where a program cannot be run, or finds something wrong.
    ///
    /// # Panics
    /// Where they differ.
    pub fn hold_the_same(&self, name: &str, format: &str) -> Result {
        let args = ["compare", "-f", format, "-F", format];
        let (ours, theirs) = (self.ours.join(name), self.theirs.join(name));
        let compared = Command::new("qemu-img").args(args).args([&ours, &theirs]).output()?;
        assert!(compared.status.success(), "{name}: {compared:?}");
        if format != "raw" {
            check(&ours)?.ok()?;
        }
        Ok(())
    }
}

/// A raw file with data, zeros and holes.
///
/// # Errors
/// Where it cannot be written.
pub fn master(path: &Path, size: u64, seed: u64) -> Result {
    let mut random = Random::new(seed);
    let file = fs::File::create(path)?;
    file.set_len(size)?;
    for n in 0..14 {
        let mut bytes = vec![n; (random.below(300_000) + 1).min(size) as usize];
        if n % 3 == 0 {
            random.fill(&mut bytes);
        }
        let at = random.below(size - bytes.len() as u64 + 1) / 512 * 512;
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at)?;
    }
    Ok(())
}
