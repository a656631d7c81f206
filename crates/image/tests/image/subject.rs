//! What is tested: formats in geometries that bring their limits near.

use image::create::CreateOptions;
use image::{BackingRef, Format, Image, OpenOptions, Repair};
use std::rc::Rc;
use store::Store;

/// A format in one geometry.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) format: Format,
    pub(crate) cluster_size: Option<u64>,
    pub(crate) table_size: Option<u32>,
}

impl Subject {
    fn qed(name: &'static str, cluster_size: u64, table_size: u32) -> Self {
        Self { name, format: Format::Qed, cluster_size: Some(cluster_size), table_size: Some(table_size) }
    }

    pub(crate) fn options(&self, size: u64, backing: Option<BackingRef>) -> CreateOptions {
        CreateOptions {
            format: self.format,
            size,
            backing,
            cluster_size: self.cluster_size,
            table_size: self.table_size,
        }
    }

    /// Makes an image of `size` bytes in `store`.
    pub(crate) async fn create(&self, store: Rc<dyn Store>, size: u64, backing: Option<BackingRef>) {
        image::create::create(store, &self.options(size, backing)).await.unwrap();
    }

    pub(crate) async fn open(&self, store: Rc<dyn Store>) -> image::Result<Rc<dyn Image>> {
        image::open(store, self.format, OpenOptions::default()).await
    }

    /// Looks at an image that nobody has open: its tables must be sound, without even a leak.
    pub(crate) async fn assert_clean(&self, store: Rc<dyn Store>) {
        let options = OpenOptions { read_only: true, for_check: true };
        let image = image::open(store, self.format, options).await.unwrap();
        let report = image.check(Repair::None).await.unwrap();
        assert!(report.is_clean(), "{}: {report:#?}", self.name);
        assert!(!image.info().dirty, "{}: left dirty", self.name);
    }
}

/// Formats that allocate. (Raw has its own tests: nothing of this applies to it.)
pub(crate) fn subjects() -> Vec<Subject> {
    vec![Subject::qed("qed 4K/1", 4096, 1), Subject::qed("qed 4K/2", 4096, 2), Subject::qed("qed 64K/4", 65536, 4)]
}
