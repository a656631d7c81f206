//! The commit job: carries what upper layers hold down into a lower one, then lets go of them.
//!
//! **Invariants.**
//! * Layers are let go of only when everything they hold is in the base, was read back, and is durable there.
//! * While a guest writes to the top of them, what it changes is marked and carried again; at the end it is stopped, the rest is
//!   carried, and it goes on over the base.
//! * However the job ends, its [`Ending::end`] is over before anybody hears of it.

use crate::OnError;
use crate::copy::{Copying, Stopped, scan};
use crate::life::{End, Life, Wish};
use crate::registry::Start;
use crate::stream::Target;
use disk::{Copied, Dirty, Disk, Missing, Result};
use futures_util::future::{LocalBoxFuture, select};
use layout::{GuestOffset, GuestRange};
use std::any::Any;
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// So much may be left when a job is called ready: what a guest at work changes while a pass is made. It is carried before anything
/// is let go of.
const READY_AT: u64 = 16 << 20;

/// So many passes are made before it is called ready whatever is left: a guest that writes faster than is carried would never let it.
const PASSES: u32 = 8;

/// What guests write within this time is carried together.
const BETWEEN_PASSES: Duration = Duration::from_millis(50);

/// What to do with the chain around the copying: whoever keeps the chain knows.
pub trait Ending {
    /// Stops whoever writes to the top; it goes on by [`Ending::end`] at the latest.
    fn quiesce(&self) -> LocalBoxFuture<'_, Result<()>>;

    /// Everything is in the base: makes it durable, then lets go of the layers.
    fn publish(&self) -> LocalBoxFuture<'_, Result<()>>;

    /// The job is over, whether it published or not.
    fn end(&self) -> LocalBoxFuture<'_, ()>;
}

/// What to commit.
pub struct CommitOptions {
    /// The job's id.
    pub id: String,
    /// What it is shown to work on.
    pub device: String,
    /// The disk as it looks from the topmost layer that is committed down.
    pub source: Rc<Disk>,
    /// The same from the base down, open for writing and as long as the source.
    pub base: Rc<Disk>,
    /// The base's node.
    pub base_node: String,
    /// What guests change of the topmost layer, if it is the one that they write to.
    pub changed: Option<Rc<Dirty>>,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
    /// What to do about errors.
    pub on_error: OnError,
    /// Publish without waiting for [`crate::Jobs::finalize`].
    pub auto_finalize: bool,
    /// Disappear when concluded without waiting for [`crate::Jobs::dismiss`].
    pub auto_dismiss: bool,
    /// What the job keeps until it is gone.
    pub hold: Option<Box<dyn Any>>,
    /// What to do with the chain.
    pub ending: Rc<dyn Ending>,
}

impl CommitOptions {
    pub(crate) fn apart(self) -> (Start, Rc<Carrying>, Option<Box<dyn Any>>) {
        let Self {
            id,
            device,
            source,
            base,
            base_node,
            changed,
            speed,
            on_error,
            auto_finalize,
            auto_dismiss,
            hold,
            ending,
        } = self;
        let start = Start { id: Some(id), kind: "commit", device, speed, on_error, auto_finalize, auto_dismiss };
        let carrying = Carrying { source, base, base_node, changed, ending, first_pass: Cell::new(true) };
        (start, Rc::new(carrying), hold)
    }
}

/// What a commit works on.
pub(crate) struct Carrying {
    source: Rc<Disk>,
    base: Rc<Disk>,
    base_node: String,
    changed: Option<Rc<Dirty>>,
    ending: Rc<dyn Ending>,
    /// Everything is to be carried, not only what has changed since.
    first_pass: Cell<bool>,
}

impl Target for Carrying {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn cluster_size(&self) -> u64 {
        let unit = self.base.chain().first().map_or(1, |base| base.image.cluster_size());
        // Marks are taken away by the grain: a chunk that holds none whole would be carried for ever.
        unit.max(u64::from(self.base.request_alignment())).max(Dirty::grain())
    }

