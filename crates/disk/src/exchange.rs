//! Layers that several disks show: each node of a graph may be somebody's disk, and lie below others'.
//!
//! **Invariants.** A layer is exchanged only while no request is inside ([`Quiet`]), so nobody meets an image that is closed. What one
//! disk's stream lets go of is let go of by all who show it, before it is closed ([`Sharers`]).

use crate::disk::Inner;
use crate::gate::Paused;
use crate::view::View;
use crate::{Disk, Layer};
use futures_util::future::{Either, LocalBoxFuture, select};
use image::{ErrorKind, Image, Result};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// How long requests under way may take. Those that are held for want of a source may take for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// No request is inside the disk, and none enters until this is dropped.
pub struct Quiet {
    inner: Rc<Inner>,
    _paused: Paused,
}

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
    /// Waits until no request is inside, and lets none in meanwhile and as long as the token lives.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`]: a request does not end.
    pub async fn quiet(&self) -> Result<Quiet> {
        let inner = Rc::clone(&self.inner);
        let paused = inner.gate.pause();
        let in_time = matches!(select(pin!(inner.gate.empty()), pin!(ring::sleep(PATIENCE))).await, Either::Left(_));
        if !in_time {
            let what = format!("requests of '{}' do not end: a source below it does not answer", inner.name);
            return Err(inner.refuse(ErrorKind::Busy, what));
        }
        Ok(Quiet { inner, _paused: paused })
    }

    /// Who is told of what a stream lets go of.
    pub fn set_sharers(&self, sharers: Sharers) {
        *self.inner.sharers.borrow_mut() = Some(sharers);
    }

    /// Follows another disk's stream. Ends when no request of this one shows what was let go of.
    pub fn let_go(&self, what: &LetGo) -> impl Future<Output = ()> + use<> {
        let view = self.inner.view();
        let above = view.layers.iter().position(|layer| layer.node == what.top);
        let gone = above.map(|above| {
            let is_gone = |layer: &Layer| what.gone.contains(&layer.node);
            let kept = view.layers.iter().enumerate().filter(|(at, layer)| *at <= above || !is_gone(layer));
            let mut kept: Vec<Layer> = kept.map(|(_, layer)| layer.clone()).collect();
            // What is the lowest now stands alone.
            if let Some(last) = kept.last_mut() {
                last.bottom = true;
            }
            self.inner.replace_view(View::new(kept)).gone()
        });
        drop(view);
        async move {
            if let Some(gone) = gone {
                gone.await;
            }
        }
    }
}

impl Quiet {
    /// Puts `image` in the place of the one that `node`, below the top, has now.
    pub fn exchange(&self, node: &str, image: &Rc<dyn Image>) {
        let mut layers = self.inner.view().layers.to_vec();
        for layer in layers.iter_mut().skip(1).filter(|layer| layer.node == node) {
            layer.image = Rc::clone(image);
        }
        drop(self.inner.replace_view(View::new(layers)));
    }
}
