//! Whose business a command is.
//!
//! **Invariant.** A command that names something of ours never reaches QEMU as if it were QEMU's own: it is carried out here, or refused.
//! A command that names nothing of ours goes to QEMU as it is.

use serde_json::{Map, Value};

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// QEMU, as it is.
    Emulator,
    /// We, whatever it names.
    Ours,
    /// Both, and the answers are put together.
    Merged(Merged),
    /// Whoever has the job that this argument names.
    Job(&'static str),
    /// Whoever has the export that this argument names.
    Export(&'static str),
    /// Both have to do something.
    Both(Shared),
    /// QEMU, unless a disk of the machine is ours: it is about the machine's whole state, and what is in our disks is none of QEMU's.
    Whole,
    /// Whoever has what it names.
    Named,
}

/// Answers that both have a part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Merged {
    /// `query-block`.
    Devices,
    /// `query-named-block-nodes`.
    Nodes,
    /// `query-blockstats`.
    Stats,
    /// `query-commands`.
    Commands,
    /// `query-qmp-schema`.
    Schema,
    /// Lists of which the one is appended to the other.
    Lists,
    /// Whoever knows what is named, or both.
    Either,
}

/// What both have to do something for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shared {
    /// `blockdev-add`.
    AddNode,
    /// `blockdev-del`.
    RemoveNode,
    /// `device_add`: a device may have one of our nodes for its drive.
    AddDevice,
    /// `blockdev-insert-medium`: so may a drive that is there.
    InsertMedium,
    /// `block_resize`.
    Resize,
    /// `object-add`: QEMU and our nodes may both refer to it.
    AddObject,
    /// `object-del`.
    RemoveObject,
    /// `human-monitor-command`.
    Line,
}

/// Arguments that name devices and nodes, wherever they stand in a command.
const NAMES: [&str; 13] = [
    "device",
    "node",
    "node-name",
    "target",
    "top",
    "top-node",
    "base-node",
    "bottom",
    "overlay",
    "snapshot-node",
    "snapshot-node-name",
    "image-node-name",
    "source",
];

/// Whose business `command` is.
pub(super) fn route(command: &str) -> Route {
    match command {
        "query-block" => Route::Merged(Merged::Devices),
        "query-named-block-nodes" => Route::Merged(Merged::Nodes),
        "query-blockstats" => Route::Merged(Merged::Stats),
        "query-commands" => Route::Merged(Merged::Commands),
        "query-qmp-schema" => Route::Merged(Merged::Schema),
        "query-jobs" | "query-block-jobs" | "query-block-exports" => Route::Merged(Merged::Lists),
        "trace-event-get-state" | "trace-event-set-state" => Route::Merged(Merged::Either),
        "blockdev-add" => Route::Both(Shared::AddNode),
        "blockdev-del" => Route::Both(Shared::RemoveNode),
        "device_add" => Route::Both(Shared::AddDevice),
        "blockdev-insert-medium" => Route::Both(Shared::InsertMedium),
        "block_resize" => Route::Both(Shared::Resize),
        "object-add" => Route::Both(Shared::AddObject),
        "object-del" => Route::Both(Shared::RemoveObject),
        "human-monitor-command" => Route::Both(Shared::Line),
        "migrate" | "migrate-incoming" | "snapshot-save" | "snapshot-load" | "snapshot-delete" => Route::Whole,
        // The API of 2011, which QEMU itself has no more.
        "block_stream" | "block_job_cancel" | "block_job_set_speed" => Route::Ours,
        // One server: what is offered to the world is what we serve.
        "nbd-server-start" | "nbd-server-stop" => Route::Ours,
        "nbd-server-remove" => Route::Export("name"),
        "block-export-del" => Route::Export("id"),
        "block-job-set-speed" | "block-job-cancel" | "block-job-pause" | "block-job-resume" | "block-job-complete" => {
            Route::Job("device")
        }
        "block-job-finalize" | "block-job-dismiss" | "block-job-change" | "job-cancel" | "job-pause" | "job-resume"
        | "job-complete" | "job-finalize" | "job-dismiss" | "job-change" => Route::Job("id"),
        // They name a device of the guest, which is QEMU's, whoever has its disk.
        "block_set_io_throttle"
        | "block-latency-histogram-set"
        | "eject"
        | "blockdev-open-tray"
        | "blockdev-close-tray"
        | "blockdev-remove-medium"
        | "set-action"
        | "qom-get"
        | "qom-set"
        | "device_del" => Route::Emulator,
        // Our own additions.
        own if own.starts_with("x-headwater-") => Route::Ours,
        _ => Route::Named,
    }
}

/// Everything in `arguments` that stands where devices and nodes are named.
pub(super) fn named(arguments: &Map<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    gather(arguments, &mut found);
    found
}

fn gather(tree: &Map<String, Value>, found: &mut Vec<String>) {
    for (key, value) in tree {
        match value {
            Value::String(name) if NAMES.contains(&key.as_str()) => found.push(name.clone()),
            Value::Object(inner) => gather(inner, found),
            Value::Array(items) => {
                for item in items {
                    if let Value::Object(inner) = item {
                        gather(inner, found);
                    }
                }
            }
            _ => {}
        }
    }
}

/// What a line for people is about, if it may be ours: the command's first words, and the device or job it names.
pub(super) fn line_subject(line: &str) -> Option<(&str, Option<&str>)> {
    let mut words = line.split_whitespace().filter(|word| !word.starts_with('-'));
    match words.next()? {
        name @ ("block_stream"
        | "block_job_cancel"
        | "block_job_complete"
        | "block_job_pause"
        | "block_job_resume"
        | "block_job_set_speed") => Some((name, words.next())),
        name @ ("savevm" | "loadvm" | "delvm" | "migrate" | "migrate_incoming") => Some((name, words.next())),
        "info" => match words.next()? {
            "block-jobs" => Some(("info block-jobs", None)),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_are_found_at_any_depth() {
        let Value::Object(tree) = json!({"actions": [
            {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "b"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "c", "name": "not-a-node"}},
        ], "properties": {"completion-mode": "grouped"}}) else {
            panic!("no object")
        };
        assert_eq!(named(&tree), ["a", "b", "c"]);
    }

    #[test]
    fn lines_for_people() {
        assert_eq!(line_subject("block_job_cancel -f virtio0"), Some(("block_job_cancel", Some("virtio0"))));
        assert_eq!(line_subject("  info   block-jobs "), Some(("info block-jobs", None)));
        assert_eq!(line_subject("info block"), None);
        assert_eq!(line_subject("savevm a"), Some(("savevm", Some("a"))));
        assert_eq!(line_subject("migrate -d tcp:h:1"), Some(("migrate", Some("tcp:h:1"))));
        assert_eq!(line_subject("stop"), None);
        assert_eq!(line_subject(""), None);
    }

    #[test]
    fn what_is_no_disk_is_qemus() {
        assert_eq!(route("stop"), Route::Named);
        assert_eq!(route("device_del"), Route::Emulator);
        assert_eq!(route("job-cancel"), Route::Job("id"));
    }
}
