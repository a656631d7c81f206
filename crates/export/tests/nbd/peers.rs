//! Everybody else's clients: libnbd, QEMU, fio. Each is skipped where it is not installed, but not in CI.

use crate::client::{Client, NONE, Style};
use crate::fixture::{Fixture, on_ring, pattern};
use headwater_export::nbd::{Address, NbdServer};
use std::env;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const MIB: usize = 1 << 20;

/// Whether all `programs` are here. If not the test is skipped, out loud; in CI it fails.
fn have(programs: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let there = |program: &&str| env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let Some(missing) = programs.iter().find(|program| !there(program)) else { return true };
    skip(&format!("{missing} is not installed"));
    false
}

fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let in_ci = env::var("CI").is_ok_and(|ci| !matches!(ci.as_str(), "" | "0" | "false"));
    assert!(!in_ci, "{test} may not be skipped in CI: {reason}");
    eprintln!("skipped: {reason}");
    if let Some(list) = env::var_os("HEADWATER_SKIPS")
        && let Ok(mut list) = OpenOptions::new().create(true).append(true).open(list)
    {
        let _ = list.write_all(format!("{test}: {reason}\n").as_bytes());
    }
}

/// Runs a program beside the ring's thread.
async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let shown = format!("{command:?}");
    let output = ring::unblock(move || command.output()).await.unwrap_or_else(|error| panic!("{shown}: {error}"));
    eprintln!("$ {shown}\n{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    output
}

