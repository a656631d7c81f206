//! NBD: both sides' codecs, which do no I/O.
//!
//! The first byte says how the rest is cut into pieces. Whatever the pieces, the outcome is that of the whole.

use nbd::client::{ClientHandshake, ClientProgress, Goal, Session, Transactions};
use nbd::handshake::{Handshake, MAX_INPUT, Offer, Progress};
use nbd::option::BlockSize;
use nbd::proto::{Command, CommandFlags, MAX_PAYLOAD, REQUEST_LEN, TransmissionFlags};
use nbd::reply::ReplyHead;
use nbd::request::{Request, Terms};

/// What a peer may make us answer, for each byte that it sends, and once: the longest reply to the shortest option.
const ANSWER_A_BYTE: usize = 512;

/// Feeds `input` as it would come off a socket, `piece` bytes at a time.
fn feed(input: &[u8], piece: usize, mut take: impl FnMut(&[u8]) -> Option<usize>) {
    let mut held = Vec::new();
    for bytes in input.chunks(piece.max(1)) {
        held.extend_from_slice(bytes);
        loop {
            match take(&held) {
                None => return,
                Some(0) => break,
                Some(taken) => {
                    held.drain(..taken);
                }
            }
        }
    }
}

fn offers() -> Vec<Offer> {
    let offer = |name: &str, size| Offer {
        name: name.to_owned(),
        description: Some(format!("the {name}")),
        size,
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH,
        block_size: BlockSize { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD },
    };
    vec![offer("disk", 1 << 20), offer("another", u64::MAX >> 1)]
}

/// The server: a handshake out of any bytes, then requests.
pub(crate) fn server(input: &[u8]) {
    let (piece, input) = input.split_first().unwrap_or((&0, &[]));
    let run = |piece: usize| {
        let mut server = Handshake::new(offers());
        let (mut output, mut end, mut used) = (Vec::new(), None, 0);
        feed(input, piece, |held| {
            let advanced = server.advance(held, &mut output);
            match advanced {
                Ok((taken, Progress::NeedMore)) => {
                    assert!(held.len() - taken <= MAX_INPUT, "{} bytes are held", held.len());
                    used += taken;
                    (taken > 0).then_some(taken).or(Some(0))
                }
                Ok((taken, Progress::Continue)) => {
                    assert!(taken > 0);
                    used += taken;
                    Some(taken)
                }
                Ok((taken, done)) => {
                    used += taken;
                    end = Some(Ok(done));
                    None
                }
                Err(error) => {
                    end = Some(Err(error));
                    None
                }
            }
        });
        assert!(output.len() <= ANSWER_A_BYTE * (input.len() + 1));
        (output, end, used)
    };
    let whole = run(input.len());
    assert_eq!(run(usize::from(*piece)), whole, "in pieces of {piece}");
    let (_, end, used) = whole;
    let terms = match end {
        Some(Ok(Progress::Transmission(agreed))) => {
            assert!(agreed.export < 2);
            Terms { size: offers()[agreed.export].size, flags: agreed.flags, allocation: agreed.allocation }
        }
        _ => Terms { size: 1 << 20, flags: TransmissionFlags::HAS_FLAGS, allocation: true },
    };
    for head in input[used.min(input.len())..].chunks_exact(REQUEST_LEN) {
        let Ok(head) = <&[u8; REQUEST_LEN]>::try_from(head) else { return };
        let Ok(request) = Request::decode(head) else { continue };
        assert_eq!(request.encode(), *head);
        if let Ok(command) = request.check(&terms) {
            assert!(request.payload() <= MAX_PAYLOAD);
            let moves = !matches!(command, Command::Disc | Command::Flush);
            assert!(
                !moves || request.offset.checked_add(u64::from(request.length)).is_some_and(|end| end <= terms.size)
            );
        }
    }
}

/// The client: a handshake out of any bytes, and replies to some requests.
pub(crate) fn client(input: &[u8]) {
    let (kind, input) = input.split_first().unwrap_or((&0, &[]));
    let (piece, input) = input.split_first().unwrap_or((&0, &[]));
    let (structured, allocation) = (kind & 1 != 0, kind & 2 != 0);
    let goal = || match kind >> 2 & 3 {
        0 => Goal::List,
        1 => Goal::Inspect("disk".to_owned()),
        _ => Goal::Export("disk".to_owned()),
    };
    let run = |piece: usize| {
        let mut client = ClientHandshake::new(goal(), structured, allocation);
        let (mut output, mut end) = (Vec::new(), None);
        feed(input, piece, |held| match client.advance(held, &mut output) {
            Ok((taken, ClientProgress::Continue)) => Some(taken),
            done => {
                end = Some(done.map(|(_, done)| done));
                None
            }
        });
        assert!(output.len() <= ANSWER_A_BYTE * (input.len() + 1));
        (output, end)
    };
    assert_eq!(run(usize::from(*piece)), run(input.len()), "the handshake, in pieces of {piece}");
    let run = |piece: usize| {
        let session = Session { structured, allocation: allocation.then_some(1), ..Session::default() };
        let mut client = Transactions::new(&session);
        for (command, offset, length) in [
            (Command::Read, 1000, 8),
            (Command::Write, 0, 512),
            (Command::BlockStatus, 0, 1 << 20),
            (Command::Read, u64::MAX - 600, 512),
            (Command::Flush, 0, 0),
        ] {
            client.begin(command, CommandFlags::empty(), offset, length);
        }
        let (mut completions, mut end) = (Vec::new(), Ok(()));
        for bytes in input.chunks(piece.max(1)) {
            end = client.receive(bytes, &mut completions);
            if end.is_err() {
                break;
            }
        }
        let accounted = client.in_flight() + completions.len();
        // What broke the protocol took its request along.
        assert!(if end.is_ok() { accounted == 5 } else { accounted <= 5 }, "each request ends once");
        (completions, end)
    };
    let (one, other) = (run(usize::from(*piece)), run(input.len()));
    assert_eq!(one, other, "replies, in pieces of {piece}");
    if let Ok(Some((_, len))) = ReplyHead::decode(input) {
        assert!(len <= input.len());
    }
}
