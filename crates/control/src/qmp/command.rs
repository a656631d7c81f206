//! The table of commands: every name there is, with what runs it.

use super::arguments::Arguments;
use super::{jobs, query};
use crate::{Engine, ErrorClass, Failure, hmp};
use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

/// What runs a command.
type Run = for<'a> fn(&'a Engine, Arguments) -> BoxFuture<'a, Result<Value, Failure>>;

/// A command that takes nothing but a job; how it names it, and what it does.
macro_rules! verb {
    ($named:ident, $verb:expr) => {
        |engine, arguments| Box::pin(jobs::plain(engine, arguments, jobs::Named::$named, $verb))
    };
}

/// Every command, in the order `query-commands` lists them.
const COMMANDS: [(&str, Run); 29] = [
    ("qmp_capabilities", |_, _| Box::pin(async { Err(negotiated()) })),
    ("query-commands", |_, arguments| Box::pin(async { arguments.end().map(|()| names()) })),
    ("query-version", |_, arguments| Box::pin(async { arguments.end().map(|()| version()) })),
    ("query-name", |_, arguments| Box::pin(async { arguments.end().map(|()| json!({ "name": "headwater" })) })),
    ("query-status", |_, arguments| Box::pin(async { arguments.end().map(|()| status()) })),
    ("quit", |engine, arguments| Box::pin(async { arguments.end().map(|()| quit(engine)) })),
    ("human-monitor-command", |engine, arguments| Box::pin(human(engine, arguments))),
    ("query-block", |engine, arguments| Box::pin(query::block(engine, arguments))),
    ("query-named-block-nodes", |engine, arguments| Box::pin(query::named_nodes(engine, arguments))),
    ("query-blockstats", |engine, arguments| Box::pin(query::block_stats(engine, arguments))),
    ("query-block-jobs", |engine, arguments| Box::pin(jobs::query_block_jobs(engine, arguments))),
    ("query-jobs", |engine, arguments| Box::pin(jobs::query_jobs(engine, arguments))),
    ("block-stream", |engine, arguments| Box::pin(jobs::block_stream(engine, arguments))),
    ("block-job-set-speed", |engine, arguments| Box::pin(jobs::set_speed(engine, arguments, "speed"))),
    ("block-job-cancel", |engine, arguments| Box::pin(jobs::cancel(engine, arguments))),
    ("block-job-pause", verb!(Device, |jobs, id| jobs.pause(id))),
    ("block-job-resume", verb!(Device, |jobs, id| jobs.resume(id))),
    ("block-job-complete", verb!(Device, |jobs, id| jobs.complete(id))),
    ("block-job-finalize", verb!(BlockId, |jobs, id| jobs.finalize(id))),
    ("block-job-dismiss", verb!(BlockId, |jobs, id| jobs.dismiss(id))),
    ("job-cancel", verb!(Id, |jobs, id| jobs.cancel(id, true))),
    ("job-pause", verb!(Id, |jobs, id| jobs.pause(id))),
    ("job-resume", verb!(Id, |jobs, id| jobs.resume(id))),
    ("job-complete", verb!(Id, |jobs, id| jobs.complete(id))),
    ("job-finalize", verb!(Id, |jobs, id| jobs.finalize(id))),
    ("job-dismiss", verb!(Id, |jobs, id| jobs.dismiss(id))),
    // The API of 2011.
    ("block_stream", |engine, arguments| Box::pin(jobs::block_stream_2011(engine, arguments))),
    ("block_job_cancel", |engine, arguments| Box::pin(jobs::cancel_2011(engine, arguments))),
    ("block_job_set_speed", |engine, arguments| Box::pin(jobs::set_speed(engine, arguments, "value"))),
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
    match COMMANDS.iter().find(|(known, _)| *known == name) {
        Some((_, run)) => run(engine, Arguments::new(members)).await,
        None => {
            Err(Failure { class: ErrorClass::CommandNotFound, desc: format!("The command {name} has not been found") })
        }
    }
}

fn negotiated() -> Failure {
    Failure {
        class: ErrorClass::CommandNotFound,
        desc: "Capabilities negotiation is already complete, command ignored".into(),
    }
}

fn names() -> Value {
    COMMANDS.iter().map(|(name, _)| json!({ "name": name })).collect()
}

/// The machine is somewhere else; as far as its disks go, it runs.
fn status() -> Value {
    json!({ "status": "running", "running": true })
}

fn quit(engine: &Engine) -> Value {
    engine.request_quit();
    json!({})
}

async fn human(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let line = arguments.needed_string("command-line")?;
    arguments.integer("cpu-index")?;
    arguments.end()?;
    Ok(json!(hmp::answer(engine, &line).await.replace('\n', "\r\n")))
}
