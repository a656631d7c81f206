//! The device on its shard: turns commands into changes of its queues, and kicks into looks at them.
//!
//! # Invariants
//! * All waiting is one poll: kicks and the mailbox's bell are in one epoll set, and that set is what the ring polls. It can
//!   always be woken (the bell), so no operation is ever left behind in the ring.
//! * Kicks are edges: an eventfd is never read, every write to it is an event.
//! * Commands come one at a time; one that drains waits beside the kicks, not in their way.

use super::VhostUserExport;
use super::config::{Features, Shape};
use super::ledger::Ledger;
use super::mailbox::{Command, QueueCommand, Reply, ShardEnd};
use super::vring::{Target, Vring};
use ring::sync::Event;
use ring::{Events, File};
use rustix::event::{Timespec, epoll};
use rustix::net::SendFlags;
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};

/// The bell's token in the epoll set; a queue's is its index.
const BELL: u64 = u64::MAX;

/// Events taken out of the epoll set at once.
const BATCH: usize = 64;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`: request 2, version 1, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The device.
pub(super) struct Device {
    target: Rc<Target>,
    queues: Vec<Rc<Vring>>,
    /// What each queue is kicked by; in the epoll set as long as it is here.
    kicks: RefCell<Vec<Option<OwnedFd>>>,
    /// Where messages to the front end go.
    channel: RefCell<Option<OwnedFd>>,
    watch: File,
    closing: Cell<bool>,
    finished: Cell<bool>,
    end: Event,
}

impl Device {
    /// A device with stopped queues.
    pub(super) fn new(export: VhostUserExport) -> io::Result<Rc<Self>> {
        let read_only = export.read_only || export.disk.read_only();
        let target = Rc::new(Target {
            disk: export.disk,
            read_only,
            write_through: export.write_through,
            serial: export.serial,
            ledger: RefCell::new(None),
            lost: Cell::new(false),
        });
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Rc::new(Self {
            queues: (0..export.queues).map(|index| Vring::new(index, Rc::clone(&target))).collect(),
            kicks: RefCell::new((0..export.queues).map(|_| None).collect()),
            channel: RefCell::new(None),
            watch: File::new(watch),
            closing: Cell::new(false),
            finished: Cell::new(false),
            end: Event::new(),
            target,
        }))
    }

    /// What the device offers.
    pub(super) fn features(&self) -> Features {
        Features::offered(self.target.read_only)
    }

    /// Serves until the protocol thread has come to its end.
    pub(super) async fn serve(self: Rc<Self>, mail: ShardEnd) {
        let noting = ring::spawn(note_when_settled(Rc::downgrade(&self.target)));
        if let Err(error) = self.watch_and_serve(&mail).await {
            tracing::error!(disk = self.target.disk.name(), %error, "the vhost-user server cannot go on");
        }
        // From here on the thread's calls fail, and it ends.
        drop(mail);
        noting.cancel();
        self.finished.set(true);
        self.end.notify_all();
    }

    async fn watch_and_serve(self: &Rc<Self>, mail: &ShardEnd) -> io::Result<()> {
        self.watch(mail.bell(), BELL)?;
        let mut events = Vec::with_capacity(BATCH);
        while !mail.finished() {
            self.watch.poll(Events::Readable).await?;
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            match epoll::wait(self.watch.as_fd(), rustix::buffer::spare_capacity(&mut events), Some(&now)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    BELL => self.attend(mail),
                    index => self.queues[index as usize].look(),
                }
            }
        }
        Ok(())
    }

    /// Takes the command that waits, if one does.
    fn attend(self: &Rc<Self>, mail: &ShardEnd) {
        if let Some((command, reply)) = mail.take() {
            let this = Rc::clone(self);
            drop(ring::spawn(async move {
                let answer = this.execute(command).await.unwrap_or_else(Reply::Refused);
                // Its thread waits for it; there is room for exactly this one.
                let _ = reply.try_send(answer);
            }));
        }
    }

    async fn execute(&self, command: Command) -> Result<Reply, String> {
        if self.closing.get() && !matches!(command, Command::Gone) {
            return Err("the server is being stopped".into());
        }
        match command {
            Command::Features(bits) => self.queues.iter().for_each(|queue| queue.set_features(Features(bits))),
            Command::Memory(map) => {
                let map = map.map(Rc::new);
                self.queues.iter().for_each(|queue| queue.set_memory(map.clone()));
            }
            Command::Queue(index, command) => return self.queue(index, command).await,
            Command::Inflight(region) => {
                self.keep_ledger(region.ledger());
                self.queues.iter().for_each(|queue| queue.set_inflight(Some(region.clone())));
            }
            Command::Channel(socket) => {
                self.channel.replace(Some(socket));
            }
            Command::Config(offset, len) => {
                let shape = Shape::of(&self.target.disk, self.queues.len() as u16);
                let outside = || format!("{len} bytes at {offset} are not in the configuration space");
                return shape.read(offset, len).map(Reply::Config).ok_or_else(outside);
            }
            Command::Reset => self.stop_all().await,
            Command::Gone => {
                self.stop_all().await;
                self.settle().await;
                self.channel.replace(None);
                self.keep_ledger(None);
                self.queues.iter().for_each(|queue| queue.reset());
            }
        }
        Ok(Reply::Done)
    }

    /// From now on notes in `ledger` what hangs on this process, after a look at what it says of the last one.
    fn keep_ledger(&self, ledger: Option<Ledger>) {
        let lost = ledger.as_ref().is_some_and(Ledger::is_lost);
        if lost {
            tracing::error!(
                disk = self.target.disk.name(),
                "the server before this one was killed with writes that it had answered and not yet put into the image's \
                 tables; they are lost, so writes and flushes fail until the guest is reset (cache=writethrough prevents this)"
            );
        }
        self.target.lost.set(lost);
        self.target.ledger.replace(ledger);
        self.target.note();
    }

    /// Before the front end is let go, in good order: nothing shall hang on this process any more. It may come back to
    /// another one.
    async fn settle(&self) {
        if self.target.ledger.borrow().is_some() && self.target.disk.has_unsettled_writes() {
            if let Err(error) = self.target.disk.flush().await {
                tracing::warn!(disk = self.target.disk.name(), %error, "what the guest was answered could not be kept");
            }
            self.target.note();
        }
    }

    async fn queue(&self, index: u16, command: QueueCommand) -> Result<Reply, String> {
        let queue = self.queues.get(usize::from(index)).ok_or_else(|| format!("there is no queue {index}"))?;
        match command {
            QueueCommand::Size(size) => queue.set_size(size)?,
            QueueCommand::Addresses(addresses) => queue.set_addresses(addresses)?,
            QueueCommand::Base(base) => queue.set_base(base)?,
            QueueCommand::Stop => return Ok(Reply::Base(self.stop(index).await)),
            QueueCommand::Kick(kick) => {
                self.unwatch(index);
                self.watch(&kick, u64::from(index))
                    .map_err(|e| format!("what kicks the queue cannot be watched: {e}"))?;
                self.kicks.borrow_mut()[usize::from(index)] = Some(kick);
                queue.set_kicked();
            }
            QueueCommand::Call(call) => queue.set_call(call),
            QueueCommand::Err(err) => queue.set_err(err),
            QueueCommand::Enable(on) => queue.set_enabled(Some(on)),
        }
        Ok(Reply::Done)
    }

    fn watch(&self, fd: impl std::os::fd::AsFd, token: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(self.watch.as_fd(), fd, epoll::EventData::new_u64(token), flags)?)
    }

    fn unwatch(&self, index: u16) {
        if let Some(kick) = self.kicks.borrow_mut()[usize::from(index)].take() {
            // It was added, and only here is it taken out.
            let _ = epoll::delete(self.watch.as_fd(), &kick);
        }
    }

    async fn stop(&self, index: u16) -> u16 {
        self.unwatch(index);
        self.queues[usize::from(index)].stop().await
    }

    /// Stops every queue, all at the same time, and disables them.
    async fn stop_all(&self) {
        let all = (0..self.queues.len() as u16).map(|index| self.stop(index));
        futures_util::future::join_all(all).await;
        self.queues.iter().for_each(|queue| queue.set_enabled(None));
    }

    /// Tells the front end that the configuration space has changed, if it wants to know.
    pub(super) fn announce(&self) {
        let mut channel = self.channel.borrow_mut();
        let Some(socket) = &*channel else { return };
        let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // A front end that does not empty its socket has news waiting already.
        match rustix::net::send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(len) if len == message.len() => {}
            Err(rustix::io::Errno::AGAIN) => {}
            _ => *channel = None,
        }
    }

    /// Serves nothing more: every queue is drained when this returns.
    pub(super) async fn close(&self) {
        self.closing.set(true);
        self.stop_all().await;
        self.settle().await;
    }

    /// Waits until [`Device::serve`] has returned.
    pub(super) async fn ended(&self) {
        loop {
            let end = self.end.wait();
            if self.finished.get() {
                return;
            }
            end.await;
        }
    }
}

/// An idle guest hears of nothing: what has become durable behind its back is noted here.
async fn note_when_settled(target: Weak<Target>) {
    loop {
        let Some(settled) = target.upgrade().map(|target| target.disk.settled()) else { return };
        settled.await;
        if let Some(target) = target.upgrade() {
            target.note();
        }
    }
}
