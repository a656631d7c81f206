//! The commands of the monitor for people.

use crate::qmp::{self, Stream};
use crate::{Engine, Failure, trace};
use std::fmt::Write;

/// A command: its names, what it takes, what it is for.
struct Command {
    names: &'static [&'static str],
    takes: &'static str,
    purpose: &'static str,
    /// What the first argument is, when it must be there.
    first: Option<&'static str>,
    /// Arguments at most.
    most: usize,
}

const COMMANDS: [Command; 10] = [
    Command {
        names: &["block_job_cancel"],
        takes: "[-f] device",
        purpose: "stop an active background block operation (use -f if you want to abort the operation immediately)",
        first: Some("block device name expected"),
        most: 2,
    },
    Command {
        names: &["block_job_complete"],
        takes: "device",
        purpose: "stop an active background block operation",
        first: Some("block device name expected"),
        most: 1,
    },
    Command {
        names: &["block_job_pause"],
        takes: "device",
        purpose: "pause an active background block operation",
        first: Some("block device name expected"),
        most: 1,
    },
    Command {
        names: &["block_job_resume"],
        takes: "device",
        purpose: "resume a paused background block operation",
        first: Some("block device name expected"),
        most: 1,
    },
    Command {
        names: &["block_job_set_speed"],
        takes: "device speed",
        purpose: "set maximum speed for a background block operation",
        first: Some("block device name expected"),
        most: 2,
    },
    Command {
        names: &["block_stream"],
        takes: "device [speed [base]]",
        purpose: "copy data from a backing file into a block device",
        first: Some("block device name expected"),
        most: 3,
    },
    Command { names: &["help", "?"], takes: "[cmd]", purpose: "show the help", first: None, most: 2 },
    Command {
        names: &["info"],
        takes: "[subcommand]",
        purpose: "show various information about the system state",
        first: None,
        most: 2,
    },
    Command { names: &["quit", "q"], takes: "", purpose: "end Headwater", first: None, most: 0 },
    Command {
        names: &["trace-event"],
        takes: "name on|off",
        purpose: "changes status of a specific trace event (name may be a pattern)",
        first: Some("string expected"),
        most: 2,
    },
];

/// What `info` shows.
const SUBJECTS: [(&str, &str, &str); 6] = [
    ("block", "[device]", "show info of one block device or all block devices"),
    ("block-jobs", "", "show progress of ongoing block device operations"),
    ("blockstats", "", "show block device statistics"),
    ("status", "", "show the current VM status (running|paused)"),
    ("trace-events", "[name]", "show available trace-events & their state (name may be a pattern)"),
    ("version", "", "show the version of Headwater, and of the QEMU it follows"),
];

/// Runs a line; what it answers ends with a line end, or is empty.
pub(crate) async fn answer(engine: &Engine, line: &str) -> String {
    let words = match split(line) {
        Ok(words) => words,
        Err(mistake) => return mistake,
    };
    let Some((name, arguments)) = words.split_first() else { return String::new() };
    let Some(command) = COMMANDS.iter().find(|command| command.names.contains(&name.as_str())) else {
        return format!("unknown command: '{name}'\n");
    };
    let name = command.names[0];
    let topic = arguments.first().filter(|_| name == "info").map_or_else(|| name.into(), |of| format!("info {of}"));
    let try_help = |mistake: String| format!("{mistake}\nTry \"help {topic}\" for more information\n");
    if arguments.len() > command.most {
        return try_help(format!("{name}: extraneous characters at the end of line"));
    }
    if let (Some(expected), None) = (command.first, arguments.first()) {
        return try_help(format!("{name}: {expected}"));
    }
    match run(engine, name, arguments).await {
        Ok(text) => text,
        Err(Refused::Usage(mistake)) => try_help(mistake),
        Err(Refused::Failed(failure)) => format!("Error: {failure}\n"),
    }
}

