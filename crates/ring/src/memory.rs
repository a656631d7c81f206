//! The pool of I/O memory: one per thread, in power-of-two size classes, every block aligned to 4096 bytes.
//!
//! **Invariants.** A block's memory is always initialised (zeroed when it is made). A block goes back to the pool only
//! when nobody else refers to it. Blocks are reused last in, first out, so that the pages a request touches are most
//! likely mapped and in cache already. The bytes a pool keeps are bounded by [`RETAINED_MAX`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

/// Every block is aligned to this: the largest logical block size that direct I/O asks for in practice, and a page.
pub(crate) const ALIGN: usize = 4096;

/// Bytes that one thread's pool keeps for reuse: some 512 requests of 128 KiB.
const RETAINED_MAX: usize = 64 << 20;

/// Smallest class: one page.
const CLASS_MIN_BITS: u32 = ALIGN.trailing_zeros();

/// Largest class that is kept. Larger blocks (whole big clusters) are rare and go back to the allocator.
const CLASS_MAX_BITS: u32 = 24;

const CLASSES: usize = (CLASS_MAX_BITS - CLASS_MIN_BITS + 1) as usize;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { retained: 0, free: [const { Vec::new() }; CLASSES] }) };
}

struct Pool {
    retained: usize,
    free: [Vec<Rc<Block>>; CLASSES],
}

/// One piece of memory. Freed when dropped.
struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

impl Block {
    fn new(size: usize) -> Self {
        let layout = Layout::from_size_align(size, ALIGN).expect("a length below isize::MAX, rounded up to 4096");
        // SAFETY: the layout's size is not zero: `take` rounds up to at least one page.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: made by `alloc_zeroed` with this very layout, and freed once: a block has one drop.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// A counted reference to a block, which goes back to this thread's pool with the last one.
#[derive(Clone)]
pub(crate) struct BlockRef(Rc<Block>);

impl BlockRef {
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.0.start
    }

    pub(crate) fn ptr_eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Drop for BlockRef {
    fn drop(&mut self) {
        if Rc::strong_count(&self.0) == 1
            && let Some(class) = class(self.0.layout.size())
        {
            // Without a pool (the thread is ending) the block is simply freed.
            let _ = POOL.try_with(|pool| {
                let mut pool = pool.borrow_mut();
                let size = self.0.layout.size();
                if pool.retained + size <= RETAINED_MAX {
                    pool.retained += size;
                    pool.free[class].push(Rc::clone(&self.0));
                }
            });
        }
    }
}

/// The class of blocks of exactly `size` bytes, if such blocks are kept.
fn class(size: usize) -> Option<usize> {
    let bits = size.trailing_zeros();
    (size.is_power_of_two() && (CLASS_MIN_BITS..=CLASS_MAX_BITS).contains(&bits))
        .then(|| (bits - CLASS_MIN_BITS) as usize)
}

/// At least `len` bytes, and whether they are known to be zero.
pub(crate) fn take(len: usize) -> (BlockRef, bool) {
    let size = if len <= 1 << CLASS_MAX_BITS {
        len.next_power_of_two().max(ALIGN)
    } else {
        len.checked_next_multiple_of(ALIGN).expect("a length that fits the address space")
    };
    let kept = class(size).and_then(|class| {
        POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            let block = pool.free[class].pop()?;
            pool.retained -= size;
            Some(block)
        })
        .ok()
        .flatten()
    });
    match kept {
        Some(block) => (BlockRef(block), false),
        None => (BlockRef(Rc::new(Block::new(size))), true),
    }
}

/// Bytes this thread's pool keeps now.
#[cfg(test)]
pub(crate) fn retained() -> usize {
    POOL.with(|pool| pool.borrow().retained)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_and_reused_last_in_first_out() {
        for len in [1, 512, 4096, 4097, 65536, (16 << 20) + 1] {
            let (block, _) = take(len);
            assert_eq!(block.start().as_ptr() as usize % ALIGN, 0);
            assert!(block.0.layout.size() >= len);
        }
        let (a, _) = take(8192);
        let (b, _) = take(8192);
        let at = b.start();
        drop(a);
        drop(b);
        let (again, zero) = take(5000);
        assert_eq!(again.start(), at, "the block freed last comes first");
        assert!(!zero, "a reused block is not known to be zero");
    }

    #[test]
    fn what_the_pool_keeps_is_bounded() {
        let blocks: Vec<_> = (0..10).map(|_| take(16 << 20).0).collect();
        drop(blocks);
        assert!(retained() <= RETAINED_MAX);
        assert_eq!(retained(), 4 * (16 << 20));
        drop(take(CLASSES << 24));
        assert_eq!(retained(), 4 * (16 << 20), "large blocks are not kept");
    }

    #[test]
    fn a_block_lives_while_any_reference_does() {
        let (a, _) = take(4096);
        let b = a.clone();
        drop(a);
        assert_eq!(retained(), 0);
        drop(b);
        assert_eq!(retained(), 4096);
    }
}
