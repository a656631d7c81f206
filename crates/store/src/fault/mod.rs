//! A decorator that makes any store fail, wait, tear and forget, on purpose and by a script.
//!
//! * **Rules** ([`FaultStore::rule`]): which operations ([`Match`]) meet with what ([`Action`]): hold until released, delay,
//!   fail, transfer in part, tear, split, lie, corrupt.
//! * **A volatile cache** ([`FaultStore::make_volatile`]): from then on only what was flushed (or written with FUA) is
//!   durable, and [`FaultStore::power_cut`] tells every state that a power cut at that moment could leave behind.
//! * **Callers that leave** ([`FaultStore::outlive_callers`]): operations whose future is dropped go on, as they do in a
//!   kernel.
//!
//! **Invariants.** Without rules the store below is seen through it unchanged. Everything random follows the seed. What
//! [`Store`] promises of a failed flush holds for one that a rule made fail: the store is poisoned.

mod cut;
mod power;
mod script;

pub use cut::{Choice, PowerCut, State, States};
pub use script::{Action, Failure, Match, Request, Rule};

use crate::abandoned::{Abandoned, Change};
use crate::memory::{SIZE_MAX, Snapshot};
use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use power::{Effect, Volatile};
use ring::Iov;
use script::{Outcome, Plan, Script, pass};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// What a disk writes as one, where nothing else was said, in bytes.
const SECTOR: u64 = 512;

/// Bytes read at a time to learn what the store below holds.
const LEARN_MAX: u64 = 1 << 20;

/// A store that goes wrong as it is told to. The test keeps an `Rc` of it, which is also the handle that steers it.
pub struct FaultStore {
    me: Weak<Self>,
    inner: Rc<dyn Store>,
    name: String,
    script: Script,
    poison: RefCell<Option<Error>>,
    volatile: RefCell<Option<Rc<Volatile>>>,
    power_off: Cell<bool>,
    outlives: Cell<bool>,
    abandoned: Rc<Abandoned>,
}

/// What a change does.
enum What {
    Write(Iov),
    Zero(ZeroMode),
    SetSize(u64),
    Allocate,
}

