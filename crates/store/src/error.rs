//! What can go wrong with a store: a matchable kind, the operation with its range and the store's name, and the cause.

use layout::HostRange;
use std::fmt;
use std::io;
use std::sync::Arc;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, for code to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The medium answered with an error (`EIO` and everything not named below).
    Io,
    /// No space (or quota) left.
    NoSpace,
    /// The store was opened read-only, or lies on a read-only file system.
    ReadOnly,
    /// No such file.
    NotFound,
    /// Not allowed to.
    Permission,
    /// Somebody else holds a lock on it.
    Locked,
    /// It exists already.
    Exists,
    /// The size cannot change, or the request reaches past what the store can hold.
    OutOfRange,
    /// The operation is not possible on this store.
    Unsupported,
    /// The place does not answer now, but may later: worth holding and asking again.
    Unavailable,
    /// An earlier write or flush of metadata failed; nothing is written any more.
    Poisoned,
}

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the operation of `Store` it is named after")]
pub enum Operation {
    Open,
    Create,
    Lock,
    Read,
    Write,
    Flush,
    Zero,
    SetSize,
    Allocate,
    Extent,
}

impl Operation {
    /// The verb in messages: "could not *read*".
    pub fn verb(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Create => "create",
            Self::Lock => "lock",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Zero => "zero",
            Self::SetSize => "resize",
            Self::Allocate => "allocate space in",
            Self::Extent => "map",
        }
    }
}

/// A store's error. Cheap to clone: a poisoned store hands out its first cause again and again.
#[derive(Clone, Debug)]
pub struct Error {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    operation: Operation,
    store: String,
    range: Option<HostRange>,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    Io(io::Error),
    Said(String),
    Earlier(Error),
}

impl Error {
    /// From the system's answer; the kind follows from its errno.
    pub fn from_io(operation: Operation, store: &str, range: Option<HostRange>, source: io::Error) -> Self {
        let kind = kind_of(&source);
        tracing::trace!(target: "store_failed", store, ?operation, range = range.map(tracing::field::display), error = %source);
        Self::build(kind, operation, store, range, Cause::Io(source))
    }

    /// With a stated kind and reason.
    pub fn new(
        kind: ErrorKind,
        operation: Operation,
        store: &str,
        range: Option<HostRange>,
        why: impl Into<String>,
    ) -> Self {
        Self::build(kind, operation, store, range, Cause::Said(why.into()))
    }

    /// What a poisoned store answers: refused since `first` happened.
    pub fn poisoned(operation: Operation, store: &str, range: Option<HostRange>, first: &Error) -> Self {
        Self::build(ErrorKind::Poisoned, operation, store, range, Cause::Earlier(first.clone()))
    }

    fn build(kind: ErrorKind, operation: Operation, store: &str, range: Option<HostRange>, cause: Cause) -> Self {
        Self { inner: Arc::new(Inner { kind, operation, store: store.to_owned(), range, cause }) }
    }

    /// For code to decide on.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// What was being done.
    pub fn operation(&self) -> Operation {
        self.inner.operation
    }

    /// Where, if it was a range.
    pub fn range(&self) -> Option<HostRange> {
        self.inner.range
    }

    /// Whose error: [`crate::Store::name`].
    pub fn store(&self) -> &str {
        &self.inner.store
    }

    /// What the system said, in its words and nothing else; `None` where somebody else said it.
    pub fn os_text(&self) -> Option<String> {
        let Cause::Io(source) = &self.inner.cause else { return None };
        let errno = source.raw_os_error()?;
        let text = source.to_string();
        Some(text.strip_suffix(&format!(" (os error {errno})")).map_or_else(|| text.clone(), str::to_owned))
    }

    /// The closest errno, for protocols that carry one.
    pub fn errno(&self) -> i32 {
        match (&self.inner.cause, self.inner.kind) {
            (Cause::Earlier(first), _) => first.errno(),
            (_, ErrorKind::NoSpace) => libc::ENOSPC,
            (_, ErrorKind::ReadOnly) => libc::EROFS,
            (_, ErrorKind::NotFound) => libc::ENOENT,
            (_, ErrorKind::Permission) => libc::EACCES,
            (_, ErrorKind::Locked) => libc::EAGAIN,
            (_, ErrorKind::Exists) => libc::EEXIST,
            (_, ErrorKind::OutOfRange) => libc::EFBIG,
            (_, ErrorKind::Unsupported) => libc::EOPNOTSUPP,
            (Cause::Io(source), _) => source.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EIO,
        }
    }
}

fn kind_of(source: &io::Error) -> ErrorKind {
    match source.raw_os_error() {
        Some(errno) => kind_of_errno(errno),
        None if source.kind() == io::ErrorKind::Unsupported => ErrorKind::Unsupported,
        None => ErrorKind::Io,
    }
}

/// What an errno says.
pub(crate) fn kind_of_errno(errno: i32) -> ErrorKind {
    match errno {
        libc::ENOSPC | libc::EDQUOT => ErrorKind::NoSpace,
        libc::EROFS => ErrorKind::ReadOnly,
        libc::ENOENT | libc::ENOTDIR => ErrorKind::NotFound,
        libc::EACCES | libc::EPERM => ErrorKind::Permission,
        libc::EEXIST => ErrorKind::Exists,
        libc::EFBIG => ErrorKind::OutOfRange,
        libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { operation, store, range, cause, .. } = &*self.inner;
        write!(f, "could not {} '{store}'", operation.verb())?;
        if let Some(range) = range {
            write!(f, " at offset {} ({} bytes)", range.start().get(), range.len())?;
        }
        match cause {
            Cause::Io(source) => write!(f, ": {source}"),
            Cause::Said(why) => write!(f, ": {why}"),
            Cause::Earlier(first) => write!(f, ": refused after an earlier failure: {first}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.inner.cause {
            Cause::Io(source) => Some(source),
            Cause::Earlier(first) => Some(first),
            Cause::Said(_) => None,
        }
    }
}
