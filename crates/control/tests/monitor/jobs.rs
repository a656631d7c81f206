//! Jobs by QMP: the API of 2011, today's, and the refusals of both.

use crate::daemon::{MIB, with_daemon};
use serde_json::json;

#[test]
fn the_api_of_2011_to_the_letter() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let unknown = client.refused("block_stream", json!({ "device": "nosuch" })).await;
        assert_eq!(unknown, "DeviceNotFound: Cannot find device='nosuch' nor node-name='nosuch'");
        for (command, more) in [("block_job_cancel", json!({})), ("block_job_set_speed", json!({ "value": 1 }))] {
            let mut arguments = json!({ "device": "top" });
            arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            assert_eq!(client.refused(command, arguments).await, "DeviceNotActive: Block job 'top' not found");
        }
        assert_eq!(client.done("query-block-jobs", json!({})).await, json!([]));

        // Nothing is copied yet when the speed is set: the first cluster may be there.
        assert_eq!(client.done("block_stream", json!({ "device": "top" })).await, json!({}));
        client.done("block_job_cancel", json!({ "device": "top" })).await;
        client.until_status("top", "null").await;
        client.told();

        client.done("block-stream", json!({ "device": "top", "speed": 65536 })).await;
        client.done("block_job_set_speed", json!({ "device": "top", "value": 131_072 })).await;
        let jobs = client.done("query-block-jobs", json!({})).await;
        let job = &jobs[0];
        assert_eq!((&job["type"], &job["device"], &job["speed"]), (&json!("stream"), &json!("top"), &json!(131_072)));
        assert!(job["len"].as_u64().unwrap() <= 8 * MIB && job["offset"].as_u64() < job["len"].as_u64(), "{job}");
        let twice = client.refused("block_stream", json!({ "device": "top" })).await;
        assert_eq!(twice, "DeviceInUse: Node 'top' is busy: block device is in use by block job: stream");
        client.done("block_job_cancel", json!({ "device": "top" })).await;
        let cancelled = client.until(|event| event["event"] == "BLOCK_JOB_CANCELLED").await["data"].clone();
        for member in ["type", "device", "len", "offset", "speed"] {
            assert!(!cancelled[member].is_null(), "{cancelled}");
        }
        client.until_status("top", "null").await;
        client.told();

        client.done("block_stream", json!({ "device": "top", "base": daemon.dir.path().join("base.img") })).await;
        client.until(|event| event["event"] == "BLOCK_JOB_COMPLETED").await;
        client.until_status("top", "null").await;
        client.told();
        client.done("block_stream", json!({ "device": "top" })).await;
        let done = client.until(|event| event["event"] == "BLOCK_JOB_COMPLETED").await;
        assert!(done["data"].get("error").is_none() && done["data"]["len"] == done["data"]["offset"], "{done}");
        assert!(
            done["timestamp"]["seconds"].as_u64() > Some(1_600_000_000) && done["timestamp"]["microseconds"].is_u64()
        );
        client.until_status("top", "null").await;
        let block = client.done("query-block", json!({})).await;
        assert_eq!((&block[0]["device"], &block[0]["inserted"]["backing_file_depth"]), (&json!("top"), &json!(0)));
    });
}

