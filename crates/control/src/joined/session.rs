//! One client of a joined monitor, and QEMU's monitor behind it.
//!
//! **Invariant.** Between two commands of the client nothing is under way with QEMU: an answer belongs to the one question that was
//! asked last, by its number.

use super::merge;
use super::route::{Merged, Route, Shared, line_subject, named, route};
use super::wire::Wire;
use super::{Joined, locked};
use crate::qmp;
use crate::{Failure, Stamped};
use graph::json::Framed;
use serde_json::{Map, Value, json};
use std::future::pending;
use std::io;
use tokio::sync::mpsc;

/// What a command comes to: a value, or an error's object.
type Answer = Result<Value, Value>;

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The client does not listen, or sends what cannot be read.
    #[error("the client: {0}")]
    Client(io::Error),
    /// QEMU is gone.
    #[error("the emulator is gone")]
    Emulator,
}

type Step<T> = Result<T, End>;

pub(super) struct Session {
    joined: Joined,
    client: Wire,
    emulator: Wire,
    /// Our events since negotiation; `None` before it.
    events: Option<mpsc::Receiver<Stamped>>,
    asked: u64,
    /// Nodes that the guest's devices have let go of, and QEMU's clients not yet.
    released: Vec<String>,
}

fn refused(failure: Failure) -> Value {
    json!({ "class": failure.class.name(), "desc": failure.desc })
}

fn generic(desc: impl Into<String>) -> Value {
    refused(Failure::generic(desc))
}

/// What a command answers that gives nothing.
fn nothing() -> Value {
    json!({})
}

fn own(answer: Result<Value, Failure>) -> Answer {
    answer.map_err(refused)
}

/// The next event; never before negotiation.
async fn next_event(events: &mut Option<mpsc::Receiver<Stamped>>) -> Option<Stamped> {
    match events {
        Some(events) => events.recv().await,
        None => pending().await,
    }
}

fn node_named(node: &str) -> Map<String, Value> {
    Map::from_iter([("node-name".to_owned(), json!(node))])
}

