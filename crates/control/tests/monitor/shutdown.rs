//! The end, as clients of the monitors hear of it.

use crate::daemon::{Daemon, Hmp, Qmp};
use serde_json::json;

fn run(test: impl AsyncFnOnce(Daemon)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { test(Daemon::start().await).await });
}

async fn rest(client: &mut Qmp) -> Vec<String> {
    while let Some(message) = client.next().await {
        assert!(message.get("event").is_some(), "{message}");
        client.events.push(message);
    }
    client.told()
}

const CANCELLED: [&str; 5] = ["SHUTDOWN", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"];

#[test]
fn quit_is_answered_and_everything_it_causes_is_told() {
    run(async |daemon| {
        let mut client = daemon.qmp().await;
        let mut other = daemon.qmp().await;
        client.done("block-stream", json!({ "device": "top", "speed": 65536 })).await;
        other.until_status("top", "running").await;
        client.told();
        other.told();
        assert_eq!(client.done("quit", json!({})).await, json!({}));
        daemon.engine.quit_requested().await;
        let engine = daemon.engine.clone();
        let end = tokio::spawn(async move { engine.shut_down().await });
        let shutdown = client.until(|event| event["event"] == "SHUTDOWN").await;
        assert_eq!(shutdown["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
        assert_eq!(rest(&mut client).await, CANCELLED);
        assert_eq!(rest(&mut other).await, CANCELLED);
        end.await.unwrap().unwrap();
        assert!(!daemon.qmp_socket().exists() && !daemon.hmp_socket().exists());
    });
}

#[test]
fn a_signal_is_told_as_such_and_nobody_holds_the_end_up() {
    run(async |daemon| {
        let mut client = daemon.qmp().await;
        let mut greeted = daemon.greeted().await;
        let mut half = daemon.qmp().await;
        half.send("{\"execute\": ").await;
        let (mut hmp, _) = Hmp::connect(&daemon.hmp_socket()).await;
        daemon.engine.shut_down().await.unwrap();
        client.until(|event| event["event"] == "SHUTDOWN").await;
        assert_eq!(client.events[0]["data"]["reason"], "host-signal");
        assert!(client.next().await.is_none() && greeted.next().await.is_none());
        assert_eq!(rest(&mut half).await, ["SHUTDOWN"]);
        assert_eq!(hmp.up_to_prompt().await, "");
        assert!(!client.try_send("{\"execute\": \"query-version\"}").await || client.next().await.is_none());
    });
}

#[test]
fn people_may_quit_too() {
    run(async |daemon| {
        let (mut hmp, _) = Hmp::connect(&daemon.hmp_socket()).await;
        let mut client = daemon.qmp().await;
        hmp.say("quit").await;
        daemon.engine.quit_requested().await;
        daemon.engine.shut_down().await.unwrap();
        client.until(|event| event["event"] == "SHUTDOWN").await;
        assert_eq!(client.events[0]["data"]["reason"], "host-qmp-quit");
    });
}
