//! What goes wrong, and when: rules that tests write and operations run into.
//!
//! **Invariants.** Rules are asked once per operation, when it starts, in the order in which they were made; so, with one
//! seed and one order of operations, the same operations are hit. Every rule that matches counts. All waits of all
//! matching rules apply, in order; of the outcomes the first one wins. A rule that holds keeps operations in order of
//! arrival; one that is dropped while held leaves the line.

use crate::{Error, ErrorKind, Operation, Result};
use layout::HostRange;
use ring::sync::Event;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// An operation, as rules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number among the store's operations, in order of start, from 0.
    pub number: u64,
    /// Which.
    pub operation: Operation,
    /// Where, if it is about a range; for a change of length, from 0 up to the new length.
    pub range: Option<HostRange>,
    /// A write that is to be durable when it completes.
    pub fua: bool,
}

/// Which operations a rule is about. Built up from [`Match::any`] or [`Match::on`]; all conditions have to hold. Those on
/// numbers (`skip`, `every`, `times`) come last: they count what all others let through.
#[derive(Clone, Default)]
pub struct Match {
    operations: Vec<Operation>,
    touching: Option<HostRange>,
    condition: Option<Rc<Condition>>,
    chance: Option<f64>,
    skip: u64,
    every: Option<u64>,
    times: Option<u64>,
}

type Condition = dyn Fn(&Request) -> bool;

impl Match {
    /// Every operation.
    pub fn any() -> Self {
        Self::default()
    }

    /// Operations of one kind.
    pub fn on(operation: Operation) -> Self {
        Self::any().or(operation)
    }

    /// Operations of this kind, too.
    pub fn or(mut self, operation: Operation) -> Self {
        self.operations.push(operation);
        self
    }

    /// Only those whose range shares a byte with `range`. What has no range (a flush) is not meant.
    pub fn touching(mut self, range: HostRange) -> Self {
        self.touching = Some(range);
        self
    }

    /// Only those for which `condition` holds.
    pub fn when(mut self, condition: impl Fn(&Request) -> bool + 'static) -> Self {
        self.condition = Some(Rc::new(condition));
        self
    }

    /// Only this share of them (0 to 1), by the store's seed.
    pub fn chance(mut self, share: f64) -> Self {
        self.chance = Some(share);
        self
    }

    /// Not the first `count`.
    pub fn skip(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }

    /// Only each `step`th.
    pub fn every(mut self, step: u64) -> Self {
        self.every = Some(step.max(1));
        self
    }

    /// At most `count` of them.
    pub fn times(mut self, count: u64) -> Self {
        self.times = Some(count);
        self
    }

    /// Only the first.
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Only the `number`th, counted from 1.
    pub fn nth(self, number: u64) -> Self {
        self.skip(number.saturating_sub(1)).times(1)
    }
}

impl fmt::Debug for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Match")
            .field("operations", &self.operations)
            .field("touching", &self.touching)
            .field("condition", &self.condition.is_some())
            .field("chance", &self.chance)
            .field("skip", &self.skip)
            .field("every", &self.every)
            .field("times", &self.times)
            .finish()
    }
}

/// How an operation fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// With the system's error of this number.
    Errno(i32),
    /// With this kind, for this reason.
    Kind(ErrorKind, String),
}

impl Failure {
    /// The medium's `EIO`.
    pub const EIO: Self = Self::Errno(libc::EIO);
    /// A full disk.
    pub const ENOSPC: Self = Self::Errno(libc::ENOSPC);

    pub(super) fn error(&self, store: &str, request: &Request) -> Error {
        match self {
            Self::Errno(number) => {
                let source = io::Error::from_raw_os_error(*number);
                Error::from_io(request.operation, store, request.range, source)
            }
            Self::Kind(kind, why) => Error::new(*kind, request.operation, store, request.range, why.clone()),
        }
    }
}

impl From<ErrorKind> for Failure {
    fn from(kind: ErrorKind) -> Self {
        Self::Kind(kind, "so the test wants it".to_owned())
    }
}

