//! An engine with monitors and two disks, and clients of both monitors.

use control::{CacheMode, DiskSpec, Engine, EngineConfig};
use image::create::{CreateOptions, create};
use image::{BackingRef, Format};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::file::{FileStore, OpenOptions};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

pub(crate) const MIB: u64 = 1 << 20;

/// Nothing here takes this long, however busy the machine is.
const PATIENCE: Duration = Duration::from_mins(1);

/// A running engine.
pub(crate) struct Daemon {
    pub(crate) dir: TempDir,
    pub(crate) engine: Engine,
}

impl Daemon {
    /// `top` (QED, 8 MiB) over `mid.qed` over `base.img`, and `plain` (raw, 1 MiB), each on a shard of its own.
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_images(dir.path());
        let engine = Engine::start(&EngineConfig { shards: 2, ..EngineConfig::default() }).unwrap();
        for (name, file, format) in [("top", "top.qed", Format::Qed), ("plain", "plain.img", Format::Raw)] {
            let spec = DiskSpec {
                description: None,
                name: name.into(),
                file: dir.path().join(file).to_str().unwrap().into(),
                format: Some(format),
                cache: CacheMode::Writeback,
                read_only: false,
                copy_on_read: false,
                snapshot: None,
                source: store::ailing::Ailments::default(),
            };
            engine.add_disk(spec).await.unwrap();
        }
        let daemon = Self { dir, engine };
        control::qmp::listen(daemon.engine.clone(), &daemon.qmp_socket()).await.unwrap();
        control::hmp::listen(daemon.engine.clone(), &daemon.hmp_socket()).await.unwrap();
        daemon
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    pub(crate) fn hmp_socket(&self) -> PathBuf {
        self.dir.path().join("hmp")
    }

    /// A client that has negotiated.
    pub(crate) async fn qmp(&self) -> Qmp {
        let mut client = self.greeted().await;
        client.send(r#"{"execute": "qmp_capabilities"}"#).await;
        assert_eq!(client.receive().await, json!({ "return": {} }));
        client
    }

    /// A client that has been greeted.
    pub(crate) async fn greeted(&self) -> Qmp {
        let mut client = Qmp::connect(&self.qmp_socket()).await;
        assert!(client.receive().await["QMP"]["capabilities"].is_array());
        client
    }

    /// What is the same on every run.
    pub(crate) fn plain(&self, text: &str) -> String {
        text.replace(self.dir.path().to_str().unwrap(), "DIR")
    }
}

/// Makes the image files.
fn make_images(dir: &Path) {
    let bytes: Vec<u8> = (0..8 * MIB).map(|at| (at % 251) as u8 + 1).collect();
    std::fs::write(dir.join("base.img"), bytes).unwrap();
    std::fs::write(dir.join("plain.img"), vec![7; 1 << 20]).unwrap();
    let ring = ring::Ring::new(ring::Config::default()).unwrap();
    ring.block_on(async {
        for (name, below, format) in [("mid.qed", "base.img", Format::Raw), ("top.qed", "mid.qed", Format::Qed)] {
            let options = CreateOptions {
                format: Format::Qed,
                size: 8 * MIB,
                backing: Some(BackingRef { name: below.into(), format: Some(format) }),
                cluster_size: None,
                table_size: None,
                qcow2: image::qcow2::Options::default(),
                passphrase: None,
                iteration_time: None,
            };
            let store = FileStore::create(&dir.join(name), OpenOptions::default()).await.unwrap();
            create(store.clone(), &options).await.unwrap();
            store::Store::close(&*store).await.unwrap();
        }
    });
}

/// A QMP client without opinions: what comes is what it says.
pub(crate) struct Qmp {
    input: BufReader<OwnedReadHalf>,
    out: OwnedWriteHalf,
    /// Events that came before the answer that was waited for.
    pub(crate) events: Vec<Value>,
}

impl Qmp {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let (input, out) = UnixStream::connect(socket).await.unwrap().into_split();
        Self { input: BufReader::new(input), out, events: Vec::new() }
    }

    pub(crate) async fn send(&mut self, text: impl AsRef<[u8]>) {
        self.out.write_all(text.as_ref()).await.unwrap();
    }

    /// As [`Qmp::send`], to somebody who may have hung up.
    pub(crate) async fn try_send(&mut self, text: impl AsRef<[u8]>) -> bool {
        self.out.write_all(text.as_ref()).await.is_ok()
    }

