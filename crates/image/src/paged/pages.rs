//! Pages of tables in memory: the last [`PAGES`] that were read.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

/// Pages that are kept: 512 of at most 64 KiB each.
pub(super) const PAGES: usize = 512;

/// Which segment's, and which of its pages.
type Key = (usize, u64);

/// See the module.
#[derive(Default)]
pub(super) struct Pages {
    held: RefCell<Held>,
}

#[derive(Default)]
struct Held {
    pages: HashMap<Key, Rc<[u64]>>,
    /// The oldest first.
    order: VecDeque<Key>,
}

impl Pages {
    pub(super) fn get(&self, segment: usize, page: u64) -> Option<Rc<[u64]>> {
        self.held.borrow().pages.get(&(segment, page)).cloned()
    }

    /// Keeps one more, which stays until [`PAGES`] others have come.
    pub(super) fn put(&self, segment: usize, page: u64, entries: Rc<[u64]>) {
        let mut held = self.held.borrow_mut();
        if held.pages.insert((segment, page), entries).is_none() {
            held.order.push_back((segment, page));
        }
        while held.order.len() > PAGES
            && let Some(oldest) = held.order.pop_front()
        {
            held.pages.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_so_many_are_kept() {
        let pages = Pages::default();
        for page in 0..2 * PAGES as u64 {
            pages.put(0, page, Rc::from([page]));
            pages.put(0, page, Rc::from([page]));
        }
        assert_eq!(pages.held.borrow().pages.len(), PAGES);
        assert!(pages.get(0, 0).is_none() && pages.get(0, 2 * PAGES as u64 - 1).is_some());
    }
}
