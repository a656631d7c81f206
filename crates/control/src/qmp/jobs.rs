//! Commands on jobs: the API of 2011 with its underscores and its error classes, and today's names for the same.

use super::arguments::Arguments;
use super::event::status_name;
use crate::{Engine, ErrorClass, Failure};
use disk::StreamBase;
use job::{IoStatus, JobError, JobErrorKind, JobInfo, Jobs, OnError, StreamOptions};
use serde_json::{Value, json};

/// The words of `on-error`.
const ON_ERROR: [(&str, OnError); 4] =
    [("report", OnError::Report), ("ignore", OnError::Ignore), ("stop", OnError::Stop), ("enospc", OnError::Enospc)];

/// What to stream, in a form that can cross threads.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) device: String,
    pub(crate) job_id: Option<String>,
    pub(crate) base: Option<String>,
    pub(crate) base_node: Option<String>,
    pub(crate) backing_name: Option<String>,
    pub(crate) speed: u64,
    pub(crate) on_error: OnError,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

impl Stream {
    /// A stream of `device` with everything at its default.
    pub(crate) fn of(device: String) -> Self {
        Self {
            device,
            job_id: None,
            base: None,
            base_node: None,
            backing_name: None,
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }

    /// Starts it.
    pub(crate) async fn start(self, engine: &Engine) -> Result<(), Failure> {
        let device = self.device.clone();
        if let Some(id) = &self.job_id {
            check_id(id)?;
            if engine.on_every_shard(jobs_named(id.clone())).await?.into_iter().any(|taken| taken) {
                return Err(Failure::generic(format!("Job ID '{id}' already in use")));
            }
        }
        engine
            .on_device(&device, move |device, shard| async move {
                let disk = device.disk.clone();
                let named = self.base.as_deref().map(|name| {
                    disk.find_base(name)
                        .ok_or_else(|| Failure::generic(format!("Can't find '{name}' in the backing chain")))
                });
                let by_node = self.base_node.as_deref().map(|node| {
                    let below = disk.chain().iter().skip(1).any(|layer| layer.node == node);
                    let base = below.then(|| StreamBase::Node(node.to_owned()));
                    base.ok_or_else(|| {
                        Failure::generic(format!("Node '{node}' is not a backing image of '{}'", device.spec.name))
                    })
                });
                let base = match (named, by_node) {
                    (Some(_), Some(_)) => {
                        return Err(Failure::generic("'base' and 'base-node' cannot be specified at the same time"));
                    }
                    (Some(base), None) | (None, Some(base)) => base?,
                    (None, None) => StreamBase::Nothing,
                };
                if self.backing_name.is_some() && base == StreamBase::Nothing {
                    return Err(Failure::generic("backing file specified, but streaming the entire chain"));
                }
                let options = StreamOptions {
                    id: self.job_id,
                    disk,
                    base,
                    backing_name: self.backing_name,
                    speed: self.speed,
                    on_error: self.on_error,
                    auto_finalize: self.auto_finalize,
                    auto_dismiss: self.auto_dismiss,
                };
                shard.jobs().stream(options).map_err(Failure::from)
            })
            .await
    }
}

/// For [`Engine::on_every_shard`]: whether a job of this id is there.
fn jobs_named(
    id: String,
) -> impl Fn(std::rc::Rc<crate::ShardState>) -> std::future::Ready<Result<bool, Failure>> + Send + Clone + 'static {
    move |shard| std::future::ready(Ok(shard.jobs().info(&id).is_some()))
}

/// Identifiers begin with a letter and hold letters, digits and `-._`, as everywhere in QEMU. A default id, taken from the
/// device's name, is not held to this.
fn check_id(id: &str) -> Result<(), Failure> {
    let fits = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if fits { Ok(()) } else { Err(Failure::generic(format!("Invalid job ID '{id}'"))) }
}

/// `block-stream`.
pub(crate) async fn block_stream(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let job_id = arguments.string("job-id")?;
    let device = arguments.needed_string("device")?;
    let stream = Stream {
        job_id,
        base: arguments.string("base")?,
        base_node: arguments.string("base-node")?,
        backing_name: arguments.string("backing-file")?,
        speed: arguments.speed("speed")?.unwrap_or(0),
        on_error: arguments.word("on-error", &ON_ERROR)?.unwrap_or_default(),
        auto_finalize: arguments.boolean("auto-finalize")?.unwrap_or(true),
        auto_dismiss: arguments.boolean("auto-dismiss")?.unwrap_or(true),
        device: device.clone(),
    };
    for unserved in ["bottom", "filter-node-name", "snapshot-node-name"] {
        if arguments.string(unserved)?.is_some() {
            return Err(Failure::generic(format!(
                "Parameter '{unserved}' is not supported by this Headwater: name the layer to stop at with 'base' or 'base-node'"
            )));
        }
    }
    arguments.boolean("backing-mask-protocol")?;
    arguments.end()?;
    stream.start(engine).await?;
    Ok(json!({}))
}

