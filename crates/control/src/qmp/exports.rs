//! Commands on exports and on the NBD server they may be offered on.

use super::arguments::Arguments;
use crate::{DoorSpec, Engine, ExportSpec, Failure};
use export::nbd::Address;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// An address as QAPI has it, in either form: `{"type": "unix", "path": …}` or with its data in `data`.
pub(crate) fn address(tree: Map<String, Value>) -> Result<Address, Failure> {
    let mut tree = tree;
    if let Some(Value::Object(data)) = tree.shift_remove("data") {
        tree.extend(data);
    }
    let mut fields = Arguments::new(tree);
    let missing = |name: &str| Failure::generic(format!("Parameter 'addr.{name}' is missing"));
    let kind = fields.string("type")?.ok_or_else(|| missing("type"))?;
    match kind.as_str() {
        "unix" => Ok(Address::Unix(fields.string("path")?.ok_or_else(|| missing("path"))?.into())),
        "inet" => {
            let host = fields.string("host")?.ok_or_else(|| missing("host"))?;
            let port = fields.string("port")?.ok_or_else(|| missing("port"))?;
            let number = port.parse().map_err(|_| Failure::generic(format!("'{port}' is no number of a TCP port")))?;
            Ok(Address::Tcp(if host.is_empty() { "0.0.0.0".to_owned() } else { host }, number))
        }
        "fd" => {
            let text = fields.string("str")?.ok_or_else(|| missing("str"))?;
            let number = text.parse().map_err(|_| Failure::generic(format!("File descriptor '{text}' not found")))?;
            Ok(Address::Inherited(number))
        }
        "vsock" => Err(Failure::generic("addresses of type 'vsock' are not supported: use unix, inet or fd")),
        _ => Err(Failure::generic(format!("Parameter 'addr.type' does not accept value '{kind}'"))),
    }
}

/// Refuses what would have to be enforced and cannot be yet.
fn no_tls(arguments: &mut Arguments) -> Result<(), Failure> {
    if arguments.string("tls-creds")?.is_some() || arguments.string("tls-authz")?.is_some() {
        return Err(Failure::generic("NBD over TLS is not there yet: leave out 'tls-creds' and 'tls-authz'"));
    }
    Ok(())
}

/// `nbd-server-start`.
pub(crate) async fn start_server(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    start_server_for(engine, arguments, false).await
}

/// The same; with `held` clients are not accepted yet.
pub(crate) async fn start_server_for(engine: &Engine, mut arguments: Arguments, held: bool) -> Result<Value, Failure> {
    no_tls(&mut arguments)?;
    let address = address(arguments.object("addr")?)?;
    let most = arguments.integer("max-connections")?.unwrap_or(0);
    let most =
        u32::try_from(most).map_err(|_| Failure::generic("'max-connections' is a number from 0 to 4294967295"))?;
    engine.on_nodes(move |shard| async move { shard.start_nbd_server(address, most, held).await.map(drop) }).await?;
    Ok(json!({}))
}

/// `nbd-server-stop`.
pub(crate) async fn stop_server(engine: &Engine, _: Arguments) -> Result<Value, Failure> {
    engine.on_nodes(|shard| async move { shard.stop_nbd_server().await }).await?;
    Ok(json!({}))
}

/// `nbd-server-add`: an export that has its name for an id.
pub(crate) async fn server_add(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let node = arguments.needed_string("device")?;
    let name = arguments.string("name")?.unwrap_or_else(|| node.clone());
    if arguments.string("bitmap")?.is_some() {
        return Err(no_bitmaps());
    }
    let door = DoorSpec::Nbd { name: Some(name.clone()), description: arguments.string("description")? };
    let writable = arguments.boolean("writable")?.unwrap_or(false);
    let spec = ExportSpec { id: name, node: node.clone(), writable, write_through: false, door };
    let added = engine.on_nodes(move |shard| async move {
        if shard.has_nbd_server() && !shard.graph().has(&node) {
            return Err(Failure::no_device(&node));
        }
        shard.add_export(spec).await
    });
    added.await.map(|()| json!({}))
}

