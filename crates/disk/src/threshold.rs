//! Marks that writes may pass: whoever lends a disk its space hears in time that more is needed.
//!
//! **Invariant.** A mark is told of once: passing it takes it away.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What is told: the mark, and by how many bytes it was passed.
pub type Told = Rc<dyn Fn(u64, u64)>;

/// One mark; 0 is none.
#[derive(Default)]
pub struct Threshold {
    at: Cell<u64>,
    told: RefCell<Option<Told>>,
}

impl Threshold {
    /// Puts the mark at this offset; 0 takes it away. `told` hears of it, on the shard, and must not block.
    pub fn set(&self, at: u64, told: Told) {
        self.at.set(at);
        *self.told.borrow_mut() = Some(told);
    }

    /// Where it is.
    pub fn at(&self) -> u64 {
        self.at.get()
    }

    /// Something is written up to `end`.
    pub(crate) fn reaches(&self, end: u64) {
        let at = self.at.get();
        if at > 0 && end > at {
            self.at.set(0);
            let told = self.told.borrow().clone();
            if let Some(told) = told {
                told(at, end - at);
            }
        }
    }
}

/// The marks of one layer.
#[derive(Clone, Default)]
pub struct Thresholds {
    /// In the guest's bytes, as the layer shows them.
    pub node: Rc<Threshold>,
    /// In the bytes of the file that holds guests' data.
    pub file: Rc<Threshold>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_passed_once() {
        let heard: Rc<RefCell<Vec<(u64, u64)>>> = Rc::default();
        let log = Rc::clone(&heard);
        let mark = Threshold::default();
        mark.reaches(1 << 40);
        mark.set(100, Rc::new(move |at, over| log.borrow_mut().push((at, over))));
        mark.reaches(100);
        assert!(heard.borrow().is_empty() && mark.at() == 100, "up to the mark is not past it");
        mark.reaches(107);
        mark.reaches(200);
        assert_eq!(*heard.borrow(), [(100, 7)]);
        assert_eq!(mark.at(), 0);
    }
}
