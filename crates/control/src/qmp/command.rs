//! The table of commands: every name there is, with what runs it.

use super::arguments::Arguments;
use super::schema::{Kind, Member, Schema, Takes, may, needs};
use super::{commit, create, event, exports, jobs, nodes, query, schema, snapshots};
use crate::{Engine, ErrorClass, Failure, hmp, trace};
use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

/// What runs a command.
type Run = for<'a> fn(&'a Engine, Arguments) -> BoxFuture<'a, Result<Value, Failure>>;

/// A command: its name, what it takes and gives, and what runs it.
struct Command {
    name: &'static str,
    takes: Takes,
    gives: Kind,
    run: Run,
}

const fn command(name: &'static str, members: &'static [Member], gives: Kind, run: Run) -> Command {
    Command { name, takes: Takes { members, open: false }, gives, run }
}

/// One that takes more than is described.
const fn open(name: &'static str, members: &'static [Member], gives: Kind, run: Run) -> Command {
    Command { name, takes: Takes { members, open: true }, gives, run }
}

/// A command that takes nothing but a job; how it names it, and what it does.
macro_rules! verb {
    ($name:literal, $named:ident, $verb:expr) => {
        command($name, jobs::Named::$named.takes(), NOTHING, |engine, arguments| {
            Box::pin(jobs::plain(engine, arguments, jobs::Named::$named, $verb))
        })
    };
}

/// What a function of `$module` runs.
macro_rules! run {
    ($module:ident::$function:ident) => {
        |engine, arguments| Box::pin($module::$function(engine, arguments))
    };
}

const NOTHING: Kind = Kind::Object(&[]);
const LIST: Kind = Kind::List(&Kind::Any);

const STREAM: &[Member] = &[
    may("job-id", Kind::Text),
    needs("device", Kind::Text),
    may("base", Kind::Text),
    may("base-node", Kind::Text),
    may("backing-file", Kind::Text),
    may("backing-mask-protocol", Kind::Flag),
    may("bottom", Kind::Text),
    may("speed", Kind::Integer),
    may("on-error", Kind::Word(&["report", "ignore", "enospc", "stop", "auto"])),
    may("filter-node-name", Kind::Text),
    may("auto-finalize", Kind::Flag),
    may("auto-dismiss", Kind::Flag),
];

/// Addresses in their older form, with what they say in `data`, or plain.
const ADDRESS: Kind = Kind::Open(&[needs("type", Kind::Text)]);

/// What an export of either type takes; each takes more of its own.
const EXPORT: &[Member] = &[
    needs("type", Kind::Word(&["nbd", "vhost-user-blk"])),
    needs("id", Kind::Text),
    needs("node-name", Kind::Text),
    may("writable", Kind::Flag),
    may("writethrough", Kind::Flag),
    may("iothread", Kind::Text),
    may("fixed-iothread", Kind::Flag),
    may("allow-inactive", Kind::Flag),
];

/// What a node of any driver takes; each takes more of its own. Switches may be words, as command lines have them.
const NODE: &[Member] = &[
    needs("driver", Kind::Text),
    may("node-name", Kind::Text),
    may("read-only", Kind::Any),
    may("auto-read-only", Kind::Any),
    may("force-share", Kind::Any),
    may("cache", Kind::Any),
    may("discard", Kind::Text),
    may("detect-zeroes", Kind::Text),
];

/// What a node is changed to; each driver takes more of its own.
const NODE_AGAIN: &[Member] = &[needs("driver", Kind::Text), may("node-name", Kind::Text)];

const MODE: Kind = Kind::Word(&["safe", "hard"]);

