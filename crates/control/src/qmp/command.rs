//! The table of commands: every name there is, and what runs it.

use super::arguments::Arguments;
use super::jobs::Named;
use super::{jobs, query};
use crate::{Engine, ErrorClass, Failure, hmp};
use serde_json::{Map, Value, json};

/// Every command, in the order `query-commands` lists them.
const NAMES: [&str; 29] = [
    "qmp_capabilities",
    "query-commands",
    "query-version",
    "query-name",
    "query-status",
    "quit",
    "human-monitor-command",
    "query-block",
    "query-named-block-nodes",
    "query-blockstats",
    "query-block-jobs",
    "query-jobs",
    "block-stream",
    "block-job-set-speed",
    "block-job-cancel",
    "block-job-pause",
    "block-job-resume",
    "block-job-complete",
    "block-job-finalize",
    "block-job-dismiss",
    "job-cancel",
    "job-pause",
    "job-resume",
    "job-complete",
    "job-finalize",
    "job-dismiss",
    "block_stream",
    "block_job_cancel",
    "block_job_set_speed",
];

/// The version as QMP clients read it: the QEMU whose monitor this one follows, and who we are.
pub(crate) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 2 },
        "package": concat!("Headwater ", env!("CARGO_PKG_VERSION")),
    })
}

/// Runs a command after negotiation.
pub(crate) async fn run(engine: &Engine, name: &str, members: Map<String, Value>) -> Result<Value, Failure> {
    let arguments = Arguments::new(members);
    match name {
        "qmp_capabilities" => Err(Failure {
            class: ErrorClass::CommandNotFound,
            desc: "Capabilities negotiation is already complete, command ignored".into(),
        }),
        "query-commands" => {
            arguments.end()?;
            Ok(NAMES.iter().map(|name| json!({ "name": name })).collect())
        }
        "query-version" => arguments.end().map(|()| version()),
        "query-name" => arguments.end().map(|()| json!({ "name": "headwater" })),
        "query-status" => arguments.end().map(|()| json!({ "status": "running", "running": true })),
        "quit" => {
            arguments.end()?;
            engine.request_quit();
            Ok(json!({}))
        }
        "human-monitor-command" => human(engine, arguments).await,
        "query-block" => query::block(engine, arguments).await,
        "query-named-block-nodes" => query::named_nodes(engine, arguments).await,
        "query-blockstats" => query::block_stats(engine, arguments).await,
        "query-block-jobs" => jobs::query_block_jobs(engine, arguments).await,
        "query-jobs" => jobs::query_jobs(engine, arguments).await,
        "block-stream" => jobs::block_stream(engine, arguments).await,
        "block_stream" => jobs::block_stream_2011(engine, arguments).await,
        "block-job-set-speed" => jobs::set_speed(engine, arguments).await,
        "block_job_set_speed" => jobs::set_speed_2011(engine, arguments).await,
        "block-job-cancel" | "block_job_cancel" => jobs::cancel(engine, arguments).await,
        "block-job-pause" => jobs::plain(engine, arguments, Named::Device, |j, id| j.pause(id)).await,
        "block-job-resume" => jobs::plain(engine, arguments, Named::Device, |j, id| j.resume(id)).await,
        "block-job-complete" => jobs::plain(engine, arguments, Named::Device, |j, id| j.complete(id)).await,
        "block-job-finalize" => jobs::plain(engine, arguments, Named::BlockId, |j, id| j.finalize(id)).await,
        "block-job-dismiss" => jobs::plain(engine, arguments, Named::BlockId, |j, id| j.dismiss(id)).await,
        "job-cancel" => jobs::plain(engine, arguments, Named::Id, |j, id| j.cancel(id, true)).await,
        "job-pause" => jobs::plain(engine, arguments, Named::Id, |j, id| j.pause(id)).await,
        "job-resume" => jobs::plain(engine, arguments, Named::Id, |j, id| j.resume(id)).await,
        "job-complete" => jobs::plain(engine, arguments, Named::Id, |j, id| j.complete(id)).await,
        "job-finalize" => jobs::plain(engine, arguments, Named::Id, |j, id| j.finalize(id)).await,
        "job-dismiss" => jobs::plain(engine, arguments, Named::Id, |j, id| j.dismiss(id)).await,
        unknown => Err(Failure {
            class: ErrorClass::CommandNotFound,
            desc: format!("The command {unknown} has not been found"),
        }),
    }
}

async fn human(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let line = arguments.needed_string("command-line")?;
    arguments.integer("cpu-index")?;
    arguments.end()?;
    Ok(json!(hmp::answer(engine, &line).await.replace('\n', "\r\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineConfig;

    /// The list clients are shown and the commands that run are the same.
    #[test]
    fn every_listed_command_is_there() -> Result<(), Box<dyn std::error::Error>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let engine = Engine::start(&EngineConfig::default())?;
            for name in NAMES.iter().filter(|name| **name != "quit" && **name != "qmp_capabilities") {
                let mut unexpected = Map::new();
                unexpected.insert("no-such-argument".into(), Value::Null);
                let refused = run(&engine, name, unexpected).await;
                assert!(refused.is_err_and(|failure| failure.class != ErrorClass::CommandNotFound), "{name}");
            }
            let unknown = run(&engine, "no-such-command", Map::new()).await;
            assert!(unknown.is_err_and(|failure| failure.class == ErrorClass::CommandNotFound));
            engine.shut_down().await?;
            Ok(())
        })
    }
}