/// `nbd-server-remove`.
pub(crate) async fn server_remove(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let name = arguments.needed_string("name")?;
    let hard = arguments.string("mode")?.as_deref() == Some("hard");
    let removed = engine.on_nodes(move |shard| async move {
        let id = shard.nbd_export(&name);
        let id = id.ok_or_else(|| Failure::generic(format!("Export '{name}' is not found")))?;
        shard.remove_export(&id, hard).await
    });
    removed.await.map(|()| json!({}))
}

fn no_bitmaps() -> Failure {
    Failure::generic("Bitmaps are not exported here")
}

/// An export, from `block-export-add` or `--export`.
///
/// # Errors
/// In QEMU's words, where something is missing or makes no sense.
pub(crate) fn export_spec(mut arguments: Arguments) -> Result<ExportSpec, Failure> {
    let kind = arguments.needed_string("type")?;
    let id = arguments.needed_string("id")?;
    let node = arguments.needed_string("node-name")?;
    let well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if !well_formed {
        return Err(Failure::generic("Invalid block export id"));
    }
    let writable = arguments.boolean("writable")?.unwrap_or(false);
    // Which of QEMU's threads serves it: ours are the disk's.
    arguments.string("iothread")?;
    arguments.boolean("fixed-iothread")?;
    let write_through = arguments.boolean("writethrough")?.unwrap_or(false);
    arguments.boolean("allow-inactive")?;
    let door = match kind.as_str() {
        "nbd" => {
            if !arguments.list("bitmaps")?.is_empty() || arguments.string("bitmap")?.is_some() {
                return Err(no_bitmaps());
            }
            arguments.boolean("allocation-depth")?;
            DoorSpec::Nbd { name: arguments.string("name")?, description: arguments.string("description")? }
        }
        "vhost-user-blk" => {
            let socket: PathBuf = match address(arguments.object("addr")?)? {
                Address::Unix(path) => path,
                Address::Tcp(..) | Address::Inherited(_) => {
                    return Err(Failure::generic("vhost-user-blk is offered on unix sockets only"));
                }
            };
            let queues = arguments.integer("num-queues")?.unwrap_or(1);
            let queues = u16::try_from(queues).ok().filter(|queues| *queues > 0);
            let queues = queues.ok_or_else(|| Failure::generic("num-queues must be greater than 0"))?;
            if let Some(size) = arguments.integer("logical-block-size")?
                && size != 512
            {
                return Err(Failure::generic("logical-block-size is 512 here: guests are served by the byte"));
            }
            DoorSpec::VhostUser { socket, queues }
        }
        other => {
            return Err(Failure::generic(format!("Parameter 'type' does not accept value '{other}'")));
        }
    };
    arguments.end()?;
    Ok(ExportSpec { id, node, writable, write_through, door })
}

/// `block-export-add`.
pub(crate) async fn add(engine: &Engine, arguments: Arguments) -> Result<Value, Failure> {
    let spec = export_spec(arguments)?;
    engine.on_nodes(move |shard| async move { shard.add_export(spec).await }).await?;
    Ok(json!({}))
}

/// `block-export-del`.
pub(crate) async fn remove(engine: &Engine, mut arguments: Arguments) -> Result<Value, Failure> {
    let id = arguments.needed_string("id")?;
    let hard = arguments.string("mode")?.as_deref() == Some("hard");
    engine.on_nodes(move |shard| async move { shard.remove_export(&id, hard).await }).await?;
    Ok(json!({}))
}

/// `query-block-exports`.
pub(crate) async fn query(engine: &Engine, _: Arguments) -> Result<Value, Failure> {
    let exports = engine.on_nodes(|shard| std::future::ready(Ok(shard.list_exports()))).await?;
    let shown = exports.into_iter().map(
        |export| json!({ "node-name": export.node, "shutting-down": false, "type": export.kind, "id": export.id }),
    );
    Ok(shown.collect())
}
