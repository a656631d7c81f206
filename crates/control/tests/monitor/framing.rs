//! Negotiation, and what a client may and may not send.

use crate::daemon::{Qmp, with_daemon};
use serde_json::{Value, json};

async fn error(client: &mut Qmp, text: impl AsRef<[u8]>) -> String {
    client.send(text).await;
    let answer = client.receive().await;
    assert_eq!(answer["error"]["class"], "GenericError", "{answer}");
    answer["error"]["desc"].as_str().unwrap().to_owned()
}

#[test]
fn negotiation_comes_first_and_once() {
    with_daemon(async |daemon| {
        let mut client = Qmp::connect(&daemon.qmp_socket()).await;
        let greeting = client.receive().await;
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
        let early = client.refused("query-version", json!({})).await;
        assert_eq!(early, "CommandNotFound: Expecting capabilities negotiation with 'qmp_capabilities'");
        for bad in [json!({ "enable": 1 }), json!({ "enable": ["x"] }), json!({ "enable": [1] }), json!({ "x": 1 })] {
            client.refused("qmp_capabilities", bad).await;
        }
        assert_eq!(client.done("qmp_capabilities", json!({ "enable": [] })).await, json!({}));
        let late = client.refused("qmp_capabilities", json!({})).await;
        assert_eq!(late, "CommandNotFound: Capabilities negotiation is already complete, command ignored");
    });
}

/// A client that has enabled `oob` is read while its commands wait, and no further than their number allows.
#[test]
fn what_overtakes_is_answered_while_others_wait() {
    with_daemon(async |daemon| {
        let mut client = Qmp::connect(&daemon.qmp_socket()).await;
        client.receive().await;
        client.done("qmp_capabilities", json!({ "enable": ["oob"] })).await;
        // A server that never greets keeps the first one waiting.
        let path = daemon.dir.path().join("silent");
        let silent = tokio::net::UnixListener::bind(&path).unwrap();
        let slow = json!({ "driver": "nbd", "node-name": "n", "server": { "type": "unix", "path": path } });
        client.send(json!({ "execute": "blockdev-add", "arguments": slow, "id": "slow" }).to_string()).await;
        for n in 0..3 {
            client.send(json!({ "execute": "query-version", "id": n }).to_string()).await;
        }
        client.send(json!({ "exec-oob": "query-version", "id": "fast" }).to_string()).await;
        let first = client.receive().await;
        let error = json!({ "class": "GenericError", "desc": "The command query-version does not support OOB" });
        assert_eq!(first, json!({ "error": error, "id": "fast" }));
        // More than may wait: the rest stays unread, this one too.
        for n in 3..100 {
            client.send(json!({ "execute": "query-version", "id": n }).to_string()).await;
        }
        client.send(json!({ "exec-oob": "nonsense", "id": "last" }).to_string()).await;
        drop(silent);
        assert_eq!(client.receive().await["id"], "slow");
        let mut ids = Vec::new();
        for _ in 0..101 {
            ids.push(client.receive().await["id"].clone());
        }
        let at = ids.iter().position(|id| id == "last").unwrap();
        assert!(at > 80, "it overtakes what waits with it, no more: {at}");
        ids.remove(at);
        assert!(ids.iter().enumerate().all(|(at, id)| *id == at), "in their order: {ids:?}");
    });
}