impl FaultStore {
    /// `inner` without faults yet; random choices follow `seed`.
    pub fn new(inner: Rc<dyn Store>, seed: u64) -> Rc<Self> {
        let name = inner.name().to_owned();
        Rc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            inner,
            name,
            script: Script::new(seed),
            poison: RefCell::default(),
            volatile: RefCell::default(),
            power_off: Cell::new(false),
            outlives: Cell::new(false),
            abandoned: Rc::default(),
        })
    }

    /// Puts a rule in force, after those there are.
    pub fn rule(&self, matches: Match, action: Action) -> Rule {
        self.script.rule(matches, action)
    }

    /// Ends all rules; what they hold goes on.
    pub fn end_rules(&self) {
        self.script.end_all();
    }

    /// Whether changes whose future is dropped go on as tasks of their own, as the kernel's do (and are over before any
    /// later operation touches their range). Otherwise they end where they are, which for a held one means: they never
    /// take effect.
    pub fn outlive_callers(&self, outlive: bool) {
        self.outlives.set(outlive);
    }

    /// Puts a volatile cache in front of what the store below holds now: from here on, only what is flushed or written
    /// with FUA is sure to survive [`FaultStore::power_cut`]. `sector` bytes (a power of two) are written as one.
    /// Operations now outlive their callers. Nothing may be in flight. What is not flushed is kept in memory twice.
    pub async fn make_volatile(&self, sector: u64) -> Result<()> {
        let mut content = Snapshot::zeros(self.inner.size());
        let mut left = HostRange::new(HostOffset::ZERO, self.inner.size());
        while !left.is_empty() {
            let extent = self.inner.extent(left).await?;
            let run = left.first(extent.len.max(1));
            if extent.backing == Backing::Data {
                let part = run.first(LEARN_MAX);
                let buffer = Iov::alloc(part.len() as usize);
                self.inner.read(part.start(), buffer.clone()).await?;
                content.write_iov(part.start().get(), &buffer);
                left = left.skip(part.len());
            } else {
                left = left.skip(run.len());
            }
        }
        self.outlive_callers(true);
        *self.volatile.borrow_mut() = Some(Rc::new(Volatile::new(content, sector.next_power_of_two())));
        Ok(())
    }

    /// All that a power cut at this moment could leave behind; `None` without [`FaultStore::make_volatile`]. The store
    /// goes on undisturbed.
    pub fn power_cut(&self) -> Option<PowerCut> {
        self.volatile.borrow().as_ref().map(|volatile| volatile.cut())
    }

    /// From now on every operation fails, also those under way: whoever is left over from before the cut changes nothing
    /// and learns nothing any more.
    pub fn switch_off(&self) {
        self.power_off.set(true);
    }

    /// The cause, once writes are refused because a flush failed by a rule.
    pub fn poisoned(&self) -> Option<Error> {
        self.poison.borrow().clone()
    }

    fn cache(&self) -> Option<Rc<Volatile>> {
        self.volatile.borrow().clone()
    }

    fn powered(&self, request: &Request) -> Result<()> {
        if self.power_off.get() {
            let failure = Failure::Kind(ErrorKind::Io, "the power is off".to_owned());
            return Err(failure.error(&self.name, request));
        }
        Ok(())
    }

    fn sound(&self, request: &Request) -> Result<()> {
        match &*self.poison.borrow() {
            Some(first) => Err(Error::poisoned(request.operation, &self.name, request.range, first)),
            None => Ok(()),
        }
    }

    fn poison(&self, cause: &Error) {
        self.poison.borrow_mut().get_or_insert_with(|| cause.clone());
    }

    /// A change, as a future that goes on without its caller if it is to.
    fn change(&self, operation: Operation, range: HostRange, fua: bool, what: What) -> IoFuture<'_, ()> {
        let store = self.me.upgrade().expect("only an Rc of it is ever handed out");
        // A change of length concerns all that is, or will be, past it.
        let touched = match what {
            What::SetSize(size) => HostRange::between(HostOffset(size.min(self.size())), HostOffset(u64::MAX)),
            _ => range,
        };
        let work = async move {
            let (request, plan) = store.script.plan(operation, Some(range), fua);
            store.powered(&request)?;
            store.abandoned.clear_of(touched).await;
            pass(&plan.before, &store.name, &request).await?;
            store.powered(&request)?;
            store.sound(&request)?;
            let mut entries = Vec::new();
            let done = store.perform(&request, &plan, what, &mut entries).await;
            let waited = pass(&plan.after, &store.name, &request).await;
            store.powered(&request)?;
            let result = done.and(waited);
            match &result {
                Ok(()) => {
                    if let Some(cache) = store.cache() {
                        cache.answered(&entries, fua);
                    }
                }
                // As a file does: some of what failed may have been a flush.
                Err(error) if fua && !matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::OutOfRange) => {
                    store.poison(error);
                }
                Err(_) => {}
            }
            result
        };
        if self.outlives.get() {
            Box::pin(Change::new(&self.abandoned, touched, Box::pin(work)))
        } else {
            Box::pin(work)
        }
    }

    /// Carries a change out as planned. What took effect is noted in `entries`.
    async fn perform(&self, request: &Request, plan: &Plan, what: What, entries: &mut Vec<u64>) -> Result<()> {
        let range = request.range.unwrap_or_default();
        let what = match (what, plan.corrupt) {
            (What::Write(from), Some((at, bits))) => What::Write(corrupted(&from, at, bits)),
            (what, _) => what,
        };
        let divisible = matches!(what, What::Write(_) | What::Zero(_)) && !range.is_empty();
        let (pieces, end) = match &plan.outcome {
            None => (vec![range], Ok(())),
            Some(Outcome::Lie) => (Vec::new(), Ok(())),
            Some(Outcome::Fail(failure)) => (Vec::new(), Err(failure)),
            Some(Outcome::FailAnswer(failure)) => (vec![range], Err(failure)),
            Some(Outcome::Split(bytes)) if divisible => (pieces_of(range, *bytes), Ok(())),
            Some(Outcome::Split(_)) => (vec![range], Ok(())),
            Some(Outcome::Partial(bytes, failure)) if divisible => (vec![range.first(*bytes)], Err(failure)),
            Some(Outcome::Tear(failure)) if divisible => (self.some_sectors(range), Err(failure)),
            Some(Outcome::Partial(_, failure) | Outcome::Tear(failure)) => (Vec::new(), Err(failure)),
        };
        for piece in pieces {
            self.apply(range, piece, &what, request.fua, entries).await?;
        }
        end.map_err(|failure| failure.error(&self.name, request))
    }

    /// Carries out one piece of a change to `whole`.
    async fn apply(
        &self,
        whole: HostRange,
        piece: HostRange,
        what: &What,
        fua: bool,
        entries: &mut Vec<u64>,
    ) -> Result<()> {
        let cache = self.cache();
        let at = piece.start();
        let (effect, work) = match what {
            What::Write(from) => {
                let skip = (at - whole.start()) as usize;
                // Not `piece.len()`: what reaches past the end of the address space is for the store below to refuse.
                let len = if piece == whole { from.len() } else { piece.len() as usize };
                let part = from.slice(skip..skip + len);
                if cache.is_some() {
                    // The caller may change its memory; the cache has to know what was written.
                    let bytes = part.to_vec();
                    let copy = Iov::from_slice(&bytes);
                    (Effect::Write(at.get(), bytes.into()), self.inner.write(at, copy, fua))
                } else {
                    (Effect::Nothing, self.inner.write(at, part, fua))
                }
            }
            What::Zero(mode) => (Effect::Zero(piece), self.inner.zero(piece, *mode)),
            What::SetSize(size) => (Effect::SetSize(*size), self.inner.set_size(*size)),
            What::Allocate => (Effect::Extend(piece.end().get()), self.inner.allocate(piece)),
        };
        let Some(cache) = cache else { return work.await };
        let changes = matches!(what, What::SetSize(_)) || !piece.is_empty();
        let possible = changes && piece.end().get() <= SIZE_MAX;
        let entry = cache.started(if possible { effect } else { Effect::Nothing });
        match work.await {
            Ok(()) => {
                cache.took_effect(entry);
                entries.push(entry);
                Ok(())
            }
            Err(error) => {
                // What did it leave behind?
                let inside = piece.intersect(HostRange::new(HostOffset::ZERO, self.inner.size()));
                let left = Iov::zeroed(inside.len().min(LEARN_MAX) as usize);
                let small = inside.len() <= LEARN_MAX && !matches!(what, What::SetSize(_) | What::Allocate);
                if !small || self.inner.read(inside.start(), left.clone()).await.is_err() {
                    cache.failed(entry, Effect::Nothing);
                } else {
                    cache.failed(entry, Effect::Write(inside.start().get(), left.to_vec().into()));
                }
                Err(error)
            }
        }
    }

    /// Runs of whole sectors that are written before a tear, some of `range`.
    fn some_sectors(&self, range: HostRange) -> Vec<HostRange> {
        let sector = self.cache().map_or(SECTOR, |cache| cache.sector());
        let mut runs: Vec<HostRange> = Vec::new();
        for piece in pieces_of(range, sector) {
            if self.script.random() & 1 == 0 {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end() == piece.start() => *last = HostRange::between(last.start(), piece.end()),
                _ => runs.push(piece),
            }
        }
        runs
    }
}

