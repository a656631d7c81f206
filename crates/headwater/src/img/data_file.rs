//! New QCOW2 images whose data are in a file of their own: the image, then that file.

use disk::chain::{FileOpener, Opener};
use image::create::CreateOptions;
use image::qcow2::{self, DataFile};
use std::path::Path;
use std::rc::Rc;
use store::Store;
use store::file::{FileStore, OpenOptions};

/// Makes both. What a data file of this name held before is gone, as qemu-img has it.
pub(crate) async fn create(file: &str, options: &CreateOptions, data: &DataFile) -> Result<(), String> {
    let opener = FileOpener::default();
    let path = opener.identify(&data.name, Some(file));
    if path == opener.identify(file, None) {
        return Err(format!("{file}: its data file is to be the image itself; name another file"));
    }
    let failed = |error: &dyn std::fmt::Display| format!("{file}: could not create its data file '{path}': {error}");
    // The image first: what cannot be made is refused before a data file loses what it held.
    let existed = Path::new(file).exists();
    let image: Rc<dyn Store> =
        FileStore::create(Path::new(file), OpenOptions::default()).await.map_err(|e| format!("{file}: {e}"))?;
    let made = qcow2::create_with_data_file(image.clone(), options, data).await;
    let closed = image.close().await;
    if made.is_err() && !existed {
        let _ = std::fs::remove_file(file);
    }
    made.map_err(|e| format!("{file}: {e}"))?;
    closed.map_err(|e| format!("{file}: {e}"))?;
    let store = FileStore::create(Path::new(&path), OpenOptions::default()).await.map_err(|e| failed(&e))?;
    let size = options.size.next_multiple_of(512);
    let made = async {
        if store.limits().fixed_size {
            return store.zero(layout::HostOffset::ZERO.range(size), store::ZeroMode { unmap: true }).await;
        }
        store.set_size(0).await?;
        store.set_size(size).await?;
        store.flush().await
    };
    let made = made.await;
    let closed = store.close().await;
    made.and(closed).map_err(|e| failed(&e))
}
