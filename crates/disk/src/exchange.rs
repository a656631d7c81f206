//! Layers that several disks show: each node of a graph may be somebody's disk, and lie below others'.
//!
//! **Invariant.** What one disk's stream lets go of is let go of by all who show it, before it is closed ([`Sharers`]).

use crate::view::View;
use crate::{Disk, Layer};
use futures_util::future::LocalBoxFuture;
use std::rc::Rc;

/// What a stream has let go of: the layers right below `top`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LetGo {
    /// The node that was streamed into.
    pub top: String,
    /// The nodes below it that are not any more, from the top down.
    pub gone: Vec<String>,
}

/// Tells other disks what was let go of; what it gives back ends when none of their requests shows it any more.
pub type Sharers = Rc<dyn Fn(LetGo) -> LocalBoxFuture<'static, ()>>;

impl Disk {
    /// Who is told of what a stream lets go of.
    pub fn set_sharers(&self, sharers: Sharers) {
        *self.root.now().kept.sharers.borrow_mut() = Some(sharers);
    }

    /// Follows another disk's stream. Ends when no request of this one shows what was let go of.
    pub fn let_go(&self, what: &LetGo) -> impl Future<Output = ()> + use<> {
        let inner = self.root.now();
        let view = inner.view();
        let above = view.layers.iter().position(|layer| layer.node == what.top);
        let gone = above.map(|above| {
            let is_gone = |layer: &Layer| what.gone.contains(&layer.node);
            let kept = view.layers.iter().enumerate().filter(|(at, layer)| *at <= above || !is_gone(layer));
            let mut kept: Vec<Layer> = kept.map(|(_, layer)| layer.clone()).collect();
            // What is the lowest now stands alone.
            if let Some(last) = kept.last_mut() {
                last.bottom = true;
            }
            inner.replace_view(View::new(kept)).gone()
        });
        drop(view);
        async move {
            if let Some(gone) = gone {
                gone.await;
            }
        }
    }
}