/// `range` cut at multiples of `bytes` counted from 0, if that is a power of two, else from its start.
fn pieces_of(range: HostRange, bytes: u64) -> Vec<HostRange> {
    let mut pieces = Vec::new();
    let mut left = range;
    while !left.is_empty() {
        let start = left.start().get();
        let len = if bytes.is_power_of_two() { bytes - start % bytes } else { bytes };
        pieces.push(left.first(len));
        left = left.skip(len);
    }
    pieces
}

/// A copy of `from` with the bits `bits` of the byte at `at` flipped.
fn corrupted(from: &Iov, at: u64, bits: u8) -> Iov {
    let copy = Iov::from_slice(&from.to_vec());
    flip(&copy, at, bits);
    copy
}

fn flip(iov: &Iov, at: u64, bits: u8) {
    if at < iov.len() as u64 {
        let mut byte = [0];
        iov.read(at as usize, &mut byte);
        iov.write(at as usize, &[byte[0] ^ bits]);
    }
}

impl Store for FaultStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = at.range(into.len() as u64);
            let (request, plan) = self.script.plan(Operation::Read, Some(range), false);
            self.powered(&request)?;
            self.abandoned.clear_of(range).await;
            pass(&plan.before, &self.name, &request).await?;
            self.powered(&request)?;
            let (bytes, step, end) = match &plan.outcome {
                None => (u64::MAX, u64::MAX, Ok(())),
                Some(Outcome::Lie) => (0, u64::MAX, Ok(())),
                Some(Outcome::Split(step)) => (u64::MAX, *step, Ok(())),
                Some(Outcome::Fail(failure) | Outcome::Tear(failure)) => (0, u64::MAX, Err(failure)),
                Some(Outcome::Partial(bytes, failure)) => (*bytes, u64::MAX, Err(failure)),
                Some(Outcome::FailAnswer(failure)) => (u64::MAX, u64::MAX, Err(failure)),
            };
            if bytes == u64::MAX && step == u64::MAX {
                self.inner.read(at, into.clone()).await?;
            } else {
                for piece in pieces_of(range.first(bytes), step) {
                    let skip = (piece.start() - at) as usize;
                    self.inner.read(piece.start(), into.slice(skip..skip + piece.len() as usize)).await?;
                }
            }
            if let Some((at, bits)) = plan.corrupt {
                flip(&into, at, bits);
            }
            pass(&plan.after, &self.name, &request).await?;
            self.powered(&request)?;
            end.map_err(|failure| failure.error(&self.name, &request))
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        let range = at.range(from.len() as u64);
        self.change(Operation::Write, range, fua, What::Write(from))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let cache = self.cache();
            // What completes from now on is not covered.
            let called = cache.as_ref().map(|cache| cache.now());
            let (request, plan) = self.script.plan(Operation::Flush, None, false);
            self.powered(&request)?;
            pass(&plan.before, &self.name, &request).await?;
            self.powered(&request)?;
            self.sound(&request)?;
            let done = match &plan.outcome {
                Some(Outcome::Lie) => Ok(()),
                Some(Outcome::Fail(failure) | Outcome::Partial(_, failure) | Outcome::Tear(failure)) => {
                    Err(failure.error(&self.name, &request))
                }
                Some(Outcome::FailAnswer(failure)) => {
                    self.inner.flush().await.and(Err(failure.error(&self.name, &request)))
                }
                Some(Outcome::Split(_)) | None => self.inner.flush().await,
            };
            let waited = pass(&plan.after, &self.name, &request).await;
            self.powered(&request)?;
            done.and(waited).inspect_err(|error| self.poison(error))?;
            if let (Some(cache), Some(called)) = (cache, called)
                && !matches!(plan.outcome, Some(Outcome::Lie))
            {
                cache.flushed(called);
            }
            Ok(())
        })
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        self.change(Operation::Zero, range, false, What::Zero(mode))
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        let range = HostRange::new(HostOffset::ZERO, size);
        self.change(Operation::SetSize, range, false, What::SetSize(size))
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.change(Operation::Allocate, range, false, What::Allocate)
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            let (request, plan) = self.script.plan(Operation::Extent, Some(range), false);
            self.powered(&request)?;
            self.abandoned.clear_of(range).await;
            pass(&plan.before, &self.name, &request).await?;
            self.powered(&request)?;
            let extent = match &plan.outcome {
                Some(
                    Outcome::Fail(failure)
                    | Outcome::FailAnswer(failure)
                    | Outcome::Partial(_, failure)
                    | Outcome::Tear(failure),
                ) => return Err(failure.error(&self.name, &request)),
                // Whoever cannot tell says data: all a store may be wrong about.
                Some(Outcome::Lie) if !range.is_empty() => HostExtent { len: range.len(), backing: Backing::Data },
                _ => self.inner.extent(range).await?,
            };
            pass(&plan.after, &self.name, &request).await?;
            self.powered(&request)?;
            Ok(extent)
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}
