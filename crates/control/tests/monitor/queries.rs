//! What is served, as QMP shows it.

use crate::daemon::{MIB, with_daemon};
use serde_json::json;

#[test]
fn query_block_shows_the_chain() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let block = client.done("query-block", json!({})).await;
        let devices: Vec<_> = block.as_array().unwrap().iter().map(|entry| entry["device"].clone()).collect();
        assert_eq!(devices, ["top", "plain"]);
        let inserted = &block[0]["inserted"];
        assert_eq!((&inserted["drv"], &inserted["ro"]), (&json!("qed"), &json!(false)));
        assert_eq!(inserted["file"], json!(daemon.dir.path().join("top.qed")));
        assert_eq!((&inserted["backing_file"], &inserted["backing_file_depth"]), (&json!("mid.qed"), &json!(2)));
        let image = &inserted["image"];
        assert_eq!((&image["virtual-size"], &image["cluster-size"]), (&json!(8 * MIB), &json!(65536)));
        assert_eq!(image["backing-image"]["backing-image"]["format"], "raw");
        assert_eq!(block[1]["inserted"]["drv"], "raw");
        assert!(block[1]["inserted"].get("backing_file").is_none());
    });
}

#[test]
fn nodes_are_listed_top_first_and_flat_if_asked() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let nodes = client.done("query-named-block-nodes", json!({})).await;
        let drivers: Vec<_> = nodes.as_array().unwrap().iter().map(|node| node["drv"].clone()).collect();
        assert_eq!(drivers, ["qed", "qed", "raw", "raw"]);
        assert!(nodes[0]["image"].get("backing-image").is_some());
        let flat = client.done("query-named-block-nodes", json!({ "flat": true })).await;
        assert!(flat[0]["image"].get("backing-image").is_none());
        let wrong = client.refused("query-named-block-nodes", json!({ "flat": 1 })).await;
        assert_eq!(wrong, "GenericError: Invalid parameter type for 'flat', expected: boolean");
    });
}

#[test]
fn blockstats_count_what_a_stream_fetches() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        client.done("block-stream", json!({ "device": "top" })).await;
        client.until_status("top", "null").await;
        let stats = client.done("query-blockstats", json!({})).await;
        assert_eq!(stats.as_array().map(Vec::len), Some(2));
        assert_eq!(stats[0]["device"], "top");
        assert_eq!(stats[0]["stats"]["x-headwater-fetched-bytes"], json!(8 * MIB));
        assert_eq!((&stats[0]["stats"]["rd_bytes"], &stats[0]["stats"]["wr_operations"]), (&json!(0), &json!(0)));
        let by_node = client.done("query-blockstats", json!({ "query-nodes": true })).await;
        assert!(by_node[0].get("device").is_none() && by_node[0]["node-name"].is_string());
    });
}

#[test]
fn every_command_that_is_listed_is_there() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let names = client.done("query-commands", json!({})).await;
        let names: Vec<String> =
            names.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect();
        for needed in
            ["block_stream", "block-stream", "job-dismiss", "query-block-jobs", "quit", "human-monitor-command"]
        {
            assert!(names.iter().any(|name| name == needed), "{needed}");
        }
        for name in names.iter().filter(|name| *name != "qmp_capabilities") {
            let said = client.refused(name, json!({ "no-such-argument": 1 })).await;
            assert!(said.starts_with("GenericError: Parameter '"), "{name}: {said}");
        }
    });
}

#[test]
fn the_human_monitor_answers_in_a_string() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let said = client.done("human-monitor-command", json!({ "command-line": "info block-jobs" })).await;
        assert_eq!(said, "No active jobs\r\n");
        let said = client.done("human-monitor-command", json!({ "command-line": "foo", "cpu-index": 0 })).await;
        assert_eq!(said, "unknown command: 'foo'\r\n");
        client.done("human-monitor-command", json!({ "command-line": "block_stream plain" })).await;
        client.until_status("plain", "null").await;
    });
}