/// Why a command did nothing.
enum Refused {
    Usage(String),
    Failed(Failure),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

async fn run(engine: &Engine, name: &str, arguments: &[String]) -> Result<String, Refused> {
    let word = |index: usize| arguments.get(index).cloned().unwrap_or_default();
    let done = match name {
        "help" => return Ok(help(&word(0), &word(1))),
        "info" => return info(engine, arguments).await,
        "quit" => {
            engine.request_quit();
            return Ok(String::new());
        }
        "block_stream" => {
            let speed = if arguments.len() > 1 { size(name, &word(1))? } else { 0 };
            let base = arguments.get(2).cloned();
            Stream { base, speed, ..Stream::of(word(0)) }.start(engine).await.map(drop)
        }
        "trace-event" => {
            let on = match word(1).as_str() {
                "on" => true,
                "off" => false,
                _ => return Err(Refused::Usage(format!("{name}: expected 'on' or 'off'"))),
            };
            trace::find(&word(0)).map(|points| trace::set(&points, on))
        }
        "block_job_set_speed" => {
            let speed = size(name, &word(1))?;
            qmp::block_job(engine, word(0), move |jobs, id| jobs.set_speed(id, speed)).await.map(drop)
        }
        "block_job_pause" => qmp::block_job(engine, word(0), |jobs, id| jobs.pause(id)).await.map(drop),
        "block_job_complete" => qmp::block_job(engine, word(0), |jobs, id| jobs.complete(id)).await.map(drop),
        "block_job_resume" => qmp::block_job(engine, word(0), |jobs, id| jobs.resume(id)).await.map(drop),
        "block_job_cancel" => {
            let force = word(0) == "-f";
            if let Some(option) = word(0).strip_prefix('-').filter(|option| *option != "f") {
                return Err(Refused::Usage(format!("{name}: unsupported option -{option}")));
            }
            if arguments.len() > 1 + usize::from(force) {
                return Err(Refused::Usage(format!("{name}: extraneous characters at the end of line")));
            }
            let id = arguments.get(usize::from(force)).cloned();
            let id = id.ok_or_else(|| Refused::Usage(format!("{name}: block device name expected")))?;
            qmp::block_job(engine, id, move |jobs, id| jobs.cancel(id, force)).await.map(drop)
        }
        _ => Ok(()),
    };
    done?;
    Ok(String::new())
}

/// A size with a suffix, in bytes: a plain number is bytes here, as in QEMU.
fn size(command: &str, text: &str) -> Result<u64, Refused> {
    let (digits, suffix) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let invalid = || Refused::Usage("invalid size".into());
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ if digits.is_empty() => return Err(invalid()),
        _ => return Err(Refused::Usage(format!("{command}: extraneous characters at the end of line"))),
    };
    let number: f64 = digits.parse().map_err(|_| invalid())?;
    let bytes = match digits.parse::<u64>() {
        Ok(whole) => whole.checked_mul(1 << shift).ok_or_else(invalid)?,
        Err(_) if digits.contains('.') => (number * (1_u64 << shift) as f64) as u64,
        Err(_) => return Err(invalid()),
    };
    i64::try_from(bytes).map(|_| bytes).map_err(|_| invalid())
}

async fn info(engine: &Engine, arguments: &[String]) -> Result<String, Refused> {
    let Some(subject) = arguments.first() else { return Ok(help("info", "")) };
    let device = arguments.get(1).map(String::as_str);
    if device.is_some() && !["block", "trace-events"].contains(&subject.as_str()) {
        return Err(Refused::Usage(format!("{subject}: extraneous characters at the end of line")));
    }
    match subject.as_str() {
        "block" if device.is_some_and(|word| word.starts_with('-')) => {
            Err(Refused::Usage(format!("{subject}: unsupported option {}", device.unwrap_or_default())))
        }
        "block" => Ok(qmp::block_text(engine, device).await?),
        "block-jobs" => Ok(jobs_text(engine).await?),
        "blockstats" => Ok(qmp::stats_text(engine).await?),
        "status" => Ok("VM status: running\n".into()),
        "trace-events" => {
            let points = trace::find(device.unwrap_or("*"))?;
            let line = |point: &&trace::Point| format!("{} : state {}\n", point.name, u8::from(point.is_on()));
            Ok(points.iter().map(line).collect())
        }
        "version" => Ok(concat!("10.0.2 (Headwater ", env!("CARGO_PKG_VERSION"), ")\n").into()),
        unknown => Ok(format!("unknown command: 'info {unknown}'\n")),
    }
}

