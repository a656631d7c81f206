//! What QEMU's test 030 asserts of `block-stream`, told anew in our words. Every case runs on the formats with backing files, with our
//! storage daemon and with QEMU's, so that what is asserted is QEMU's behaviour and not our idea of it.
//!
//! The original has a guest without a system on top of its disks; here an NBD export, which writes, stands for it. Where it stops a
//! disk by a monitor for people (`qemu-io drive0 "break …"`), which storage daemons have not, a job is kept slow by its rate.
//!
//! Left out: a quorum's children (`TestQuorum`; there is no such driver).

mod commits;
mod errors;
mod parallel;
mod single;
mod speed;

use std::path::PathBuf;
use std::process::Command;

use headwater_tests::process::finish;
use headwater_tests::qemu;
use headwater_tests::storage::{Kind, Storage};
use headwater_tests::{Result, error};
use serde_json::{Value, json};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// The images of a test, all in one folder, and whose daemon has them.
struct World {
    dir: TempDir,
    kind: Kind,
    format: &'static str,
}

/// Runs a test with both daemons and on both formats.
fn everywhere(test: impl Fn(&World) -> Result) -> Result {
    for kind in Kind::ALL {
        for format in ["qcow2", "qed"] {
            let world = World { dir: tempfile::tempdir()?, kind, format };
            test(&world).map_err(|why| error!("{kind:?}, {format}: {why}"))?;
        }
    }
    Ok(())
}

impl World {
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A raw file in which no sector is like another, nor zero.
    fn raw(&self, name: &str, size: u64) -> Result {
        let sectors = (0..size / 512).flat_map(|sector| {
            let mut bytes = [0xa5; 512];
            bytes[..8].copy_from_slice(&sector.to_le_bytes());
            bytes
        });
        std::fs::write(self.at(name), sectors.collect::<Vec<u8>>())?;
        Ok(())
    }

    /// An image over another one, of that one's size or of `size`.
    fn overlay(&self, name: &str, backing: &str, backing_format: &str, size: Option<u64>) -> Result {
        let mut command = Command::new("qemu-img");
        command.current_dir(self.dir.path());
        command.args(["create", "-q", "-f", self.format, "-F", backing_format, "-b", backing, name]);
        command.args(size.map(|size| size.to_string()));
        finish(&mut command)?.ok()?;
        Ok(())
    }

    fn io(&self, format: &str, name: &str, command: &str) -> Result {
        qemu::qemu_io(format, &self.at(name), &[command])?;
        Ok(())
    }

    /// What an image itself has, as qemu-io tells it, although somebody may use the image.
    fn map(&self, format: &str, name: &str) -> Result<String> {
        let mut command = Command::new("qemu-io");
        command.current_dir(self.dir.path()).args(["-f", format, "-r", "-U", "-c", "map", name]);
        finish(&mut command)?.ok()
    }

    /// The name of the backing file in an image's header.
    fn backing(&self, name: &str) -> Result<Option<String>> {
        Ok(qemu::info(&self.at(name))?["backing-filename"].as_str().map(str::to_owned))
    }

    /// Nothing is wrong with an image, and it reads as `wanted` does.
    fn sound(&self, name: &str, wanted: &[u8]) -> Result {
        qemu::check(&self.at(name))?.ok()?;
        let wanted_file = self.at("wanted.raw");
        std::fs::write(&wanted_file, wanted)?;
        qemu::compare(&wanted_file, &self.at(name))?.ok()?;
        Ok(())
    }

    /// The node of an image of this world's format, over `backing`: a tree, a name, or what its header names.
    fn node(&self, node: &str, file: &str, backing: Option<Value>) -> Value {
        let mut tree = json!({"driver": self.format, "node-name": node, "file": {"driver": "file", "filename": file}});
        if let Some(backing) = backing {
            tree["backing"] = backing;
        }
        tree
    }

    /// Starts the daemon with one chain, and an export that writes on top of it (`guest`, by NBD at `nbd.sock`).
    fn start(&self, chain: &Value) -> Result<Storage> {
        let export = format!("nbd,id=guest,name=,writable=on,node-name={}", chain["node-name"].as_str().unwrap_or("?"));
        let chain = chain.to_string();
        let socket = self.at("nbd.sock");
        let server = format!("addr.type=unix,addr.path={}", socket.display());
        let mut daemon = Storage::start(
            self.kind,
            self.dir.path(),
            ["--blockdev", &chain, "--nbd-server", &server, "--export", &export],
        )?;
        daemon.daemon.listening(&socket)?;
        Ok(daemon)
    }
}

/// The node of a raw file.
fn raw_node(node: &str, file: &str) -> Value {
    json!({"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": file}})
}

/// Asserts that no block job is there.
fn nothing_runs(daemon: &mut Storage) -> Result {
    assert_eq!(daemon.jobs()?, Vec::<Value>::new());
    Ok(())
}
