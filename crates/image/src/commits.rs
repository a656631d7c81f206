//! Who waits for which commit.
//!
//! **Invariant.** One commit at a time. Every call takes a ticket; a commit serves the tickets taken before it began. After a
//! commit that failed there is no other.

use crate::health::Health;
use crate::{Error, Result};
use ring::sync::Event;
use std::cell::RefCell;
use std::rc::Rc;

#[derive(Default)]
struct State {
    tickets: u64,
    served: u64,
    running: bool,
    /// The tickets a failed commit would have served, and why it failed.
    failed: Option<(u64, Error)>,
}

/// The commits of one image.
pub(crate) struct Commits {
    state: RefCell<State>,
    ended: Event,
}

impl Default for Commits {
    fn default() -> Self {
        Self { state: RefCell::default(), ended: Event::new() }
    }
}

impl Commits {
    /// Whether one is under way.
    pub(crate) fn is_running(&self) -> bool {
        self.state.borrow().running
    }
}

/// What commits in epochs.
pub(crate) trait Epochs: 'static {
    /// Its commits.
    fn commits(&self) -> &Commits;
    /// Its health.
    fn health(&self) -> &Health;
    /// Makes durable what was linked when it was called.
    fn commit_epoch(&self) -> impl Future<Output = Result<()>>;
}

/// Waits for a commit that begins after this call; starts it if none is under way. It goes on if the caller goes away.
pub(crate) async fn commit<C: Epochs>(core: &Rc<C>) -> Result<()> {
    let (ticket, idle) = {
        let mut state = core.commits().state.borrow_mut();
        state.tickets += 1;
        (state.tickets, !std::mem::replace(&mut state.running, true))
    };
    if idle {
        // Dropping the handle leaves it running.
        drop(ring::spawn(run(core.clone())));
    }
    loop {
        let wait = {
            let commits = core.commits();
            let state = commits.state.borrow();
            if state.served >= ticket {
                return Ok(());
            }
            match &state.failed {
                Some((upto, cause)) if ticket <= *upto => return Err(cause.clone()),
                Some((_, cause)) => return Err(core.health().error_after(cause)),
                None => commits.ended.wait(),
            }
        };
        wait.await;
    }
}

/// Commits until every ticket is served.
async fn run<C: Epochs>(core: Rc<C>) {
    loop {
        let upto = core.commits().state.borrow().tickets;
        let image = core.health().name();
        tracing::trace!(target: "image_commit", image);
        let result = core.commit_epoch().await;
        if let Err(error) = &result {
            tracing::trace!(target: "image_commit_failed", image, %error);
        }
        let commits = core.commits();
        let mut state = commits.state.borrow_mut();
        match result {
            Ok(()) => state.served = upto,
            Err(cause) => state.failed = Some((upto, cause)),
        }
        state.running = state.failed.is_none() && state.tickets > upto;
        commits.ended.notify_all();
        if !state.running {
            return;
        }
    }
}