/// What happens to an operation that a rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It waits until [`Rule::release`] before it does anything.
    Hold,
    /// It takes effect, and its answer waits until [`Rule::release`].
    HoldAnswer,
    /// It waits this long before it does anything.
    Delay(Duration),
    /// It takes effect, and its answer waits this long.
    DelayAnswer(Duration),
    /// It waits for up to this long, by the store's seed, before it does anything, and as long again before it answers.
    Jitter(Duration),
    /// It fails, and nothing was done.
    Fail(Failure),
    /// It is done in full, and fails.
    FailAnswer(Failure),
    /// A read or write transfers (and zeroing zeroes) the first so many bytes, and fails. Other operations just fail.
    Partial(u64, Failure),
    /// A write writes (and zeroing zeroes) some of its sectors, by the store's seed, and fails. Others just fail.
    Tear(Failure),
    /// A read or write (or zeroing) is done in pieces of this many bytes at most, one after the other: whole, but not at
    /// one moment.
    Split(u64),
    /// It succeeds, and nothing was done: a write is lost, a flush made nothing durable, a read leaves the memory as it is.
    Lie,
    /// What a read brings, or a write leaves behind, has the bits of the second number flipped in the byte at the first
    /// (counted from the operation's start; no effect beyond its end). Goes together with any outcome.
    Corrupt(u64, u8),
}

/// Rules, and the random numbers they draw.
pub(super) struct Script {
    rules: RefCell<Vec<Rc<Shared>>>,
    random: Cell<u64>,
    number: Cell<u64>,
}

pub(super) struct Shared {
    matches: Match,
    action: Action,
    matched: Cell<u64>,
    hits: Cell<u64>,
    hit: Event,
    /// Holds nothing any more.
    open: Cell<bool>,
    next: Cell<u64>,
    /// Who is held, by order of arrival. Taken out: may go on.
    held: RefCell<BTreeSet<u64>>,
    /// How those who may go on do so, if not well.
    verdicts: RefCell<BTreeMap<u64, Failure>>,
    released: Event,
}

/// A rule in force. Clones are the same rule; dropping them does not end it.
#[derive(Clone)]
pub struct Rule {
    shared: Rc<Shared>,
}

impl Rule {
    /// How many operations it was applied to.
    pub fn hits(&self) -> u64 {
        self.shared.hits.get()
    }

    /// Waits until it was applied to `count` operations in all.
    pub async fn wait_for(&self, count: u64) {
        while self.hits() < count {
            self.shared.hit.wait().await;
        }
    }

    /// How many operations it holds now.
    pub fn held(&self) -> usize {
        self.shared.held.borrow().len()
    }

    /// Lets the operation go on that it has held longest; `false` if it holds none.
    pub fn release(&self) -> bool {
        self.let_go(None)
    }

    /// Lets the operation fail that it has held longest; `false` if it holds none.
    pub fn release_failing(&self, failure: Failure) -> bool {
        self.let_go(Some(failure))
    }

    /// Lets all operations go on that it holds now.
    pub fn release_all(&self) {
        while self.release() {}
    }

    /// Ends the rule: nothing matches any more, and what it holds goes on.
    pub fn end(&self) {
        self.shared.open.set(true);
        self.release_all();
    }

    fn let_go(&self, failure: Option<Failure>) -> bool {
        let Some(ticket) = self.shared.held.borrow_mut().pop_first() else { return false };
        if let Some(failure) = failure {
            self.shared.verdicts.borrow_mut().insert(ticket, failure);
        }
        self.shared.released.notify_all();
        true
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { matches, action, .. } = &*self.shared;
        f.debug_struct("Rule")
            .field("matches", matches)
            .field("action", action)
            .field("hits", &self.hits())
            .field("held", &self.held())
            .finish()
    }
}

/// What an operation has to wait for.
pub(super) enum Wait {
    Released(Rc<Shared>),
    Passed(Duration),
}

impl Wait {
    /// Waits; the failure it was released with, if it was.
    pub(super) async fn over(&self) -> std::result::Result<(), Failure> {
        match self {
            Self::Passed(span) => {
                ring::sleep(*span).await;
                Ok(())
            }
            Self::Released(rule) => rule.hold().await,
        }
    }
}

impl Shared {
    async fn hold(&self) -> std::result::Result<(), Failure> {
        /// Leaves the line when dropped.
        struct Place<'a>(&'a Shared, u64);
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                self.0.held.borrow_mut().remove(&self.1);
                self.0.verdicts.borrow_mut().remove(&self.1);
            }
        }
        if self.open.get() {
            return Ok(());
        }
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        self.held.borrow_mut().insert(ticket);
        let place = Place(self, ticket);
        self.count();
        while self.held.borrow().contains(&ticket) {
            self.released.wait().await;
        }
        let verdict = self.verdicts.borrow_mut().remove(&ticket);
        drop(place);
        verdict.map_or(Ok(()), Err)
    }

    fn count(&self) {
        self.hits.set(self.hits.get() + 1);
        self.hit.notify_all();
    }

    /// Whether it is this operation's turn.
    fn applies(&self, request: &Request, random: impl FnOnce() -> f64) -> bool {
        let Match { operations, touching, condition, chance, skip, every, times } = &self.matches;
        let meant = !self.open.get()
            && (operations.is_empty() || operations.contains(&request.operation))
            && touching.is_none_or(|range| request.range.is_some_and(|own| own.overlaps(range)))
            && condition.as_ref().is_none_or(|condition| condition(request))
            && chance.is_none_or(|share| random() < share);
        if !meant {
            return false;
        }
        let before = self.matched.get();
        self.matched.set(before + 1);
        let Some(turn) = before.checked_sub(*skip) else { return false };
        let step = every.unwrap_or(1);
        // `every(3)` hits the third, the sixth, ...
        (turn + 1).is_multiple_of(step) && times.is_none_or(|most| (turn + 1) / step <= most)
    }
}