async fn jobs_text(engine: &Engine) -> Result<String, Failure> {
    let jobs = qmp::all_jobs(engine).await?;
    if jobs.is_empty() {
        return Ok("No active jobs\n".into());
    }
    let lines = jobs.into_iter().map(|job| {
        format!(
            "Streaming device {}: Completed {} of {} bytes, speed limit {} bytes/s\n",
            job.id, job.offset, job.len, job.speed
        )
    });
    Ok(lines.collect())
}

fn help(name: &str, subject: &str) -> String {
    let mut text = String::new();
    let mut line = |name: &str, takes: &str, purpose: &str| {
        let _ = writeln!(text, "{name} {takes} -- {purpose}");
    };
    if name == "info" {
        for (name, takes, purpose) in SUBJECTS.iter().filter(|(name, ..)| subject.is_empty() || *name == subject) {
            line(&format!("info {name}"), takes, purpose);
        }
        return text;
    }
    for command in COMMANDS.iter().filter(|command| name.is_empty() || command.names.contains(&name)) {
        line(&command.names.join("|"), command.takes, command.purpose);
    }
    if text.is_empty() { format!("unknown command: '{name}'\n") } else { text }
}

/// Words, separated by space; double quotes keep a word together and know `\"` and `\\`.
fn split(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_whitespace() {
            continue;
        }
        let mut word = String::new();
        if c == '"' {
            loop {
                match chars.next() {
                    None => return Err("unterminated string\n".into()),
                    Some('"') => break,
                    Some('\\') => word.extend(chars.next()),
                    Some(c) => word.push(c),
                }
            }
        } else {
            word.push(c);
            while let Some(c) = chars.next_if(|c| !c.is_whitespace()) {
                word.push(c);
            }
        }
        words.push(word);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineConfig;

    #[test]
    fn words_may_be_quoted() {
        assert_eq!(
            split(r#"  block_stream "dri ve" 1M"#),
            Ok(vec!["block_stream".into(), "dri ve".into(), "1M".into()])
        );
        assert!(split("\"open").is_err());
    }

    #[test]
    fn speeds_have_suffixes() {
        let bytes = |text| size("c", text).ok();
        assert_eq!(bytes("1M"), Some(1 << 20));
        assert_eq!(bytes("1.5k"), Some(1536));
        assert_eq!(bytes("65536"), Some(65536));
        for bad in ["x", "", "7xx", "99999999999999999999"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn refusals_are_in_qemus_words() -> Result<(), Box<dyn std::error::Error>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let engine = Engine::start(&EngineConfig::default())?;
            for (line, said) in [
                ("foo", "unknown command: 'foo'\n"),
                ("info foo", "unknown command: 'info foo'\n"),
                ("info block-jobs", "No active jobs\n"),
                ("block_stream nosuch", "Error: Cannot find device='nosuch' nor node-name='nosuch'\n"),
                ("block_job_set_speed nosuch 1", "Error: Block job 'nosuch' not found\n"),
                (
                    "block_job_pause",
                    "block_job_pause: block device name expected\nTry \"help block_job_pause\" for more information\n",
                ),
                (
                    "block_stream a 0 b c",
                    "block_stream: extraneous characters at the end of line\nTry \"help block_stream\" for more information\n",
                ),
                (
                    "block_job_set_speed drive0 x",
                    "invalid size\nTry \"help block_job_set_speed\" for more information\n",
                ),
                ("? block_stream", "block_stream device [speed [base]] -- copy data from a backing file into a block device\n"),
                ("", ""),
            ] {
                assert_eq!(answer(&engine, line).await, said, "{line}");
            }
            engine.shut_down().await?;
            Ok(())
        })
    }
}
