//! QMP: the machine monitor protocol, JSON over a unix socket.
//!
//! # Invariants
//! * A client harms only itself: what it sends is bounded ([`graph::json`]), it is read only while its last command is answered, and one
//!   that does not read what it is sent is cut off rather than served with gaps.
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
pub use place::{Place, serve};
pub(crate) use query::{block_text, counters, stats_text};

use crate::{Engine, ErrorClass, Failure, Stamped};
use graph::json::{Framed, Framer};
use serde_json::{Map, Value, json};
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

/// `nbd-server-start`, of a command line.
pub async fn nbd_server_start(engine: &Engine, tree: Map<String, Value>) -> Result<(), Failure> {
    exports::start_server(engine, arguments::Arguments::new(tree)).await.map(drop)
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
}

impl Client {
    fn new(
        engine: Engine,
        input: Box<dyn AsyncRead + Send + Unpin>,
        out: Box<dyn AsyncWrite + Send + Unpin>,
        pretty: bool,
    ) -> Self {
        Self { engine, input, out, pretty, events: None }
    }

    async fn serve(mut self) -> io::Result<()> {
        let greeting = json!({ "QMP": { "version": version(), "capabilities": [] } });
        self.send(&greeting).await?;
        let mut framer = Framer::default();
        let mut bytes = vec![0; READ];
        let engine = self.engine.clone();
        loop {
            tokio::select! {
                read = self.input.read(&mut bytes) => {
                    let read = read?;
                    if read == 0 {
                        return Ok(());
                    }
                    for byte in &bytes[..read] {
                        if let Some(framed) = framer.take(*byte) {
                            self.obey(framed).await?;
                        }
                    }
                }
                event = next_event(&mut self.events) => match event {
                    Some(stamped) => self.send(&event::message(&stamped)).await?,
                    // More events piled up than it took: it is cut off, and can connect again.
                    None => return Ok(()),
                },
                why = engine.ending() => {
                    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    let last = event::shutdown(since.as_secs(), since.subsec_micros(), why);
                    return self.say_goodbye(&last).await;
                }
            }
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

    async fn obey(&mut self, framed: Framed) -> io::Result<()> {
        let (id, answer) = match framed {
            Ok(Value::Object(mut request)) => {
                let id = request.shift_remove("id");
                (id, self.execute(request).await)
            }
            Ok(_) => (None, Err(Failure::generic("QMP input must be a JSON object"))),
            Err(mistake) => (None, Err(Failure::generic(mistake))),
        };
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

    async fn execute(&mut self, mut request: Map<String, Value>) -> Result<Value, Failure> {
        let command = request.shift_remove("execute");
        let arguments = request.shift_remove("arguments");
        if let Some(member) = request.keys().next() {
            return Err(Failure::generic(format!("QMP input member '{member}' is unexpected")));
        }
        let command = match command {
            Some(Value::String(command)) => command,
            Some(_) => return Err(Failure::generic("QMP input member 'execute' must be a string")),
            None => return Err(Failure::generic("QMP input lacks member 'execute'")),
        };
        let arguments = match arguments {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Failure::generic("QMP input member 'arguments' must be an object")),
        };
        if self.events.is_none() {
            return self.negotiate(&command, arguments);
        }
        command::run(&self.engine, &command, arguments).await
    }

    fn negotiate(&mut self, command: &str, mut arguments: Map<String, Value>) -> Result<Value, Failure> {
        if command != "qmp_capabilities" {
            return Err(Failure {
                class: ErrorClass::CommandNotFound,
                desc: "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
            });
        }
        match arguments.shift_remove("enable") {
            None => {}
            Some(Value::Array(wanted)) => match wanted.first() {
                None => {}
                Some(Value::String(name)) if name == "oob" => {
                    return Err(Failure::generic("Capability 'oob' is not available"));
                }
                Some(Value::String(name)) => {
                    return Err(Failure::generic(format!("Parameter 'enable[0]' does not accept value '{name}'")));
                }
                Some(_) => return Err(Failure::generic("Invalid parameter type for 'enable[0]', expected: string")),
            },
            Some(_) => return Err(Failure::generic("Invalid parameter type for 'enable', expected: array")),
        }
        arguments::Arguments::new(arguments).end()?;
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
