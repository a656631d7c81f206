//! What can go wrong with an image (and with a disk over it): a matchable kind, what was being done, and the cause.

use layout::HostOffset;
use std::fmt;
use std::sync::Arc;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, for code to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A store failed; [`Error::store_error`] has its kind.
    Store,
    /// The image contradicts its specification.
    Corrupt,
    /// The image uses what this Headwater does not know.
    Unsupported,
    /// What the caller asked for makes no sense (a size, an option, a range).
    InvalidArgument,
    /// The image or disk was opened read-only.
    ReadOnly,
    /// Refused after an earlier failure; the source is that first failure.
    Poisoned,
    /// The backing chain cannot be put together (missing, cyclic, too deep).
    Chain,
    /// Somebody is in the way: a job runs, a node is in use.
    Busy,
}

/// An image's error. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Error {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    image: String,
    offset: Option<HostOffset>,
    what: String,
    store: Option<store::Error>,
    source: Option<Error>,
}

impl Error {
    /// With a stated kind: which image (empty where there is none yet), where in it (if anywhere), and what is wrong in words
    /// for a user, remedy included.
    pub fn new(kind: ErrorKind, image: &str, offset: Option<HostOffset>, what: impl Into<String>) -> Self {
        Self {
            inner: Arc::new(Inner {
                kind,
                image: image.to_owned(),
                offset,
                what: what.into(),
                store: None,
                source: None,
            }),
        }
    }

    /// This one because of `source`.
    #[must_use]
    pub fn because(self, source: Error) -> Self {
        let Inner { kind, image, offset, what, store, .. } = &*self.inner;
        Self {
            inner: Arc::new(Inner {
                kind: *kind,
                image: image.clone(),
                offset: *offset,
                what: what.clone(),
                store: store.clone(),
                source: Some(source),
            }),
        }
    }

    /// What a poisoned image answers.
    pub fn poisoned(image: &str, first: &Error) -> Self {
        Self::new(
            ErrorKind::Poisoned,
            image,
            None,
            "refused after an earlier failure; reads go on, reopen it after repairing the cause",
        )
        .because(first.clone())
    }

    /// For code to decide on.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// Which image: its store's name.
    pub fn image(&self) -> &str {
        &self.inner.image
    }

    /// The store's error at the root of this one, if there is one.
    pub fn store_error(&self) -> Option<&store::Error> {
        self.inner.store.as_ref().or_else(|| self.inner.source.as_ref().and_then(Error::store_error))
    }

    /// Whether it is for want of space.
    pub fn is_no_space(&self) -> bool {
        self.store_error().is_some_and(|e| e.kind() == store::ErrorKind::NoSpace)
    }

    /// Whether the place does not answer now but may later.
    pub fn is_unavailable(&self) -> bool {
        self.store_error().is_some_and(|e| e.kind() == store::ErrorKind::Unavailable)
    }

    /// The closest errno, for protocols that carry one.
    pub fn errno(&self) -> i32 {
        const EIO: i32 = 5;
        const EBUSY: i32 = 16;
        const EINVAL: i32 = 22;
        const EROFS: i32 = 30;
        const EOPNOTSUPP: i32 = 95;
        match self.inner.kind {
            ErrorKind::InvalidArgument => EINVAL,
            ErrorKind::ReadOnly => EROFS,
            ErrorKind::Unsupported => EOPNOTSUPP,
            ErrorKind::Busy => EBUSY,
            _ => self.store_error().map_or(EIO, store::Error::errno),
        }
    }
}

impl From<store::Error> for Error {
    fn from(source: store::Error) -> Self {
        Self {
            inner: Arc::new(Inner {
                kind: ErrorKind::Store,
                image: source.store().to_owned(),
                offset: source.range().map(|r| r.start()),
                what: String::new(),
                store: Some(source),
                source: None,
            }),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { image, offset, what, store, source, .. } = &*self.inner;
        if let Some(store) = store {
            return store.fmt(f);
        }
        if !image.is_empty() {
            write!(f, "'{image}'")?;
            if let Some(offset) = offset {
                write!(f, " at offset {}", offset.get())?;
            }
            write!(f, ": ")?;
        }
        write!(f, "{what}")?;
        if let Some(source) = source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match (&self.inner.store, &self.inner.source) {
            (Some(store), _) => Some(store),
            (None, Some(source)) => Some(source),
            (None, None) => None,
        }
    }
}
