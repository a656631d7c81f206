//! The monitor for people.

use crate::daemon::{Hmp, with_daemon};
use serde_json::json;
use std::fmt::Write;
use tokio::io::AsyncWriteExt;

/// Leaves out numbers that differ from run to run.
fn without_digits_after(marks: &[&str], text: &str) -> String {
    let mut out = text.to_owned();
    for mark in marks {
        let mut parts = out.split(mark);
        let mut next = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            next = next + mark + "N" + part.trim_start_matches(|c: char| c.is_ascii_digit());
        }
        out = next;
    }
    out
}

#[test]
fn a_session() {
    with_daemon(async |daemon| {
        let (mut hmp, greeting) = Hmp::connect(&daemon.hmp_socket()).await;
        let mut session = greeting;
        for line in [
            "help",
            "help block_stream",
            "help nosuch",
            "info",
            "info version",
            "info status",
            "info block",
            "info block plain",
            "info block nosuch",
            "info block -v",
            "info block-jobs",
            "info blockstats",
            "info nosuch",
            "info version extra",
            "",
            "foo",
            "block_stream",
            "block_stream nosuch",
            "block_stream top x",
            "block_stream top 0 nosuch",
            "block_stream top 0 mid.qed extra",
            "block_stream \"to",
            "block_job_cancel",
            "block_job_cancel -x top",
            "block_job_cancel -f",
            "block_job_cancel top",
            "block_job_set_speed top",
            "block_job_set_speed top 7xx",
            "block_job_set_speed top 1k",
            "block_job_complete top",
            "block_job_pause top",
        ] {
            let said = hmp.say(line).await;
            let _ = write!(session, "(qemu) {line}\r\n{said}");
        }
        let session = daemon.plain(&session).replace("\r\n", "\n").replace(env!("CARGO_PKG_VERSION"), "VERSION");
        insta::assert_snapshot!(without_digits_after(&["#block", "_ns="], &session));
    });
}

#[test]
fn a_stream_by_hand() {
    with_daemon(async |daemon| {
        let mut qmp = daemon.qmp().await;
        let (mut hmp, _) = Hmp::connect(&daemon.hmp_socket()).await;
        assert_eq!(hmp.say("block_stream top 64k").await, "");
        assert_eq!(hmp.say("block_job_pause top").await, "");
        qmp.until_status("top", "paused").await;
        let jobs = hmp.say("info block-jobs").await;
        assert!(jobs.starts_with("Streaming device top: Completed "), "{jobs}");
        assert!(jobs.ends_with(" of 8388608 bytes, speed limit 65536 bytes/s\r\n"), "{jobs}");
        assert_eq!(hmp.say("block_job_pause top").await, "Error: Job is already paused\r\n");
        let refused = hmp.say("block_job_cancel top").await;
        assert_eq!(refused, "Error: The block job for device 'top' is currently paused\r\n");
        assert_eq!(hmp.say("block_job_set_speed top 1.5M").await, "");
        assert_eq!(qmp.done("query-block-jobs", json!({})).await[0]["speed"], 1_572_864);
        assert_eq!(hmp.say("block_job_resume top").await, "");
        assert_eq!(hmp.say("block_job_cancel -f top").await, "");
        qmp.until_status("top", "null").await;
        assert_eq!(hmp.say("info block-jobs").await, "No active jobs\r\n");
    });
}

#[test]
fn odd_lines_harm_nobody() {
    with_daemon(async |daemon| {
        let (mut good, _) = Hmp::connect(&daemon.hmp_socket()).await;
        let (mut half, _) = Hmp::connect(&daemon.hmp_socket()).await;
        half.stream.write_all(b"info ver").await.unwrap();
        let (mut long, _) = Hmp::connect(&daemon.hmp_socket()).await;
        long.stream.write_all(&[b'x'; 5000]).await.unwrap();
        assert_eq!(long.up_to_prompt().await, "the line is too long\r\n");
        let (mut bytes, _) = Hmp::connect(&daemon.hmp_socket()).await;
        bytes.stream.write_all(b"\xff\xfe\x00\n").await.unwrap();
        assert!(bytes.up_to_prompt().await.starts_with("unknown command"));
        assert_eq!(good.say("info status\r").await, "VM status: running\r\n");
        half.stream.write_all(b"sion\n").await.unwrap();
        assert!(half.up_to_prompt().await.contains('.'));
    });
}
