//! A small QMP client for the commands that steer a running daemon.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// A line longer than this is no answer of ours.
const LINE_LIMIT: u64 = 16 << 20;

/// A connection that has finished capabilities negotiation.
pub(crate) struct Client {
    lines: BufReader<OwnedReadHalf>,
    out: OwnedWriteHalf,
    /// Events that came while an answer was awaited.
    events: VecDeque<Value>,
    partial: Vec<u8>,
}

impl Client {
    /// Connects to a QMP socket and negotiates.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).await.map_err(|e| {
            format!(
                "could not reach a QMP monitor at '{}': {e} (is `headwater serve --qmp` running?)",
                socket.display()
            )
        })?;
        let (read, out) = stream.into_split();
        let mut client = Self { lines: BufReader::new(read), out, events: VecDeque::new(), partial: Vec::new() };
        let greeting = client.line().await?;
        if greeting.get("QMP").is_none() {
            return Err(format!("'{}' does not speak QMP", socket.display()));
        }
        client.execute("qmp_capabilities", json!({})).await?;
        Ok(client)
    }

    /// Runs a command; the error is the monitor's own sentence.
    pub(crate) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push_str("\r\n");
        self.out.write_all(request.as_bytes()).await.map_err(|e| format!("the monitor is gone: {e}"))?;
        loop {
            let mut answer = self.line().await?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error.get("desc").and_then(Value::as_str).unwrap_or("unknown error").to_owned());
            } else {
                return Ok(answer.get_mut("return").map(Value::take).unwrap_or_default());
            }
        }
    }

    /// The next event, or `None` when `patience` has passed without one. May be dropped and called again.
    pub(crate) async fn event(&mut self, patience: Duration) -> Result<Option<Value>, String> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match tokio::time::timeout(patience, self.line()).await {
            Ok(event) => event.map(Some),
            Err(_) => Ok(None),
        }
    }

    async fn line(&mut self) -> Result<Value, String> {
        loop {
            // `read_until` appends to `partial` and may be dropped half-way: what it had read stays there.
            let read = self
                .lines
                .read_until(b'\n', &mut self.partial)
                .await
                .map_err(|e| format!("the monitor is gone: {e}"))?;
            if read == 0 {
                return Err("the monitor has closed the connection".into());
            }
            if self.partial.len() as u64 > LINE_LIMIT {
                return Err("the monitor's answer is too long".into());
            }
            let line = std::mem::take(&mut self.partial);
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice(&line).map_err(|e| format!("the monitor's answer makes no sense: {e}"));
        }
    }
}
