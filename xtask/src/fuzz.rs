//! `cargo xtask fuzz`: builds the targets with coverage counters and lets libFuzzer loose on them, one after the other.
//!
//! The stable compiler can do it: the counters are an LLVM pass, and libFuzzer itself comes as source with its crate (which
//! takes a C++ compiler). New inputs go to the target directory; `--keep` merges those that reach something new into the
//! corpus of the repository. What a target does not stand is left in `fuzz/artifacts`.

use std::fs;

use clap::Args;

use crate::workspace::{Doing, Failure, Outcome, Workspace};

/// Every target has a corpus; its folders are the list.
const CORPUS: &str = "fuzz/corpus";

/// What cargo-fuzz passes, but for a sanitizer: that takes a nightly compiler, and `unsafe` is rare here.
const COUNTERS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

/// Longest input, in bytes: images and rings need more than messages, and short inputs are quick.
const LONGEST: u32 = 16 << 10;

#[derive(Args)]
pub(crate) struct Options {
    /// Minutes for each target
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    minutes: f64,
    /// Only this target; may be given more than once
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// Merge what reaches something new into the corpus of the repository
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Outcome {
    let home = workspace.target.join("fuzz");
    let triple = host()?;
    workspace
        .cargo()
        .args([
            "build",
            "--release",
            "--manifest-path",
            "fuzz/libfuzzer/Cargo.toml",
            "--target",
            &triple,
            "--target-dir",
        ])
        .arg(&home)
        .env("RUSTFLAGS", COUNTERS)
        .run()?;
    let program = home.join(triple).join("release").join("headwater-libfuzzer");
    let mut targets = Vec::new();
    for entry in fs::read_dir(workspace.root.join(CORPUS)).doing("listing the corpus")? {
        targets.push(entry.doing("listing the corpus")?.file_name().to_string_lossy().into_owned());
    }
    targets.sort();
    if let Some(unknown) = options.target.iter().find(|name| !targets.contains(name)) {
        return Err(Failure::new(format!("there is no target '{unknown}', only {}", targets.join(", "))));
    }
    for target in targets.iter().filter(|name| options.target.is_empty() || options.target.contains(name)) {
        let (found, seeds) = (home.join("corpus").join(target), workspace.root.join(CORPUS).join(target));
        let artifacts = workspace.root.join("fuzz/artifacts").join(target);
        fs::create_dir_all(&found).doing("making room for new inputs")?;
        fs::create_dir_all(&artifacts).doing("making room for findings")?;
        let fuzzer = || workspace.program(&program).env("HEADWATER_FUZZ_TARGET", target);
        fuzzer()
            .arg(&found)
            .arg(&seeds)
            .arg(format!("-max_total_time={}", (options.minutes * 60.0) as u64))
            .arg(format!("-max_len={LONGEST}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args(["-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"])
            .run()?;
        if options.keep {
            fuzzer().arg("-merge=1").arg(&seeds).arg(&found).run()?;
        }
    }
    Ok(())
}

/// This machine's target triple: naming it keeps the counters out of build scripts.
fn host() -> Outcome<String> {
    let said = std::process::Command::new("rustc").arg("-vV").output().doing("asking rustc for its host")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: ")).map(str::to_owned);
    host.ok_or_else(|| Failure::new("rustc does not say what its host is"))
}
