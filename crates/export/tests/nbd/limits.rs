//! Nobody waits for somebody else, and nobody may have too much.

use crate::client::{Client, NONE, Style};
use crate::fixture::{Fixture, on_ring, pattern};
use nbd::client::Answer;
use nbd::proto::Command;
use std::time::Duration;

#[test]
fn a_slow_read_holds_nobody_up() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(1 << 20, 1)).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        fixture.store.hold();
        let slow = client.submit(Command::Read, NONE, 0, 4096, &[]).await;
        fixture.store.until_waiting(1).await;
        // The same connection, after the slow one.
        for at in 1..50 {
            client.write(NONE, at * 4096, &[3; 4096]).await.unwrap();
        }
        client.call(Command::Flush, NONE, 0, 0).await.unwrap();
        assert!(client.ended(slow).is_none());
        fixture.store.release();
        assert!(client.wait(slow).await.is_ok());
    });
}

#[test]
fn requests_in_flight_are_bounded() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(1 << 20, 2)).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        fixture.store.hold();
        let (mut cookies, mut bytes) = (Vec::new(), Vec::new());
        for at in 0..1000 {
            let (cookie, head) = client.begin(Command::Read, at * 512, 512);
            cookies.push((cookie, at as usize * 512));
            bytes.extend(head);
        }
        client.raw(&bytes).await.unwrap();
        fixture.store.until_waiting(128).await;
        ring::sleep(Duration::from_millis(20)).await;
        assert_eq!(fixture.store.waiting.get(), 128);
        fixture.store.release();
        let expected = pattern(1 << 20, 2);
        for (cookie, at) in cookies {
            let Ok(Answer::Data { bytes, .. }) = client.wait(cookie).await else { panic!("a read failed") };
            assert!(bytes == expected[at..at + 512]);
        }
        assert!(fixture.store.most_waiting.get() <= 128);
    });
}

#[test]
fn bytes_in_flight_are_bounded() {
    on_ring(async {
        let fixture = Fixture::new(64 << 20).await;
        let mut client = Client::new(fixture.address(), Style::Structured).await;
        fixture.store.hold();
        let mut cookies = Vec::new();
        for _ in 0..8 {
            cookies.push(client.submit(Command::Read, NONE, 0, 32 << 20, &[]).await);
        }
        fixture.store.until_waiting(2).await;
        ring::sleep(Duration::from_millis(20)).await;
        assert_eq!(fixture.store.waiting.get(), 2, "64 MiB and no more");
        fixture.store.release();
        for cookie in cookies {
            assert!(client.wait(cookie).await.is_ok());
        }
    });
}

#[test]
fn a_client_that_does_not_read_blocks_only_itself() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(4 << 20, 3)).await;
        let mut deaf = Client::new(fixture.address(), Style::Simple).await;
        for _ in 0..100 {
            // 400 MiB of replies: more than any socket holds, and more than may be in flight.
            deaf.submit(Command::Read, NONE, 0, 4 << 20, &[]).await;
        }
        let mut other = Client::new(fixture.address(), Style::Structured).await;
        let bytes = pattern(4 << 20, 3);
        for at in 0..100 {
            assert!(other.read(at * 4096, 4096).await == bytes[at as usize * 4096..][..4096]);
        }
        other.leave().await;
        // Dropped rather than waited for, for ever: it is given some seconds.
        fixture.server.stop().await;
        drop(deaf);
    });
}
