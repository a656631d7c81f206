//! Clients that do harm, and those who must not notice.

use crate::daemon::with_daemon;
use serde_json::json;

#[test]
fn half_a_message_and_a_silent_client_hold_nobody_up() {
    with_daemon(async |daemon| {
        let mut half = daemon.qmp().await;
        half.send("{\"execute\": \"query-vers").await;
        let _silent = daemon.greeted().await;
        let mut good = daemon.qmp().await;
        good.done("query-version", json!({})).await;
        half.send("ion\"}").await;
        assert!(half.receive().await["return"]["qemu"].is_object());
    });
}

#[test]
fn commands_without_number_are_all_answered_in_order() {
    with_daemon(async |daemon| {
        let mut flood = daemon.qmp().await;
        let mut good = daemon.qmp().await;
        let many: Vec<String> = (0..5000).map(|id| json!({ "execute": "query-name", "id": id }).to_string()).collect();
        flood.send_apart(many.concat());
        let read = async {
            for id in 0..5000 {
                assert_eq!(flood.receive().await["id"], id);
                if id % 1000 == 0 {
                    good.done("query-version", json!({})).await;
                }
            }
        };
        read.await;
    });
}

#[test]
fn who_does_not_read_is_cut_off_without_gaps_and_others_go_on() {
    with_daemon(async |daemon| {
        let mut deaf = daemon.qmp().await;
        let mut good = daemon.qmp().await;
        let mut all = Vec::new();
        // More events than any queue and any socket buffer takes.
        for round in 0..2000 {
            let id = format!("j{round}");
            good.done("block-stream", json!({ "job-id": id, "device": "plain" })).await;
            good.until_status(&id, "null").await;
            all.append(&mut good.events);
        }
        assert!(all.len() >= 14_000);
        let mut heard = 0;
        while let Some(event) = deaf.next().await {
            assert_eq!(event, all[heard], "no gap at {heard}");
            heard += 1;
        }
        assert!(heard < all.len(), "it was cut off");
        // It may come back.
        let mut again = daemon.qmp().await;
        again.done("query-version", json!({})).await;
    });
}

#[test]
fn there_is_room_for_many_and_for_more_when_some_leave() {
    with_daemon(async |daemon| {
        let mut clients = Vec::new();
        for _ in 0..64 {
            clients.push(daemon.qmp().await);
        }
        let waiting = daemon.qmp();
        let leave = async {
            for client in clients.iter_mut().take(3) {
                client.done("query-version", json!({})).await;
            }
            clients.pop();
        };
        let (mut late, ()) = tokio::join!(waiting, leave);
        late.done("query-version", json!({})).await;
    });
}

#[test]
fn who_leaves_in_the_middle_of_anything_is_forgotten() {
    with_daemon(async |daemon| {
        for sent in ["", "{", "{\"execute\": \"qmp_capabilities\"}", "{\"execute\": \"query-version\"} {", "[[["] {
            let mut client = daemon.greeted().await;
            client.send(sent).await;
        }
        let mut good = daemon.qmp().await;
        good.done("block-stream", json!({ "job-id": "k", "device": "plain" })).await;
        good.until_status("k", "null").await;
    });
}
