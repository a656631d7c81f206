//! QMP: the machine monitor protocol, JSON over a unix socket.
//!
//! # Invariants
//! * A client harms only itself: what it sends is bounded ([`graph::json`]), it is read only while its last command is answered (where it
//!   has enabled `oob`: while no more than [`QUEUE`] commands wait), and one that does not read what it is sent is cut off rather than
//!   served with gaps.
//! * Answers and events are one line each. What a command caused is told before the command's own answer.
//! * When the process ends, clients hear of everything that this causes before they are hung up on.

mod arguments;
mod command;
mod commit;
mod create;
mod event;
mod exports;
mod jobs;
mod nodes;
mod place;
mod query;
mod schema;
mod snapshots;

pub(crate) use command::{described, knows, names, run, version};
pub(crate) use event::message as event_message;
pub(crate) use jobs::{Stream, all as all_jobs, block_job};
pub(crate) use nodes::describe as describe_node;
pub use place::{Open, Place, open, serve};
pub(crate) use query::{block_text, counters, stats_text};

use crate::{Engine, ErrorClass, Failure, Stamped};
use futures_util::future::BoxFuture;
use graph::json::{Framed, Framer};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Clients served at a time; more wait to be accepted.
const CLIENTS: usize = 64;

/// Bytes read at once.
const READ: usize = 16 << 10;

/// Commands of a client that has enabled `oob` that may wait; then it is not read until one of them is answered. QEMU's number.
const QUEUE: usize = 8;

/// A client that takes nothing for this long is gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Listens for QMP clients on a unix socket (made anew; a stale one is replaced) until the runtime ends. Returns when the
/// socket accepts.
pub async fn listen(engine: Engine, socket: &Path) -> Result<(), Failure> {
    serve(engine, Place::Listen(socket.to_owned()), false).await
}

/// A command, as a client would give it after negotiation.
///
/// # Errors
/// What the client would be answered.
pub async fn execute(engine: &Engine, command: &str, arguments: Map<String, Value>) -> Result<Value, Failure> {
    run(engine, command, arguments).await
}

/// `blockdev-add`, of a command line.
pub async fn blockdev_add(engine: &Engine, tree: Map<String, Value>) -> Result<(), Failure> {
    nodes::add(engine, arguments::Arguments::new(tree)).await.map(drop)
}

/// `object-add`, of a command line.
pub async fn object_add(engine: &Engine, tree: Map<String, Value>) -> Result<(), Failure> {
    nodes::add_object(engine, arguments::Arguments::new(tree)).await.map(drop)
}

/// `block-export-add`, of a command line.
pub async fn export_add(engine: &Engine, tree: Map<String, Value>) -> Result<(), Failure> {
    exports::add(engine, arguments::Arguments::new(tree)).await.map(drop)
}

/// `nbd-server-start`, of a command line: clients wait until all of it is done, and [`ShardState::admit_nbd_clients`] says so. Whoever
/// comes early would find nothing to use.
///
/// [`ShardState::admit_nbd_clients`]: crate::ShardState::admit_nbd_clients
pub async fn nbd_server_start(engine: &Engine, tree: Map<String, Value>) -> Result<(), Failure> {
    exports::start_server_for(engine, arguments::Arguments::new(tree), true).await.map(drop)
}

/// A command that is under way, and whose answer bears what id.
struct Running {
    id: Option<Value>,
    answer: BoxFuture<'static, Result<Value, Failure>>,
}

/// One connection.
struct Client {
    engine: Engine,
    input: Box<dyn AsyncRead + Send + Unpin>,
    out: Box<dyn AsyncWrite + Send + Unpin>,
    /// Answers are spread over lines, for people.
    pretty: bool,
    /// Events since negotiation; `None` before it.
    events: Option<mpsc::Receiver<Stamped>>,
    /// It may send commands that overtake others.
    oob: bool,
    /// What it has sent and nobody has looked at yet.
    bytes: VecDeque<u8>,
    framer: Framer,
    waiting: VecDeque<Framed>,
    running: Option<Running>,
}

