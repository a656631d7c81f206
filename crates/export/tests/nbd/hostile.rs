//! Clients that do not keep to the protocol, or leave in the middle of it. Others must not notice.

use crate::client::{Client, NONE, Style, connect};
use crate::fixture::{Fixture, on_ring, pattern};
use nbd::proto::{Command, CommandFlags, MAX_PAYLOAD, NBD_REQUEST_MAGIC};
use nbd::request::Request;
use ring::{File, Iov};
use std::time::Duration;

/// Everything the server sends until it hangs up.
async fn until_hung_up(file: &File) -> Vec<u8> {
    let buffer = Iov::alloc(4096);
    let mut all = Vec::new();
    while let Ok(received @ 1..) = file.recv(&buffer).await {
        all.extend(buffer.slice(0..received).to_vec());
    }
    all
}

/// The server has let go of every client, and serves the next one.
async fn well(fixture: &Fixture) {
    while fixture.server.connections() > 0 {
        ring::sleep(Duration::from_millis(1)).await;
    }
    let mut client = Client::new(fixture.address(), Style::Structured).await;
    assert_eq!(client.read(0, 512).await.len(), 512);
    client.leave().await;
}

#[test]
fn garbage_in_the_handshake_is_hung_up_on() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let mut inputs: Vec<Vec<u8>> = (0..20).map(|seed| pattern(2000, seed)).collect();
        // A good beginning, then garbage; an endless option; unknown client flags; an unknown export by the old way.
        inputs.push([&[0, 0, 0, 3][..], &pattern(100, 99)].concat());
        inputs.push(b"\0\0\0\x03IHAVEOPT\0\0\0\x06\xff\xff\xff\xff".to_vec());
        inputs.push(b"\0\0\0\xff".to_vec());
        inputs.push(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03abc".to_vec());
        inputs.push(b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n".to_vec());
        for input in inputs {
            let file = connect(fixture.address()).await.unwrap();
            // The server may hang up before it has read everything.
            let _ = file.send_all(&Iov::from_slice(&input)).await;
            let said = until_hung_up(&file).await;
            assert!(said.is_empty() || said.starts_with(b"NBDMAGIC"));
        }
        well(&fixture).await;
    });
}

#[test]
fn garbage_instead_of_a_request_is_hung_up_on() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        for seed in 0..10 {
            let mut client = Client::new(fixture.address(), Style::Simple).await;
            let cookie = client.submit(Command::Read, NONE, 0, 512, &[]).await;
            let _ = client.raw(&pattern(500, seed)).await;
            while client.receive().await {}
            // The read before it may or may not have been answered.
            let _ = client.ended(cookie);
        }
        well(&fixture).await;
    });
}

#[test]
fn oversized_writes_are_hung_up_on() {
    on_ring(async {
        let fixture = Fixture::new(64 << 20).await;
        for length in [MAX_PAYLOAD + 1, u32::MAX] {
            let mut client = Client::new(fixture.address(), Style::Simple).await;
            let request = Request { flags: NONE, command: Command::Write.to_wire(), cookie: 1, offset: 0, length };
            client.raw(&request.encode()).await.unwrap();
            assert!(!client.receive().await);
        }
        well(&fixture).await;
    });
}

#[test]
fn unknown_commands_and_flags_are_errors_only() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        for style in [Style::Simple, Style::Structured] {
            let mut client = Client::new(fixture.address(), style).await;
            let (_, mut head) = client.begin(Command::Flush, 0, 0);
            // Command 300 with flags; the answer belongs to the flush that the client believes it sent.
            head[4..8].copy_from_slice(&[0x80, 0, 1, 44]);
            client.raw(&head).await.unwrap();
            assert!(client.receive().await);
            assert_eq!(client.ended(1).unwrap().unwrap_err().error, 22);
            assert_eq!(client.read(0, 512).await, [0; 512]);
        }
        well(&fixture).await;
    });
}

#[test]
fn leaving_in_the_middle_of_a_message_changes_nothing() {
    on_ring(async {
        let fixture = Fixture::new(8 << 20).await;
        let write = |length: u32| Request {
            flags: CommandFlags::FUA,
            command: Command::Write.to_wire(),
            cookie: 1,
            offset: 0,
            length,
        };
        for (length, sent) in [(4096, 10), (4096, 27), (4096, 28), (4096, 4000), (4 << 20, 100_000), (4 << 20, 4 << 20)]
        {
            let client = Client::new(fixture.address(), Style::Simple).await;
            let mut bytes = write(length).encode().to_vec();
            bytes.resize(28 + length as usize, 0xee);
            client.raw(&bytes[..sent]).await.unwrap();
            drop(client);
            while fixture.server.connections() > 0 {
                ring::sleep(Duration::from_millis(1)).await;
            }
            assert!(fixture.bytes().iter().all(|&byte| byte == 0), "{sent} of {length} bytes");
        }
        well(&fixture).await;
    });
}

#[test]
fn leaving_with_requests_in_flight_leaves_nothing_behind() {
    on_ring(async {
        let fixture = Fixture::holding(&pattern(1 << 20, 1)).await;
        fixture.store.hold();
        for _ in 0..5 {
            let mut client = Client::new(fixture.address(), Style::Structured).await;
            for _ in 0..10 {
                client.submit(Command::Read, NONE, 0, 4096, &[]).await;
            }
        }
        fixture.store.until_waiting(50).await;
        fixture.store.release();
        well(&fixture).await;
        assert_eq!(fixture.store.waiting.get(), 0);
    });
}

#[test]
fn messages_may_come_byte_by_byte() {
    on_ring(async {
        let fixture = Fixture::new(1 << 20).await;
        let mut client = Client::new(fixture.address(), Style::Simple).await;
        let (write, mut bytes) = client.begin(Command::Write, 100, 50);
        bytes.extend(pattern(50, 1));
        let (read, head) = client.begin(Command::Flush, 0, 0);
        bytes.extend(head);
        assert_eq!(bytes[..4], NBD_REQUEST_MAGIC.to_be_bytes());
        for byte in bytes {
            client.raw(&[byte]).await.unwrap();
            ring::yield_now().await;
        }
        assert!(client.wait(write).await.is_ok());
        assert!(client.wait(read).await.is_ok());
        assert_eq!(fixture.bytes()[100..150], pattern(50, 1));
    });
}
