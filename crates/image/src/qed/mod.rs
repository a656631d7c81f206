//! QED, the QEMU Enhanced Disk format.
