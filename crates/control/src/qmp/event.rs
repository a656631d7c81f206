//! Events as they stand on the wire.

use crate::Stamped;
use job::{ErrorAction, Event, Status};
use serde_json::{Value, json};

/// A job's status in QMP's words.
pub(crate) fn status_name(status: Status) -> &'static str {
    match status {
        Status::Undefined => "undefined",
        Status::Created => "created",
        Status::Running => "running",
        Status::Paused => "paused",
        Status::Ready => "ready",
        Status::Standby => "standby",
        Status::Waiting => "waiting",
        Status::Pending => "pending",
        Status::Aborting => "aborting",
        Status::Concluded => "concluded",
        Status::Null => "null",
    }
}

/// An event's message.
pub(crate) fn message(stamped: &Stamped) -> Value {
    let (name, data) = match &stamped.event {
        Event::StatusChange { id, status } => {
            ("JOB_STATUS_CHANGE", json!({ "status": status_name(*status), "id": id }))
        }
        Event::Completed { id, len, offset, speed, error } => {
            let mut data = progress(id, *len, *offset, *speed);
            if let Some(error) = error {
                data["error"] = json!(error);
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        Event::Cancelled { id, len, offset, speed } => ("BLOCK_JOB_CANCELLED", progress(id, *len, *offset, *speed)),
        Event::Error { id, write, action } => {
            let operation = if *write { "write" } else { "read" };
            let action = match action {
                ErrorAction::Ignore => "ignore",
                ErrorAction::Report => "report",
                ErrorAction::Stop => "stop",
            };
            ("BLOCK_JOB_ERROR", json!({ "device": id, "operation": operation, "action": action }))
        }
        Event::Pending { id } => ("BLOCK_JOB_PENDING", json!({ "type": "stream", "id": id })),
    };
    named(stamped.seconds, stamped.microseconds, name, data)
}

/// What the process says as its last.
pub(crate) fn shutdown(seconds: u64, microseconds: u32) -> Value {
    named(seconds, microseconds, "SHUTDOWN", json!({ "guest": false, "reason": "host-qmp-quit" }))
}

fn named(seconds: u64, microseconds: u32, name: &str, data: Value) -> Value {
    json!({ "timestamp": { "seconds": seconds, "microseconds": microseconds }, "event": name, "data": data })
}

fn progress(id: &str, len: u64, offset: u64, speed: u64) -> Value {
    json!({ "device": id, "len": len, "offset": offset, "speed": speed, "type": "stream" })
}
