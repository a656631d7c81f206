//! What is tested: formats in geometries that bring their limits near.

use image::create::CreateOptions;
use image::{BackingRef, Format, Image, OpenOptions, Repair, qcow2};
use std::rc::Rc;
use store::Store;

/// A format in one geometry.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) format: Format,
    pub(crate) cluster_size: Option<u64>,
    pub(crate) table_size: Option<u32>,
    pub(crate) qcow2: qcow2::Options,
}

impl Subject {
    fn qed(name: &'static str, cluster_size: u64, table_size: u32) -> Self {
        let qcow2 = qcow2::Options::default();
        Self { name, format: Format::Qed, cluster_size: Some(cluster_size), table_size: Some(table_size), qcow2 }
    }

    pub(crate) fn qcow2(name: &'static str, cluster_size: u64, qcow2: qcow2::Options) -> Self {
        Self { name, format: Format::Qcow2, cluster_size: Some(cluster_size), table_size: None, qcow2 }
    }

    /// Whether a power cut may leave clusters that are counted and not used.
    pub(crate) fn may_leak(&self) -> bool {
        self.format == Format::Qcow2
    }

    /// Whether the disk can become smaller.
    pub(crate) fn may_shrink(&self) -> bool {
        self.format == Format::Qcow2
    }

    /// Whether a cluster can be said to be zeros without a place of its own.
    pub(crate) fn marks_zeros(&self) -> bool {
        self.format == Format::Qed || self.qcow2.version > 2
    }

    /// Entries of an L2 table.
    pub(crate) fn entries(&self) -> u64 {
        let cluster = self.cluster_size.unwrap_or(65536);
        match self.format {
            Format::Qcow2 if self.qcow2.extended_l2 => cluster / 16,
            Format::Qcow2 => cluster / 8,
            _ => cluster * u64::from(self.table_size.unwrap_or(4)) / 8,
        }
    }

    /// Longest name of a backing file.
    pub(crate) fn longest_name(&self) -> usize {
        if self.cluster_size == Some(512) { 300 } else { 1023 }
    }

    pub(crate) fn options(&self, size: u64, backing: Option<BackingRef>) -> CreateOptions {
        CreateOptions {
            format: self.format,
            size,
            backing,
            cluster_size: self.cluster_size,
            table_size: self.table_size,
            qcow2: self.qcow2,
            passphrase: None,
            iteration_time: None,
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

impl Subject {
    /// Looks at an image that was cut off: nothing may be wrong with it; what is counted and not used is given back first,
    /// where the format lets that happen.
    pub(crate) async fn assert_clean_after_a_cut(&self, store: Rc<dyn Store>) {
        if self.may_leak() {
            let image = image::open(store.clone(), self.format, OpenOptions::default()).await.unwrap();
            let report = image.check(Repair::Leaks).await.unwrap();
            assert!(report.is_clean() && report.corruptions_fixed == 0, "{}: {report:#?}", self.name);
            image.close().await.unwrap();
        }
        self.assert_clean(store).await;
    }
}

/// The formats that mark an image as unclean while it is written to.
pub(crate) fn marking_subjects() -> Vec<Subject> {
    subjects().into_iter().filter(|subject| !subject.may_leak()).collect()
}

/// Formats that allocate. (Raw has its own tests: nothing of this applies to it.)
pub(crate) fn subjects() -> Vec<Subject> {
    let plain = qcow2::Options::default();
    vec![
        Subject::qed("qed 4K/1", 4096, 1),
        Subject::qed("qed 4K/2", 4096, 2),
        Subject::qed("qed 64K/4", 65536, 4),
        Subject::qcow2("qcow2 512", 512, plain),
        Subject::qcow2("qcow2 4K, refcounts of a bit", 4096, qcow2::Options { refcount_bits: 1, ..plain }),
        Subject::qcow2("qcow2 64K", 65536, plain),
        Subject::qcow2("qcow2 4K, version 2", 4096, qcow2::Options { version: 2, ..plain }),
        Subject::qcow2(
            "qcow2 16K, subclusters",
            16384,
            qcow2::Options { extended_l2: true, refcount_bits: 64, ..plain },
        ),
    ]
}
