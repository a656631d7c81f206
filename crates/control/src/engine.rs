//! The engine: shards, which device lives on which, and the stream of events. `Send`, cheap to clone; every block
//! operation it offers is a closure that runs on the device's own shard.

use crate::{Device, DiskSpec, Failure, ShardState};
use export::nbd::Address;
use job::Event;
use ring::{Handle, Shard};
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// Events that may wait for one subscriber; one that lets more pile up is cut off rather than served with gaps.
const EVENTS_WAITING: usize = 4096;

/// How long the end waits for clients of monitors to take the last events.
const FAREWELL: Duration = Duration::from_secs(2);

/// How to start.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Shard threads, at least 1.
    pub shards: usize,
    /// Each shard's ring.
    pub ring: ring::Config,
    /// What disks' names may refer to, as `--object` has it ([`graph::Objects`]).
    pub objects: Vec<String>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { shards: 1, ring: ring::Config::default(), objects: Vec::new() }
    }
}

/// An event and when it happened (since the epoch, as QMP's `timestamp`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamped {
    /// Whole seconds.
    pub seconds: u64,
    /// And microseconds.
    pub microseconds: u32,
    /// What.
    pub event: Happening,
}

/// What happens that operators hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// To a job.
    Job(Event),
    /// Something was written behind a mark.
    WriteThreshold {
        /// The node that has the mark.
        node: String,
        /// Where it was.
        threshold: u64,
        /// By how many bytes it was passed.
        exceeded: u64,
    },
    /// An export is gone.
    ExportDeleted {
        /// Which.
        id: String,
    },
}

/// A running Headwater.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    handles: Vec<Handle>,
    shards: Mutex<Vec<Shard>>,
    /// Device name and shard index, in the order they came.
    placed: Mutex<Vec<(String, usize)>>,
    subscribers: Arc<Mutex<Vec<mpsc::Sender<Stamped>>>>,
    ending: watch::Sender<Option<Ending>>,
    /// How many clients of monitors there are.
    monitors: watch::Sender<usize>,
}

/// Why the process ends, as QMP's `SHUTDOWN` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// Somebody at a monitor asked for it.
    HostQmpQuit,
    /// The host did: a signal, or a start that failed.
    HostSignal,
}

/// A client of a monitor, until dropped: the shutdown lets it hear the last events.
pub(crate) struct AtMonitor {
    engine: Engine,
}

