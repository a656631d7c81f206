//! A store that tests watch, hold and break.

use super::dice::Dice;
use layout::{HostOffset, HostRange};
use ring::Iov;
use ring::sync::Event;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use store::{Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Store, ZeroMode};

/// One operation, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) store: String,
    pub(crate) operation: Operation,
    pub(crate) range: HostRange,
}

/// What was asked for, in order, across the stores that share it.
pub(crate) type Log = Rc<RefCell<Vec<Seen>>>;

struct Rule {
    operation: Operation,
    range: HostRange,
    what: What,
}

enum What {
    /// Waits until the valve is opened.
    Hold,
    /// Fails, so many times.
    Fail(ErrorKind, u64),
}

/// A decorator.
pub(crate) struct Valve {
    inner: Rc<dyn Store>,
    rules: RefCell<Vec<Rule>>,
    opened: Event,
    held: Cell<usize>,
    log: Log,
    dice: Option<Dice>,
}

/// The whole store.
pub(crate) fn all() -> HostRange {
    HostOffset::ZERO.range(u64::MAX)
}

impl Valve {
    pub(crate) fn new(inner: Rc<dyn Store>, log: Log) -> Rc<Self> {
        Self::build(inner, log, None)
    }

    /// One whose operations take their time, by chance.
    pub(crate) fn slow(inner: Rc<dyn Store>, seed: u64) -> Rc<Self> {
        Self::build(inner, Log::default(), Some(Dice::new(seed)))
    }

    fn build(inner: Rc<dyn Store>, log: Log, dice: Option<Dice>) -> Rc<Self> {
        Rc::new(Self { inner, rules: RefCell::default(), opened: Event::new(), held: Cell::new(0), log, dice })
    }

    /// Operations of this kind that touch `range` wait until [`Valve::open`].
    pub(crate) fn hold(&self, operation: Operation, range: HostRange) {
        self.rules.borrow_mut().push(Rule { operation, range, what: What::Hold });
    }

    /// The next `times` operations of this kind that touch `range` fail.
    pub(crate) fn fail(&self, operation: Operation, range: HostRange, kind: ErrorKind, times: u64) {
        self.rules.borrow_mut().push(Rule { operation, range, what: What::Fail(kind, times) });
    }

    /// Lets go of all that is held, and holds nothing any more.
    pub(crate) fn open(&self) {
        self.rules.borrow_mut().retain(|rule| !matches!(rule.what, What::Hold));
        self.opened.notify_all();
    }

    /// How many operations are held now.
    pub(crate) fn held(&self) -> usize {
        self.held.get()
    }

    /// How many operations of this kind were asked for.
    pub(crate) fn count(&self, operation: Operation) -> usize {
        let log = self.log.borrow();
        log.iter().filter(|seen| seen.operation == operation && seen.store == self.inner.name()).count()
    }

    fn judge(&self, operation: Operation, range: HostRange) -> Option<Result<(), Error>> {
        let mut rules = self.rules.borrow_mut();
        for rule in &mut *rules {
            let touched = rule.range.overlaps(range) || range.is_empty();
            if rule.operation != operation || !touched {
                continue;
            }
            match &mut rule.what {
                What::Hold => return None,
                What::Fail(_, 0) => {}
                What::Fail(kind, times) => {
                    *times -= 1;
                    return Some(Err(Error::new(
                        *kind,
                        operation,
                        self.inner.name(),
                        Some(range),
                        "by the test's will",
                    )));
                }
            }
        }
        Some(Ok(()))
    }

    async fn pass(&self, operation: Operation, range: HostRange) -> Result<(), Error> {
        self.log.borrow_mut().push(Seen { store: self.inner.name().to_owned(), operation, range });
        self.linger().await;
        loop {
            let opened = self.opened.wait();
            if let Some(verdict) = self.judge(operation, range) {
                return verdict;
            }
            self.held.set(self.held.get() + 1);
            opened.await;
            self.held.set(self.held.get() - 1);
        }
    }

    async fn linger(&self) {
        if let Some(dice) = &self.dice {
            match dice.below(4) {
                0 => {}
                1 => ring::yield_now().await,
                _ => ring::sleep(Duration::from_micros(dice.below(300))).await,
            }
        }
    }
}

impl Store for Valve {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn limits(&self) -> Limits {
        self.inner.limits()
    }
    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.pass(Operation::Read, at.range(into.len() as u64)).await?;
            self.inner.read(at, into).await?;
            self.linger().await;
            Ok(())
        })
    }
    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.pass(Operation::Write, at.range(from.len() as u64)).await?;
            self.inner.write(at, from, fua).await?;
            self.linger().await;
            Ok(())
        })
    }
    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.pass(Operation::Flush, HostRange::default()).await?;
            self.inner.flush().await
        })
    }
    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.pass(Operation::Zero, range).await?;
            self.inner.zero(range, mode).await
        })
    }
    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.pass(Operation::SetSize, HostOffset(size).range(0)).await?;
            self.inner.set_size(size).await
        })
    }
    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.inner.allocate(range)
    }
    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            self.pass(Operation::Extent, range).await?;
            self.inner.extent(range).await
        })
    }
    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}
