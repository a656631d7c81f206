use super::*;
use crate::option::{OptionReplyHead, encode_option};
use crate::proto::{NBD_REP_FLAG_ERROR, OPTION_REPLY_LEN};
use proptest::prelude::*;

fn offers() -> Vec<Offer> {
    let offer = |name: &str, size| Offer {
        name: name.to_owned(),
        description: (size > 1000).then(|| format!("the {name}")),
        size,
        flags: TransmissionFlags::SEND_FLUSH,
        block_size: BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 },
    };
    vec![offer("big", 1 << 30), offer("small", 512)]
}

/// A handshake past its client flags.
fn begun(flags: ClientFlags) -> Handshake {
    let mut handshake = Handshake::new(offers());
    let answer = handshake.advance(&flags.bits().to_be_bytes(), &mut Vec::new());
    assert_eq!(answer, Ok((4, Progress::Continue)));
    handshake
}

/// Sends one option; the kinds and data of its replies come back.
fn ask(handshake: &mut Handshake, option: OptionKind, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, Progress) {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    encode_option(&mut input, option.to_wire(), data);
    let (consumed, progress) = handshake.advance(&input, &mut output).unwrap();
    assert_eq!(consumed, input.len());
    (replies(&output, option.to_wire()), progress)
}

fn replies(mut output: &[u8], option: u32) -> Vec<(u32, Vec<u8>)> {
    let mut replies = Vec::new();
    while !output.is_empty() {
        let head = OptionReplyHead::decode(output).unwrap().unwrap();
        assert_eq!(head.option, option);
        let end = OPTION_REPLY_LEN + head.length as usize;
        replies.push((head.kind, output[OPTION_REPLY_LEN..end].to_vec()));
        output = &output[end..];
    }
    replies
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<OptionReplyKind> {
    replies.iter().map(|(kind, _)| OptionReplyKind::from_wire(*kind).unwrap()).collect()
}

#[test]
fn the_greeting_is_fixed_newstyle() {
    assert_eq!(&Handshake::greeting(), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let mut handshake = Handshake::new(offers());
    assert_eq!(handshake.advance(&[0, 0, 0, 7], &mut Vec::new()), Err(HandshakeError::ClientFlags(7)));
}

#[test]
fn go_tells_what_was_asked_and_begins_transmission() {
    let mut handshake = begun(ClientFlags::all());
    let everything = InfoQuery { name: "big", wants: vec![1, 2, 3, 77] }.encode();
    let (answers, progress) = ask(&mut handshake, OptionKind::Go, &everything);
    let infos: Vec<Info<'_>> =
        answers[..answers.len() - 1].iter().map(|(_, data)| Info::decode(data).unwrap().unwrap()).collect();
    let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
    assert_eq!(
        infos,
        [
            Info::Export(1 << 30, flags),
            Info::Name("big"),
            Info::Description("the big"),
            Info::BlockSize(BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 }),
        ]
    );
    let agreement = Agreement { export: 0, flags, structured: false, allocation: false };
    assert_eq!(progress, Progress::Transmission(agreement));
}

#[test]
fn info_does_not_begin_transmission_and_unknown_exports_are_an_error() {
    let mut handshake = begun(ClientFlags::all());
    let (answers, progress) =
        ask(&mut handshake, OptionKind::Info, &InfoQuery { name: "small", wants: vec![] }.encode());
    assert_eq!(kinds(&answers), [OptionReplyKind::Info, OptionReplyKind::Ack]);
    assert_eq!(progress, Progress::Continue);
    for option in [OptionKind::Info, OptionKind::Go] {
        let (answers, progress) = ask(&mut handshake, option, &InfoQuery { name: "none", wants: vec![] }.encode());
        assert_eq!(kinds(&answers), [OptionReplyKind::ErrUnknown]);
        assert_eq!(progress, Progress::Continue);
        let (answers, _) = ask(&mut handshake, option, &[0, 0, 0, 9]);
        assert_eq!(kinds(&answers), [OptionReplyKind::ErrInvalid]);
    }
}

#[test]
fn the_first_export_answers_to_the_empty_name() {
    let mut handshake = begun(ClientFlags::all());
    let (_, progress) = ask(&mut handshake, OptionKind::Go, &InfoQuery { name: "", wants: vec![] }.encode());
    assert!(matches!(progress, Progress::Transmission(Agreement { export: 0, .. })));
}

#[test]
fn export_name_pads_unless_agreed_otherwise() {
    for (flags, len) in [(ClientFlags::all(), 10), (ClientFlags::FIXED_NEWSTYLE, 134), (ClientFlags::empty(), 134)] {
        let mut handshake = begun(flags);
        let (mut input, mut output) = (Vec::new(), Vec::new());
        encode_option(&mut input, OptionKind::ExportName.to_wire(), b"small");
        let (_, progress) = handshake.advance(&input, &mut output).unwrap();
        assert!(matches!(progress, Progress::Transmission(Agreement { export: 1, .. })));
        assert_eq!(output.len(), len);
        assert_eq!(output[..8], 512_u64.to_be_bytes());
    }
    let mut input = Vec::new();
    encode_option(&mut input, OptionKind::ExportName.to_wire(), b"none");
    let refused = begun(ClientFlags::all()).advance(&input, &mut Vec::new());
    assert_eq!(refused, Err(HandshakeError::UnknownExport("none".into())));
}

#[test]
fn the_list_holds_every_export() {
    let mut handshake = begun(ClientFlags::all());
    let (answers, progress) = ask(&mut handshake, OptionKind::List, &[]);
    assert_eq!(kinds(&answers), [OptionReplyKind::Server, OptionReplyKind::Server, OptionReplyKind::Ack]);
    assert_eq!(answers[0].1, encode_server("big", "the big"));
    assert_eq!(answers[1].1, encode_server("small", ""));
    assert_eq!(progress, Progress::Continue);
    let (answers, _) = ask(&mut handshake, OptionKind::List, b"x");
    assert_eq!(kinds(&answers), [OptionReplyKind::ErrInvalid]);
}

#[test]
fn contexts_need_structured_replies_first() {
    let mut handshake = begun(ClientFlags::all());
    let query = MetaQuery { name: "big", queries: vec![BASE_ALLOCATION] }.encode();
    for option in [OptionKind::ListMetaContext, OptionKind::SetMetaContext] {
        assert_eq!(kinds(&ask(&mut handshake, option, &query).0), [OptionReplyKind::ErrInvalid]);
    }
    assert_eq!(kinds(&ask(&mut handshake, OptionKind::StructuredReply, &[]).0), [OptionReplyKind::Ack]);
    let (answers, _) = ask(&mut handshake, OptionKind::SetMetaContext, &query);
    assert_eq!(kinds(&answers), [OptionReplyKind::MetaContext, OptionReplyKind::Ack]);
    assert_eq!(answers[0].1, encode_context(ALLOCATION_CONTEXT, BASE_ALLOCATION));
    let (_, progress) = ask(&mut handshake, OptionKind::Go, &InfoQuery { name: "", wants: vec![] }.encode());
    let Progress::Transmission(agreement) = progress else { panic!("{progress:?}") };
    assert!(agreement.structured && agreement.allocation);
    assert!(agreement.flags.contains(TransmissionFlags::SEND_DF));
}

#[test]
fn a_context_counts_for_its_export_and_the_last_selection_only() {
    let select = |handshake: &mut Handshake, name, queries| {
        ask(handshake, OptionKind::SetMetaContext, &MetaQuery { name, queries }.encode()).0
    };
    let go = |mut handshake: Handshake, name| {
        let query = InfoQuery { name, wants: vec![] }.encode();
        match ask(&mut handshake, OptionKind::Go, &query).1 {
            Progress::Transmission(agreement) => agreement.allocation,
            other => panic!("{other:?}"),
        }
    };
    let structured = || {
        let mut handshake = begun(ClientFlags::all());
        ask(&mut handshake, OptionKind::StructuredReply, &[]);
        handshake
    };
    let mut other = structured();
    select(&mut other, "small", vec![BASE_ALLOCATION]);
    assert!(!go(other, "big"));
    let mut replaced = structured();
    select(&mut replaced, "big", vec![BASE_ALLOCATION]);
    assert_eq!(kinds(&select(&mut replaced, "big", vec!["x-none:"])), [OptionReplyKind::Ack]);
    assert!(!go(replaced, "big"));
    let mut failed = structured();
    select(&mut failed, "big", vec![BASE_ALLOCATION]);
    assert_eq!(kinds(&select(&mut failed, "none", vec![BASE_ALLOCATION])), [OptionReplyKind::ErrUnknown]);
    assert!(!go(failed, "big"));
}

#[test]
fn contexts_are_listed_by_name_namespace_or_all() {
    let mut handshake = begun(ClientFlags::all());
    ask(&mut handshake, OptionKind::StructuredReply, &[]);
    for (queries, found) in [
        (vec![], true),
        (vec!["base:"], true),
        (vec!["x:", "base:allocation", "base:"], true),
        (vec!["base"], false),
        (vec!["base:alloc"], false),
        (vec!["qemu:dirty-bitmap:"], false),
    ] {
        let data = MetaQuery { name: "", queries: queries.clone() }.encode();
        let (answers, _) = ask(&mut handshake, OptionKind::ListMetaContext, &data);
        let contexts = kinds(&answers).into_iter().filter(|kind| *kind == OptionReplyKind::MetaContext).count();
        assert_eq!(contexts, usize::from(found), "{queries:?}");
    }
    // For a selection the namespace alone is no name.
    let data = MetaQuery { name: "", queries: vec!["base:"] }.encode();
    assert_eq!(kinds(&ask(&mut handshake, OptionKind::SetMetaContext, &data).0), [OptionReplyKind::Ack]);
}

#[test]
fn unknown_options_and_tls_are_unsupported() {
    let mut handshake = begun(ClientFlags::all());
    for option in [4_u32, 5, 11, 12, 4_000_000_000] {
        let (mut input, mut output) = (Vec::new(), Vec::new());
        encode_option(&mut input, option, &[1; 100]);
        assert_eq!(handshake.advance(&input, &mut output), Ok((input.len(), Progress::Continue)));
        assert_eq!(kinds(&replies(&output, option)), [OptionReplyKind::ErrUnsup]);
    }
}

#[test]
fn long_options_are_skipped_and_longer_ones_end_the_connection() {
    let mut handshake = begun(ClientFlags::all());
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let data = vec![7; MAX_OPTION_DATA as usize + 1];
    encode_option(&mut input, OptionKind::Info.to_wire(), &data);
    let mut rest = input.as_slice();
    while output.is_empty() {
        // In pieces, as a socket would bring it.
        let (consumed, _) = handshake.advance(&rest[..rest.len().min(1000)], &mut output).unwrap();
        assert!(consumed > 0);
        rest = &rest[consumed..];
    }
    assert!(rest.is_empty());
    assert_eq!(kinds(&replies(&output, OptionKind::Info.to_wire())), [OptionReplyKind::ErrTooBig]);
    assert_eq!(kinds(&ask(&mut handshake, OptionKind::Abort, &[]).0), [OptionReplyKind::Ack]);

    let mut head = IHAVEOPT.to_be_bytes().to_vec();
    head.extend([0, 0, 0, 6, 0xff, 0xff, 0xff, 0xff]);
    let refused = begun(ClientFlags::all()).advance(&head, &mut Vec::new());
    assert_eq!(refused, Err(HandshakeError::TooLong(u32::MAX)));
}

#[test]
fn clients_that_are_not_fixed_may_only_name_an_export() {
    let mut input = Vec::new();
    encode_option(&mut input, OptionKind::List.to_wire(), &[]);
    assert_eq!(begun(ClientFlags::empty()).advance(&input, &mut Vec::new()), Err(HandshakeError::NotFixed(3)));
}

#[test]
fn options_without_end_end_the_connection() {
    let mut handshake = begun(ClientFlags::all());
    let mut input = Vec::new();
    encode_option(&mut input, OptionKind::List.to_wire(), &[]);
    for _ in 0..MAX_OPTIONS {
        handshake.advance(&input, &mut Vec::new()).unwrap();
    }
    assert_eq!(handshake.advance(&input, &mut Vec::new()), Err(HandshakeError::TooMany));
}

/// Options more or less as clients send them.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..60),
        (prop_oneof!["big", "small", "none", ""], proptest::collection::vec(0_u16..5, 0..5))
            .prop_map(|(name, wants)| InfoQuery { name: &name, wants }.encode()),
        (prop_oneof!["big", "small", "none", ""], proptest::collection::vec("base:(allocation)?", 0..3)).prop_map(
            |(name, queries)| MetaQuery { name: &name, queries: queries.iter().map(String::as_str).collect() }.encode()
        ),
    ];
    (0_u32..13, data).prop_map(|(option, data)| {
        let mut bytes = Vec::new();
        encode_option(&mut bytes, option, &data);
        bytes
    })
}

