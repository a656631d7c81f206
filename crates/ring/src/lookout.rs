//! Work that is found by looking, while the thread is awake anyway.
//!
//! Being told of work costs both sides a system call, and the other side often leaves a mark in shared memory first (a
//! virtqueue's driver does). While such a place is likely to have more soon, whoever serves it asks the ring to look there,
//! and tells the other side not to bother.
//!
//! **Invariant.** A ring does not sleep before every lookout has said, by [`Lookout::rest`], that from now on it is told.

use crate::runtime;
use std::cell::RefCell;
use std::rc::Rc;

/// A place to look at. Every method is called on the ring's own thread, outside of any task.
pub trait Lookout {
    /// Whether there is something to take. Called very often, also while the ring looks for completions: it only looks.
    fn has_news(&self) -> bool;

    /// Takes what there is. It may start tasks, no operations.
    fn attend(self: Rc<Self>);

    /// The thread is about to sleep. Arranges that whatever comes from now on wakes it, and returns false: the ring looks here
    /// no more. Or true, if something has come already. It starts nothing.
    fn rest(&self) -> bool;
}

/// Lets the running ring look at `lookout` until the thread sleeps. Panics outside of a ring.
pub fn look_out(lookout: Rc<dyn Lookout>) {
    runtime::current().lookouts.0.borrow_mut().push(lookout);
}

/// Those that a ring looks at.
#[derive(Default)]
pub(crate) struct Lookouts(RefCell<Vec<Rc<dyn Lookout>>>);

impl Lookouts {
    /// Whether nothing is looked at.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Whether one has something.
    pub(crate) fn have_news(&self) -> bool {
        self.0.borrow().iter().any(|lookout| lookout.has_news())
    }

    /// Lets those that have something take it.
    pub(crate) fn attend(&self) {
        // They may come back here and add others behind, so nothing is borrowed meanwhile. Only a rest takes away.
        let mut at = 0;
        loop {
            let news = match self.0.borrow().get(at) {
                None => return,
                Some(lookout) => lookout.has_news().then(|| Rc::clone(lookout)),
            };
            if let Some(lookout) = news {
                lookout.attend();
            }
            at += 1;
        }
    }

    /// Lets all rest; true: one has something after all, and the thread must not sleep.
    pub(crate) fn rest(&self) -> bool {
        let mut awake = false;
        let mut gone = Vec::new();
        self.0.borrow_mut().retain(|lookout| {
            let stays = lookout.rest();
            awake |= stays;
            if !stays {
                gone.push(Rc::clone(lookout));
            }
            stays
        });
        // What goes with the last reference goes outside of the borrow.
        drop(gone);
        awake
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        drop(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Ring, sim::Sim};
    use std::cell::Cell;
    use std::time::Duration;

    /// Has `left` things to give, and counts what it was asked.
    #[derive(Default)]
    struct Place {
        left: Cell<u32>,
        taken: Cell<u32>,
        rests: Cell<u32>,
        /// What comes between the last look and the rest.
        late: Cell<u32>,
    }

    impl Lookout for Place {
        fn has_news(&self) -> bool {
            self.left.get() > 0
        }

        fn attend(self: Rc<Self>) {
            self.left.set(self.left.get() - 1);
            let this = Rc::clone(&self);
            drop(crate::spawn(async move { this.taken.set(this.taken.get() + 1) }));
        }

        fn rest(&self) -> bool {
            self.rests.set(self.rests.get() + 1);
            self.left.set(self.left.get() + self.late.take());
            self.left.get() > 0
        }
    }

    #[test]
    fn what_is_there_is_taken_before_the_thread_sleeps() {
        let place = Rc::new(Place::default());
        place.left.set(3);
        place.late.set(2);
        let ring = Ring::new(Config::default()).unwrap();
        ring.block_on(async {
            look_out(Rc::clone(&place) as Rc<dyn Lookout>);
            crate::sleep(Duration::from_millis(20)).await;
        });
        assert_eq!((place.taken.get(), place.left.get()), (5, 0));
        let rests = place.rests.get();
        assert!(rests >= 2);
        // It was forgotten.
        ring.block_on(crate::sleep(Duration::from_millis(5)));
        assert_eq!(place.rests.get(), rests);
        drop(ring);
        assert_eq!(Rc::strong_count(&place), 1);
    }

    #[test]
    fn a_simulation_looks_too() {
        let place = Rc::new(Place::default());
        place.left.set(1);
        place.late.set(1);
        Sim::new(1).block_on(async {
            look_out(Rc::clone(&place) as Rc<dyn Lookout>);
            crate::sleep(Duration::from_secs(1)).await;
        });
        assert_eq!(place.taken.get(), 2);
    }

    #[test]
    fn a_ring_that_goes_lets_go_of_it() {
        let place = Rc::new(Place::default());
        let ring = Ring::new(Config::default()).unwrap();
        ring.block_on(async { look_out(Rc::clone(&place) as Rc<dyn Lookout>) });
        drop(ring);
        assert_eq!(Rc::strong_count(&place), 1);
    }
}