/// 2011's `block_stream {device, base?}`.
pub(crate) async fn block_stream_2011(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let device = arguments.needed_string("device")?;
    let base = arguments.string("base")?;
    arguments.end()?;
    let stream = Stream { base, ..Stream::of(device.clone()) };
    stream.start(engine).await.map_err(|failure| as_in_2011(failure, engine, &device))?;
    Ok(json!({}))
}

/// The error classes of the first streaming API: an unknown device has one of its own.
fn as_in_2011(failure: Failure, engine: &Engine, device: &str) -> Failure {
    let known = engine.devices().iter().any(|name| name == device);
    if known { failure } else { Failure { class: ErrorClass::DeviceNotFound, ..failure } }
}

/// 2011's `block_job_set_speed {device, value}`.
pub(crate) async fn set_speed_2011(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("device")?;
    let speed = arguments.needed_speed("value")?;
    arguments.end()?;
    block_job(engine, id, move |jobs, id| jobs.set_speed(id, speed)).await
}

/// `block-job-set-speed`.
pub(crate) async fn set_speed(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("device")?;
    let speed = arguments.needed_speed("speed")?;
    arguments.end()?;
    block_job(engine, id, move |jobs, id| jobs.set_speed(id, speed)).await
}

/// `block-job-cancel`, and 2011's `block_job_cancel {device}`.
pub(crate) async fn cancel(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("device")?;
    let force = arguments.boolean("force")?.unwrap_or(false);
    arguments.end()?;
    cancel_job(engine, id, force).await
}

/// Cancels by id, for both monitors.
pub(crate) async fn cancel_job(engine: &Engine, id: String, force: bool) -> Result<Value, Failure> {
    block_job(engine, id, move |jobs, id| match jobs.info(id) {
        Some(info) if info.paused && !force => Err(JobError {
            kind: JobErrorKind::WrongState,
            message: format!("The block job for device '{id}' is currently paused"),
        }),
        _ => jobs.cancel(id, force),
    })
    .await
}

/// What a plain verb does to a job.
type Verb = fn(&Jobs, &str) -> Result<(), JobError>;

/// Which argument of a command names the job, and how an unknown one is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// `block-job-*`: by `device`.
    Device,
    /// `block-job-finalize` and `-dismiss`: by `id`, refused as block jobs are.
    BlockId,
    /// `job-*`: by `id`.
    Id,
}

/// A command that takes nothing but a job.
pub(crate) async fn plain(
    engine: &Engine,
    mut arguments: Arguments,
    named: Named,
    verb: Verb,
) -> Result<Value, Failure> {
    let id = arguments.needed_string(if named == Named::Device { "device" } else { "id" })?;
    arguments.end()?;
    let done = block_job(engine, id, verb).await;
    match named {
        Named::Id => done.map_err(|failure| match failure.class {
            ErrorClass::DeviceNotActive => Failure::generic("Job not found"),
            _ => failure,
        }),
        Named::Device | Named::BlockId => done,
    }
}

/// Does something to a job, wherever it is.
pub(crate) async fn block_job(
    engine: &Engine,
    id: String,
    verb: impl Fn(&Jobs, &str) -> Result<(), JobError> + Send + Clone + 'static,
) -> Result<Value, Failure> {
    let not_found = Failure { class: ErrorClass::DeviceNotActive, desc: format!("Block job '{id}' not found") };
    let tried = engine
        .on_every_shard(move |shard| {
            let found = shard.jobs().info(&id).map(|_| verb(shard.jobs(), &id));
            std::future::ready(Ok(found))
        })
        .await?;
    match tried.into_iter().flatten().next() {
        None => Err(not_found),
        Some(done) => done.map(|()| json!({})).map_err(Failure::from),
    }
}

/// Every job there is.
pub(crate) async fn all(engine: &Engine) -> Result<Vec<JobInfo>, Failure> {
    let shards = engine.on_every_shard(|shard| std::future::ready(Ok(shard.jobs().list()))).await?;
    Ok(shards.into_iter().flatten().collect())
}

/// `query-block-jobs`: 2011's `type device len offset speed`, and what was added since.
pub(crate) async fn query_block_jobs(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    arguments.end()?;
    let jobs = all(engine).await?.into_iter().map(|job| {
        let io_status = match job.io_status {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        };
        let mut entry = json!({
            "type": job.kind, "device": job.id, "len": job.len, "offset": job.offset, "speed": job.speed,
            "busy": job.busy, "paused": job.paused, "ready": job.ready, "io-status": io_status,
            "status": status_name(job.status), "auto-finalize": job.auto_finalize, "auto-dismiss": job.auto_dismiss,
        });
        if let Some(error) = job.error {
            entry["error"] = json!(error);
        }
        entry
    });
    Ok(jobs.collect())
}

/// `query-jobs`.
pub(crate) async fn query_jobs(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    arguments.end()?;
    let jobs = all(engine).await?.into_iter().map(|job| {
        let mut entry = json!({
            "id": job.id, "type": job.kind, "status": status_name(job.status),
            "current-progress": job.offset, "total-progress": job.len,
        });
        if let Some(error) = job.error {
            entry["error"] = json!(error);
        }
        entry
    });
    Ok(jobs.collect())
}
