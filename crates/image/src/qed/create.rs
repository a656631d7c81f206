//! Creating: the same bytes as the reference tool writes.

use super::header::{backing_features, check_backing};
use crate::create::CreateOptions;
use crate::{BackingRef, Error, ErrorKind, Result};
use layout::qed::geometry::{DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, SECTOR};
use layout::qed::{Geometry, HEADER_BYTES, Header, NameSlot};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use store::{Store, ZeroMode};

/// The header `options` ask for.
fn header(options: &CreateOptions) -> Result<Header> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidArgument, "", None, what);
    let cluster_size = options.cluster_size.unwrap_or(DEFAULT_CLUSTER_SIZE);
    let table_size = options.table_size.unwrap_or(DEFAULT_TABLE_SIZE);
    let geometry = Geometry::new(cluster_size, table_size).map_err(|e| invalid(format!("no such QED image: {e}")))?;
    let size = options.size.checked_next_multiple_of(SECTOR).filter(|size| *size <= geometry.max_image_size());
    let size = size.ok_or_else(|| {
        invalid(format!(
            "a QED image with clusters of {cluster_size} bytes and tables of {table_size} clusters holds at most {} bytes ({} were asked \
             for); use larger clusters",
            geometry.max_image_size(),
            options.size
        ))
    })?;
    let mut header = Header::new(geometry, size).map_err(|e| invalid(e.to_string()))?;
    if let Some(backing) = &options.backing {
        check_backing("", backing)?;
        header.backing_name = NameSlot { offset: HEADER_BYTES as u32, len: backing.name.len() as u32 };
    }
    header.features = backing_features(options.backing.as_ref());
    Ok(header)
}

/// Checks `options`; returns warnings.
pub(crate) fn validate(options: &CreateOptions) -> Result<Vec<String>> {
    let geometry = header(options)?.geometry;
    if geometry.served_by_qemu() {
        return Ok(Vec::new());
    }
    Ok(vec![format!(
        "QEMU (10.0 and before) cannot open QED images with a cluster size of {} and a table size of {}",
        geometry.cluster_size(),
        geometry.table_size()
    )])
}

/// Writes a new image: the tables first, then the header.
pub(crate) async fn create(store: Rc<dyn Store>, options: &CreateOptions) -> Result<()> {
    let header = header(options)?;
    let end = header.l1_range().end();
    let l1 = HostRange::between(HostOffset::ZERO, end);
    if store.limits().fixed_size {
        if store.size() < end.get() {
            let what = format!("it has {} bytes; the tables alone need {}", store.size(), end.get());
            return Err(Error::new(ErrorKind::InvalidArgument, store.name(), None, what));
        }
        store.zero(l1, ZeroMode { unmap: true }).await?;
    } else {
        store.set_size(0).await?;
        store.set_size(end.get()).await?;
    }
    let first = Iov::zeroed(header.header_bytes().min(4096) as usize);
    first.write(0, &header.encode());
    if let Some(BackingRef { name, .. }) = &options.backing {
        first.write(HEADER_BYTES, name.as_bytes());
    }
    store.write(HostOffset::ZERO, first, false).await?;
    store.flush().await?;
    Ok(())
}

const _: () =
    assert!(HEADER_BYTES + layout::qed::MAX_BACKING_NAME <= 4096, "a new header fits in the smallest cluster");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;

    fn options() -> CreateOptions {
        CreateOptions::new(Format::Qed, 1 << 30)
    }

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        let refused = |options: CreateOptions| validate(&options).unwrap_err().to_string();
        assert!(refused(CreateOptions { cluster_size: Some(5000), ..options() }).contains("power of two"));
        assert!(refused(CreateOptions { table_size: Some(3), ..options() }).contains("1, 2, 4, 8 or 16"));
        assert!(refused(CreateOptions { size: (64 << 40) + 1, ..options() }).contains("larger clusters"));
        assert!(refused(CreateOptions { size: u64::MAX, ..options() }).contains("larger clusters"));
        let named = |name: String| CreateOptions { backing: Some(BackingRef { name, format: None }), ..options() };
        assert!(refused(named(String::new())).contains("empty"));
        assert!(refused(named("x".repeat(1024))).contains("1023"));
        assert!(validate(&named("x".repeat(1023))).is_ok());
    }

    #[test]
    fn what_qemu_cannot_open_is_warned_about() {
        assert!(validate(&options()).unwrap().is_empty());
        assert_eq!(validate(&CreateOptions { table_size: Some(1), ..options() }).unwrap().len(), 1);
        assert_eq!(validate(&CreateOptions { cluster_size: Some(64 << 20), ..options() }).unwrap().len(), 1);
    }
}
