//! A QCOW2 image to stream from, made by hand: Headwater reads that format and does not write it.
//!
//! Version 3, one refcount block's worth of nothing (a reader does not look), clusters of every kind: left out where they
//! are zeros, marked as zeros, stored, or packed.

use crate::content::{SECTOR, Value, ZEROS, encode};
use crate::dice::Dice;
use std::io::Write;

/// Puts a big-endian number somewhere.
fn put(bytes: &mut Vec<u8>, at: usize, value: u64, width: usize) {
    if bytes.len() < at + width {
        bytes.resize(at + width, 0);
    }
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// An image that shows `content`, in clusters of `1 << cluster_bits` bytes.
pub(crate) fn qcow2(content: &[Value], cluster_bits: u32, dice: &Dice) -> Vec<u8> {
    let cluster = 1_usize << cluster_bits;
    let sectors = cluster / SECTOR as usize;
    let entries = cluster / 8;
    let clusters = content.len().div_ceil(sectors);
    let tables = clusters.div_ceil(entries);
    let mut bytes = vec![0; cluster];
    put(&mut bytes, 0, 0x5146_49fb, 4);
    put(&mut bytes, 4, 3, 4);
    put(&mut bytes, 20, cluster_bits.into(), 4);
    put(&mut bytes, 24, content.len() as u64 * SECTOR, 8);
    put(&mut bytes, 36, tables as u64, 4);
    put(&mut bytes, 40, cluster as u64, 8);
    put(&mut bytes, 96, 4, 4);
    put(&mut bytes, 100, 104, 4);
    let first_table = cluster + (tables * 8).next_multiple_of(cluster);
    bytes.resize(first_table + tables * cluster, 0);
    for (number, values) in content.chunks(sectors).enumerate() {
        let (table, index) = (number / entries, number % entries);
        let at = first_table + table * cluster;
        put(&mut bytes, cluster + table * 8, (1 << 63) | at as u64, 8);
        let entry = if values.iter().all(|value| *value == ZEROS) {
            dice.below(2)
        } else {
            let mut data = Vec::with_capacity(cluster);
            for (sector, value) in values.iter().enumerate() {
                encode(*value, (number * sectors + sector) as u64, &mut data);
            }
            data.resize(cluster, 0);
            store(&mut bytes, data, cluster_bits, dice)
        };
        put(&mut bytes, at + index * 8, entry, 8);
    }
    // What is packed last ends with its stream, which its entry says nothing of: its sectors are there.
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    bytes
}

/// Appends a cluster, as it is or packed; its entry.
fn store(bytes: &mut Vec<u8>, data: Vec<u8>, cluster_bits: u32, dice: &Dice) -> u64 {
    let cluster = data.len();
    let mut packer = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    let packed = packer.write_all(&data).and_then(|()| packer.finish()).unwrap_or_default();
    if dice.percent(50) && !packed.is_empty() && packed.len() < cluster {
        let at = bytes.len();
        bytes.extend(packed);
        let behind_the_first = (bytes.len() - 1) / 512 - at / 512;
        return (1 << 62) | ((behind_the_first as u64) << (62 - (cluster_bits - 8))) | at as u64;
    }
    let at = bytes.len().next_multiple_of(cluster);
    bytes.resize(at, 0);
    bytes.extend(data);
    (1 << 63) | at as u64
}