    fn next_missing(&self, from: GuestOffset) -> LocalBoxFuture<'_, Result<Option<Missing>>> {
        Box::pin(async move {
            if self.first_pass.get() {
                return self.source.next_above(from, &self.base_node).await;
            }
            let next = self.changed.as_ref().and_then(|changed| changed.next(from, GuestOffset(self.size())));
            Ok(next.map(|range| Missing { range, zero: false }))
        })
    }

    fn populate(&self, range: GuestRange) -> LocalBoxFuture<'_, Result<Copied>> {
        Box::pin(async move {
            // Before looking: what a guest changes from now on is marked again.
            if let Some(changed) = &self.changed {
                changed.clear(range, GuestOffset(self.size()));
            }
            let carried = self.source.carry(range, &self.base_node, &self.base).await;
            if let (Err(_), Some(changed)) = (&carried, &self.changed) {
                changed.mark(range);
            }
            carried
        })
    }

    fn finish(&self) -> LocalBoxFuture<'_, Result<()>> {
        self.ending.publish()
    }
}

/// The job's task, from its start to its end.
pub(crate) async fn run(life: Rc<Life>, target: Rc<Carrying>, on_error: OnError) {
    let end = work(&life, &target, on_error).await;
    target.ending.end().await;
    // The job holds nothing of the disk any more by the time it says that it has ended.
    drop(target);
    life.conclude(end);
}

fn stopped(why: Stopped) -> End {
    match why {
        Stopped::Cancelled => End::Cancelled,
        Stopped::Failed(error) => End::Failed(error.to_string()),
    }
}

async fn work(life: &Rc<Life>, target: &Rc<Carrying>, on_error: OnError) -> End {
    let target_of = || Rc::clone(target) as Rc<dyn Target>;
    let pass = || Copying::new(Rc::clone(life), target_of(), on_error);
    let counting = ring::spawn(scan(Rc::clone(life), target_of()));
    let carried = pass().run().await;
    counting.cancel();
    if let Err(why) = carried {
        return stopped(why);
    }
    target.first_pass.set(false);
    let mut wish = Wish::Complete;
    if let Some(changed) = &target.changed {
        let mut passes = 0;
        while changed.bytes() > READY_AT && passes < PASSES {
            passes += 1;
            if let Err(why) = pass().run().await {
                return stopped(why);
            }
        }
        life.ready();
        wish = match follow(life, changed, &pass).await {
            Ok(wish) => wish,
            Err(end) => return end,
        };
        if let Err(error) = target.ending.quiesce().await {
            return End::Failed(error.to_string());
        }
        while !changed.is_empty() {
            if let Err(why) = pass().in_haste().run().await {
                return stopped(why);
            }
        }
    }
    if !life.may_publish().await {
        return End::Cancelled;
    }
    let published = match wish {
        Wish::Complete => target.ending.publish().await,
        Wish::LeaveBe => target.base.flush().await,
    };
    match published {
        Ok(()) => End::Completed,
        Err(error) => End::Failed(error.to_string()),
    }
}

/// Carries what guests change until somebody says how it shall end.
async fn follow(life: &Rc<Life>, changed: &Rc<Dirty>, pass: &impl Fn() -> Copying) -> std::result::Result<Wish, End> {
    loop {
        // Before looking at anything, so that nothing is missed.
        let (told, marked) = (life.changed.wait(), changed.marked());
        if life.is_cancelled() {
            return Err(End::Cancelled);
        }
        if life.is_paused() {
            life.rest().await;
            continue;
        }
        if let Some(wish) = life.wish() {
            return Ok(wish);
        }
        if changed.is_empty() {
            select(told, pin!(marked)).await;
        } else {
            pass().run().await.map_err(stopped)?;
            select(told, pin!(ring::sleep(BETWEEN_PASSES))).await;
        }
    }
}