/// Every command, in the order `query-commands` lists them.
const COMMANDS: &[Command] = &[
    command("qmp_capabilities", &[may("enable", Kind::List(&Kind::Text))], NOTHING, |_, _| {
        Box::pin(async { Err(negotiated()) })
    }),
    command("query-commands", &[], LIST, |_, _| Box::pin(async { Ok(names()) })),
    command("query-qmp-schema", &[], LIST, |_, _| Box::pin(async { Ok(described()) })),
    command("query-version", &[], Kind::Any, |_, _| Box::pin(async { Ok(version()) })),
    command("query-name", &[], Kind::Any, |_, _| Box::pin(async { Ok(json!({ "name": "headwater" })) })),
    command("query-status", &[], Kind::Any, |_, _| Box::pin(async { Ok(status()) })),
    command("quit", &[], NOTHING, |engine, _| Box::pin(async { Ok(quit(engine)) })),
    command(
        "human-monitor-command",
        &[needs("command-line", Kind::Text), may("cpu-index", Kind::Integer)],
        Kind::Text,
        |e, a| Box::pin(human(e, a)),
    ),
    command("trace-event-get-state", &[needs("name", Kind::Text), may("vcpu", Kind::Integer)], LIST, |_, arguments| {
        Box::pin(async { trace_state(arguments) })
    }),
    command(
        "trace-event-set-state",
        &[
            needs("name", Kind::Text),
            needs("enable", Kind::Flag),
            may("ignore-unavailable", Kind::Flag),
            may("vcpu", Kind::Integer),
        ],
        NOTHING,
        |_, arguments| Box::pin(async { set_trace_state(arguments) }),
    ),
    command("query-block", &[], LIST, run!(query::block)),
    command("query-named-block-nodes", &[may("flat", Kind::Flag)], LIST, run!(query::named_nodes)),
    command("query-blockstats", &[may("query-nodes", Kind::Flag)], LIST, run!(query::block_stats)),
    command("query-block-jobs", &[], LIST, run!(jobs::query_block_jobs)),
    command("query-jobs", &[], LIST, run!(jobs::query_jobs)),
    open("blockdev-add", NODE, NOTHING, run!(nodes::add)),
    command("blockdev-reopen", &[needs("options", Kind::List(&Kind::Open(NODE_AGAIN)))], NOTHING, run!(nodes::reopen)),
    command("blockdev-del", &[needs("node-name", Kind::Text)], NOTHING, run!(nodes::remove)),
    command(
        "block_resize",
        &[may("device", Kind::Text), may("node-name", Kind::Text), needs("size", Kind::Integer)],
        NOTHING,
        run!(nodes::resize),
    ),
    command(
        "change-backing-file",
        &[needs("device", Kind::Text), needs("image-node-name", Kind::Text), needs("backing-file", Kind::Text)],
        NOTHING,
        run!(nodes::change_backing),
    ),
    command(
        "block-set-write-threshold",
        &[needs("node-name", Kind::Text), needs("write-threshold", Kind::Size)],
        NOTHING,
        run!(nodes::set_threshold),
    ),
    command("blockdev-create", create::CREATE, NOTHING, run!(create::create)),
    command("blockdev-snapshot", snapshots::SNAPSHOT, NOTHING, run!(snapshots::to_node)),
    command("blockdev-snapshot-sync", snapshots::SNAPSHOT_FILE, NOTHING, run!(snapshots::to_file)),
    command("transaction", snapshots::TRANSACTION, NOTHING, run!(snapshots::transaction)),
    open("object-add", &[needs("qom-type", Kind::Text), needs("id", Kind::Text)], NOTHING, run!(nodes::add_object)),
    command("object-del", &[needs("id", Kind::Text)], NOTHING, run!(nodes::remove_object)),
    open("block-export-add", EXPORT, NOTHING, run!(exports::add)),
    command("block-export-del", &[needs("id", Kind::Text), may("mode", MODE)], NOTHING, run!(exports::remove)),
    command("query-block-exports", &[], LIST, run!(exports::query)),
    command(
        "nbd-server-start",
        &[
            needs("addr", ADDRESS),
            may("tls-creds", Kind::Text),
            may("tls-authz", Kind::Text),
            may("max-connections", Kind::Integer),
        ],
        NOTHING,
        run!(exports::start_server),
    ),
    command(
        "nbd-server-add",
        &[
            needs("device", Kind::Text),
            may("name", Kind::Text),
            may("description", Kind::Text),
            may("writable", Kind::Flag),
            may("bitmap", Kind::Text),
        ],
        NOTHING,
        run!(exports::server_add),
    ),
    command(
        "nbd-server-remove",
        &[needs("name", Kind::Text), may("mode", MODE)],
        NOTHING,
        run!(exports::server_remove),
    ),
    command("nbd-server-stop", &[], NOTHING, run!(exports::stop_server)),
    command("block-stream", STREAM, NOTHING, run!(jobs::block_stream)),
    command("block-commit", commit::COMMIT, NOTHING, run!(commit::block_commit)),
    command(
        "block-job-set-speed",
        &[needs("device", Kind::Text), needs("speed", Kind::Integer)],
        NOTHING,
        |engine, arguments| Box::pin(jobs::set_speed(engine, arguments, "speed")),
    ),
    command("block-job-cancel", &[needs("device", Kind::Text), may("force", Kind::Flag)], NOTHING, run!(jobs::cancel)),
    verb!("block-job-pause", Device, |jobs, id| jobs.pause(id)),
    verb!("block-job-resume", Device, |jobs, id| jobs.resume(id)),
    verb!("block-job-complete", Device, |jobs, id| jobs.complete(id)),
    verb!("block-job-finalize", BlockId, |jobs, id| jobs.finalize(id)),
    verb!("block-job-dismiss", BlockId, |jobs, id| jobs.dismiss(id)),
    verb!("job-cancel", Id, |jobs, id| jobs.cancel(id, true)),
    verb!("job-pause", Id, |jobs, id| jobs.pause(id)),
    verb!("job-resume", Id, |jobs, id| jobs.resume(id)),
    verb!("job-complete", Id, |jobs, id| jobs.complete(id)),
    verb!("job-finalize", Id, |jobs, id| jobs.finalize(id)),
    verb!("job-dismiss", Id, |jobs, id| jobs.dismiss(id)),
    // The API of 2011.
    command(
        "block_stream",
        &[needs("device", Kind::Text), may("base", Kind::Text)],
        NOTHING,
        run!(jobs::block_stream_2011),
    ),
    command("block_job_cancel", &[needs("device", Kind::Text)], NOTHING, run!(jobs::cancel_2011)),
    command(
        "block_job_set_speed",
        &[needs("device", Kind::Text), needs("value", Kind::Integer)],
        NOTHING,
        |engine, arguments| Box::pin(jobs::set_speed(engine, arguments, "value")),
    ),
];