/// What becomes of one operation.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) before: Vec<Wait>,
    pub(super) outcome: Option<Outcome>,
    pub(super) corrupt: Option<(u64, u8)>,
    pub(super) after: Vec<Wait>,
}

/// How an operation ends, if not well and whole.
pub(super) enum Outcome {
    Fail(Failure),
    FailAnswer(Failure),
    Partial(u64, Failure),
    Tear(Failure),
    Split(u64),
    Lie,
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        Self { rules: RefCell::default(), random: Cell::new(seed), number: Cell::new(0) }
    }

    pub(super) fn rule(&self, matches: Match, action: Action) -> Rule {
        let shared = Rc::new(Shared {
            matches,
            action,
            matched: Cell::new(0),
            hits: Cell::new(0),
            hit: Event::new(),
            open: Cell::new(false),
            next: Cell::new(0),
            held: RefCell::default(),
            verdicts: RefCell::default(),
            released: Event::new(),
        });
        let mut rules = self.rules.borrow_mut();
        // Rules that can never apply again are forgotten.
        rules.retain(|rule| !rule.open.get());
        rules.push(Rc::clone(&shared));
        Rule { shared }
    }

    pub(super) fn end_all(&self) {
        for shared in self.rules.take() {
            Rule { shared }.end();
        }
    }

    /// The next random number (SplitMix64, by its published constants).
    pub(super) fn random(&self) -> u64 {
        let state = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Numbers an operation and asks the rules about it.
    pub(super) fn plan(&self, operation: Operation, range: Option<HostRange>, fua: bool) -> (Request, Plan) {
        let number = self.number.get();
        self.number.set(number + 1);
        let request = Request { number, operation, range, fua };
        let mut plan = Plan::default();
        // A condition may make rules.
        let rules = self.rules.borrow().clone();
        for rule in rules {
            if rule.applies(&request, || (self.random() >> 11) as f64 / (1_u64 << 53) as f64) {
                self.add(&rule, &mut plan);
            }
        }
        (request, plan)
    }

    fn add(&self, rule: &Rc<Shared>, plan: &mut Plan) {
        let outcome = match rule.action.clone() {
            // Those count when they begin to hold.
            Action::Hold => return plan.before.push(Wait::Released(Rc::clone(rule))),
            Action::HoldAnswer => return plan.after.push(Wait::Released(Rc::clone(rule))),
            Action::Delay(span) => {
                plan.before.push(Wait::Passed(span));
                None
            }
            Action::DelayAnswer(span) => {
                plan.after.push(Wait::Passed(span));
                None
            }
            Action::Jitter(most) => {
                let draw = || {
                    let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
                    Wait::Passed(Duration::from_nanos(self.random() % most.saturating_add(1).max(1)))
                };
                plan.before.push(draw());
                plan.after.push(draw());
                None
            }
            Action::Corrupt(at, bits) => {
                plan.corrupt.get_or_insert((at, bits));
                None
            }
            Action::Fail(failure) => Some(Outcome::Fail(failure)),
            Action::FailAnswer(failure) => Some(Outcome::FailAnswer(failure)),
            Action::Partial(bytes, failure) => Some(Outcome::Partial(bytes, failure)),
            Action::Tear(failure) => Some(Outcome::Tear(failure)),
            Action::Split(bytes) => Some(Outcome::Split(bytes.max(1))),
            Action::Lie => Some(Outcome::Lie),
        };
        rule.count();
        if plan.outcome.is_none() {
            plan.outcome = outcome;
        }
    }
}

/// Waits for all of `waits`; a release that is to fail ends it.
pub(super) async fn pass(waits: &[Wait], store: &str, request: &Request) -> Result<()> {
    for wait in waits {
        if let Err(failure) = wait.over().await {
            return Err(failure.error(store, request));
        }
    }
    Ok(())
}
