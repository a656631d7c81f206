//! `block-commit`.

use super::arguments::Arguments;
use super::schema::{Kind, Member, may, needs};
use crate::{Engine, ErrorClass, Failure, ShardState};
use disk::Result as DiskResult;
use futures_util::future::LocalBoxFuture;
use graph::nodes::{CommitWish, Committing};
use job::{CommitOptions, Ending, OnError};
use serde_json::{Value, json};
use std::rc::Rc;

/// What it takes.
pub(super) const COMMIT: &[Member] = &[
    may("job-id", Kind::Text),
    needs("device", Kind::Text),
    may("base-node", Kind::Text),
    may("base", Kind::Text),
    may("top-node", Kind::Text),
    may("top", Kind::Text),
    may("backing-file", Kind::Text),
    may("backing-mask-protocol", Kind::Flag),
    may("speed", Kind::Integer),
    may("on-error", Kind::Word(&["report", "ignore", "enospc", "stop", "auto"])),
    may("filter-node-name", Kind::Text),
    may("auto-finalize", Kind::Flag),
    may("auto-dismiss", Kind::Flag),
];

/// What the graph does for a commit.
struct OnGraph {
    shard: Rc<ShardState>,
    commit: Rc<Committing>,
}

impl Ending for OnGraph {
    fn quiesce(&self) -> LocalBoxFuture<'_, DiskResult<()>> {
        Box::pin(self.shard.graph().quiesce_commit(&self.commit))
    }

    fn publish(&self) -> LocalBoxFuture<'_, DiskResult<()>> {
        Box::pin(self.shard.graph().publish_commit(&self.commit))
    }

    fn end(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(self.shard.graph().end_commit(&self.commit))
    }
}

/// `block-commit`.
pub(crate) async fn block_commit(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let device = arguments.needed_string("device")?;
    let id = arguments.string("job-id")?;
    let wish = CommitWish {
        device: device.clone(),
        top: arguments.string("top")?,
        top_node: arguments.string("top-node")?,
        base: arguments.string("base")?,
        base_node: arguments.string("base-node")?,
        backing_file: arguments.string("backing-file")?,
        filter: arguments.string("filter-node-name")?,
        job: id.clone().unwrap_or_default(),
        refused: None,
    };
    let speed = arguments.speed("speed")?.unwrap_or(0);
    let on_error = arguments.word("on-error", OnError::from_name)?.unwrap_or_default();
    let auto_finalize = arguments.boolean("auto-finalize")?.unwrap_or(true);
    let auto_dismiss = arguments.boolean("auto-dismiss")?.unwrap_or(true);
    // A protocol is never masked here: what is recorded is the name as it was.
    arguments.boolean("backing-mask-protocol")?;
    arguments.end()?;
    if engine.devices().contains(&device) {
        return Err(Failure::generic(format!("Device '{device}' is served as a whole: commits are for named nodes")));
    }
    let started = engine.on_nodes(move |shard| async move {
        if !shard.graph().has(&device) {
            return Err(Failure { class: ErrorClass::DeviceNotFound, desc: format!("Device '{device}' not found") });
        }
        // Nodes have no device whose name could be the job's.
        let id = id.unwrap_or_default();
        let refused = shard.jobs().check_id(&id).err().map(|refused| refused.message);
        let commit = shard.graph().begin_commit(&CommitWish { refused, ..wish }).await?;
        let options = CommitOptions {
            id,
            device,
            source: Rc::clone(commit.source()),
            base: Rc::clone(commit.lower()),
            base_node: commit.base_node().to_owned(),
            changed: commit.changed(),
            speed,
            on_error,
            auto_finalize,
            auto_dismiss,
            hold: None,
            ending: Rc::new(OnGraph { shard: Rc::clone(&shard), commit: Rc::clone(&commit) }),
        };
        if let Err(refused) = shard.jobs().commit(options) {
            shard.graph().end_commit(&commit).await;
            return Err(refused.into());
        }
        Ok(())
    });
    started.await.map(|()| json!({}))
}
