//! Creating: header, refcount table, refcount blocks and L1 table side by side, each counted once.

use super::data_file::DataFile;
use super::header::{check_backing, extensions};
use crate::create::CreateOptions;
use crate::luks;
use crate::{Error, ErrorKind, Result};
use layout::qcow2::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, CRYPT_LUKS, Compression, Extension, Extensions, Features,
    Header, refcount,
};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use store::{Store, ZeroMode};

/// As QEMU has it.
const DEFAULT_CLUSTER_SIZE: u64 = 64 << 10;

/// Bytes of the headers that are made: version 2's, and version 3's with the compression type.
pub(super) const V2_BYTES: u32 = 72;
pub(super) const V3_BYTES: u32 = 112;

/// Header, extensions and names of a new image lie within this.
const HEAD_BYTES: u64 = 4096;

/// What QCOW2 alone lets one choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// 2 ("0.10") or 3 ("1.1").
    pub version: u32,
    /// Bits of a refcount: a power of two up to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Refcounts may be written late. Allowed to others; not needed by us.
    pub lazy_refcounts: bool,
    /// Entries of L2 tables have 32 subclusters each.
    pub extended_l2: bool,
    /// How packed clusters are packed.
    pub compression: Compression,
    /// Guests' data are encrypted by LUKS, under the passphrase of [`CreateOptions`].
    pub encrypted: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            version: 3,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Deflate,
            encrypted: false,
        }
    }
}

/// Where everything of a new image goes, in clusters from 0: header, refcount table, refcount blocks, L1 table.
struct Plan {
    header: Header,
    blocks: u64,
    l1_clusters: u64,
    /// For the header of the encryption, behind everything else.
    luks_clusters: u64,
}

impl Plan {
    fn clusters(&self) -> u64 {
        1 + u64::from(self.header.refcount_table_clusters) + self.blocks + self.l1_clusters + self.luks_clusters
    }
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, "", None, what)
}

