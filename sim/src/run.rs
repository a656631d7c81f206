//! One seed, one run: phases of load on one disk, with power cuts in between and looked at afterwards.

use crate::content::Value;
use crate::cut::Cut;
use crate::dice::Dice;
use crate::load::{Queue, grow};
use crate::oracle::Oracle;
use crate::plan::{End, Faults, Phase, Plan, Shape};
use crate::streaming::stream;
use crate::world::World;
use disk::{Disk, DiskOptions};
use ring::sim::Sim;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;
use store::fault::Action;
use store::fault::Match;
use store::trace::Trace;

/// How thoroughly a run looks.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// States looked at for every power cut.
    pub states: usize,
    /// Of 100,000 states so many are shown to `qemu-img check`.
    pub qemu_img: u64,
    /// Prints the plan and every operation on every store.
    pub verbose: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { states: 8, qemu_img: 0, verbose: false }
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Guests' requests.
    pub requests: u64,
    /// Of those, failed as the faults of their phase explain.
    pub errors: u64,
    /// Streams that ended well.
    pub streams: u64,
    /// Moments at which a power cut was looked at.
    pub cuts: u64,
    /// States that those could have left, each opened, checked and read.
    pub states: u64,
    /// Of those, shown to `qemu-img check`.
    pub qemu_checks: u64,
    /// Times that the power went for good.
    pub power_offs: u64,
    /// A hash of every operation on every store, in order.
    pub hash: u64,
}

impl Tally {
    /// Both together (the hashes too, in any order).
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            errors: self.errors + other.errors,
            streams: self.streams + other.streams,
            cuts: self.cuts + other.cuts,
            states: self.states + other.states,
            qemu_checks: self.qemu_checks + other.qemu_checks,
            power_offs: self.power_offs + other.power_offs,
            hash: self.hash.wrapping_add(other.hash),
        }
    }
}

/// What everybody in a run shares.
pub(crate) struct Context {
    pub(crate) options: Options,
    pub(crate) world: Rc<World>,
    pub(crate) shape: Shape,
    pub(crate) oracle: RefCell<Oracle>,
    /// Where all queues like to be: the first sector.
    pub(crate) hot: u64,
    tally: Cell<Tally>,
    trouble: RefCell<Option<String>>,
    cuts: RefCell<Vec<Cut>>,
    backings: RefCell<Vec<Option<String>>>,
    /// From then on every flush fails, until the disk is opened anew.
    pub(crate) flush_has_failed: Cell<bool>,
    dark: Cell<bool>,
    closing: Cell<bool>,
    growing: Cell<bool>,
    /// Operations on the top's store in this phase, and at which of them something is to happen.
    operations: Cell<u64>,
    cuts_at: RefCell<Vec<u64>>,
    dark_at: Cell<Option<u64>>,
}

impl Context {
    /// Something is wrong. The first one counts.
    pub(crate) fn fail(&self, what: String) {
        self.trouble.borrow_mut().get_or_insert(what);
    }

    /// Whether nothing that happens now counts any more.
    pub(crate) fn is_over(&self) -> bool {
        self.dark.get() || self.trouble.borrow().is_some()
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.get()
    }

    pub(crate) fn growing(&self, growing: bool) {
        self.growing.set(growing);
    }

    /// Whether the disk has grown, or tried to, in this phase.
    pub(crate) fn grows(&self) -> bool {
        self.growing.get()
    }

    pub(crate) fn tally(&self, change: impl FnOnce(&mut Tally)) {
        let mut tally = self.tally.get();
        change(&mut tally);
        self.tally.set(tally);
    }

    /// What the top's header may name from now on.
    pub(crate) fn backings(&self, names: Vec<Option<String>>) {
        *self.backings.borrow_mut() = names;
    }

    /// The power might fail now.
    pub(crate) fn cut(&self, why: String) {
        if self.is_over() {
            return;
        }
        let Some(power) = self.world.top().and_then(|top| top.power_cut()) else { return };
        self.tally(|tally| tally.cuts += 1);
        let cut = Cut::take(why, power, self.oracle.borrow().after_cut(), self.backings.borrow().clone());
        self.cuts.borrow_mut().push(cut);
    }

    /// An operation on the top's store is about to begin.
    fn operation(&self) {
        let number = self.operations.get();
        self.operations.set(number + 1);
        if self.is_over() || self.closing.get() && self.dark_at.get().is_none() {
            return;
        }
        let goes_dark = self.dark_at.get().is_some_and(|at| number >= at);
        if goes_dark || self.cuts_at.borrow().contains(&number) {
            self.cut(format!("before operation {number} on the top"));
        }
        if goes_dark {
            self.dark.set(true);
            self.world.switch_off();
        }
    }
}