/// Runs a program that must succeed; what it prints.
async fn ok(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    assert!(output.status.success(), "{program} {arguments:?}: {}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// A disk with data, zeros and holes.
fn mixed() -> Vec<u8> {
    let mut bytes = vec![0; 16 * MIB];
    for (at, len, seed) in [(0, 300_000, 1), (3 * MIB, MIB, 2), (7 * MIB + 512, 4096, 3), (15 * MIB, MIB, 4)] {
        bytes[at..at + len].copy_from_slice(&pattern(len, seed));
    }
    bytes
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nbdinfo_reads_what_we_offer() {
    if !have(&["nbdinfo"]) {
        return;
    }
    on_ring(async {
        let fixture = Fixture::new(16 * MIB as u64).await;
        let mut client = Client::new(fixture.address(), Style::Simple).await;
        client.write(NONE, 3 * MIB as u64, &pattern(MIB, 1)).await.unwrap();
        client.leave().await;
        let info = ok("nbdinfo", &["--json", &fixture.uri()]).await;
        for expected in [
            "\"protocol\": \"newstyle-fixed\"",
            "\"structured\": true",
            "\"export-name\": \"disk\"",
            "\"description\": \"the disk\"",
            "\"export-size\": 16777216",
            "\"is_read_only\": false",
            "\"can_multi_conn\": true",
            "\"can_fua\": true",
            "\"can_flush\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"can_fast_zero\": true",
            "\"can_cache\": true",
            "\"can_df\": true",
            "\"base:allocation\"",
            "\"block_size_minimum\": 1,",
            "\"block_size_preferred\": 4096,",
            "\"block_size_maximum\": 33554432",
        ] {
            assert!(info.contains(expected), "{expected} in {info}");
        }
        let Address::Unix(socket) = fixture.address() else { panic!("not a unix socket") };
        let list = ok("nbdinfo", &["--list", &format!("nbd+unix://?socket={}", socket.display())]).await;
        assert!(list.contains("export=\"disk\":") && list.contains("description: the disk"), "{list}");
        let map = ok("nbdinfo", &["--map", "--totals", &fixture.uri()]).await;
        let totals: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(totals.contains(&vec!["1048576", "6.2%", "0", "data"]), "{map}");
        assert!(totals.contains(&vec!["15728640", "93.8%", "3", "hole,zero"]), "{map}");
        let unknown = format!("nbd+unix:///none?socket={}", socket.display());
        let refused = run("nbdinfo", &[&unknown]).await;
        assert!(!refused.status.success());
        assert!(String::from_utf8_lossy(&refused.stderr).contains("none"));
    });
}

#[test]
fn nbdcopy_copies_both_ways() {
    if !have(&["nbdcopy"]) {
        return;
    }
    on_ring(async {
        let bytes = mixed();
        let folder = tempfile::tempdir().unwrap();
        let (source, copy) = (folder.path().join("source"), folder.path().join("copy"));
        std::fs::write(&source, &bytes).unwrap();
        let fixture = Fixture::new(bytes.len() as u64).await;
        ok("nbdcopy", &["--flush", path(&source), &fixture.uri()]).await;
        assert!(fixture.bytes() == bytes);
        for requests in ["1", "64"] {
            let _ = std::fs::remove_file(&copy);
            ok("nbdcopy", &["--requests", requests, &fixture.uri(), path(&copy)]).await;
            assert!(std::fs::read(&copy).unwrap() == bytes);
        }
        // From server to server, over several connections.
        let other = Fixture::new(bytes.len() as u64).await;
        ok("nbdcopy", &["--connections", "4", &fixture.uri(), &other.uri()]).await;
        assert!(other.bytes() == bytes);
    });
}

#[test]
fn qemu_img_converts_maps_and_compares() {
    if !have(&["qemu-img"]) {
        return;
    }
    on_ring(async {
        let bytes = mixed();
        let folder = tempfile::tempdir().unwrap();
        let (source, copy) = (folder.path().join("source"), folder.path().join("copy"));
        std::fs::write(&source, &bytes).unwrap();
        let fixture = Fixture::new(bytes.len() as u64).await;
        let uri = fixture.uri();
        let onto = ["convert", "-n", "-W", "-f", "raw", "-O", "raw", path(&source), &uri];
        ok("qemu-img", &onto).await;
        assert!(fixture.bytes() == bytes);
        let same = ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", path(&source), &uri]).await;
        assert!(same.contains("Images are identical"));
        ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, path(&copy)]).await;
        assert!(std::fs::read(&copy).unwrap() == bytes);
        let map = ok("qemu-img", &["map", "-f", "raw", "--output=json", &uri]).await;
        assert!(map.contains("\"zero\": true, \"data\": false") && map.contains("\"data\": true"), "{map}");
        let info = ok("qemu-img", &["info", &uri]).await;
        assert!(info.contains("16 MiB (16777216 bytes)"), "{info}");
    });
}

#[test]
fn qemu_io_writes_discards_and_zeroes() {
    if !have(&["qemu-io"]) {
        return;
    }
    on_ring(async {
        let fixture = Fixture::new(16 * MIB as u64).await;
        let flushed = (fixture.store.flushes.get(), fixture.store.durable_writes.get());
        let commands = [
            "write -P 0x11 0 1M",
            "write -f -P 0x22 1M 64k",
            "write -z -u 512k 64k",
            "write -z 600k 10000",
            "aio_write -P 0x33 4M 2M",
            "aio_flush",
            "discard 256k 128k",
            "flush",
            "read -P 0x11 0 256k",
            "read -P 0 512k 64k",
            "read -P 0 600k 10000",
            "read -P 0x22 1M 64k",
            "read -P 0x33 4M 2M",
            "read -P 0 15M 1M",
        ];
        let uri = fixture.uri();
        let mut arguments = vec!["-f", "raw", "-d", "unmap", "-t", "writeback"];
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(&uri);
        let output = run("qemu-io", &arguments).await;
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !text.contains("failed"), "{text}");
        assert!(fixture.store.flushes.get() > flushed.0, "flush arrived");
        let bytes = fixture.bytes();
        assert!(bytes[..256 << 10].iter().all(|&byte| byte == 0x11));
        assert!(bytes[4 * MIB..6 * MIB].iter().all(|&byte| byte == 0x33));
    });
}

#[test]
fn qemu_is_refused_what_a_read_only_export_refuses() {
    if !have(&["qemu-io"]) {
        return;
    }
    on_ring(async {
        let store = store::memory::MemoryStore::from_bytes("memory", &pattern(MIB, 9));
        let fixture = Fixture::with(store, true).await;
        let refused = run("qemu-io", &["-f", "raw", "-c", "write 0 4k", &fixture.uri()]).await;
        assert!(!refused.status.success(), "opening it for writing fails");
        ok("qemu-io", &["-r", "-f", "raw", "-c", "read 0 1M", &fixture.uri()]).await;
        assert!(fixture.bytes() == pattern(MIB, 9));
    });
}

