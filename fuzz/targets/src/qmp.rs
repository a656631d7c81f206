//! The monitor's framer: where values end on a stream, and what they are.

use control::qmp::framed;

/// * What is held back is bounded by what came, and a line end after garbage brings the stream back to a known state.
/// * A value that was read, written as plain JSON and read again, is the same.
/// * Values do not hang on what came before them: after a byte that JSON does not know, the next value is read as if alone.
pub(crate) fn framer(input: &[u8]) {
    let (values, held) = framed(input);
    assert!(held <= input.len());
    assert!(values.len() <= input.len() + 1);
    for value in values.iter().flatten() {
        let mut text = serde_json::to_vec(value).expect("a value is always JSON");
        text.push(b'\n');
        let (again, rest) = framed(&text);
        assert_eq!(again, [Ok(value.clone())], "{}", String::from_utf8_lossy(&text));
        assert_eq!(rest, 0);
    }
    // 0xff is what QMP clients send to find their feet again.
    let mut stream = input.to_vec();
    stream.push(0xff);
    let before = framed(&stream).0.len();
    stream.extend_from_slice(b"{\"execute\": 'stop'}\n");
    let (after, held) = framed(&stream);
    assert_eq!(after.len(), before + 1);
    assert_eq!(after.last(), Some(&Ok(serde_json::json!({ "execute": "stop" }))));
    assert_eq!(held, 0);
}
