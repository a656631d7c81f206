//! Commands on jobs: the API of 2011 with its underscores and its error classes, and today's names for the same.

use super::arguments::Arguments;
use super::schema::{Kind, Member, needs};
use crate::{Device, Engine, ErrorClass, Failure, ShardState};
use disk::{Disk, StreamBase};
use job::{JobError, JobInfo, Jobs, OnError, StreamOptions};
use serde_json::{Value, json};
use std::any::Any;
use std::future::ready;
use std::rc::Rc;

/// What to stream, in a form that can cross threads.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) device: String,
    pub(crate) job_id: Option<String>,
    pub(crate) base: Option<String>,
    pub(crate) base_node: Option<String>,
    pub(crate) bottom: Option<String>,
    /// What the node above it is called while it runs.
    pub(crate) filter: Option<String>,
    pub(crate) backing_name: Option<String>,
    pub(crate) speed: u64,
    pub(crate) on_error: OnError,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

/// A node: which device's, and how far below its top.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    name: String,
    device: String,
    depth: usize,
}

impl Stream {
    /// A stream of `device` with everything at its default.
    pub(crate) fn of(device: String) -> Self {
        Self {
            device,
            job_id: None,
            base: None,
            base_node: None,
            bottom: None,
            filter: None,
            backing_name: None,
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }

    /// Starts it.
    pub(crate) async fn start(self, engine: &Engine) -> Result<(), Failure> {
        let together = [("base", &self.base), ("base-node", &self.base_node), ("bottom", &self.bottom)];
        let mut given = together.iter().filter(|(_, value)| value.is_some()).map(|(name, _)| name);
        if let (Some(first), Some(second)) = (given.next(), given.next()) {
            // QEMU names `bottom` before `base-node`.
            let (first, second) = if *first == "base-node" { (second, first) } else { (first, second) };
            return Err(Failure::generic(format!("'{first}' and '{second}' cannot be specified at the same time")));
        }
        let nodes = nodes(engine).await?;
        if self.is_on_node(engine).await? {
            return self.start_on_node(engine).await;
        }
        let device = self.device_in(engine, &nodes)?;
        if self.filter.is_some() {
            let why =
                "Parameter 'filter-node-name' is not supported: a device's stream puts no filter node into the chain";
            return Err(Failure::generic(why));
        }
        if let Some(name) = self.base_node.as_ref().or(self.bottom.as_ref()) {
            check_below(&nodes, name, &device, &self.device)?;
        }
        if let Some(id) = self.job_id.clone() {
            let taken = move |shard: Rc<ShardState>| ready(Ok(shard.jobs().info(&id).is_some()));
            if engine.on_every_shard(taken).await?.contains(&true) {
                let id = self.job_id.unwrap_or_default();
                return Err(Failure::generic(format!("Job ID '{id}' already in use")));
            }
        }
        engine.on_device(&device, |device, shard| ready(self.start_on(&device, &shard))).await
    }

    /// The device that is meant: by its name, or by the name of its top node.
    fn device_in(&self, engine: &Engine, nodes: &[Node]) -> Result<String, Failure> {
        if engine.devices().contains(&self.device) {
            return Ok(self.device.clone());
        }
        match nodes.iter().find(|node| node.name == self.device) {
            Some(node) if node.depth == 0 => Ok(node.device.clone()),
            Some(node) => Err(Failure::generic(format!(
                "Node '{}' lies below device '{}'; only the top of a chain can be streamed into",
                node.name, node.device
            ))),
            None => Err(Failure::no_device(&self.device)),
        }
    }

    /// Whether it is about a named node.
    async fn is_on_node(&self, engine: &Engine) -> Result<bool, Failure> {
        let name = self.device.clone();
        engine.on_nodes(move |shard| ready(Ok(shard.graph().has(&name)))).await
    }

    /// Starts it on a named node, which it holds until it is gone.
    async fn start_on_node(self, engine: &Engine) -> Result<(), Failure> {
        // Nodes have no device whose name could be the job's.
        let id = self.job_id.clone().unwrap_or_default();
        if !job::is_id(&id) {
            return Err(Failure::generic(format!("Invalid job ID '{id}'")));
        }
        engine
            .on_nodes(move |shard| async move {
                let graph = shard.graph();
                for name in self.base_node.iter().chain(self.bottom.iter()) {
                    if !graph.has(name) {
                        return Err(Failure::no_node(name));
                    }
                }
                // First as it is: nothing is opened for writing for a job that cannot be.
                let (filter, busy) = {
                    let hold = graph.take(&self.device, false).await?;
                    let disk = hold.disk();
                    let chain = disk.chain();
                    for name in self.base_node.iter().chain(self.bottom.iter()) {
                        if !chain[1..].iter().any(|layer| layer.node == *name) {
                            let what = format!("Node '{name}' is not a backing image of '{}'", self.device);
                            return Err(Failure::generic(what));
                        }
                    }
                    let base = self.base_in(disk)?;
                    let above = match &base {
                        StreamBase::Nothing => chain.len(),
                        StreamBase::Node(base) => {
                            chain.iter().position(|layer| layer.node == *base).unwrap_or(chain.len())
                        }
                    };
                    let nodes = chain[..above].iter().map(|layer| layer.node.clone()).collect();
                    let filter = graph.show_filter(self.filter.as_deref(), "copy-on-read", &self.device, true);
                    let filter = filter.map_err(|error| Failure::generic(format!("Could not create node: {error}")))?;
                    let busy = graph.occupy("stream", Some(filter.name().to_owned()), nodes)?;
                    (filter, busy)
                };
                if shard.jobs().info(&id).is_some() {
                    return Err(Failure::generic(format!("Job ID '{id}' already in use")));
                }
                let hold = graph.take(&self.device, true).await?;
                let disk = Rc::clone(hold.disk());
                self.start_with(disk, &shard, Some(Box::new((filter, hold, busy))))
            })
            .await
    }

    fn start_on(self, device: &Device, shard: &ShardState) -> Result<(), Failure> {
        self.start_with(device.disk.clone(), shard, None)
    }

    fn start_with(self, disk: Rc<Disk>, shard: &ShardState, hold: Option<Box<dyn Any>>) -> Result<(), Failure> {
        let base = self.base_in(&disk)?;
        let options = StreamOptions {
            id: self.job_id,
            disk,
            base,
            backing_name: self.backing_name,
            speed: self.speed,
            on_error: self.on_error,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            hold,
        };
        shard.jobs().stream(options).map_err(Failure::from)
    }
}

impl Stream {
    /// Where it ends in this disk's chain.
    fn base_in(&self, disk: &Disk) -> Result<StreamBase, Failure> {
        let chain = disk.chain();
        Ok(if let Some(name) = &self.base {
            let found = disk.find_base(name);
            found.ok_or_else(|| Failure::generic(format!("Can't find '{name}' in the backing chain")))?
        } else if let Some(node) = &self.base_node {
            StreamBase::Node(node.clone())
        } else if let Some(bottom) = &self.bottom {
            let at = chain.iter().position(|layer| layer.node == *bottom);
            let below = at.and_then(|at| chain.get(at + 1));
            below.map_or(StreamBase::Nothing, |layer| StreamBase::Node(layer.node.clone()))
        } else {
            StreamBase::Nothing
        })
    }
}

/// Every node of every device.
async fn nodes(engine: &Engine) -> Result<Vec<Node>, Failure> {
    let shards = engine
        .on_every_shard(|shard| {
            let mut nodes = Vec::new();
            for device in shard.devices() {
                let named = |(depth, layer): (usize, &disk::Layer)| Node {
                    name: layer.node.clone(),
                    device: device.spec.name.clone(),
                    depth,
                };
                nodes.extend(device.disk.chain().iter().enumerate().map(named));
            }
            ready(Ok(nodes))
        })
        .await?;
    Ok(shards.into_iter().flatten().collect())
}

/// Whether node `name` lies below the top of `device` (which the user called `said`).
fn check_below(nodes: &[Node], name: &str, device: &str, said: &str) -> Result<(), Failure> {
    match nodes.iter().find(|node| node.name == name) {
        None => Err(Failure::generic(format!("Cannot find device='' nor node-name='{name}'"))),
        Some(node) if node.device == device && node.depth > 0 => Ok(()),
        Some(_) => Err(Failure::generic(format!("Node '{name}' is not a backing image of '{said}'"))),
    }
}

/// `block-stream`.
pub(crate) async fn block_stream(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let stream = Stream {
        job_id: arguments.string("job-id")?,
        device: arguments.needed_string("device")?,
        base: arguments.string("base")?,
        base_node: arguments.string("base-node")?,
        backing_name: arguments.string("backing-file")?,
        bottom: arguments.string("bottom")?,
        filter: arguments.string("filter-node-name")?,
        speed: arguments.speed("speed")?.unwrap_or(0),
        on_error: arguments.word("on-error", OnError::from_name)?.unwrap_or_default(),
        auto_finalize: arguments.boolean("auto-finalize")?.unwrap_or(true),
        auto_dismiss: arguments.boolean("auto-dismiss")?.unwrap_or(true),
    };
    // A protocol is never masked here: what is recorded is the name as it was.
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
    let Err(failure) = stream.start(engine).await else { return Ok(json!({})) };
    // That API had classes of its own for a device that is not there and for one that is streamed into already.
    let class = if failure == Failure::no_device(&device) {
        ErrorClass::DeviceNotFound
    } else if all(engine).await?.iter().any(|job| job.device == device) {
        ErrorClass::DeviceInUse
    } else {
        failure.class
    };
    Err(Failure { class, ..failure })
}

/// `block-job-set-speed {device, speed}`, and 2011's `block_job_set_speed {device, value}`.
pub(crate) async fn set_speed(engine: &Engine, mut arguments: Arguments, speed: &str) -> Result<Value, Failure> {
    let id = arguments.needed_string("device")?;
    let speed = arguments.needed_speed(speed)?;
    arguments.end()?;
    block_job(engine, id, move |jobs, id| jobs.set_speed(id, speed)).await
}

/// `block-job-cancel`.
pub(crate) async fn cancel(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("device")?;
    let force = arguments.boolean("force")?.unwrap_or(false);
    arguments.end()?;
    block_job(engine, id, move |jobs, id| jobs.cancel(id, force)).await
}

/// 2011's `block_job_cancel {device}`: nothing is paused there, and nothing is cancelled twice.
pub(crate) async fn cancel_2011(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("device")?;
    arguments.end()?;
    let cancelling = all(engine).await?.iter().any(|job| job.id == id && job.cancelling);
    if cancelling {
        let desc = format!("Block job '{id}' is being cancelled already");
        return Err(Failure { class: ErrorClass::DeviceInUse, desc });
    }
    block_job(engine, id, |jobs, id| jobs.cancel(id, true)).await
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

impl Named {
    /// What such a command takes.
    pub(crate) const fn takes(self) -> &'static [Member] {
        const DEVICE: &[Member] = &[needs("device", Kind::Text)];
        const ID: &[Member] = &[needs("id", Kind::Text)];
        match self {
            Self::Device => DEVICE,
            Self::BlockId | Self::Id => ID,
        }
    }
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
    let done = some_job(engine, id, named != Named::Id, verb).await;
    match named {
        Named::Id => done.map_err(|failure| match failure.class {
            ErrorClass::DeviceNotActive => Failure::generic("Job not found"),
            _ => failure,
        }),
        Named::Device | Named::BlockId => done,
    }
}

/// Does something to a block job, wherever it is.
pub(crate) async fn block_job(
    engine: &Engine,
    id: String,
    verb: impl Fn(&Jobs, &str) -> Result<(), JobError> + Send + Clone + 'static,
) -> Result<Value, Failure> {
    some_job(engine, id, true, verb).await
}

/// Does something to a job; `block`: to one that works on a disk.
async fn some_job(
    engine: &Engine,
    id: String,
    block: bool,
    verb: impl Fn(&Jobs, &str) -> Result<(), JobError> + Send + Clone + 'static,
) -> Result<Value, Failure> {
    let not_found = Failure { class: ErrorClass::DeviceNotActive, desc: format!("Block job '{id}' not found") };
    let tried = engine
        .on_every_shard(move |shard| {
            let found = shard.jobs().info(&id).filter(|job| !block || job.is_block_job());
            let found = found.map(|_| verb(shard.jobs(), &id));
            ready(Ok(found))
        })
        .await?;
    match tried.into_iter().flatten().next() {
        None => Err(not_found),
        Some(done) => done.map(|()| json!({})).map_err(Failure::from),
    }
}

/// Every job there is.
pub(crate) async fn all(engine: &Engine) -> Result<Vec<JobInfo>, Failure> {
    let shards = engine.on_every_shard(|shard| ready(Ok(shard.jobs().list()))).await?;
    Ok(shards.into_iter().flatten().collect())
}

/// `query-block-jobs`: 2011's `type device len offset speed`, and what was added since.
pub(crate) async fn query_block_jobs(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    arguments.end()?;
    let jobs = all(engine).await?.into_iter().filter(JobInfo::is_block_job).map(|job| {
        let mut entry = json!({
            "type": job.kind, "device": job.id, "len": job.len, "offset": job.offset, "speed": job.speed,
            "busy": job.busy, "paused": job.paused, "ready": job.ready, "io-status": job.io_status.name(),
            "status": job.status.name(), "auto-finalize": job.auto_finalize, "auto-dismiss": job.auto_dismiss,
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
            "id": job.id, "type": job.kind, "status": job.status.name(),
            "current-progress": job.offset, "total-progress": job.len,
        });
        if let Some(error) = job.error {
            entry["error"] = json!(error);
        }
        entry
    });
    Ok(jobs.collect())
}