proptest! {
    /// However the input is cut into pieces, the output and the end are the same, nothing panics, nothing is held back
    /// for more input than the bound allows.
    #[test]
    fn pieces_do_not_matter(options in proptest::collection::vec(any_option(), 0..8), cuts in 1_usize..50, flags in 0_u32..4) {
        let mut input = flags.to_be_bytes().to_vec();
        input.extend(options.concat());
        let whole = run(&input, input.len());
        let pieces = run(&input, cuts);
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), flagged: bool) {
        let mut input = if flagged { vec![0, 0, 0, 3] } else { vec![] };
        input.extend(bytes);
        let _ = run(&input, 7);
    }

    #[test]
    fn replies_are_well_formed(options in proptest::collection::vec(any_option(), 0..8)) {
        let mut handshake = begun(ClientFlags::all());
        for input in options {
            let option = u32::from_be_bytes(*input[8..].first_chunk().unwrap());
            let mut output = Vec::new();
            let Ok((consumed, progress)) = handshake.advance(&input, &mut output) else { break };
            prop_assert_eq!(consumed, input.len());
            if option != OptionKind::ExportName.to_wire() {
                let replies = replies(&output, option);
                let (last, before) = replies.split_last().unwrap();
                // Exactly one final reply, and it is the last.
                prop_assert!(last.0 == OptionReplyKind::Ack.to_wire() || last.0 & NBD_REP_FLAG_ERROR != 0);
                prop_assert!(before.iter().all(|(kind, _)| (2..=4).contains(kind)));
            }
            if progress != Progress::Continue {
                break;
            }
        }
    }
}

fn run(input: &[u8], piece: usize) -> (Vec<u8>, Result<Progress, HandshakeError>) {
    let mut handshake = Handshake::new(offers());
    let (mut held, mut output) = (Vec::new(), Vec::new());
    for bytes in input.chunks(piece.max(1)) {
        held.extend_from_slice(bytes);
        loop {
            match handshake.advance(&held, &mut output) {
                Err(error) => return (output, Err(error)),
                Ok((consumed, Progress::NeedMore)) => {
                    held.drain(..consumed);
                    assert!(held.len() < MAX_INPUT);
                    break;
                }
                Ok((consumed, Progress::Continue)) => drop(held.drain(..consumed)),
                Ok((_, end)) => return (output, Ok(end)),
            }
        }
    }
    (output, Ok(Progress::NeedMore))
}
