//! The stream job: brings in what lies between a disk's top image and its base, then lets go of it.

use crate::copy::{Copying, Stopped, scan};
use crate::life::{End, Life};
use disk::{Copied, Disk, Error, ErrorKind, Missing, Result, StreamBase};
use futures_util::future::LocalBoxFuture;
use layout::{GuestOffset, GuestRange};
use std::any::Any;
use std::rc::Rc;

/// What a job does about an error while copying (QMP's `BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// Ends with the error.
    #[default]
    Report,
    /// Goes on elsewhere; ends with the error after all else is copied, the backing reference kept.
    Ignore,
    /// Pauses until resumed, then tries the same place again.
    Stop,
    /// `Stop` for want of space, else `Report`.
    Enospc,
}

impl OnError {
    /// Every policy.
    pub const ALL: [Self; 4] = [Self::Report, Self::Ignore, Self::Enospc, Self::Stop];

    /// The name QMP gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }

    /// From the name QMP gives it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// What to stream.
pub struct StreamOptions {
    /// The job's id; by default the disk's name.
    pub id: Option<String>,
    /// The disk.
    pub disk: Rc<Disk>,
    /// How far down.
    pub base: StreamBase,
    /// What the header shall call the base; by default what the chain calls it.
    pub backing_name: Option<String>,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
    /// What to do about errors.
    pub on_error: OnError,
    /// Publish without waiting for [`crate::Jobs::finalize`].
    pub auto_finalize: bool,
    /// Disappear when concluded without waiting for [`crate::Jobs::dismiss`].
    pub auto_dismiss: bool,
    /// What the job keeps until it is gone: a hold on what it works on.
    pub hold: Option<Box<dyn Any>>,
}

/// What a stream works on: a disk, seen from a base. Of its own so that the job's tests can be awkward.
pub(crate) trait Target: 'static {
    /// Bytes; constant while the job runs.
    fn size(&self) -> u64;

    /// Bytes, a power of two: what is brought in as a whole.
    fn cluster_size(&self) -> u64;

    /// See [`Disk::next_missing`].
    fn next_missing(&self, from: GuestOffset) -> LocalBoxFuture<'_, Result<Option<Missing>>>;

    /// See [`Disk::populate`].
    fn populate(&self, range: GuestRange) -> LocalBoxFuture<'_, Result<Copied>>;

    /// See [`Disk::finish_stream`].
    fn finish(&self) -> LocalBoxFuture<'_, Result<()>>;
}

/// A disk and the base to stream down to.
pub(crate) struct DiskTarget {
    pub(crate) disk: Rc<Disk>,
    pub(crate) base: StreamBase,
    pub(crate) backing_name: Option<String>,
}

impl Target for DiskTarget {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn cluster_size(&self) -> u64 {
        // Formats without clusters say 1: any range is whole there.
        self.disk
            .chain()
            .first()
            .map_or(1, |top| top.image.cluster_size())
            .max(u64::from(self.disk.request_alignment()))
    }

    fn next_missing(&self, from: GuestOffset) -> LocalBoxFuture<'_, Result<Option<Missing>>> {
        Box::pin(self.disk.next_missing(from, &self.base))
    }

    fn populate(&self, range: GuestRange) -> LocalBoxFuture<'_, Result<Copied>> {
        Box::pin(self.disk.populate(range, &self.base))
    }

    fn finish(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(self.disk.finish_stream(&self.base, self.backing_name.as_deref()))
    }
}

/// The job's task, from its start to its end.
pub(crate) async fn run(life: Rc<Life>, target: Rc<dyn Target>, on_error: OnError) {
    let counting = ring::spawn(scan(Rc::clone(&life), Rc::clone(&target)));
    let copied = Copying::new(Rc::clone(&life), Rc::clone(&target), on_error).run().await;
    counting.cancel();
    let end = match copied {
        Ok(()) => {
            if life.may_publish().await {
                match target.finish().await {
                    Ok(()) => End::Completed,
                    Err(error) => failed(&life, &error),
                }
            } else {
                End::Cancelled
            }
        }
        Err(Stopped::Cancelled) => End::Cancelled,
        Err(Stopped::Failed(error)) => failed(&life, &error),
    };
    // The job holds nothing of the disk any more by the time it says that it has ended.
    drop(target);
    life.conclude(end);
}

/// What clients are told of an error. Where the system gave one it is in the system's words alone, as QEMU has it and programs compare
/// it; the whole of it, with the place, is in the log.
fn failed(life: &Life, error: &Error) -> End {
    tracing::warn!(job = life.id(), %error, "the stream has failed");
    if error.kind() != ErrorKind::Store {
        return End::Failed(error.to_string());
    }
    let said = std::io::Error::from_raw_os_error(error.errno()).to_string();
    End::Failed(said.split(" (os error").next().unwrap_or(&said).to_owned())
}