#[test]
fn messages_come_in_any_shape() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let version = client.done("query-version", json!({})).await;
        // No line end, single quotes, an id of any kind.
        client.send("{'execute':'query-version','id':'x\\'y'}").await;
        assert_eq!(client.receive().await, json!({ "return": version, "id": "x'y" }));
        // Several in one packet, spread over lines.
        client
            .send("{\"execute\"\n:\"query-name\"\n}{\"execute\":\"query-version\",\"id\":{\"a\":[1,null,1.5]}}")
            .await;
        assert!(client.receive().await["return"]["name"].is_string());
        assert_eq!(client.receive().await["id"], json!({ "a": [1, null, 1.5] }));
        client.send(r#"{"execute": "query-name", "id": null}"#).await;
        assert_eq!(client.receive().await.get("id"), Some(&Value::Null));
        // Byte by byte.
        for byte in br#" {"execute": "query-status", "arguments": {}}"# {
            client.send([*byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(client.receive().await, json!({ "return": { "status": "running", "running": true } }));
        // An error echoes the id, too.
        client.send(r#"{"execute": "nosuch", "id": 7}"#).await;
        let answer = client.receive().await;
        let error = json!({ "class": "CommandNotFound", "desc": "The command nosuch has not been found" });
        assert_eq!(answer, json!({ "error": error, "id": 7 }));
    });
}

#[test]
fn mistakes_are_named_in_qemus_words_and_cost_one_error() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        for (sent, said) in [
            ("[]", "QMP input must be a JSON object"),
            ("7\n", "QMP input must be a JSON object"),
            ("\"x\"", "QMP input must be a JSON object"),
            ("{\"a\":}", "JSON parse error, expecting value"),
            ("}", "JSON parse error, expecting value"),
            ("xyz\n", "JSON parse error, invalid keyword 'xyz'"),
            ("{\"a\":1,\"a\":2}", "JSON parse error, duplicate key"),
            ("{\"a\":\"\\ud800\"}", "JSON parse error, \\ud800 is not a valid Unicode character"),
            ("%", "JSON parse error, stray '%'"),
            ("{}", "QMP input lacks member 'execute'"),
            ("{\"exec\":7}", "QMP input member 'exec' is unexpected"),
            ("{\"execute\":7}", "QMP input member 'execute' must be a string"),
            ("{\"execute\":\"query-version\",\"foo\":7}", "QMP input member 'foo' is unexpected"),
            ("{\"exec-oob\":\"query-version\"}", "QMP input member 'exec-oob' is unexpected"),
            ("{\"execute\":\"query-version\",\"arguments\":7}", "QMP input member 'arguments' must be an object"),
            ("{\"execute\":\"query-version\",\"arguments\":{\"x\":1}}", "Parameter 'x' is unexpected"),
        ] {
            assert_eq!(error(&mut client, sent).await, said, "{sent}");
            client.done("query-version", json!({})).await;
        }
    });
}

#[test]
fn a_client_that_has_lost_the_thread_finds_it_again() {
    with_daemon(async |daemon| {
        for lost in ["{\"execute\": \"que", "[[[{\"a\": [", "'", "{'a': 'b\\"] {
            let mut client = daemon.qmp().await;
            client.send(lost).await;
            assert!(error(&mut client, [0xff]).await.starts_with("JSON parse error"), "{lost}");
            client.done("query-version", json!({})).await;
        }
    });
}

#[test]
fn what_is_too_deep_or_too_long_is_refused() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        assert_eq!(error(&mut client, [b'['; 1025]).await, "JSON nesting depth limit exceeded");
        client.done("query-version", json!({})).await;
        // Answers come while it is still being sent.
        let long = vec![b'x'; 5 << 20];
        client.send("\"").await;
        let said = error(&mut client, &long).await;
        assert_eq!(said, "JSON token size limit exceeded");
        assert!(error(&mut client, "\n").await.starts_with("JSON parse error"));
        client.done("query-version", json!({})).await;
    });
}

#[test]
fn a_message_of_a_thousand_members_is_one_error() {
    with_daemon(async |daemon| {
        let mut client = daemon.qmp().await;
        let members: Vec<String> = (0..1000).map(|n| format!(",\"m{n}\":[{n}]")).collect();
        let said = error(&mut client, format!("{{\"execute\":\"query-version\"{}}}", members.concat())).await;
        assert_eq!(said, "QMP input member 'm0' is unexpected");
        let deep = format!("{{\"execute\":\"query-name\",\"id\":{}1{}}}", "[".repeat(1000), "]".repeat(1000));
        client.send(deep).await;
        // The answer nests as deeply as the question; it is enough that it comes back whole.
        assert!(client.answer_text().await.ends_with(&format!("1{}}}\r\n", "]".repeat(1000))));
    });
}
