//! A small QMP client: commands with their answers, and events kept in order until they are asked for.
//!
//! It is strict where the protocol is (a greeting, one answer to each command, `id` echoed), so that a server's
//! deviation fails the test that meets it.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::PATIENCE;
use crate::{Result, error};

/// An error the server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// The class clients match on, such as `GenericError` or `DeviceNotFound`.
    pub class: String,
    /// The text for people.
    pub desc: String,
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl std::error::Error for QmpError {}

/// One connection to a QMP server.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: Receiver<String>,
    events: VecDeque<Value>,
    next_id: u64,
    /// The `QMP` member of the server's greeting.
    pub greeting: Value,
}

impl Qmp {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Result<Qmp> {
        let mut qmp = Qmp::greeted(path)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Connects to a storage daemon of QEMU's that has just started. It hands its monitor over to a thread of its own when its line
    /// is carried out already; who connects in that moment is greeted twice, and what it says may be torn apart.
    pub fn connect_to_qemus(path: &Path) -> Result<Qmp> {
        const HANDED_OVER: Duration = Duration::from_millis(100);
        let mut last = None;
        for _ in 0..4 {
            thread::sleep(HANDED_OVER);
            match Qmp::connect(path) {
                Ok(qmp) => {
                    thread::sleep(HANDED_OVER);
                    // Nobody has asked for anything: what comes now is a second greeting.
                    if qmp.lines.try_recv().is_err() {
                        return Ok(qmp);
                    }
                }
                Err(why) => last = Some(why),
            }
        }
        Err(last.unwrap_or_else(|| error!("{} greets twice every time", path.display())))
    }

    /// Connects and reads the greeting, no more: the server is still in negotiation.
    pub fn greeted(path: &Path) -> Result<Qmp> {
        let stream = UnixStream::connect(path).map_err(|why| error!("connecting to {}: {why}", path.display()))?;
        let reader = BufReader::new(stream.try_clone()?);
        let (sender, lines) = channel();
        // Ends with the connection, which ends with this value at the latest.
        thread::spawn(move || {
            for line in reader.lines().map_while(std::io::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut qmp = Qmp { stream, lines, events: VecDeque::new(), next_id: 1, greeting: Value::Null };
        let hello = qmp.receive(Instant::now() + PATIENCE)?;
        qmp.greeting = hello.get("QMP").cloned().ok_or_else(|| error!("not a QMP greeting: {hello}"))?;
        Ok(qmp)
    }

    /// A connection that leads nowhere, to take the place of one that is given up.
    pub fn nobody() -> Result<Qmp> {
        let (stream, _) = UnixStream::pair()?;
        Ok(Qmp { stream, lines: channel().1, events: VecDeque::new(), next_id: 1, greeting: Value::Null })
    }

    /// Sends `text` as it is, with a line end.
    pub fn send_raw(&mut self, text: &str) -> Result {
        // In one piece: a server may obey at the closing brace, and hang up after `quit`.
        self.stream.write_all(format!("{text}\n").as_bytes())?;
        Ok(())
    }

    /// Runs a command; its `return` value, or the error the server answered.
    pub fn command(&mut self, command: &str, arguments: Value) -> Result<std::result::Result<Value, QmpError>> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if arguments.as_object().is_none_or(|object| !object.is_empty()) {
            request["arguments"] = arguments;
        }
        self.send_raw(&request.to_string())?;
        let answer = self.answer()?;
        if answer.get("id") != Some(&json!(id)) {
            return Err(error!("the answer to {request} has another id: {answer}"));
        }
        read_answer(&answer)
    }

    /// Runs a command that must succeed; its `return` value.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.command(command, arguments)?.map_err(|why| error!("{command}: {why}"))
    }

    /// Runs a command that must fail; its error.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Result<QmpError> {
        match self.command(command, arguments)? {
            Err(refused) => Ok(refused),
            Ok(value) => Err(error!("{command} should be refused and returned {value}")),
        }
    }

    /// The next message that is not an event.
    pub fn answer(&mut self) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else {
                return Ok(message);
            }
        }
    }

    /// Takes the first event, waiting or to come, that `wanted` accepts; earlier ones stay for others to take.
    pub fn event_where(&mut self, within: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        if let Some(at) = self.events.iter().position(&wanted) {
            // The position was found a line above.
            return Ok(self.events.remove(at).unwrap_or_default());
        }
        let deadline = Instant::now() + within;
        loop {
            let message = self.receive(deadline)?;
            if message.get("event").is_none() {
                return Err(error!("an answer nobody asked for: {message}"));
            }
            if wanted(&message) {
                return Ok(message);
            }
            self.events.push_back(message);
        }
    }

    /// Takes the first event of this name; its `data`.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        let event = self
            .event_where(PATIENCE, |event| event["event"] == name)
            .map_err(|why| error!("waiting for {name}: {why}; others: {:?}", self.events))?;
        Ok(event.get("data").cloned().unwrap_or_default())
    }

    /// Takes all events that have arrived by now.
    pub fn drain(&mut self) -> Vec<Value> {
        while let Ok(message) = self.receive(Instant::now()) {
            self.events.push_back(message);
        }
        self.events.drain(..).collect()
    }

    fn receive(&mut self, deadline: Instant) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => serde_json::from_str(&line).map_err(|why| error!("not JSON: {line}: {why}")),
            Err(RecvTimeoutError::Timeout) => Err("no QMP message in time".into()),
            Err(RecvTimeoutError::Disconnected) => Err("the QMP server closed the connection".into()),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // The reading thread has the connection open, too. QEMU serves one client at a time, so the next one waits for
        // this to be closed. It fails only if the server closed it first.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn read_answer(answer: &Value) -> Result<std::result::Result<Value, QmpError>> {
    if let Some(value) = answer.get("return") {
        return Ok(Ok(value.clone()));
    }
    let text = |key: &str| answer["error"][key].as_str().map(str::to_owned);
    match (text("class"), text("desc")) {
        (Some(class), Some(desc)) => Ok(Err(QmpError { class, desc })),
        _ => Err(error!("neither a return nor an error: {answer}")),
    }
}

/// The row of an answer whose `key` is `value`.
///
/// # Errors
/// There is none.
pub fn row<'a>(answer: &'a Value, key: &str, value: &str) -> Result<&'a Value> {
    let found = answer.as_array().into_iter().flatten().find(|row| row[key] == value);
    found.ok_or_else(|| error!("no row with {key} = {value} in {answer:#}"))
}
