//! Changing how an image that is there says what it says: the guest sees the same before and after.

/// What is to be changed; `None`: stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amendment {
    /// QCOW2: 2 or 3.
    pub version: Option<u32>,
    /// QCOW2: refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// QCOW2: bits of a refcount: 1, 2, 4, 8, 16, 32 or 64.
    pub refcount_bits: Option<u32>,
    /// QCOW2: where its data file is now.
    pub data_file: Option<String>,
    /// QCOW2: whether its data file is a raw image by itself. It can only cease to be one.
    pub data_file_raw: Option<bool>,
}
