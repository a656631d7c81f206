//! `headwater stream`, `jobs`, `speed`, `pause`, `resume`, `cancel`: an operator's hand on a running daemon.

use crate::client::Client;
use crate::exit::{Exit, Outcome};
use crate::images::Output;
use crate::progress;
use crate::size::{human, parse};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// How often `--wait` looks at the job's progress.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(clap::Args)]
pub(crate) struct Monitor {
    /// The daemon's QMP socket
    #[arg(long, value_name = "SOCK")]
    qmp: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct StreamArgs {
    #[command(flatten)]
    monitor: Monitor,
    /// Stream only what lies above this backing file
    #[arg(long, value_name = "FILE")]
    base: Option<String>,
    /// Bytes a second at most (suffixes k, M, G); 0 is unlimited
    #[arg(long, value_name = "RATE", value_parser = parse, default_value = "0")]
    speed: u64,
    /// What to do about errors: report, ignore, stop or enospc
    #[arg(long, value_name = "POLICY", default_value = "report")]
    on_error: String,
    /// The job's id; by default the device's name
    #[arg(long, value_name = "ID")]
    job_id: Option<String>,
    /// Wait for the end, with a progress bar on a terminal; Ctrl-C cancels cleanly
    #[arg(long)]
    wait: bool,
    /// The device
    device: String,
}

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    monitor: Monitor,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

#[derive(clap::Args)]
pub(crate) struct SpeedArgs {
    #[command(flatten)]
    monitor: Monitor,
    /// The job (by default named like its device)
    job: String,
    /// Bytes a second at most (suffixes k, M, G); 0 is unlimited
    #[arg(value_parser = parse)]
    speed: u64,
}

#[derive(clap::Args)]
pub(crate) struct JobArgs {
    #[command(flatten)]
    monitor: Monitor,
    /// The job (by default named like its device)
    job: String,
}

pub(crate) fn stream(args: StreamArgs) -> Outcome {
    run(async move {
        let mut client = Client::connect(&args.monitor.qmp).await?;
        let job = args.job_id.clone().unwrap_or_else(|| args.device.clone());
        let mut arguments = Map::new();
        arguments.insert("job-id".into(), json!(job));
        arguments.insert("device".into(), json!(args.device));
        arguments.insert("speed".into(), json!(args.speed));
        arguments.insert("on-error".into(), json!(args.on_error));
        if let Some(base) = &args.base {
            arguments.insert("base".into(), json!(base));
        }
        client.execute("block-stream", Value::Object(arguments)).await?;
        if args.wait { wait(&mut client, &job).await } else { Ok(Exit::Ok) }
    })
}

/// Follows the job to its end. Ctrl-C cancels it: what has arrived is kept, and a later stream goes on from there.
async fn wait(client: &mut Client, job: &str) -> Outcome {
    let bar = progress::bytes(0, job);
    let mut interrupted = false;
    loop {
        let event = tokio::select! {
            event = client.event(LOOK_EVERY) => event?,
            _ = tokio::signal::ctrl_c(), if !interrupted => {
                interrupted = true;
                // The job may have ended in this very moment; its event says so.
                let _ = client.execute("block-job-cancel", json!({ "device": job })).await;
                continue;
            }
        };
        let Some(event) = event else {
            let jobs = client.execute("query-block-jobs", json!({})).await?;
            if let Some((len, offset)) = progress_of(&jobs, job) {
                bar.set_length(len);
                bar.set_position(offset);
            }
            continue;
        };
        let data = &event["data"];
        if data["device"] != job {
            continue;
        }
        let copied = data["offset"].as_u64().unwrap_or(0);
        match event["event"].as_str() {
            Some("BLOCK_JOB_COMPLETED") => {
                bar.finish_and_clear();
                return match data["error"].as_str() {
                    None => {
                        println!("{job}: streamed {}; the image is complete", human(copied));
                        Ok(Exit::Ok)
                    }
                    Some(error) => {
                        Err(format!("job '{job}' failed: {error}; what has arrived is kept, stream again to go on"))
                    }
                };
            }
            Some("BLOCK_JOB_CANCELLED") => {
                bar.finish_and_clear();
                eprintln!("{job}: cancelled; what has arrived is kept, stream again to go on");
                return Ok(Exit::Cancelled);
            }
            Some("BLOCK_JOB_ERROR") if data["action"] == "stop" => {
                bar.println(format!("{job}: stopped by an error; mend its cause, then `headwater resume`"));
            }
            _ => {}
        }
    }
}

fn progress_of(jobs: &Value, job: &str) -> Option<(u64, u64)> {
    let found = jobs.as_array()?.iter().find(|entry| entry["device"] == job)?;
    Some((found["len"].as_u64()?, found["offset"].as_u64()?))
}

pub(crate) fn list(args: &ListArgs) -> Outcome {
    run(async {
        let mut client = Client::connect(&args.monitor.qmp).await?;
        let jobs = client.execute("query-block-jobs", json!({})).await?;
        if args.output == Output::Json {
            println!("{jobs:#}");
            return Ok(Exit::Ok);
        }
        let jobs = jobs.as_array().cloned().unwrap_or_default();
        if jobs.is_empty() {
            println!("No active jobs");
        }
        for job in jobs {
            let number = |name: &str| job[name].as_u64().unwrap_or(0);
            let limit = match number("speed") {
                0 => "no speed limit".to_owned(),
                speed => format!("at most {}/s", human(speed)),
            };
            println!(
                "{}: {} of {} ({}), {}, {limit}",
                job["device"].as_str().unwrap_or("?"),
                human(number("offset")),
                human(number("len")),
                job["type"].as_str().unwrap_or("?"),
                job["status"].as_str().unwrap_or("?"),
            );
        }
        Ok(Exit::Ok)
    })
}

pub(crate) fn speed(args: SpeedArgs) -> Outcome {
    one(args.monitor, "block-job-set-speed", json!({ "device": args.job, "speed": args.speed }))
}

pub(crate) fn pause(args: JobArgs) -> Outcome {
    one(args.monitor, "block-job-pause", json!({ "device": args.job }))
}

pub(crate) fn resume(args: JobArgs) -> Outcome {
    one(args.monitor, "block-job-resume", json!({ "device": args.job }))
}

pub(crate) fn cancel(args: JobArgs) -> Outcome {
    one(args.monitor, "block-job-cancel", json!({ "device": args.job }))
}

fn one(monitor: Monitor, command: &'static str, arguments: Value) -> Outcome {
    run(async move {
        let mut client = Client::connect(&monitor.qmp).await?;
        client.execute(command, arguments).await?;
        Ok(Exit::Ok)
    })
}

fn run(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| format!("could not set up I/O: {e}"))?.block_on(work)
}