impl Client {
    fn new(
        engine: Engine,
        input: Box<dyn AsyncRead + Send + Unpin>,
        out: Box<dyn AsyncWrite + Send + Unpin>,
        pretty: bool,
    ) -> Self {
        Self {
            engine,
            input,
            out,
            pretty,
            events: None,
            oob: false,
            bytes: VecDeque::new(),
            framer: Framer::default(),
            waiting: VecDeque::new(),
            running: None,
        }
    }

    async fn serve(mut self) -> io::Result<()> {
        let greeting = json!({ "QMP": { "version": version(), "capabilities": ["oob"] } });
        self.send(&greeting).await?;
        let mut read_into = vec![0; READ];
        let engine = self.engine.clone();
        loop {
            self.look().await?;
            let idle = self.running.is_none();
            tokio::select! {
                read = self.input.read(&mut read_into), if self.bytes.is_empty() && self.has_room() => {
                    let read = read?;
                    if read == 0 {
                        // What it still waits for is carried out all the same.
                        while let Some(running) = self.running.take() {
                            let answer = running.answer.await;
                            self.answer(running.id, answer).await?;
                            self.look().await?;
                        }
                        return Ok(());
                    }
                    self.bytes.extend(&read_into[..read]);
                }
                (id, answer) = answered(&mut self.running) => {
                    self.running = None;
                    self.answer(id, answer).await?;
                }
                event = next_event(&mut self.events) => match event {
                    Some(stamped) => self.send(&event::message(&stamped)).await?,
                    // More events piled up than it took: it is cut off, and can connect again.
                    None => return Ok(()),
                },
                why = engine.ending(), if idle => {
                    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    let last = event::shutdown(since.as_secs(), since.subsec_micros(), why);
                    return self.say_goodbye(&last).await;
                }
            }
        }
    }

    /// Whether another message may be taken from it.
    fn has_room(&self) -> bool {
        if self.oob { self.waiting.len() < QUEUE } else { self.running.is_none() && self.waiting.is_empty() }
    }

    /// Looks at what it has sent: answers what overtakes at once, begins the next of the others.
    async fn look(&mut self) -> io::Result<()> {
        loop {
            while self.has_room()
                && let Some(byte) = self.bytes.pop_front()
            {
                match self.framer.take(byte) {
                    Some(Ok(Value::Object(request))) if self.oob && request.contains_key("exec-oob") => {
                        let (id, refusal) = overtaking(request);
                        self.answer(id, Err(refusal)).await?;
                    }
                    Some(framed) => self.waiting.push_back(framed),
                    None => {}
                }
            }
            if self.running.is_some() {
                return Ok(());
            }
            let Some(framed) = self.waiting.pop_front() else { return Ok(()) };
            self.begin(framed).await?;
        }
    }

    /// Tells what the end of the process causes, up to the last event there is. Nothing is read any more.
    async fn say_goodbye(mut self, shutdown: &Value) -> io::Result<()> {
        let Some(mut events) = self.events.take() else { return Ok(()) };
        self.send(shutdown).await?;
        while let Some(stamped) = events.recv().await {
            self.send(&event::message(&stamped)).await?;
        }
        self.out.shutdown().await
    }

    /// Begins a command, or answers it if that takes no time.
    async fn begin(&mut self, framed: Framed) -> io::Result<()> {
        let mut request = match framed {
            Ok(Value::Object(request)) => request,
            Ok(_) => return self.answer(None, Err(Failure::generic("QMP input must be a JSON object"))).await,
            Err(mistake) => return self.answer(None, Err(Failure::generic(mistake))).await,
        };
        let id = request.shift_remove("id");
        match command_of(request, "execute") {
            Err(failure) => self.answer(id, Err(failure)).await,
            Ok((command, arguments)) if self.events.is_none() => {
                let negotiated = self.negotiate(&command, arguments);
                self.answer(id, negotiated).await
            }
            Ok((command, arguments)) => {
                let engine = self.engine.clone();
                let answer = Box::pin(async move { command::run(&engine, &command, arguments).await });
                self.running = Some(Running { id, answer });
                Ok(())
            }
        }
    }