    /// Sends while something else goes on. Nothing can be sent afterwards.
    pub(crate) fn send_apart(&mut self, text: String) {
        let (_, nowhere) = UnixStream::pair().unwrap().0.into_split();
        let mut out = std::mem::replace(&mut self.out, nowhere);
        drop(tokio::spawn(async move {
            out.write_all(text.as_bytes()).await.unwrap();
            // The other side would take a closed half for the end.
            std::mem::forget(out);
        }));
    }

    /// The next line, as it is.
    pub(crate) async fn answer_text(&mut self) -> String {
        let mut line = String::new();
        timeout(PATIENCE, self.input.read_line(&mut line)).await.expect("a line in time").unwrap();
        line
    }

    /// The next message; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        let mut line = Vec::new();
        let read =
            timeout(PATIENCE, self.input.read_until(b'\n', &mut line)).await.expect("a message in time").unwrap();
        if read == 0 {
            return None;
        }
        assert!(line.ends_with(b"\r\n"), "{line:?}");
        Some(serde_json::from_slice(&line).unwrap())
    }

    pub(crate) async fn receive(&mut self) -> Value {
        self.next().await.expect("a message before the end")
    }

    /// The next message that is no event.
    pub(crate) async fn answer(&mut self) -> Value {
        loop {
            let message = self.receive().await;
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Runs a command.
    pub(crate) async fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.send(json!({ "execute": command, "arguments": arguments }).to_string()).await;
        self.answer().await
    }

    /// Runs a command that must succeed.
    pub(crate) async fn done(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.run(command, arguments).await;
        answer.get("return").unwrap_or_else(|| panic!("{command}: {answer}")).clone()
    }

    /// Runs a command that must fail; class and text.
    pub(crate) async fn refused(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.run(command, arguments).await;
        let part =
            |name: &str| answer["error"][name].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned();
        format!("{}: {}", part("class"), part("desc"))
    }

    /// Collects events up to one that `last` accepts, and says which that was.
    pub(crate) async fn until(&mut self, last: impl Fn(&Value) -> bool) -> Value {
        if let Some(found) = self.events.iter().find(|event| last(event)) {
            return found.clone();
        }
        loop {
            let message = self.receive().await;
            assert!(message.get("event").is_some(), "{message}");
            self.events.push(message.clone());
            if last(&message) {
                return message;
            }
        }
    }

    /// Waits until the job has this status.
    pub(crate) async fn until_status(&mut self, id: &str, status: &str) {
        self.until(|event| event["data"]["id"] == id && event["data"]["status"] == status).await;
    }

    /// What came so far, in short; forgotten then.
    pub(crate) fn told(&mut self) -> Vec<String> {
        let short = |event: Value| match event["event"].as_str() {
            Some("JOB_STATUS_CHANGE") => event["data"]["status"].as_str().unwrap_or("?").to_owned(),
            other => other.unwrap_or("?").to_owned(),
        };
        self.events.drain(..).map(short).collect()
    }
}

/// Somebody at the human monitor.
pub(crate) struct Hmp {
    pub(crate) stream: UnixStream,
}

impl Hmp {
    /// Connects and reads the greeting up to the first prompt.
    pub(crate) async fn connect(socket: &Path) -> (Self, String) {
        let mut hmp = Self { stream: UnixStream::connect(socket).await.unwrap() };
        let greeting = hmp.up_to_prompt().await;
        (hmp, greeting)
    }

    /// What is said until the next prompt, or the end.
    pub(crate) async fn up_to_prompt(&mut self) -> String {
        let mut said = Vec::new();
        while !said.ends_with(b"(qemu) ") {
            let mut byte = [0];
            let read = timeout(PATIENCE, self.stream.read(&mut byte)).await.expect("a prompt in time").unwrap();
            if read == 0 {
                break;
            }
            said.push(byte[0]);
        }
        let said = String::from_utf8(said).unwrap();
        said.trim_end_matches("(qemu) ").to_owned()
    }

    pub(crate) async fn say(&mut self, line: &str) -> String {
        self.stream.write_all(line.as_bytes()).await.unwrap();
        self.stream.write_all(b"\n").await.unwrap();
        self.up_to_prompt().await
    }
}

/// Runs a test on a daemon of its own.
pub(crate) fn with_daemon(test: impl AsyncFnOnce(&Daemon)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let daemon = Daemon::start().await;
        test(&daemon).await;
        daemon.engine.shut_down().await.unwrap();
    });
}
