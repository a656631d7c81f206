//! Creating: a length.

use super::{MAX_SIZE, SECTOR};
use crate::create::CreateOptions;
use crate::{Error, ErrorKind, Result};
use std::rc::Rc;
use store::Store;

/// Checks `options`; there is nothing to warn about.
pub(crate) fn validate(options: &CreateOptions) -> Result<Vec<String>> {
    let refuse = |what: &str| Err(Error::new(ErrorKind::InvalidArgument, "", None, what));
    if options.backing.is_some() {
        return refuse("a raw image cannot have a backing file; use '-f qed'");
    }
    if options.cluster_size.is_some() || options.table_size.is_some() {
        return refuse("a raw image has no clusters and no tables; leave out 'cluster_size' and 'table_size'");
    }
    if options.size > MAX_SIZE {
        return refuse("the size is more than a file can hold");
    }
    Ok(Vec::new())
}

/// Gives `store` its length, durably.
pub(crate) async fn create(store: Rc<dyn Store>, options: &CreateOptions) -> Result<()> {
    validate(options)?;
    let size = options.size.next_multiple_of(SECTOR);
    if !store.limits().fixed_size {
        store.set_size(0).await?;
        store.set_size(size).await?;
    } else if store.size() < size {
        let what = format!("it has {} bytes, {size} were asked for", store.size());
        return Err(Error::new(ErrorKind::InvalidArgument, store.name(), None, what));
    }
    Ok(store.flush().await?)
}
