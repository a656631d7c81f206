//! The pieces of one request, moved side by side.

use futures_util::{StreamExt, stream};
use image::Result;
use std::future::Future;

/// Pieces of one request in flight at once. Enough to keep a disk's queue busy from one large, scattered request; the
/// exports bound how many requests there are.
const IN_FLIGHT: usize = 16;

/// Runs all of `pieces`, a bounded number at a time, and waits for every one of them even after a failure: when the caller
/// answers its guest, nothing touches the guest's memory any more. The first failure is reported.
pub(crate) async fn run_all<F>(pieces: impl IntoIterator<Item = F>) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let mut outcome = Ok(());
    let mut running = stream::iter(pieces).buffer_unordered(IN_FLIGHT);
    while let Some(result) = running.next().await {
        outcome = outcome.and(result);
    }
    outcome
}