#[test]
fn fio_verifies_what_it_writes() {
    if !have(&["fio"]) {
        return;
    }
    on_ring(async {
        let engines = ok("fio", &["--enghelp"]).await;
        if !engines.contains("nbd") {
            return skip("this fio has no nbd engine");
        }
        let fixture = Fixture::new(32 * MIB as u64).await;
        let uri = format!("--uri={}", fixture.uri());
        for pattern in ["--rw=randwrite", "--rw=write"] {
            let arguments = [
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                pattern,
                "--bsrange=512-128k",
                "--iodepth=32",
                "--size=32m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--fsync=64",
            ];
            ok("fio", &arguments).await;
        }
        assert!(fixture.store.flushes.get() > 0);
    });
}

#[test]
fn libnbd_finds_no_fault_from_python() {
    on_ring(async {
        // The package is for the system's Python, which need not be the first on the search path.
        let mut found = None;
        for python in ["python3", "/usr/bin/python3"] {
            let import = Command::new(python).args(["-c", "import nbd"]).stderr(Stdio::null()).status();
            found = found.or(import.is_ok_and(|status| status.success()).then_some(python));
        }
        let Some(python) = found else { return skip("no Python here has the module nbd (python3-libnbd)") };
        let fixture = Fixture::holding(&mixed()).await;
        let script = r#"
import nbd, sys
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
size = h.get_size()
assert size == 16 << 20
h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == b"x" * 4096
for flags in 0, nbd.CMD_FLAG_DF:
    chunks = []
    def chunk(buf, offset, status, error):
        chunks.append((offset, len(buf), status))
    h.pread_structured(size, 0, chunk, flags)
    assert sum(length for _, length, _ in chunks) == size
    assert any(status == nbd.READ_HOLE for _, _, status in chunks) == (flags == 0)
    assert len(chunks) == 1 or flags == 0
for flags in 0, nbd.CMD_FLAG_REQ_ONE:
    seen = []
    h.block_status(size, 0, lambda context, offset, entries, error: seen.append((context, entries)), flags)
    [(context, entries)] = seen
    assert context == "base:allocation" and sum(entries[0::2]) <= size
    assert len(entries) == 2 or flags == 0
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 8192) == bytearray(4096)
h.trim(4096, 0)
h.cache(4096, 0)
h.flush()
# What the library itself would refuse to send goes out as it is.
h.set_strict_mode(0)
def refused(error, call):
    try:
        call()
    except nbd.Error as caught:
        assert caught.errno == error, (caught.errno, error)
    else:
        raise SystemExit("accepted what must be refused with " + error)
refused("EINVAL", lambda: h.pread(512, size))
refused("EINVAL", lambda: h.trim(512, size))
refused("EINVAL", lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE))
refused("ENOSPC", lambda: h.pwrite(b"x", 1 << 62))
refused("ENOSPC", lambda: h.zero(1, size))
refused("ENOTSUP", lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE))
assert h.pread(4096, 8192) == bytearray(4096)
h.shutdown()
"#;
        ok(python, &["-c", script, &fixture.uri()]).await;
    });
}

#[test]
fn tcp_peers_connect_too() {
    if !have(&["nbdinfo"]) {
        return;
    }
    on_ring(async {
        let fixture = Fixture::new(MIB as u64).await;
        let export = crate::fixture::export("over tcp", &fixture.disk, false);
        let server = NbdServer::start(Address::Tcp("127.0.0.1".into(), 0), vec![export]).await.unwrap();
        let Address::Tcp(_, port) = server.address() else { panic!("not TCP") };
        let info = ok("nbdinfo", &[&format!("nbd://127.0.0.1:{port}/over%20tcp")]).await;
        assert!(info.contains("export-size: 1048576"), "{info}");
        server.stop().await;
    });
}
