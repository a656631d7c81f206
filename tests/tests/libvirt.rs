//! Stock libvirt with `headwater-qemu` for an emulator: a guest boots over a chain and checks its own files, while its disk is pulled in,
//! others come and go, and libvirtd is started anew. (`cargo xtask test --libvirt` runs these tests alone.)

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use headwater_tests::front::program;
use headwater_tests::guest::{BOOT_PATIENCE, Disk, Guest};
use headwater_tests::headwater::headwater;
use headwater_tests::libvirt::Libvirt;
use headwater_tests::master::{self, Master, Spec};
use headwater_tests::qemu::{check, info, qemu_img};
use headwater_tests::{Result, error, peer};

/// Rounds, in each of which the guest reads everything anew, after the last of what is done to it.
const ROUNDS_AFTER: usize = 2;

fn create(format: &str, backing: &Path, backing_format: &str, image: &Path) -> Result {
    let args = ["create", "-q", "-f", format, "-F", backing_format, "-b"].map(OsStr::new);
    headwater(args.into_iter().chain([backing.as_os_str(), image.as_os_str()]))?.ok()?;
    Ok(())
}

fn domain(dir: &Path, format: &str, top: &Path, guest: &Guest) -> Result<PathBuf> {
    let (kernel, initramfs, line) = guest.parts(dir)?;
    let (emulator, serial, ear) = (program(dir)?, dir.join("serial.log"), dir.join("ear.sock"));
    let text = format!(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd><cmdline>{line}</cmdline></os>\
         <features><acpi/></features><on_reboot>destroy</on_reboot><devices><emulator>{}</emulator>\
         <disk type='file' device='disk'><driver name='qemu' type='{format}' cache='none'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk><controller type='scsi' index='0' model='virtio-scsi'/>\
         <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><target dev='sdc' bus='sata'/><readonly/></disk>\
         <serial type='file'><source path='{}'/><target port='0'/></serial>\
         <serial type='unix'><source mode='bind' path='{}'/><target port='1'/></serial></devices></domain>",
        kernel.display(),
        initramfs.display(),
        emulator.display(),
        top.display(),
        serial.display(),
        ear.display()
    );
    let path = dir.join("domain.xml");
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Waits until the guest's console holds `text`.
fn says(libvirt: &Libvirt, dir: &Path, text: &str) -> Result<String> {
    let began = Instant::now();
    loop {
        let console = std::fs::read(dir.join("serial.log")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        if console.contains(text) {
            return Ok(console);
        }
        if began.elapsed() > BOOT_PATIENCE {
            return Err(error!("the guest does not say \"{text}\"\n{console}\n{}", libvirt.log()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn backing(image: &Path) -> Result<Option<String>> {
    Ok(info(image)?.get("backing-filename").and_then(|name| name.as_str()).map(str::to_owned))
}

fn libvirt_pulls_under_a_guest(format: &str) -> Result {
    if !rustix::process::geteuid().is_root() {
        peer::skip("a libvirtd of one's own needs root");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let master = Master::build(dir, &Spec::default())?;
    let (middle, top) = (dir.join(format!("middle.{format}")), dir.join(format!("my.{format}")));
    create(format, &master.image, "raw", &middle)?;
    create(format, &middle, format, &top)?;
    let second = dir.join("second.qcow2");
    headwater(["create", "-q", "-f", "qcow2", &second.display().to_string(), "64M"])?.ok()?;
    let script = format!(
        "echo written by the guest >/written; sync\n\
         (read -r line </dev/ttyS1 && : >/tmp/told) &\n\
         n=0; left={ROUNDS_AFTER}\nwhile [ $left -gt 0 ]; do\n\
         if [ -e /tmp/told ]; then left=$((left - 1)); fi\n\
         echo 3 >/proc/sys/vm/drop_caches; verify / || exit 1\nn=$((n + 1)); report round $n\ndone\n\
         report errors $(dmesg | grep -ciE 'i/o error|ext4-fs error|remount')\n"
    );
    let guest = Guest::new(Disk::Words(Vec::new()), &script).manifest(&master.manifest).boot_from_disk();
    let domain = domain(dir, format, &top, &guest)?;
    let mut libvirt = Libvirt::start(&dir.join("libvirt"))?;
    libvirt.virsh(&format!("create {}", domain.display()))?;
    assert!(libvirt.virsh("domblkinfo guest vda")?.contains("Capacity"));

    // With a base, then slowly without one; libvirtd comes and goes meanwhile.
    let base = master.image.display().to_string();
    libvirt.virsh(&format!("blockpull guest vda --base {base} --wait --verbose"))?;
    assert_eq!(backing(&top)?, Some(base));
    libvirt.virsh("blockpull guest vda --bandwidth 1")?;
    assert!(libvirt.virsh("blockjob guest vda --raw")?.contains("type=Block Pull"));
    libvirt.restart()?;
    // Some moments after it answers, it knows what its guests do.
    let began = Instant::now();
    loop {
        let job = libvirt.virsh("blockjob guest vda --raw")?;
        if job.contains("bandwidth=1") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "after the restart: {job}\n{}", libvirt.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    libvirt.virsh("blockjob guest vda --bandwidth 2")?;
    libvirt.virsh("blockjob guest vda --abort")?;
    assert!(backing(&top)?.is_some(), "aborted");

    // Disks and media come and go.
    let attach = format!("attach-disk guest {} sdb --targetbus scsi --driver qemu --subdriver qcow2", second.display());
    libvirt.virsh(&attach)?;
    assert!(libvirt.virsh("domblkstat guest sdb")?.contains("rd_bytes"));
    libvirt.virsh("detach-disk guest sdb")?;
    libvirt.virsh(&format!("change-media guest sdc {} --insert", master.image.display()))?;
    libvirt.virsh("change-media guest sdc --eject")?;
    check(&second)?.ok()?;
    libvirt.virsh("suspend guest")?;
    assert_eq!(libvirt.virsh("domstate guest")?.trim(), "paused");
    libvirt.virsh("resume guest")?;
    // There is no way yet, and it says so.
    assert!(libvirt.refused("blockresize guest vda 1G")?.contains("NBD"));

    says(&libvirt, dir, "@@round 1")?;
    assert!(libvirt.virsh("domblkstat guest vda")?.contains("rd_bytes"));
    libvirt.virsh("blockpull guest vda --wait --verbose")?;
    assert_eq!(backing(&top)?, None);
    std::fs::remove_file(&middle)?;
    // However fast it is: it goes on until it is told.
    let mut ear = UnixStream::connect(dir.join("ear.sock"))?;
    ear.write_all(b"enough\n")?;
    let console = says(&libvirt, dir, "@@exit")?;
    assert!(console.contains("@@errors 0") && console.contains("@@exit 0"), "{console}");
    let began = Instant::now();
    while libvirt.virsh("list --name")?.contains("guest") {
        assert!(began.elapsed() < BOOT_PATIENCE, "the guest is off, and its domain is not gone\n{}", libvirt.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    check(&top)?.ok()?;
    std::fs::remove_file(&master.image)?;
    let raw = dir.join("after.raw");
    let args = ["convert", "-O", "raw"].map(OsStr::new);
    qemu_img(args.into_iter().chain([top.as_os_str(), raw.as_os_str()]))?.ok()?;
    master::e2fsck(&raw)?.ok()?;
    assert_eq!(master::file_in(&raw, "/written")?, "written by the guest\n");
    Ok(())
}

#[test]
fn libvirt_pulls_a_qed_disk_under_a_guest() -> Result {
    peer!("headwater", "guest", "libvirtd", "virsh", "unshare", "nsenter", "mke2fs", "e2fsck", "debugfs");
    libvirt_pulls_under_a_guest("qed")
}

#[test]
fn libvirt_pulls_a_qcow2_disk_under_a_guest() -> Result {
    peer!("headwater", "guest", "libvirtd", "virsh", "unshare", "nsenter", "mke2fs", "e2fsck", "debugfs");
    libvirt_pulls_under_a_guest("qcow2")
}