impl Drop for AtMonitor {
    fn drop(&mut self) {
        self.engine.inner.monitors.send_modify(|clients| *clients -= 1);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data, valid at every step: a panic elsewhere leaves nothing half done in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// Starts the shard threads.
    pub fn start(config: &EngineConfig) -> io::Result<Self> {
        let subscribers: Arc<Mutex<Vec<mpsc::Sender<Stamped>>>> = Arc::default();
        // Each shard has its own, of the same texts; mistakes are found before anything runs.
        graph::Objects::new(&config.objects).map_err(io::Error::other)?;
        let mut shards = Vec::new();
        for index in 0..config.shards.max(1) {
            let shard = Shard::start(&format!("shard-{index}"), config.ring.clone())?;
            let (subscribers, objects) = (subscribers.clone(), config.objects.clone());
            shard
                .handle()
                .post(move || ShardState::install(Rc::new(move |event| publish(&subscribers, event)), &objects))
                .map_err(io::Error::other)?;
            shards.push(shard);
        }
        let handles = shards.iter().map(|shard| shard.handle().clone()).collect();
        Ok(Self {
            inner: Arc::new(Inner {
                handles,
                shards: Mutex::new(shards),
                placed: Mutex::default(),
                subscribers,
                ending: watch::Sender::new(None),
                monitors: watch::Sender::new(0),
            }),
        })
    }

    /// Opens a disk on the shard that has the fewest. [`Failure`] if the name is taken.
    pub async fn add_disk(&self, spec: DiskSpec) -> Result<(), Failure> {
        let name = spec.name.clone();
        let index = {
            let mut placed = locked(&self.inner.placed);
            if placed.iter().any(|(taken, _)| *taken == name) {
                return Err(Failure::generic(format!(
                    "Device name '{name}' is taken; give each disk its own (--device NAME=FILE)"
                )));
            }
            let load = |index: usize| placed.iter().filter(|(_, at)| *at == index).count();
            let index = (0..self.inner.handles.len()).min_by_key(|index| load(*index)).unwrap_or(0);
            placed.push((name.clone(), index));
            index
        };
        let added = self.run(index, |state| async move { state.add_disk(spec).await.map(drop) }).await;
        if added.is_err() {
            locked(&self.inner.placed).retain(|(placed, _)| *placed != name);
        }
        added
    }

    /// Offers devices (all on one shard) at an NBD address; returns the address in use.
    pub async fn serve_nbd(&self, address: Address, devices: Vec<String>) -> Result<Address, Failure> {
        self.serve_nbd_to(address, devices, 0).await
    }

    /// The same, to `most` clients at once (0: any number).
    pub async fn serve_nbd_to(&self, address: Address, devices: Vec<String>, most: u32) -> Result<Address, Failure> {
        let mut at = None;
        for device in &devices {
            let index = self.shard_of(device)?;
            if *at.get_or_insert(index) != index {
                return Err(Failure::generic("Disks behind one NBD address must share a shard; serve with --shards 1"));
            }
        }
        self.run(at.unwrap_or(0), move |state| async move { state.start_nbd(address, &devices, most).await }).await
    }

    /// Offers a device to a vhost-user front end.
    pub async fn serve_vhost_user(&self, device: &str, socket: PathBuf, queues: u16) -> Result<(), Failure> {
        let index = self.shard_of(device)?;
        let device = device.to_owned();
        self.run(index, move |state| async move { state.start_vhost_user(&device, socket, queues).await }).await
    }

    /// Device names, in the order they came.
    pub fn devices(&self) -> Vec<String> {
        locked(&self.inner.placed).iter().map(|(name, _)| name.clone()).collect()
    }

    /// Runs `work` where `device` lives, with the shard's state (its jobs among them).
    pub async fn on_device<T, F>(
        &self,
        device: &str,
        work: impl FnOnce(Rc<Device>, Rc<ShardState>) -> F + Send + 'static,
    ) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + 'static,
    {
        let index = self.shard_of(device)?;
        let name = device.to_owned();
        self.run(index, move |state| async move {
            let device = state.device(&name).ok_or_else(|| Failure::no_device(&name))?;
            work(device, state).await
        })
        .await
    }

    /// Runs `work` where the named nodes are, with the shard's state.
    pub async fn on_nodes<T, F>(&self, work: impl FnOnce(Rc<ShardState>) -> F + Send + 'static) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + 'static,
    {
        self.run(0, work).await
    }

    /// Runs `work` on every shard; answers come in shard order.
    pub async fn on_every_shard<T, F>(
        &self,
        work: impl Fn(Rc<ShardState>) -> F + Send + Clone + 'static,
    ) -> Result<Vec<T>, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + 'static,
    {
        let mut answers = Vec::new();
        for index in 0..self.inner.handles.len() {
            let work = work.clone();
            answers.push(self.run(index, work).await?);
        }
        Ok(answers)
    }

    /// Events from now on. A subscriber that lets thousands pile up is cut off: its channel ends.
    pub fn subscribe(&self) -> mpsc::Receiver<Stamped> {
        let (sender, receiver) = mpsc::channel(EVENTS_WAITING);
        locked(&self.inner.subscribers).push(sender);
        receiver
    }

    /// Asks the process to end (QMP's `quit`).
    pub fn request_quit(&self) {
        self.end(Ending::HostQmpQuit);
    }

    /// The first reason counts.
    fn end(&self, why: Ending) {
        self.inner.ending.send_if_modified(|ending| ending.replace(ending.unwrap_or(why)).is_none());
    }

    /// Waits until somebody has asked the process to end.
    pub async fn quit_requested(&self) {
        self.ending().await;
    }

    /// Waits until the end has begun, whoever wanted it.
    pub(crate) async fn ending(&self) -> Ending {
        let mut ending = self.inner.ending.subscribe();
        // The sender lives in `self`, so this cannot end early; were it to, the process is past all monitors.
        let seen = ending.wait_for(Option::is_some).await.map(|why| *why);
        seen.ok().flatten().unwrap_or(Ending::HostSignal)
    }

    /// Counts a client of a monitor.
    pub(crate) fn at_monitor(&self) -> AtMonitor {
        self.inner.monitors.send_modify(|clients| *clients += 1);
        AtMonitor { engine: self.clone() }
    }

    /// Ends exports, jobs and disks, then the shards; at last the monitors' clients, who have a moment to hear of it all.
    /// The first failure is reported; everything is closed all the same. Needs tokio's timers.
    pub async fn shut_down(&self) -> Result<(), Failure> {
        self.end(Ending::HostSignal);
        let mut outcome = Ok(());
        for index in 0..self.inner.handles.len() {
            let ended = self.run(index, |state| async move { state.shut_down().await }).await;
            outcome = outcome.and(ended);
        }
        locked(&self.inner.placed).clear();
        let shards = std::mem::take(&mut *locked(&self.inner.shards));
        for shard in shards {
            shard.stop();
        }
        locked(&self.inner.subscribers).clear();
        let mut monitors = self.inner.monitors.subscribe();
        let _ = tokio::time::timeout(FAREWELL, monitors.wait_for(|clients| *clients == 0)).await;
        outcome
    }

    fn shard_of(&self, device: &str) -> Result<usize, Failure> {
        locked(&self.inner.placed)
            .iter()
            .find_map(|(name, index)| (name == device).then_some(*index))
            .ok_or_else(|| Failure::no_device(device))
    }

    async fn run<T, F>(
        &self,
        index: usize,
        work: impl FnOnce(Rc<ShardState>) -> F + Send + 'static,
    ) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + 'static,
    {
        self.inner.handles[index]
            .call(move || async move {
                match ShardState::current() {
                    Some(state) => work(state).await,
                    None => Err(Failure::from(ring::Closed)),
                }
            })
            .await?
    }
}

/// Stamps an event and hands it to every subscriber; one whose channel is full or gone is dropped.
fn publish(subscribers: &Mutex<Vec<mpsc::Sender<Stamped>>>, event: Happening) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamped = Stamped { seconds: since.as_secs(), microseconds: since.subsec_micros(), event };
    locked(subscribers).retain(|subscriber| subscriber.try_send(stamped.clone()).is_ok());
}
