//! Somebody's script, which has QEMU's tools by their names, run with links to our one program first on its path, and with QEMU's own: it
//! says the same.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use headwater_tests::process::finish;
use headwater_tests::{Result, peer};

/// An overlay is made, streamed in under a client, served by itself, copied, and given to a machine.
const SCRIPT: &str = r#"set -eu
gone() { while kill -0 "$1" 2>/dev/null; do sleep 0.05; done; }
shell() { HOME=$PWD qmp-shell "$1"; }

qemu-img create -q -f raw base.raw 8M
qemu-io -f raw -c 'write -q -P 1 0 8M' base.raw
qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2
qemu-io -f qcow2 -c 'write -q -P 2 1M 64k' top.qcow2
qemu-img map --output=json top.qcow2
qemu-img compare top.qcow2 base.raw || echo "compare: $?"

qemu-storage-daemon --daemonize --pidfile "$PWD/qsd.pid" \
    --blockdev driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2 \
    --nbd-server addr.type=unix,addr.path=nbd.sock --export nbd,id=e,node-name=top,name=top,writable=on \
    --chardev socket,id=m,path=qmp.sock,server=on,wait=off --monitor m
qemu-img info nbd+unix:///top?socket=nbd.sock | grep -E '^(file format|virtual size)'
echo 'block-stream device=top job-id=j' | shell qmp.sock | grep -o '{.*'
qemu-io -f raw -c 'write -q -P 3 2M 64k' 'nbd+unix:///top?socket=nbd.sock'
while echo query-block-jobs | shell qmp.sock | grep -q '"device"'; do sleep 0.1; done
qemu-io -f raw -c 'read -P 1 0 1M' -c 'read -P 2 1M 64k' -c 'read -P 3 2M 64k' 'nbd+unix:///top?socket=nbd.sock' | grep '^read'
kill "$(cat qsd.pid)"; gone "$(cat qsd.pid)"
qemu-img check top.qcow2 | head -n 1
qemu-img info top.qcow2 | grep -c 'backing file' || echo 'it stands alone'
rm base.raw

qemu-nbd --fork --pid-file="$PWD/nbd.pid" -k "$PWD/own.sock" -f qcow2 -x disk top.qcow2
pid=$(cat nbd.pid)
qemu-io -f raw -c 'write -q -P 4 3M 64k' -c flush 'nbd+unix:///disk?socket=own.sock'
gone "$pid"
qemu-img convert -f qcow2 -O raw top.qcow2 out.raw
qemu-io -f raw -r -c 'read -P 4 3M 64k' -c 'read -P 1 4M 4M' out.raw | grep '^read'

headwater-qemu -nodefaults -display none -accel tcg -m 64 -S -daemonize -pidfile "$PWD/vm.pid" \
    -drive if=virtio,file=top.qcow2,format=qcow2 -qmp "unix:$PWD/vm.sock,server=on,wait=off"
pid=$(cat vm.pid)
printf 'query-status\nquit\n' | shell vm.sock | grep -o 'prelaunch'
gone "$pid"
qemu-img compare -f qcow2 -F raw top.qcow2 out.raw
qemu-img check top.qcow2 | head -n 1
"#;

const TOOLS: [&str; 4] = ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"];

/// Runs it in a folder of its own with these programs.
fn run_with(dir: &Path, tool: impl Fn(&str) -> Result<std::path::PathBuf>, emulator: &Path) -> Result<String> {
    let (bin, work) = (dir.join("bin"), dir.join("work"));
    fs::create_dir_all(&bin)?;
    fs::create_dir(&work)?;
    for name in TOOLS {
        symlink(tool(name)?, bin.join(name))?;
    }
    symlink(emulator, bin.join("headwater-qemu"))?;
    symlink(peer::python()?.with_file_name("qmp-shell"), bin.join("qmp-shell"))?;
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT]).current_dir(&work).env("PATH", path);
    finish(&mut command)?.ok()
}

#[test]
fn a_script_runs_with_either_tools() -> Result {
    peer!("headwater", "qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64", "qemu.qmp");
    let dir = tempfile::tempdir()?;
    let ours = fs::canonicalize(peer::headwater()?)?;
    let said = run_with(&dir.path().join("ours"), |_| Ok(ours.clone()), &ours)?;
    let wanted = run_with(&dir.path().join("theirs"), peer::find, &peer::find("qemu-system-x86_64")?)?;
    assert_eq!(said, wanted);
    assert!(said.contains("it stands alone") && said.contains("prelaunch"), "{said}");
    Ok(())
}