/// Whether there is a command of this name.
pub(crate) fn knows(name: &str) -> bool {
    COMMANDS.iter().any(|command| command.name == name)
}

/// What all of it looks like (`query-qmp-schema`).
pub(crate) fn described() -> Value {
    let mut schema = Schema::default();
    for Command { name, takes, gives, .. } in COMMANDS {
        schema.command(name, *takes, *gives, false);
    }
    for (name, carries) in event::EVENTS {
        schema.event(name, carries);
    }
    schema.finish()
}

/// The version as QMP clients read it: the QEMU whose monitor this one follows, and who we are.
pub(crate) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 2 },
        "package": concat!("Headwater ", env!("CARGO_PKG_VERSION")),
    })
}

/// Runs a command after negotiation.
pub(crate) async fn run(engine: &Engine, name: &str, members: Map<String, Value>) -> Result<Value, Failure> {
    match COMMANDS.iter().find(|command| command.name == name) {
        Some(command) => {
            schema::check(command.takes, &members)?;
            (command.run)(engine, Arguments::new(members)).await
        }
        None => Err(unknown(name)),
    }
}

/// There is no such command.
pub(super) fn unknown(name: &str) -> Failure {
    Failure { class: ErrorClass::CommandNotFound, desc: format!("The command {name} has not been found") }
}

fn negotiated() -> Failure {
    Failure {
        class: ErrorClass::CommandNotFound,
        desc: "Capabilities negotiation is already complete, command ignored".into(),
    }
}

pub(crate) fn names() -> Value {
    COMMANDS.iter().map(|command| json!({ "name": command.name })).collect()
}

/// The machine is somewhere else; as far as its disks go, it runs.
fn status() -> Value {
    json!({ "status": "running", "running": true })
}

fn quit(engine: &Engine) -> Value {
    engine.request_quit();
    json!({})
}

fn trace_state(mut arguments: Arguments) -> Result<Value, Failure> {
    let points = trace::find(&arguments.needed_string("name")?)?;
    let state = |on| if on { "enabled" } else { "disabled" };
    Ok(points.iter().map(|point| json!({ "name": point.name, "state": state(point.is_on()) })).collect())
}

fn set_trace_state(mut arguments: Arguments) -> Result<Value, Failure> {
    let points = trace::find(&arguments.needed_string("name")?)?;
    trace::set(&points, arguments.boolean("enable")?.unwrap_or(false));
    Ok(json!({}))
}

async fn human(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let line = arguments.needed_string("command-line")?;
    arguments.integer("cpu-index")?;
    arguments.end()?;
    Ok(json!(hmp::answer(engine, &line).await.replace('\n', "\r\n")))
}