fn string(arguments: &Map<String, Value>, key: &str) -> String {
    arguments.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

impl Session {
    pub(super) fn new(joined: Joined, client: Wire, emulator: Wire) -> Self {
        Self { joined, client, emulator, events: None, asked: 0, released: Vec::new() }
    }

    /// Until one of the three is gone.
    pub(super) async fn run(mut self) -> Step<()> {
        match self.talk().await {
            Err(End::Emulator) => self.say_goodbye().await,
            end => end,
        }
    }

    async fn talk(&mut self) -> Step<()> {
        self.greet().await?;
        loop {
            tokio::select! {
                message = self.client.next() => match message.map_err(End::Client)? {
                    Some(message) => self.obey(message).await?,
                    None => return Ok(()),
                },
                message = self.emulator.next() => self.relay(message).await.map(drop)?,
                event = next_event(&mut self.events) => match event {
                    Some(stamped) => self.tell(&qmp::event_message(&stamped)).await?,
                    // More events piled up than it took, or everything has ended.
                    None => return Ok(()),
                },
            }
        }
    }

    async fn tell(&mut self, message: &Value) -> Step<()> {
        self.client.send(message, Vec::new()).await.map_err(End::Client)
    }

    /// QEMU's greeting, as it is but for what is not offered here.
    async fn greet(&mut self) -> Step<()> {
        let first = self.emulator.next().await.ok().flatten().ok_or(End::Emulator)?;
        let mut greeting = first.map_err(|_| End::Emulator)?;
        if let Some(capabilities) = greeting.pointer_mut("/QMP/capabilities") {
            *capabilities = json!([]);
        }
        self.tell(&greeting).await
    }

    /// QEMU has ended, or is about to: what that causes is told, up to the last event there is.
    async fn say_goodbye(&mut self) -> Step<()> {
        let Some(mut events) = self.events.take() else { return Ok(()) };
        while let Some(stamped) = events.recv().await {
            self.tell(&qmp::event_message(&stamped)).await?;
        }
        Ok(())
    }

    /// Takes what came from QEMU: an event goes on to the client, an answer is returned.
    async fn relay(&mut self, message: io::Result<Option<Framed>>) -> Step<Option<Value>> {
        let framed = message.ok().flatten().ok_or(End::Emulator)?;
        let value = framed.map_err(|_| End::Emulator)?;
        if value.get("event").is_some() {
            if value["event"] == "DEVICE_DELETED" {
                let device = value.pointer("/data/device").and_then(Value::as_str);
                self.released.extend(device.and_then(|id| self.joined.device_gone(id)));
            }
            self.tell(&value).await?;
            return Ok(None);
        }
        Ok(Some(value))
    }

    /// Nodes that no device of the guest has any more are only ours again. Others may have been quicker, and QEMU may still have a
    /// use for one: then `blockdev-del` is what ends it.
    async fn let_go(&mut self) -> Step<()> {
        while let Some(node) = self.released.pop() {
            if self.joined.is_lent(&node) && self.ask("blockdev-del", node_named(&node)).await?.is_ok() {
                let _ = self.joined.take_back(&node).await;
            }
        }
        Ok(())
    }

    /// Asks QEMU, and waits for its answer; meanwhile events go on.
    async fn forward(&mut self, mut request: Map<String, Value>) -> Step<Answer> {
        // The two that take a descriptor.
        let takes = matches!(request.get("execute").and_then(Value::as_str), Some("getfd" | "add-fd"));
        let fds = if takes { self.client.take_descriptors() } else { Vec::new() };
        self.asked += 1;
        let number = json!(self.asked);
        request.insert("id".to_owned(), number.clone());
        self.emulator.send(&Value::Object(request), fds).await.map_err(|_| End::Emulator)?;
        loop {
            let answer = tokio::select! {
                message = self.emulator.next() => self.relay(message).await?,
                event = next_event(&mut self.events) => {
                    match event {
                        Some(stamped) => self.tell(&qmp::event_message(&stamped)).await?,
                        None => return Err(End::Client(io::ErrorKind::TimedOut.into())),
                    }
                    None
                }
            };
            let Some(mut answer) = answer else { continue };
            if answer.get("id") != Some(&number) {
                continue;
            }
            return Ok(match answer.get_mut("return").map(Value::take) {
                Some(value) => Ok(value),
                None => Err(answer.get_mut("error").map(Value::take).unwrap_or_default()),
            });
        }
    }

    async fn ask(&mut self, command: &str, arguments: Map<String, Value>) -> Step<Answer> {
        let mut request = Map::new();
        request.insert("execute".to_owned(), json!(command));
        if !arguments.is_empty() {
            request.insert("arguments".to_owned(), Value::Object(arguments));
        }
        self.forward(request).await
    }

    async fn obey(&mut self, framed: Framed) -> Step<()> {
        self.let_go().await?;
        let (id, answer) = match framed {
            Ok(Value::Object(mut request)) => {
                let id = request.shift_remove("id");
                (id, self.execute(request).await?)
            }
            Ok(_) => (None, Err(generic("QMP input must be a JSON object"))),
            Err(mistake) => (None, Err(generic(mistake))),
        };
        // What the command caused comes first, as it happened first.
        while let Some(Ok(stamped)) = self.events.as_mut().map(mpsc::Receiver::try_recv) {
            self.tell(&qmp::event_message(&stamped)).await?;
        }
        let mut told = match answer {
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": error }),
        };
        if let Some(id) = id {
            told["id"] = id;
        }
        self.tell(&told).await
    }

    async fn execute(&mut self, request: Map<String, Value>) -> Step<Answer> {
        let command = request.get("execute").and_then(Value::as_str).unwrap_or_default().to_owned();
        let arguments = match request.get("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments.clone(),
            // QEMU says what is wrong with it.
            Some(_) => return self.forward(request).await,
        };
        if request.contains_key("exec-oob") {
            return Ok(Err(generic("QMP input member 'exec-oob' is unexpected: out-of-band execution is not offered")));
        }
        if self.events.is_none() {
            return self.negotiate(&command, &arguments, request).await;
        }
        // Whoever misspells a command hears of it from QEMU.
        let stray = request.keys().any(|key| key != "execute" && key != "arguments");
        if command.is_empty() || stray {
            return self.forward(request).await;
        }
        match route(&command) {
            Route::Emulator => self.forward(request).await,
            Route::Ours => self.carry_out(&command, arguments).await,
            Route::Merged(how) => self.merged(how, &command, arguments).await,
            Route::Job(key) => {
                let known = self.joined.has_job(&string(&arguments, key)).await;
                self.run_or_ask(known, &command, arguments, request).await
            }
            Route::Export(key) => {
                let known = self.joined.has_export(&string(&arguments, key)).await;
                self.run_or_ask(known, &command, arguments, request).await
            }
            Route::Both(shared) => self.shared(shared, &command, arguments, request).await,
            Route::Whole => match self.whole(&command).await {
                Ok(None) => self.forward(request).await,
                Ok(Some(why)) => Ok(Err(generic(why))),
                Err(failure) => Ok(Err(refused(failure))),
            },
            Route::Named => {
                let names = named(&arguments);
                let known = if names.is_empty() { Ok(false) } else { self.any_ours(&names).await };
                match known {
                    Ok(true) if !qmp::knows(&command) => Ok(Err(generic(format!(
                        "'{command}' is not there for disks that Headwater serves ('{}')",
                        names.join("', '")
                    )))),
                    known => self.run_or_ask(known, &command, arguments, request).await,
                }
            }
        }
    }

    /// Why what concerns the machine's whole state cannot be, if a disk of it is ours.
    async fn whole(&self, command: &str) -> Result<Option<String>, Failure> {
        let ours = self.joined.ours().await?.inserted.into_keys();
        // Not as QEMU's clients are called that nobody gave a name.
        let mut names: Vec<String> = ours.filter(|name| !name.starts_with("headwater-")).collect();
        names.sort_unstable();
        let disks = names.join("', '");
        Ok((!names.is_empty()).then(|| {
            if command.starts_with("migrate") {
                format!("'{command}' is not there while Headwater serves disks of the machine ('{disks}'): it cannot hand them over")
            } else {
                format!(
                    "'{command}' is not there while Headwater serves disks of the machine ('{disks}'): \
                     QEMU can keep no state of the machine in them"
                )
            }
        }))
    }

    async fn any_ours(&self, names: &[String]) -> Result<bool, Failure> {
        let ours = self.joined.names().await?;
        Ok(names.iter().any(|name| ours.contains(name)))
    }

    async fn negotiate(
        &mut self,
        command: &str,
        arguments: &Map<String, Value>,
        request: Map<String, Value>,
    ) -> Step<Answer> {
        let wanted = arguments.get("enable").and_then(Value::as_array);
        if command == "qmp_capabilities" && wanted.is_some_and(|wanted| wanted.contains(&json!("oob"))) {
            return Ok(Err(generic("Capability 'oob' is not available")));
        }
        let answer = self.forward(request).await?;
        if command == "qmp_capabilities" && answer.is_ok() {
            self.events = Some(self.joined.engine().subscribe());
        }
        Ok(answer)
    }

    /// Carries a command out on our side.
    async fn carry_out(&mut self, command: &str, arguments: Map<String, Value>) -> Step<Answer> {
        let arguments = self.joined.translated(arguments);
        Ok(own(qmp::execute(self.joined.engine(), command, arguments).await))
    }

    /// Carries a command out on our side if what it names is ours, else asks QEMU.
    async fn run_or_ask(
        &mut self,
        ours: Result<bool, Failure>,
        command: &str,
        arguments: Map<String, Value>,
        request: Map<String, Value>,
    ) -> Step<Answer> {
        match ours {
            Ok(true) => self.carry_out(command, arguments).await,
            Ok(false) => self.forward(request).await,
            Err(failure) => Ok(Err(refused(failure))),
        }
    }

    /// An answer that both have a part in. If QEMU refuses, so do we, unless either will do.
    async fn merged(&mut self, how: Merged, command: &str, arguments: Map<String, Value>) -> Step<Answer> {
        let theirs = self.ask(command, arguments.clone()).await?;
        if how == Merged::Either {
            let mine = qmp::execute(self.joined.engine(), command, arguments).await;
            return Ok(match (theirs, mine) {
                (Ok(theirs @ Value::Array(_)), Ok(mine)) => Ok(merge::lists(theirs, mine)),
                (Err(_), Ok(mine)) => Ok(mine),
                (theirs, _) => theirs,
            });
        }
        let theirs = match theirs {
            Ok(theirs) => theirs,
            refused => return Ok(refused),
        };
        Ok(own(self.put_together(how, command, arguments, theirs).await))
    }

    async fn put_together(
        &self,
        how: Merged,
        command: &str,
        arguments: Map<String, Value>,
        theirs: Value,
    ) -> Result<Value, Failure> {
        let joined = &self.joined;
        match how {
            Merged::Commands => Ok(merge::commands(theirs, qmp::names())),
            Merged::Schema => Ok(merge::schema(theirs, qmp::described())),
            Merged::Devices => Ok(merge::devices(theirs, &joined.ours().await?)),
            Merged::Lists | Merged::Either => {
                Ok(merge::lists(theirs, qmp::execute(joined.engine(), command, arguments).await?))
            }
            Merged::Nodes => {
                let mine = qmp::execute(joined.engine(), command, arguments).await?;
                Ok(merge::nodes(theirs, mine, &joined.ours().await?))
            }
            Merged::Stats => {
                let by_node = arguments.get("query-nodes") == Some(&Value::Bool(true));
                let mine = joined.own_stats(arguments).await?;
                Ok(merge::stats(theirs, mine, &joined.ours().await?, by_node))
            }
        }
    }

    async fn shared(
        &mut self,
        what: Shared,
        command: &str,
        arguments: Map<String, Value>,
        request: Map<String, Value>,
    ) -> Step<Answer> {
        match what {
            Shared::AddNode => self.add_node(arguments, request).await,
            Shared::RemoveNode => self.remove_node(arguments, request).await,
            Shared::AddDevice => self.with_node("drive", command, arguments).await,
            Shared::InsertMedium => self.with_node("node-name", command, arguments).await,
            Shared::Resize => {
                let names = [string(&arguments, "device"), string(&arguments, "node-name")];
                match self.any_ours(&names).await {
                    Ok(true) if self.reached_over_nbd(&names) => Ok(Err(generic(
                        "A disk that the guest has cannot change its size: the guest reaches it over NBD, which has one for good",
                    ))),
                    ours => self.run_or_ask(ours, command, arguments, request).await,
                }
            }
            Shared::AddObject => {
                let answer = self.forward(request).await?;
                let kind = string(&arguments, "qom-type");
                if answer.is_ok() && matches!(kind.as_str(), "secret" | "throttle-group") {
                    let id = string(&arguments, "id");
                    // One that only QEMU understands is missed by whoever refers to it, and that is told.
                    if let Err(failure) = qmp::object_add(self.joined.engine(), arguments).await {
                        tracing::debug!(%failure, id, "an object is QEMU's only");
                    }
                }
                Ok(answer)
            }
            Shared::RemoveObject => {
                let answer = self.forward(request).await?;
                if answer.is_ok() {
                    // Most are QEMU's only.
                    let _ = qmp::execute(self.joined.engine(), command, arguments).await;
                }
                Ok(answer)
            }
            Shared::Line => self.line(command, arguments, request).await,
        }
    }

    /// Whether the guest has one of these over NBD: a device's name is never an empty one.
    fn reached_over_nbd(&self, names: &[String]) -> bool {
        let drives = locked(&self.joined.inner.drives);
        names.iter().filter(|name| !name.is_empty()).any(|name| {
            let drive = drives.iter().find(|drive| drive.device == *name || drive.client() == Some(name.as_str()));
            drive.is_some_and(|drive| drive.client().is_some()) || self.joined.is_lent(name)
        })
    }

    /// `blockdev-add`: ours if we can open it and have what it refers to.
    async fn add_node(&mut self, arguments: Map<String, Value>, request: Map<String, Value>) -> Step<Answer> {
        let ours = match graph::serves_tree(&arguments) {
            Err(_) => false,
            Ok(refers) => match self.joined.names().await {
                Ok(names) => refers.to.iter().all(|name| names.contains(name)),
                Err(failure) => return Ok(Err(refused(failure))),
            },
        };
        if !ours {
            return self.forward(request).await;
        }
        Ok(own(self.joined.add_node(arguments).await.map(|()| nothing())))
    }

    /// `blockdev-del`: of a node that QEMU has, QEMU's client goes first.
    async fn remove_node(&mut self, arguments: Map<String, Value>, request: Map<String, Value>) -> Step<Answer> {
        let node = string(&arguments, "node-name");
        match self.any_ours(std::slice::from_ref(&node)).await {
            Ok(true) => {}
            ours => return self.run_or_ask(ours, "blockdev-del", arguments, request).await,
        }
        if self.joined.is_lent(&node) {
            let answer = self.forward(request).await?;
            if answer.is_err() {
                return Ok(answer);
            }
            if let Err(failure) = self.joined.take_back(&node).await {
                return Ok(Err(refused(failure)));
            }
        }
        Ok(own(self.joined.remove_node(&node).await.map(|()| nothing())))
    }

    /// A command by which a device of the guest comes to a node: if it is ours, QEMU is lent it first.
    async fn with_node(&mut self, key: &str, command: &str, mut arguments: Map<String, Value>) -> Step<Answer> {
        let node = string(&arguments, key);
        if !self.joined.has_node(&node).await {
            return self.ask(command, arguments).await;
        }
        let lent = match self.joined.lend(&node).await {
            Ok(lent) => lent,
            Err(failure) => return Ok(Err(refused(failure))),
        };
        let fresh = lent.is_some();
        if let Some(tree) = lent
            && let Err(error) = self.ask("blockdev-add", tree).await?
        {
            let _ = self.joined.take_back(&node).await;
            return Ok(Err(error));
        }
        if command == "device_add" {
            pausing(&mut arguments);
        }
        let device = string(&arguments, "id");
        let answer = self.ask(command, arguments).await?;
        if command == "device_add" && answer.is_ok() && !device.is_empty() {
            self.joined.add_device(&device, &node);
        }
        if fresh && answer.is_err() && self.ask("blockdev-del", node_named(&node)).await?.is_ok() {
            let _ = self.joined.take_back(&node).await;
        }
        Ok(answer)
    }

    /// `human-monitor-command`: lines about our jobs are ours.
    async fn line(
        &mut self,
        command: &str,
        arguments: Map<String, Value>,
        request: Map<String, Value>,
    ) -> Step<Answer> {
        let line = string(&arguments, "command-line");
        match line_subject(&line) {
            None => self.forward(request).await,
            Some(("info block-jobs", _)) => {
                let theirs = self.forward(request).await?;
                let jobs = match qmp::all_jobs(self.joined.engine()).await {
                    Ok(jobs) => jobs,
                    Err(failure) => return Ok(Err(refused(failure))),
                };
                match theirs {
                    Ok(theirs) if !jobs.is_empty() => {
                        let mine = self.carry_out(command, arguments).await?;
                        Ok(mine.map(|mine| {
                            let theirs = theirs.as_str().filter(|text| !text.starts_with("No active jobs"));
                            json!(format!("{}{}", mine.as_str().unwrap_or_default(), theirs.unwrap_or_default()))
                        }))
                    }
                    theirs => Ok(theirs),
                }
            }
            Some((name @ ("savevm" | "loadvm" | "delvm" | "migrate" | "migrate_incoming"), _)) => {
                match self.whole(name).await {
                    Ok(None) => self.forward(request).await,
                    Ok(Some(why)) => Ok(Ok(json!(format!("Error: {why}\r\n")))),
                    Err(failure) => Ok(Err(refused(failure))),
                }
            }
            Some((name, subject)) => {
                let subject = subject.unwrap_or_default().to_owned();
                let ours = if name == "block_stream" {
                    self.any_ours(&[subject]).await
                } else {
                    self.joined.has_job(&subject).await
                };
                self.run_or_ask(ours, command, arguments, request).await
            }
        }
    }
}

/// Devices that can pause the guest when their disk fails, which is what they do when we are lost, unless their user wants it
/// otherwise.
const PAUSING: [&str; 8] = [
    "virtio-blk-pci",
    "virtio-blk-pci-non-transitional",
    "virtio-blk-device",
    "virtio-blk-ccw",
    "scsi-hd",
    "scsi-cd",
    "ide-hd",
    "ide-cd",
];

/// Whether a device of this kind has `werror` and `rerror`.
pub fn can_pause(driver: &str) -> bool {
    PAUSING.contains(&driver)
}

/// Lets a device pause the guest on errors, unless its user said something of that.
fn pausing(device: &mut Map<String, Value>) {
    if can_pause(&string(device, "driver")) {
        for key in ["werror", "rerror"] {
            device.entry(key).or_insert_with(|| json!("stop"));
        }
    }
}
