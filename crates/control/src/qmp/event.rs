//! Events as they stand on the wire.

use super::schema::{Kind, Member, may, needs};
use crate::{Ending, Happening, Stamped};
use job::Event;
use serde_json::{Value, json};

const CANCELLED: &[Member] = &[
    needs("type", Kind::Text),
    needs("device", Kind::Text),
    needs("len", Kind::Integer),
    needs("offset", Kind::Integer),
    needs("speed", Kind::Integer),
];

const COMPLETED: &[Member] = &[
    needs("type", Kind::Text),
    needs("device", Kind::Text),
    needs("len", Kind::Integer),
    needs("offset", Kind::Integer),
    needs("speed", Kind::Integer),
    may("error", Kind::Text),
];

/// Every event, and what it carries.
pub(super) const EVENTS: &[(&str, &[Member])] = &[
    ("JOB_STATUS_CHANGE", &[needs("id", Kind::Text), needs("status", Kind::Text)]),
    ("BLOCK_JOB_COMPLETED", COMPLETED),
    ("BLOCK_JOB_CANCELLED", CANCELLED),
    (
        "BLOCK_JOB_ERROR",
        &[
            needs("device", Kind::Text),
            needs("operation", Kind::Word(&["read", "write"])),
            needs("action", Kind::Word(&["ignore", "report", "stop"])),
        ],
    ),
    ("BLOCK_JOB_READY", CANCELLED),
    ("BLOCK_JOB_PENDING", &[needs("type", Kind::Text), needs("id", Kind::Text)]),
    (
        "BLOCK_WRITE_THRESHOLD",
        &[
            needs("node-name", Kind::Text),
            needs("amount-exceeded", Kind::Integer),
            needs("write-threshold", Kind::Integer),
        ],
    ),
    ("BLOCK_EXPORT_DELETED", &[needs("id", Kind::Text)]),
    ("SHUTDOWN", &[needs("guest", Kind::Flag), needs("reason", Kind::Text)]),
];

/// An event's message.
pub(crate) fn message(stamped: &Stamped) -> Value {
    let event = match &stamped.event {
        Happening::Job(event) => event,
        Happening::WriteThreshold { node, threshold, exceeded } => {
            let data = json!({ "node-name": node, "write-threshold": threshold, "amount-exceeded": exceeded });
            return named(stamped.seconds, stamped.microseconds, "BLOCK_WRITE_THRESHOLD", data);
        }
        Happening::ExportDeleted { id } => {
            return named(stamped.seconds, stamped.microseconds, "BLOCK_EXPORT_DELETED", json!({ "id": id }));
        }
    };
    let (name, data) = match event {
        Event::StatusChange { id, status } => ("JOB_STATUS_CHANGE", json!({ "status": status.name(), "id": id })),
        Event::Completed { id, kind, len, offset, speed, error } => {
            let mut data = progress(id, kind, *len, *offset, *speed);
            if let Some(error) = error {
                data["error"] = json!(error);
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        Event::Cancelled { id, kind, len, offset, speed } => {
            ("BLOCK_JOB_CANCELLED", progress(id, kind, *len, *offset, *speed))
        }
        Event::Ready { id, kind, len, offset, speed } => ("BLOCK_JOB_READY", progress(id, kind, *len, *offset, *speed)),
        Event::Error { id, write, action } => {
            let operation = if *write { "write" } else { "read" };
            ("BLOCK_JOB_ERROR", json!({ "device": id, "operation": operation, "action": action.name() }))
        }
        Event::Pending { id, kind } => ("BLOCK_JOB_PENDING", json!({ "type": kind, "id": id })),
    };
    named(stamped.seconds, stamped.microseconds, name, data)
}

/// The process begins to end.
pub(crate) fn shutdown(seconds: u64, microseconds: u32, why: Ending) -> Value {
    let reason = match why {
        Ending::HostQmpQuit => "host-qmp-quit",
        Ending::HostSignal => "host-signal",
    };
    named(seconds, microseconds, "SHUTDOWN", json!({ "guest": false, "reason": reason }))
}

fn named(seconds: u64, microseconds: u32, name: &str, data: Value) -> Value {
    json!({ "timestamp": { "seconds": seconds, "microseconds": microseconds }, "event": name, "data": data })
}

fn progress(id: &str, kind: &str, len: u64, offset: u64, speed: u64) -> Value {
    json!({ "device": id, "len": len, "offset": offset, "speed": speed, "type": kind })
}
