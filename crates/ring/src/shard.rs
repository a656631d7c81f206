//! A shard: a thread with a ring that serves its inbox until told to stop.

use crate::executor::{Config, Ring};
use crate::inbox::Handle;
use crate::oneshot;
use std::io;
use std::thread;

/// A thread that runs a ring. Dropping it asks it to stop and joins the thread.
pub struct Shard {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Shard {
    /// Starts a thread called `name` whose ring serves its inbox until [`Shard::stop`].
    pub fn start(name: &str, config: Config) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (started, start) = oneshot::channel();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            // A ring belongs to the thread that makes it.
            let ring = match Ring::new(config) {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            if started.send(Ok(ring.handle())).is_ok() {
                ring.block_on(stopped);
            }
        })?;
        match start.wait() {
            Some(Ok(handle)) => Ok(Self { handle, stop: Some(stop), thread: Some(thread) }),
            Some(Err(error)) => {
                // It ends by itself.
                let _ = thread.join();
                Err(error)
            }
            None => Err(io::Error::other("the shard's thread died while it started")),
        }
    }

    /// How to reach it.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Stops taking messages, lets what runs end (tasks are dropped, operations drained), and joins the thread.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.handle.close();
        // Dropping the sender is the signal.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // From its own thread it can only be asked.
            if !self.handle.is_local() && thread.join().is_err() {
                tracing::error!("a shard's thread has panicked");
            }
        }
    }
}
