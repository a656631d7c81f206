//! The NBD server of both storage daemons: a socket that was handed down, a limit of clients, writes that are durable.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use headwater_tests::process::Daemon;
use headwater_tests::sides::Sides;
use headwater_tests::{Result, peer};
use rustix::io::{FdFlags, fcntl_setfd};

/// Starts `program` on a socket that it inherits, for one client at once.
fn start(program: &Path, dir: &Path, export: &str) -> Result<(Daemon, UnixListener)> {
    let listener = UnixListener::bind(dir.join("nbd.sock"))?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let mut command = Command::new(program);
    command.current_dir(dir).args(["--blockdev", "driver=file,node-name=disk,filename=a.raw", "--nbd-server"]);
    command.arg(format!("addr.type=fd,addr.str={},max-connections=1", listener.as_raw_fd()));
    command.args(["--export", export]);
    Ok((Daemon::spawn("storage daemon", command)?, listener))
}

/// Reads the greeting: whoever is served has it at once.
fn greeted(client: &UnixStream) -> Result<bool> {
    use std::io::Read;
    let mut greeting = [0; 18];
    client.set_read_timeout(Some(Duration::from_millis(700)))?;
    let mut from = client;
    Ok(from.read_exact(&mut greeting).is_ok() && greeting.starts_with(b"NBDMAGIC"))
}

#[test]
fn a_socket_that_was_handed_down_serves_as_many_clients_as_it_may() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-io");
    let sides = Sides::new("qemu-storage-daemon")?;
    let theirs = peer::find("qemu-storage-daemon")?;
    for (program, dir) in [(&theirs, &sides.theirs), (&sides.tool, &sides.ours)] {
        std::fs::File::create(dir.join("a.raw"))?.set_len(1 << 20)?;
        let export = "type=nbd,id=e,node-name=disk,name=x,writable=on,writethrough=on";
        let (mut daemon, listener) = start(program, dir, export)?;
        let socket = dir.join("nbd.sock");
        let uri = format!("nbd+unix:///x?socket={}", socket.display());
        let io = |commands: &[&str]| {
            let mut line = Command::new("qemu-io");
            line.args(["-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command])).arg(&uri);
            line.output()
        };
        let output = io(&["write -P 7 4k 8k", "read -P 7 4k 8k", "read -P 0 0 4k"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !said.contains("failed"), "{program:?}: {output:?}");
        let first = UnixStream::connect(&socket)?;
        assert!(greeted(&first)?, "{program:?}");
        let second = UnixStream::connect(&socket)?;
        assert!(!greeted(&second)?, "{program:?} serves two");
        drop(first);
        assert!(greeted(&second)?, "{program:?} does not go on");
        drop((second, listener));
        daemon.terminate()?;
    }
    Ok(())
}

#[test]
fn a_descriptor_that_is_no_such_socket_is_refused() -> Result {
    peer!("headwater");
    let sides = Sides::new("qemu-storage-daemon")?;
    for (address, text) in [
        ("addr.type=fd,addr.str=1", "descriptor"),
        ("addr.type=fd,addr.str=977", "descriptor"),
        ("addr.type=fd,addr.str=name", "descriptor"),
        ("addr.type=fd", "Parameter 'addr.str' is missing"),
        ("addr.type=vsock,addr.cid=1,addr.port=2", "vsock"),
    ] {
        let output = Command::new(&sides.tool).args(["--nbd-server", address]).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(text), "{address}: {output:?}");
    }
    Ok(())
}

/// What the daemon has opened itself is nobody's to name: its number is not taken for a descriptor that was handed down.
#[test]
fn descriptors_of_the_daemons_own_are_not_taken() -> Result {
    peer!("headwater");
    let sides = Sides::new("qemu-storage-daemon")?;
    std::fs::File::create(sides.ours.join("a.raw"))?.set_len(1 << 20)?;
    for number in 3..20 {
        for (option, value) in [
            ("--chardev", format!("socket,id=m,fd={number},server=on,wait=off")),
            ("--nbd-server", format!("addr.type=fd,addr.str={number}")),
        ] {
            let mut command = Command::new(&sides.tool);
            command.current_dir(&sides.ours).args(["--blockdev", "file,node-name=a,filename=a.raw", option, &value]);
            let output = command.output()?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(1) && said.to_lowercase().contains("descriptor"),
                "{value}: {output:?}"
            );
        }
    }
    Ok(())
}
