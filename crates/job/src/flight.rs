//! Chunks in flight: each a task of its own, so that all go on while the job looks for more.
//!
//! **Invariant.** Every chunk that was sent comes back exactly once, with the answer or (should its task die) without one.

use crate::life::Life;
use crate::stream::Target;
use disk::{Copied, Result};
use layout::{GuestOffset, GuestRange};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// A range to be brought in by one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) range: GuestRange,
    /// Nothing is fetched for it, only marked.
    pub(crate) zero: bool,
}

/// A chunk that has come back.
pub(crate) struct Landed {
    pub(crate) chunk: Chunk,
    /// What became of it and how long it took; `None`: its task has died.
    pub(crate) answer: Option<(Result<Copied>, Duration)>,
}

#[derive(Default)]
struct State {
    under_way: Vec<Chunk>,
    landed: Vec<Landed>,
}

/// The chunks of one job, which is told of every landing.
pub(crate) struct Flight {
    life: Rc<Life>,
    target: Rc<dyn Target>,
    state: Rc<RefCell<State>>,
}

impl Flight {
    pub(crate) fn new(life: Rc<Life>, target: Rc<dyn Target>) -> Self {
        Self { life, target, state: Rc::default() }
    }

    /// Sends a chunk. Those under way are all different.
    pub(crate) fn send(&self, chunk: Chunk) {
        self.state.borrow_mut().under_way.push(chunk);
        let target = Rc::clone(&self.target);
        let mut landing = Landing { chunk, state: Rc::clone(&self.state), life: Rc::clone(&self.life), answer: None };
        drop(ring::spawn(async move {
            let began = ring::now();
            let result = target.populate(chunk.range).await;
            landing.answered(result, ring::now().since(began));
        }));
    }

    /// Takes out what has landed.
    pub(crate) fn landed(&self) -> Vec<Landed> {
        std::mem::take(&mut self.state.borrow_mut().landed)
    }

    /// How many are under way.
    pub(crate) fn count(&self) -> usize {
        self.state.borrow().under_way.len()
    }

    /// How many bytes are under way that have to be fetched.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.borrow().under_way.iter().filter(|chunk| !chunk.zero).map(|chunk| chunk.range.len()).sum()
    }

    /// The start of the foremost chunk under way.
    pub(crate) fn first(&self) -> Option<GuestOffset> {
        self.state.borrow().under_way.iter().map(|chunk| chunk.range.start()).min()
    }
}

/// Hands the chunk back when dropped, whatever has become of its task.
struct Landing {
    chunk: Chunk,
    state: Rc<RefCell<State>>,
    life: Rc<Life>,
    answer: Option<(Result<Copied>, Duration)>,
}

impl Landing {
    fn answered(&mut self, result: Result<Copied>, took: Duration) {
        self.answer = Some((result, took));
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        if let Some(at) = state.under_way.iter().position(|chunk| *chunk == self.chunk) {
            state.under_way.swap_remove(at);
        }
        state.landed.push(Landed { chunk: self.chunk, answer: self.answer.take() });
        drop(state);
        self.life.changed.notify_all();
    }
}
