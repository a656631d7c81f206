//! A libvirtd of the test's own: its files and sockets are in one folder, which only it and its clients see in their places.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::{Daemon, Finished, PATIENCE, finish};
use crate::{Result, error, peer};

/// Puts the folder's parts where libvirt has them, in a view of the file system of its own, and becomes libvirtd.
const ENTER: &str = r#"set -e
cd "$1"
for place in etc:/etc/libvirt lib:/var/lib/libvirt run:/run/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
    mkdir -p "${place%%:*}" "${place#*:}"
    mount --bind "${place%%:*}" "${place#*:}"
done
cp /etc/passwd /etc/group .
for group in kvm:64001 libvirt-qemu:64002; do
    grep -q "^${group%%:*}:" group || echo "${group%%:*}:x:${group#*:}:" >>group
done
grep -q '^libvirt-qemu:' passwd || echo 'libvirt-qemu:x:64002:64001::/:/usr/sbin/nologin' >>passwd
mount --bind passwd /etc/passwd
mount --bind group /etc/group
exec libvirtd -f "$1/etc/libvirtd.conf"
"#;

/// Guests are this user's, who may read everything the test made.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nstdio_handler = \"file\"\n\
     cgroup_controllers = [ ]\nremember_owner = 0\nnamespaces = [ ]\n";

/// A libvirtd that runs.
#[derive(Debug)]
pub struct Libvirt {
    dir: PathBuf,
    daemon: Daemon,
}

fn spawn(dir: &Path) -> Result<Daemon> {
    let mut command = Command::new(peer::find("unshare")?);
    command.args(["--mount", "sh", "-c", ENTER, "sh"]).arg(dir);
    Daemon::spawn("libvirtd", command)
}

impl Libvirt {
    /// Starts one with its files in `dir`.
    pub fn start(dir: &Path) -> Result<Libvirt> {
        let etc = dir.join("etc");
        std::fs::create_dir_all(&etc)?;
        std::fs::write(etc.join("qemu.conf"), QEMU_CONF)?;
        let log = dir.join("libvirtd.log");
        let conf = format!(
            "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nlog_level = 3\nlog_outputs = \"3:file:{}\"\n",
            log.display()
        );
        std::fs::write(etc.join("libvirtd.conf"), conf)?;
        let mut libvirt = Libvirt { dir: dir.to_path_buf(), daemon: spawn(dir)? };
        libvirt.answers()?;
        Ok(libvirt)
    }

    fn answers(&mut self) -> Result {
        let deadline = Instant::now() + PATIENCE;
        while self.run(["version"])?.status.code() != Some(0) {
            if !self.daemon.runs() || Instant::now() > deadline {
                return Err(error!("libvirtd does not answer\n{}", self.log()));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends it and starts it anew; its domains run on.
    pub fn restart(&mut self) -> Result {
        self.daemon.terminate()?;
        self.daemon = spawn(&self.dir)?;
        self.answers()
    }

    fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Finished> {
        let mut command = Command::new(peer::find("nsenter")?);
        command.args(["--mount", "--target", &self.daemon.id().to_string()]);
        finish(command.args(["virsh", "-q", "-c", "qemu:///system"]).args(args))
    }

    /// What `virsh` says to a line of words; an error if it fails.
    pub fn virsh(&self, line: &str) -> Result<String> {
        let said = self.run(line.split_whitespace())?;
        said.ok().map_err(|why| error!("{why}\n{}", self.log()))
    }

    /// What `virsh` complains to a line of words that it must refuse.
    pub fn refused(&self, line: &str) -> Result<String> {
        let finished = self.run(line.split_whitespace())?;
        if finished.status.success() { Err(error!("not refused: {line}")) } else { Ok(finished.stderr) }
    }

    /// What it and its guests' emulators logged.
    pub fn log(&self) -> String {
        let mut text = std::fs::read_to_string(self.dir.join("libvirtd.log")).unwrap_or_default();
        for entry in std::fs::read_dir(self.dir.join("log/qemu")).into_iter().flatten().flatten() {
            text.push_str(&std::fs::read_to_string(entry.path()).unwrap_or_default());
        }
        format!("{}{text}", self.daemon.log())
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // Its domains would live on.
        let running = self.virsh("list --name").unwrap_or_default();
        for name in running.split_whitespace() {
            let _ = self.virsh(&format!("destroy {name}"));
        }
    }
}