#[test]
fn a_job_by_hand_from_its_start_to_its_end() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let start = json!({
            "job-id": "j1", "device": "top", "speed": 65536, "on-error": "enospc",
            "auto-finalize": false, "auto-dismiss": false,
        });
        client.done("block-stream", start).await;
        assert_eq!(client.told(), ["created", "running"], "before the answer");
        for command in ["block-job-complete", "block-job-resume"] {
            client.refused(command, json!({ "device": "j1" })).await;
        }
        client.done("block-job-pause", json!({ "device": "j1" })).await;
        client.until_status("j1", "paused").await;
        let again = client.refused("job-pause", json!({ "id": "j1" })).await;
        assert_eq!(again, "GenericError: Job is already paused");
        let paused = client.refused("block-job-cancel", json!({ "device": "j1" })).await;
        assert_eq!(paused, "GenericError: The block job for device 'j1' is currently paused");
        client.done("block-job-set-speed", json!({ "device": "j1", "speed": 0 })).await;
        client.told();
        client.done("job-resume", json!({ "id": "j1" })).await;
        assert_eq!(client.told(), ["running"]);
        client.until(|event| event["event"] == "BLOCK_JOB_PENDING").await;
        assert_eq!(client.told(), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
        let early = client.refused("job-dismiss", json!({ "id": "j1" })).await;
        assert_eq!(early, "GenericError: Job 'j1' in state 'pending' cannot accept command verb 'dismiss'");
        client.done("job-finalize", json!({ "id": "j1" })).await;
        client.until_status("j1", "concluded").await;
        assert_eq!(client.told(), ["BLOCK_JOB_COMPLETED", "concluded"]);
        let jobs = client.done("query-jobs", json!({})).await;
        let whole = json!(8 * MIB);
        assert_eq!(
            jobs,
            json!([{ "id": "j1", "type": "stream", "status": "concluded", "current-progress": whole, "total-progress": whole }])
        );
        let block_jobs = client.done("query-block-jobs", json!({})).await;
        assert_eq!(
            block_jobs,
            json!([{
                "type": "stream", "device": "j1", "len": whole, "offset": whole, "speed": 0, "busy": false,
                "paused": false, "ready": false, "io-status": "ok", "status": "concluded",
                "auto-finalize": false, "auto-dismiss": false,
            }])
        );
        client.done("block-job-dismiss", json!({ "id": "j1" })).await;
        assert_eq!(client.told(), ["null"]);
        assert_eq!(
            client.refused("block-job-dismiss", json!({ "id": "j1" })).await,
            "DeviceNotActive: Block job 'j1' not found"
        );
        assert_eq!(client.refused("job-dismiss", json!({ "id": "j1" })).await, "GenericError: Job not found");
    });
}

#[test]
fn a_cancelled_job_says_so() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        client.done("block-stream", json!({ "device": "top", "speed": 65536, "auto-dismiss": false })).await;
        client.done("job-cancel", json!({ "id": "top" })).await;
        client.until_status("top", "concluded").await;
        assert_eq!(client.told(), ["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded"]);
        assert_eq!(client.done("query-jobs", json!({})).await[0]["error"], "Operation canceled");
        client.done("job-dismiss", json!({ "id": "top" })).await;
    });
}

#[test]
fn arguments_are_checked_in_qemus_words() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let missing = client.refused("block-stream", json!({})).await;
        assert_eq!(missing, "GenericError: Parameter 'device' is missing");
        let unknown = client.refused("block-stream", json!({ "device": "nosuch" })).await;
        assert_eq!(unknown, "GenericError: Cannot find device='nosuch' nor node-name='nosuch'");
        let nodes = client.done("query-named-block-nodes", json!({})).await;
        let node = |at: usize| nodes[at]["node-name"].as_str().unwrap().to_owned();
        let (top, mid, plain) = (node(0), node(1), node(3));
        for (name, value, said) in [
            ("device", json!(7), "Invalid parameter type for 'device', expected: string".to_owned()),
            ("speed", json!("x"), "Invalid parameter type for 'speed', expected: integer".into()),
            ("speed", json!(-1), "Parameter 'speed' expects a non-negative value".into()),
            ("speed", json!(1.5), "Invalid parameter type for 'speed', expected: integer".into()),
            ("speed", json!(u64::MAX), "Invalid parameter type for 'speed', expected: integer".into()),
            ("on-error", json!("x"), "Parameter 'on-error' does not accept value 'x'".into()),
            ("on-error", json!(7), "Invalid parameter type for 'on-error', expected: string".into()),
            ("auto-finalize", json!(7), "Invalid parameter type for 'auto-finalize', expected: boolean".into()),
            ("job-id", json!("1x"), "Invalid job ID '1x'".into()),
            ("base", json!("nosuch"), "Can't find 'nosuch' in the backing chain".into()),
            ("base-node", json!("nosuch"), "Cannot find device='' nor node-name='nosuch'".into()),
            ("bottom", json!("nosuch"), "Cannot find device='' nor node-name='nosuch'".into()),
            ("base-node", json!(top), format!("Node '{top}' is not a backing image of 'top'")),
            ("base-node", json!(plain), format!("Node '{plain}' is not a backing image of 'top'")),
            ("backing-file", json!("x"), "backing file specified, but streaming the entire chain".into()),
            ("foo", json!(7), "Parameter 'foo' is unexpected".into()),
        ] {
            let mut arguments = json!({ "device": "top" });
            arguments[name] = value;
            assert_eq!(client.refused("block-stream", arguments).await, format!("GenericError: {said}"));
        }
        for (first, second, said) in [
            ("base", "base-node", "'base' and 'base-node' cannot be specified at the same time"),
            ("base-node", "bottom", "'bottom' and 'base-node' cannot be specified at the same time"),
        ] {
            let arguments = json!({ "device": "top", first: mid, second: mid });
            assert_eq!(client.refused("block-stream", arguments).await, format!("GenericError: {said}"));
        }
        let below = client.refused("block-stream", json!({ "device": mid })).await;
        assert!(below.contains("only the top of a chain"), "{below}");
        let set = client.refused("block-job-set-speed", json!({ "device": "nosuch", "speed": 1 })).await;
        assert_eq!(set, "DeviceNotActive: Block job 'nosuch' not found");
        assert!(client.told().is_empty(), "nothing was started");
    });
}