fn plan(options: &CreateOptions, data_file: Option<&DataFile>) -> Result<Plan> {
    let own = options.qcow2;
    let cluster = options.cluster_size.unwrap_or(DEFAULT_CLUSTER_SIZE);
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(invalid(format!(
            "Cluster size must be a power of two between 512 and 2048k ({cluster} was asked for)"
        )));
    }
    if options.table_size.is_some() {
        return Err(invalid("QCOW2 images have no table size to choose"));
    }
    if !own.refcount_bits.is_power_of_two() || own.refcount_bits > 64 {
        return Err(invalid("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if !(2..=3).contains(&own.version) {
        return Err(invalid("there are versions 2 ('compat=0.10') and 3 ('compat=1.1')"));
    }
    if own.version == 2 {
        let needs = match own {
            Options {
                refcount_bits: 16,
                lazy_refcounts: false,
                extended_l2: false,
                compression: Compression::Deflate,
                ..
            } => None,
            Options { refcount_bits: 16, lazy_refcounts: true, .. } => Some("Lazy refcounts"),
            Options { refcount_bits: 16, extended_l2: true, .. } => Some("Extended L2 entries"),
            Options { refcount_bits: 16, .. } => Some("Other compression than zlib"),
            _ => Some("Different refcount widths than 16 bits"),
        };
        if let Some(needs) = needs {
            return Err(invalid(format!("{needs} need compatibility level 1.1 or above (use compat=1.1 or greater)")));
        }
    }
    if own.extended_l2 && cluster < 16 << 10 {
        return Err(invalid("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"));
    }
    if let Some(file) = data_file {
        file.check()?;
        if own.version == 2 {
            return Err(invalid(
                "External data files are only supported with compatibility level 1.1 and above (use \
                                version=v3 or greater)",
            ));
        }
        if file.raw && options.backing.is_some() {
            return Err(invalid("Backing file and data-file-raw cannot be used at the same time"));
        }
    }
    let size = options.size.checked_next_multiple_of(512).ok_or_else(|| invalid("no disk can be that large"))?;
    let mut features = Features::empty();
    features.set(Features::EXTENDED_L2, own.extended_l2);
    features.set(Features::EXTERNAL_DATA, data_file.is_some());
    features.set(Features::COMPRESSION, own.compression != Compression::Deflate);
    let mut header = Header {
        version: own.version,
        cluster_bits: cluster.trailing_zeros(),
        size,
        l1_entries: 0,
        l1_table: HostOffset::ZERO,
        backing_name: None,
        refcount_table: HostOffset(cluster),
        refcount_table_clusters: 1,
        refcount_order: own.refcount_bits.trailing_zeros(),
        snapshots: 0,
        snapshot_table: HostOffset::ZERO,
        features,
        compatible_features: if own.lazy_refcounts { COMPATIBLE_LAZY_REFCOUNTS } else { 0 },
        autoclear_features: if data_file.is_some_and(|file| file.raw) { AUTOCLEAR_DATA_FILE_RAW } else { 0 },
        compression: own.compression,
        crypt: if own.encrypted { CRYPT_LUKS } else { 0 },
        header_bytes: if own.version == 2 { V2_BYTES } else { V3_BYTES },
    };
    if size > header.max_size() {
        return Err(invalid(format!(
            "a QCOW2 image with clusters of {cluster} bytes holds at most {} bytes ({} were asked for); use larger clusters",
            header.max_size(),
            options.size
        )));
    }
    header.l1_entries = header.l1_entries_for(size) as u32;
    let l1_clusters = header.l1_range().len().div_ceil(cluster);
    let luks_clusters = if own.encrypted { luks::header_bytes().div_ceil(cluster) } else { 0 };
    // More blocks need more counting: once around is not always enough.
    let (mut blocks, mut table) = (1, 1);
    loop {
        let clusters = 1 + table + blocks + l1_clusters + luks_clusters;
        let (blocks_now, table_now) = (clusters.div_ceil(header.refcounts_per_block()), (blocks * 8).div_ceil(cluster));
        if blocks_now <= blocks && table_now <= table {
            break;
        }
        (blocks, table) = (blocks.max(blocks_now), table.max(table_now));
    }
    header.refcount_table_clusters = table as u32;
    header.l1_table = HostOffset((1 + table + blocks) * cluster);
    let luks_at = HostOffset((1 + table + blocks + l1_clusters) * cluster);
    let start = u64::from(header.header_bytes) + header_extensions(options, data_file, luks_at).len() as u64;
    if start > cluster.min(HEAD_BYTES) {
        return Err(invalid("the name of the data file does not fit into the first cluster; use larger clusters"));
    }
    if let Some(backing) = &options.backing {
        check_backing("", backing)?;
        let name = HostRange::new(HostOffset(start), backing.name.len() as u64);
        if name.end().get() > cluster.min(HEAD_BYTES) {
            return Err(invalid(
                "the name of the backing file does not fit into the first cluster; use larger clusters",
            ));
        }
        header.backing_name = Some(name);
    }
    header.validate().map_err(|error| invalid(error.to_string()))?;
    Ok(Plan { header, blocks, l1_clusters, luks_clusters })
}

/// Bytes of the file of such an image, once all of it is allocated: for `measure`.
pub fn measure(options: &CreateOptions) -> Result<u64> {
    let header = plan(options, None)?.header;
    let cluster = header.cluster_size();
    let l1 = header.l1_range().len().div_ceil(cluster);
    let l2 = header.l1_entries_for(header.size);
    let rest = 1 + l1 + l2 + header.size.div_ceil(cluster);
    let (mut blocks, mut table) = (0, 0);
    loop {
        let clusters = rest + blocks + table;
        let (blocks_now, table_now) = (clusters.div_ceil(header.refcounts_per_block()), (blocks * 8).div_ceil(cluster));
        if (blocks_now, table_now) == (blocks, table) {
            return Ok(clusters * cluster);
        }
        (blocks, table) = (blocks_now, table_now);
    }
}

fn header_extensions(options: &CreateOptions, data_file: Option<&DataFile>, luks_at: HostOffset) -> Vec<u8> {
    let mut own = Extensions { all: data_file.map(DataFile::extension).into_iter().collect() };
    if options.qcow2.encrypted {
        let place = [luks_at.get(), luks::header_bytes()];
        let data = place.into_iter().flat_map(u64::to_be_bytes).collect();
        own.all.push(Extension { kind: Extension::ENCRYPTION, data });
    }
    extensions(&own, options.backing.as_ref()).encode()
}

/// Checks `options`; returns warnings.
pub(crate) fn validate(options: &CreateOptions) -> Result<Vec<String>> {
    plan(options, None).map(|_| Vec::new())
}

/// Writes a new image: the tables first, then the header.
pub(crate) async fn create(store: Rc<dyn Store>, options: &CreateOptions) -> Result<()> {
    create_as(store, options, None).await
}

/// Writes a new image whose data are in a file of their own. Makes the tables only: the data file is there already, as long as
/// the disk, and reads as zeros. Where it is raw, [`crate::Image::preallocate`] gives its clusters their places.
pub async fn create_with_data_file(store: Rc<dyn Store>, options: &CreateOptions, data_file: &DataFile) -> Result<()> {
    create_as(store, options, Some(data_file)).await
}

async fn create_as(store: Rc<dyn Store>, options: &CreateOptions, data_file: Option<&DataFile>) -> Result<()> {
    let plan = plan(options, data_file)?;
    let header = &plan.header;
    let cluster = header.cluster_size();
    let end = plan.clusters() * cluster;
    if store.limits().fixed_size {
        if store.size() < end {
            let what = format!("it has {} bytes; the tables alone need {end}", store.size());
            return Err(Error::new(ErrorKind::InvalidArgument, store.name(), None, what));
        }
        store.zero(HostOffset::ZERO.range(end), ZeroMode { unmap: true }).await?;
    } else {
        store.set_size(0).await?;
        store.set_size(end).await?;
    }
    let first_block = u64::from(header.refcount_table_clusters) + 1;
    let mut left = plan.clusters();
    for number in 0..plan.blocks {
        let mut block = vec![0; cluster as usize];
        let count = left.min(header.refcounts_per_block());
        for index in 0..count {
            refcount::set(&mut block, header.refcount_order, index, 1);
        }
        left -= count;
        store.write(HostOffset((first_block + number) * cluster), Iov::from_slice(&block), false).await?;
    }
    let entries = (0..plan.blocks).map(|number| (first_block + number) * cluster);
    let table: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
    store.write(header.refcount_table, Iov::from_slice(&table), false).await?;
    let mut first = vec![0; cluster.min(HEAD_BYTES) as usize];
    header.encode_over(&mut first);
    let luks_at = header.l1_table + plan.l1_clusters * cluster;
    if options.qcow2.encrypted {
        let passphrase = options.passphrase.clone().ok_or_else(|| {
            invalid("Parameter 'encrypt.key-secret' is required for cipher: name a secret that holds the passphrase")
        })?;
        let made = luks::plan(passphrase, options.iteration_time).await?;
        store.write(luks_at, Iov::from_slice(&made.bytes), false).await?;
    }
    let (start, extensions) = (header.header_bytes as usize, header_extensions(options, data_file, luks_at));
    first[start..start + extensions.len()].copy_from_slice(&extensions);
    if let (Some(backing), Some(slot)) = (&options.backing, header.backing_name) {
        let at = slot.start().get() as usize;
        first[at..at + backing.name.len()].copy_from_slice(backing.name.as_bytes());
    }
    store.write(HostOffset::ZERO, Iov::from_slice(&first), false).await?;
    store.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackingRef, Format};

    fn options() -> CreateOptions {
        CreateOptions::new(Format::Qcow2, 1 << 30)
    }

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        let refused = |options: CreateOptions| validate(&options).unwrap_err().to_string();
        let own = |qcow2| CreateOptions { qcow2, ..options() };
        assert!(refused(CreateOptions { cluster_size: Some(5000), ..options() }).contains("power of two"));
        assert!(refused(CreateOptions { cluster_size: Some(4 << 20), ..options() }).contains("power of two"));
        assert!(refused(CreateOptions { table_size: Some(4), ..options() }).contains("table size"));
        assert!(refused(CreateOptions { size: u64::MAX, ..options() }).contains("no disk"));
        assert!(refused(CreateOptions { size: 1 << 40, cluster_size: Some(512), ..options() }).contains("larger"));
        assert!(refused(own(Options { refcount_bits: 3, ..Options::default() })).contains("power of two"));
        assert!(refused(own(Options { version: 2, refcount_bits: 1, ..Options::default() })).contains("1.1"));
        assert!(refused(own(Options { version: 2, lazy_refcounts: true, ..Options::default() })).contains("Lazy"));
        let extended = own(Options { extended_l2: true, ..Options::default() });
        assert!(refused(CreateOptions { cluster_size: Some(4096), ..extended }).contains("16384"));
        let named = |name: String| CreateOptions { backing: Some(BackingRef { name, format: None }), ..options() };
        assert!(refused(named(String::new())).contains("empty"));
        assert!(refused(named("x".repeat(1024))).contains("1023"));
        assert!(validate(&named("x".repeat(1023))).is_ok());
    }

    #[test]
    fn every_geometry_counts_all_it_takes() {
        for bits in [1, 8, 16, 64] {
            for cluster_size in [512, 4096, 65536, 2 << 20] {
                for size in [0, 512, 1 << 30, 100 << 30] {
                    let qcow2 = Options { refcount_bits: bits, ..Options::default() };
                    let options = CreateOptions { size, cluster_size: Some(cluster_size), qcow2, ..options() };
                    let Ok(plan) = plan(&options, None) else { continue };
                    assert!(plan.clusters() <= plan.blocks * plan.header.refcounts_per_block(), "{options:?}");
                    assert!(plan.blocks * 8 <= plan.header.refcount_table_bytes(), "{options:?}");
                }
            }
        }
    }
}
