//! The guest's initramfs: busybox, the modules, and the test's script, as an uncompressed `newc` archive.

use std::fs;

use super::kernel::Kernel;
use crate::{Result, peer};

/// Runs first: brings up the disk, then runs the script, here or on the disk.
const INIT: &str = include_str!("init.sh");

/// The helpers a script may use.
const LIB: &str = include_str!("lib.sh");

const EXECUTABLE: u32 = 0o100_755;
const PLAIN: u32 = 0o100_644;
const DIRECTORY: u32 = 0o040_755;

pub(super) fn build(kernel: &Kernel, script: &str, manifest: &str, from_disk: bool) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "run", "tmp", "mnt", "modules", "payload"] {
        archive.add(dir, DIRECTORY, &[])?;
    }
    archive.add("bin/busybox", EXECUTABLE, &fs::read(peer::find("busybox")?)?)?;
    archive.add("init", EXECUTABLE, INIT.as_bytes())?;
    let mut order = String::new();
    for (name, content) in kernel.modules()? {
        order.push_str(&name);
        order.push('\n');
        archive.add(&format!("modules/{name}.ko"), PLAIN, &content)?;
    }
    archive.add("modules/order", PLAIN, order.as_bytes())?;
    archive.add("payload/lib.sh", PLAIN, LIB.as_bytes())?;
    archive.add("payload/script", PLAIN, script.as_bytes())?;
    archive.add("payload/manifest", PLAIN, manifest.as_bytes())?;
    if from_disk {
        archive.add("payload/from-disk", PLAIN, &[])?;
    }
    archive.finish()
}

/// A `newc` archive: for each file a header of hexadecimal numbers, the name, and the content, each padded to four.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result {
        self.files += 1;
        let size = u32::try_from(content.len())?;
        let name_size = u32::try_from(name.len() + 1)?;
        // inode, mode, owner, group, links, time, size, device of the file and of the node, name's size, checksum
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_contents_are_aligned() -> Result {
        let mut archive = Archive::default();
        archive.add("a", PLAIN, b"hello")?;
        let bytes = archive.finish()?;
        // 110 bytes of header and a name of 2 are 112; 5 bytes of content are padded to 8.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..120], b"hello\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(&bytes[230..241], b"TRAILER!!!\0");
        Ok(())
    }
}