#[test]
fn nodes_name_the_top_the_base_and_the_bottom() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let nodes = client.done("query-named-block-nodes", json!({ "flat": true })).await;
        let node = |at: usize| nodes[at]["node-name"].clone();
        // Down to and with the middle: the base stays.
        client
            .done("block-stream", json!({ "device": node(0), "bottom": node(1), "backing-file": "renamed.img" }))
            .await;
        client.until_status("top", "null").await;
        let after = client.done("query-block", json!({})).await;
        assert_eq!(after[0]["inserted"]["backing_file"], "renamed.img");
        client.told();
        client.done("block-stream", json!({ "device": "top", "base-node": node(2) })).await;
        client.until_status("top", "null").await;
        client.told();
        client.done("block-stream", json!({ "device": "top", "bottom": node(2) })).await;
        client.until_status("top", "null").await;
        let after = client.done("query-block", json!({})).await;
        assert!(after[0]["inserted"].get("backing_file").is_none(), "{after}");
    });
}

#[test]
fn ids_are_unique_whatever_shard_the_disk_is_on() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        client.done("block-stream", json!({ "job-id": "j", "device": "top", "speed": 65536 })).await;
        let taken = client.refused("block-stream", json!({ "job-id": "j", "device": "plain" })).await;
        assert_eq!(taken, "GenericError: Job ID 'j' already in use");
        client.done("block-stream", json!({ "job-id": "k", "device": "plain" })).await;
        client.until_status("k", "null").await;
        let jobs = client.done("query-jobs", json!({})).await;
        assert_eq!(jobs.as_array().map(Vec::len), Some(1));
    });
}

#[test]
fn every_client_hears_every_event_but_only_after_negotiation() {
    with_daemon(async |daemon| {
        let mut first = daemon.qmp().await;
        let mut second = daemon.qmp().await;
        let mut silent = daemon.greeted().await;
        first.done("block-stream", json!({ "job-id": "k", "device": "plain" })).await;
        first.until_status("k", "null").await;
        second.until_status("k", "null").await;
        assert_eq!(first.events, second.events);
        silent.send(r#"{"execute": "qmp_capabilities"}"#).await;
        assert_eq!(silent.receive().await, json!({ "return": {} }));
        first.told();
        first.done("block-stream", json!({ "job-id": "l", "device": "plain" })).await;
        silent.until_status("l", "null").await;
        assert!(silent.events.iter().all(|event| event["data"]["id"] != "k" && event["data"]["device"] != "k"));
    });
}
