//! The guest's kernel and the modules it needs to see a virtio disk with an ext4 file system.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, error, peer};

/// What the guests need; what is built into the kernel is not found as a module, which is fine.
const WANTED: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// An unpacked kernel package.
#[derive(Debug)]
pub(super) struct Kernel {
    /// The bootable image.
    pub(super) image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The one that `cargo xtask peers` unpacked.
    pub(super) fn find() -> Result<Kernel> {
        let root = peer::directory()?.join("kernel");
        let missing = || error!("no guest kernel is unpacked: cargo xtask peers");
        let boot = fs::read_dir(root.join("boot")).map_err(|_| missing())?;
        let image = boot
            .flatten()
            .map(|entry| entry.path())
            .find(|path| file_name(path).starts_with("vmlinuz-"))
            .ok_or_else(missing)?;
        // Debian has the modules below /lib, and from release 13 on below /usr/lib.
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|place| root.join(place))
            .into_iter()
            .find(|place| place.is_dir())
            .ok_or_else(missing)?;
        Ok(Kernel { image, modules })
    }

    /// The modules the guests need, each after those it depends on: its name and its content.
    pub(super) fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut paths = HashMap::new();
        list(&self.modules, &mut paths)?;
        let mut ordered = Vec::new();
        for wanted in WANTED {
            add(wanted, &paths, &mut ordered)?;
        }
        Ok(ordered)
    }
}

fn add(name: &str, paths: &HashMap<String, PathBuf>, ordered: &mut Vec<(String, Vec<u8>)>) -> Result {
    let Some(path) = paths.get(name) else {
        return Ok(());
    };
    if ordered.iter().any(|(there, _)| there == name) {
        return Ok(());
    }
    let content = read(path)?;
    for dependency in dependencies(&content) {
        add(&dependency, paths, ordered)?;
    }
    ordered.push((name.to_owned(), content));
    Ok(())
}

/// All modules by name. A name's dashes are underscores to whoever depends on it.
fn list(dir: &Path, paths: &mut HashMap<String, PathBuf>) -> Result {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            list(&path, paths)?;
        } else if let Some((name, "ko" | "ko.xz")) = file_name(&path).split_once('.') {
            paths.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(path)?);
    }
    let output = Command::new(peer::find("xz")?).arg("-dc").arg(path).output()?;
    if output.status.success() { Ok(output.stdout) } else { Err(error!("xz cannot unpack {}", path.display())) }
}

/// What a module says it depends on, from its `.modinfo` section: `depends=a,b` between zero bytes.
fn dependencies(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let found = module.windows(FIELD.len()).position(|window| window == FIELD);
    let value = found.map(|at| &module[at + FIELD.len()..]).unwrap_or_default();
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::dependencies;

    #[test]
    fn dependencies_are_read_from_the_module() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["virtio", "virtio_ring"]);
        assert_eq!(dependencies(b"\0depends=\0"), [""; 0]);
        assert_eq!(dependencies(b"nothing"), [""; 0]);
    }
}
