//! Tests of the image contract, written once for every format: [`subject::subjects`] lists the formats and geometries, and a new format
//! inherits everything by adding itself there.

extern crate headwater_image as image;

mod amend;
mod basics;
mod bitmaps;
mod crash;
mod data_file;
mod faults;
mod files;
mod guest;
mod hostile;
mod key_slots;
mod luks;
mod masters;
mod model;
mod mutation;
mod packed;
mod pitfalls;
mod pressure;
mod qcow2;
mod raw;
mod reference;
mod subject;
mod vhdx;
mod vmdk;
mod vpc;