    async fn answer(&mut self, id: Option<Value>, answer: Result<Value, Failure>) -> io::Result<()> {
        // What the command caused comes first, as it happened first.
        while let Some(Ok(stamped)) = self.events.as_mut().map(mpsc::Receiver::try_recv) {
            self.send(&event::message(&stamped)).await?;
        }
        let mut message = match answer {
            Ok(value) => json!({ "return": value }),
            Err(Failure { class, desc }) => json!({ "error": { "class": class.name(), "desc": desc } }),
        };
        if let Some(id) = id {
            message["id"] = id;
        }
        self.send(&message).await
    }

    fn negotiate(&mut self, command: &str, mut arguments: Map<String, Value>) -> Result<Value, Failure> {
        if command != "qmp_capabilities" {
            return Err(Failure {
                class: ErrorClass::CommandNotFound,
                desc: "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
            });
        }
        let enable = match arguments.shift_remove("enable") {
            None => Vec::new(),
            Some(Value::Array(wanted)) => wanted,
            Some(_) => return Err(Failure::generic("Invalid parameter type for 'enable', expected: array")),
        };
        for (at, wanted) in enable.iter().enumerate() {
            match wanted.as_str() {
                Some("oob") => {}
                // QEMU does not say which.
                Some(name) => {
                    return Err(Failure::generic(format!("Parameter 'null' does not accept value '{name}'")));
                }
                None => {
                    let what = format!("Invalid parameter type for 'enable[{at}]', expected: string");
                    return Err(Failure::generic(what));
                }
            }
        }
        arguments::Arguments::new(arguments).end()?;
        self.oob = !enable.is_empty();
        self.events = Some(self.engine.subscribe());
        Ok(json!({}))
    }

    async fn send(&mut self, message: &Value) -> io::Result<()> {
        let mut line = if self.pretty { format!("{message:#}") } else { message.to_string() };
        line.push_str("\r\n");
        match tokio::time::timeout(WRITE_PATIENCE, self.out.write_all(line.as_bytes())).await {
            Ok(sent) => sent,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The command and the arguments of a request whose id was taken out, named by this member.
fn command_of(mut request: Map<String, Value>, member: &str) -> Result<(String, Map<String, Value>), Failure> {
    let command = request.shift_remove(member);
    let arguments = request.shift_remove("arguments");
    if let Some(other) = request.keys().next() {
        return Err(Failure::generic(match &**other {
            "execute" => "QMP input member 'execute' clashes with 'exec-oob'".to_owned(),
            other => format!("QMP input member '{other}' is unexpected"),
        }));
    }
    let command = match command {
        Some(Value::String(command)) => command,
        Some(_) => return Err(Failure::generic(format!("QMP input member '{member}' must be a string"))),
        None => return Err(Failure::generic("QMP input lacks member 'execute'")),
    };
    match arguments {
        None => Ok((command, Map::new())),
        Some(Value::Object(arguments)) => Ok((command, arguments)),
        Some(_) => Err(Failure::generic("QMP input member 'arguments' must be an object")),
    }
}

/// What `exec-oob` comes to: no command of a storage daemon may overtake others, here as with QEMU.
fn overtaking(mut request: Map<String, Value>) -> (Option<Value>, Failure) {
    let id = request.shift_remove("id");
    let refusal = match command_of(request, "exec-oob") {
        Err(failure) => failure,
        Ok((command, _)) if knows(&command) => Failure::generic(format!("The command {command} does not support OOB")),
        Ok((command, _)) => command::unknown(&command),
    };
    (id, refusal)
}

/// The answer of what is under way; never, if nothing is.
async fn answered(running: &mut Option<Running>) -> (Option<Value>, Result<Value, Failure>) {
    match running {
        Some(running) => {
            let answer = (&mut running.answer).await;
            (running.id.take(), answer)
        }
        None => pending().await,
    }
}

/// The next event; never before negotiation.
async fn next_event(events: &mut Option<mpsc::Receiver<Stamped>>) -> Option<Stamped> {
    match events {
        Some(events) => events.recv().await,
        None => pending().await,
    }
}

/// For fuzz/: all that a stream of these bytes holds (mistakes as their texts), and how many bytes are held back at its end.
#[cfg(feature = "fuzzing")]
pub fn framed(bytes: &[u8]) -> (Vec<Result<serde_json::Value, String>>, usize) {
    let mut framer = Framer::default();
    let values = bytes.iter().filter_map(|byte| framer.take(*byte)).collect();
    (values, framer.held())
}
