//! The reference from an image to what lies below it.

use crate::probe::Format;
use crate::{Error, ErrorKind, Result};

/// A backing file as an image's header names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackingRef {
    /// The name as recorded: a path (relative to the image's own folder) or a URL.
    pub name: String,
    /// The recorded format; `None` where the header leaves it open.
    pub format: Option<Format>,
}

impl BackingRef {
    /// Checks the reference before anything is written: images of `holder` record names of up to `most` bytes.
    pub(crate) fn check(&self, image: &str, holder: Format, most: usize) -> Result<()> {
        let len = self.name.len();
        let what = match len {
            0 => "the name of the backing file is empty".to_owned(),
            _ if self.name.contains('\0') => "the name of the backing file contains a NUL byte".to_owned(),
            _ if len <= most => return Ok(()),
            _ => {
                let holder = holder.name().to_uppercase();
                format!("the name of the backing file has {len} bytes; {holder} images hold at most {most}")
            }
        };
        Err(Error::new(ErrorKind::InvalidArgument, image, None, what))
    }
}
