//! Overlays on nodes in use, one at a time or several at one go.

use super::arguments::Arguments;
use super::schema::{Kind, Member, may, needs};
use crate::{Engine, Failure};
use graph::nodes::Overlay;
use serde_json::{Map, Value, json};

/// What `blockdev-snapshot-sync` takes.
pub(super) const SNAPSHOT_FILE: &[Member] = &[
    may("device", Kind::Text),
    may("node-name", Kind::Text),
    needs("snapshot-file", Kind::Text),
    may("snapshot-node-name", Kind::Text),
    may("format", Kind::Text),
    may("mode", Kind::Word(&["existing", "absolute-paths"])),
];

/// What `blockdev-snapshot` takes.
pub(super) const SNAPSHOT: &[Member] = &[needs("node", Kind::Text), needs("overlay", Kind::Text)];

/// What `transaction` takes; what its actions do is looked at when they are.
pub(super) const TRANSACTION: &[Member] = &[
    needs("actions", Kind::List(&Kind::Object(ACTION))),
    may("properties", Kind::Object(&[may("completion-mode", Kind::Word(&["individual", "grouped"]))])),
];

const ACTION: &[Member] = &[needs("type", Kind::Text), needs("data", Kind::Any)];

/// One step of a transaction, in a form that can cross threads.
enum Action {
    /// Puts an overlay on a node: its name, and what to say where there is none.
    Put { node: String, missing: Failure, overlay: Overlay },
    /// Takes everything back.
    Abort,
}

fn snapshot_file(mut arguments: Arguments) -> Result<Action, Failure> {
    let device = arguments.string("device")?;
    let node = arguments.string("node-name")?;
    let overlay = Overlay::File {
        file: arguments.needed_string("snapshot-file")?,
        node: arguments.string("snapshot-node-name")?,
        format: arguments.string("format")?.unwrap_or_else(|| "qcow2".to_owned()),
        existing: arguments.string("mode")?.is_some_and(|mode| mode == "existing"),
    };
    arguments.end()?;
    // There are no devices here: only nodes are found.
    let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
    let missing = Failure::generic(format!("Cannot find device='{device}' nor node-name='{node}'"));
    Ok(Action::Put { node, missing, overlay })
}

fn snapshot(mut arguments: Arguments) -> Result<Action, Failure> {
    let node = arguments.needed_string("node")?;
    let overlay = Overlay::Node(arguments.needed_string("overlay")?);
    arguments.end()?;
    Ok(Action::Put { missing: Failure::no_device(&node), node, overlay })
}

/// Carries out all of it or nothing. The disks are stopped together, before the first step: what they show below their overlays is
/// of one moment.
async fn carry_out(engine: &Engine, actions: Vec<Action>) -> Result<Value, Failure> {
    let resized = engine.on_nodes(move |shard| async move {
        let mut change = shard.graph().change().await;
        let done = async {
            for action in &actions {
                if let Action::Put { node, .. } = action {
                    change.stop(node).await?;
                }
            }
            for action in actions {
                match action {
                    Action::Put { node, missing, .. } if !shard.graph().has(&node) => return Err(missing),
                    Action::Put { node, overlay, .. } => change.put(&node, overlay).await?,
                    Action::Abort => return Err(Failure::generic("Transaction aborted using Abort action")),
                }
            }
            Ok(())
        };
        if let Err(failure) = done.await {
            change.abort().await;
            return Err(failure);
        }
        for disk in change.commit().await? {
            shard.announce_size(&disk);
        }
        Ok(())
    });
    resized.await.map(|()| json!({}))
}

/// `blockdev-snapshot-sync`.
pub(crate) async fn to_file(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    carry_out(engine, vec![snapshot_file(arguments)?]).await
}

/// `blockdev-snapshot`.
pub(crate) async fn to_node(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    carry_out(engine, vec![snapshot(arguments)?]).await
}

/// What makes a step of its arguments.
type Read = fn(Arguments) -> Result<Action, Failure>;

/// The steps of a transaction that are there: their names, and what they take.
const ACTIONS: &[(&str, &[Member], Read)] = &[
    ("abort", &[], |_| Ok(Action::Abort)),
    ("blockdev-snapshot", SNAPSHOT, snapshot),
    ("blockdev-snapshot-sync", SNAPSHOT_FILE, snapshot_file),
];

fn action(at: usize, mut tree: Map<String, Value>) -> Result<(String, Action), Failure> {
    let Some(Value::String(kind)) = tree.shift_remove("type") else {
        return Err(super::arguments::missing(&format!("actions[{at}].type")));
    };
    let found = ACTIONS.iter().find(|(name, ..)| *name == kind);
    let Some((_, takes, read)) = found else {
        return Err(Failure::generic(format!("Parameter 'type' does not accept value '{kind}'")));
    };
    let data = match tree.shift_remove("data") {
        Some(Value::Object(data)) => data,
        None => return Err(super::arguments::missing(&format!("actions[{at}].data"))),
        Some(_) => return Err(super::arguments::wrong_type(&format!("actions[{at}].data"), "object")),
    };
    super::schema::check_at(&format!("actions[{at}].data."), takes, &data)?;
    Ok((kind, read(Arguments::new(data))?))
}

/// `transaction`.
pub(crate) async fn transaction(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let listed = arguments.list("actions")?;
    let mut properties = match arguments.all().shift_remove("properties") {
        Some(Value::Object(properties)) => properties,
        _ => Map::new(),
    };
    let grouped = properties.shift_remove("completion-mode").is_some_and(|mode| mode == "grouped");
    let mut actions = Vec::new();
    for (at, listed) in listed.into_iter().enumerate() {
        let Value::Object(tree) = listed else { continue };
        let (kind, action) = action(at, tree)?;
        if grouped && !matches!(action, Action::Abort) {
            let what = format!("Action '{kind}' does not support transaction property completion-mode = grouped");
            return Err(Failure::generic(what));
        }
        actions.push(action);
    }
    carry_out(engine, actions).await
}