/// Runs one seed. The error says what went wrong.
pub fn run(seed: u64, options: Options) -> Result<Tally, String> {
    let done = catch_unwind(AssertUnwindSafe(|| Sim::new(seed).block_on(whole(seed, options))));
    match done {
        Ok(done) => done,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}

async fn whole(seed: u64, options: Options) -> Result<Tally, String> {
    let dice = Dice::new(seed);
    let plan = Plan::new(&dice);
    let trace = if options.verbose {
        eprintln!("{plan}");
        Trace::calling(|record| eprintln!("{:?} {record}", ring::now()))
    } else {
        Trace::off()
    };
    trace.switch(false);
    let built = World::new(&plan.shape, dice.fork(), trace.clone()).await;
    let (world, content) = built.map_err(|error| format!("the chain could not be built: {error}"))?;
    let below = plan.shape.layers.len().checked_sub(2).map(|layer| plan.shape.name(layer));
    let context = Rc::new(Context {
        options,
        world,
        hot: dice.below(content.len() as u64),
        shape: plan.shape.clone(),
        oracle: RefCell::new(Oracle::new(&content)),
        tally: Cell::default(),
        trouble: RefCell::default(),
        cuts: RefCell::default(),
        backings: RefCell::new(vec![below]),
        flush_has_failed: Cell::new(false),
        dark: Cell::new(false),
        closing: Cell::new(false),
        growing: Cell::new(false),
        operations: Cell::new(0),
        cuts_at: RefCell::default(),
        dark_at: Cell::new(None),
    });
    for (number, phase) in plan.phases.iter().enumerate() {
        let told = |what| format!("{what}\n  in phase {number}");
        one_phase(&context, phase, &dice).await.map_err(told)?;
    }
    context.tally(|tally| tally.hash = trace.hash());
    Ok(context.tally.get())
}

async fn one_phase(context: &Rc<Context>, phase: &Phase, dice: &Dice) -> Result<(), String> {
    context.flush_has_failed.set(false);
    context.dark.set(false);
    context.closing.set(false);
    context.growing.set(false);
    context.operations.set(0);
    let reach = dice.pick(&[30, 100, 400]);
    *context.cuts_at.borrow_mut() = (0..phase.cuts).map(|_| dice.below(reach)).collect();
    context.dark_at.set((phase.end == End::PowerCut).then(|| dice.below(reach)));
    let options = DiskOptions {
        copy_on_read: context.shape.copy_on_read,
        write_through: context.shape.write_through,
        discard: context.shape.discard,
    };
    // A machine that comes back finds its disk in order: what goes wrong starts once it is open.
    let opened = context.world.disk(options, &phase.faults).await;
    let disk = opened.map_err(|error| format!("the disk does not open: {error}"))?;
    if let Some(top) = context.world.top() {
        let sees = Rc::downgrade(context);
        let look = move || {
            if let Some(context) = sees.upgrade() {
                context.operation();
            }
            false
        };
        top.rule(Match::any().when(move |_| look()), Action::Delay(Duration::ZERO));
    }
    load(context, &disk, phase, dice).await;
    context.closing.set(true);
    let left = leave(context, &disk, &phase.faults).await;
    let trouble = context.trouble.borrow_mut().take();
    trouble.map_or(Ok(()), Err)?;
    let cuts: Vec<Cut> = context.cuts.borrow_mut().drain(..).collect();
    for cut in &cuts {
        cut.verify(context, dice).await?;
    }
    if left {
        return Ok(());
    }
    context.tally(|tally| tally.power_offs += 1);
    let Some(last) = cuts.last() else { return Err("the power went, and nobody saw it".to_owned()) };
    let (image, content): (_, Vec<Value>) = last.choose(context, dice).await?;
    come_back(context, image, &content).await
}

/// All that goes on at once, to its end or to the power's.
async fn load(context: &Rc<Context>, disk: &Rc<Disk>, phase: &Phase, dice: &Dice) {
    let mut tasks = Vec::new();
    for _ in 0..phase.queues {
        let queue =
            Queue { context: Rc::clone(context), disk: Rc::clone(disk), faults: phase.faults, dice: dice.fork() };
        tasks.push(ring::spawn(queue.run(phase.requests)));
    }
    if let Some(plan) = phase.stream {
        tasks.push(ring::spawn(stream(Rc::clone(context), Rc::clone(disk), plan, phase.faults, dice.fork())));
    }
    if !phase.growth.is_empty() {
        let steps = phase.growth.clone();
        let grown = grow(Rc::clone(context), Rc::clone(disk), phase.faults, steps, dice.fork());
        tasks.push(ring::spawn(grown));
    }
    for task in tasks {
        task.await;
    }
}

/// Leaves the disk: closed as it should be (and then everything is durable and clean), or because the power is off.
/// Whether it is in order.
async fn leave(context: &Rc<Context>, disk: &Rc<Disk>, faults: &Faults) -> bool {
    let began = context.oracle.borrow_mut().began();
    let poisoned = disk.chain()[0].image.poisoned().is_some();
    let closed = disk.close().await;
    if context.is_over() {
        return false;
    }
    match closed {
        // Who flushed has been told; closing adds nothing to it.
        Ok(()) if !poisoned => {
            context.oracle.borrow_mut().flushed(began);
            context.cut("after the disk was closed".to_owned());
            true
        }
        closed => {
            if !faults.top_may_fail() {
                context.fail(format!("the disk was not closed in order, without a reason: {closed:?}"));
            }
            context.cut("after the disk could not be closed".to_owned());
            context.dark.set(true);
            context.world.switch_off();
            false
        }
    }
}

/// The machine is on again, with this image.
async fn come_back(context: &Rc<Context>, image: store::memory::Snapshot, content: &[Value]) -> Result<(), String> {
    let found = context.world.chain_over(&image).await.map_err(|error| format!("it does not open: {error}"))?;
    context.backings(vec![found.1[0].image.backing().map(|backing| backing.name)]);
    context.world.adopt(image);
    context.oracle.borrow_mut().collapse(content);
    Ok(())
}
