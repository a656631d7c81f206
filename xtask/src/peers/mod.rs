//! `cargo xtask peers`: the programs the tests run beside us.
//!
//! The list of peers stands here once. Looking is cheap (no program but `qemu-img --version` is run when all is
//! there) and changes nothing; installing is only done as root on Debian, from the machine's own package sources,
//! and is repeatable. Everywhere else each missing peer is named with the way to get it.

mod apt;
mod kernel;
mod python;

use std::fmt::Write as _;

use clap::Args;

use crate::workspace::{Failure, Outcome, Run, Workspace, find_program};

/// The oldest QEMU whose messages, options and images the tests were written against.
const QEMU_AT_LEAST: (u32, u32) = (10, 0);

/// QEMU's Debian packages. They must be of one version, so they are always installed together.
const QEMU_PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-block-extra", "qemu-utils"];

#[derive(Args, Default)]
pub(crate) struct Options {
    /// Install what is missing; needs root on Debian
    #[arg(long, conflicts_with = "check")]
    install: bool,
    /// Only look: exit code 1 and a list if something is missing
    #[arg(long)]
    check: bool,
}

/// One program, the Debian package that has it, and what it is for.
struct Program {
    name: &'static str,
    package: &'static str,
    why: &'static str,
}

const fn program(name: &'static str, package: &'static str, why: &'static str) -> Program {
    Program { name, package, why }
}

const PROGRAMS: [Program; 22] = [
    program("qemu-img", "qemu-utils", "makes, checks and compares images"),
    program("qemu-io", "qemu-utils", "reads and writes images"),
    program("qemu-nbd", "qemu-utils", "an NBD server to read from"),
    program("qemu-storage-daemon", "qemu-utils", "the other side of the bench"),
    program("qemu-system-x86_64", "qemu-system-x86", "runs the guests"),
    program("nbdkit", "nbdkit", "an NBD server with delays and errors"),
    program("nbdinfo", "libnbd-bin", "an NBD client of other hands"),
    program("nbdcopy", "libnbd-bin", "an NBD client of other hands"),
    program("nbdsh", "python3-libnbd", "an NBD client that sends what it is told"),
    program("nbdfuse", "libnbd-bin", "a slow local file for the bench"),
    program("fusermount3", "fuse3", "unmounts what nbdfuse mounted"),
    program("fio", "fio", "load for the bench"),
    program("mke2fs", "e2fsprogs", "makes the guests' file systems"),
    program("e2fsck", "e2fsprogs", "checks the guests' file systems"),
    program("mkfs.xfs", "xfsprogs", "makes a file system that shares extents"),
    program("busybox", "busybox-static", "the guests' user land"),
    program("xz", "xz-utils", "unpacks compressed kernel modules"),
    program("python3", "python3", "runs the qemu.qmp client"),
    // No service of the machine's own is used: the tests start a libvirtd of their own.
    program("libvirtd", "libvirt-daemon", "steers guests whose emulator is ours"),
    program("virsh", "libvirt-clients", "tells libvirtd what to do"),
    program("virt-qemu-run", "libvirt-daemon-driver-qemu", "comes with what lets libvirtd run QEMU"),
    program("unshare", "util-linux", "gives libvirtd a view of its own of the file system"),
];

/// Something that is not there.
struct Missing {
    what: String,
    why: &'static str,
    /// The Debian package, if one package is the remedy.
    package: Option<&'static str>,
    remedy: String,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Outcome {
    let mut missing = look(workspace);
    if missing.is_empty() {
        eprintln!("peers: all there");
        return Ok(());
    }
    let can_install = apt::can_install();
    if options.install || (!options.check && can_install.is_ok()) {
        can_install.map_err(|why| Failure::new(format!("cannot install: {why}\n{}", describe(&missing))))?;
        install(workspace, &missing)?;
        missing = look(workspace);
        if missing.is_empty() {
            eprintln!("peers: all there now");
            return Ok(());
        }
    }
    Err(Failure::new(describe(&missing)))
}

fn describe(missing: &[Missing]) -> String {
    let mut text = format!("{} test peers are missing:", missing.len());
    for Missing { what, why, remedy, .. } in missing {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {what} ({why}): {remedy}");
    }
    text.push_str(
        "\nAs root on Debian, `cargo xtask peers --install` gets all of them. Tests without their peer are skipped, \
         and fail where CI is set.",
    );
    text
}

fn look(workspace: &Workspace) -> Vec<Missing> {
    let mut missing: Vec<Missing> = PROGRAMS
        .iter()
        .filter(|program| find_program(program.name).is_none())
        .map(|program| Missing {
            what: program.name.to_owned(),
            why: program.why,
            package: Some(program.package),
            remedy: format!("Debian package {}", program.package),
        })
        .collect();
    if let Some(version) = qemu_version()
        && version < QEMU_AT_LEAST
    {
        let (major, minor) = version;
        let (needs_major, needs_minor) = QEMU_AT_LEAST;
        missing.push(Missing {
            what: format!("QEMU {needs_major}.{needs_minor} or later (found {major}.{minor})"),
            why: "the images and messages the tests compare with",
            package: Some("qemu-utils"),
            remedy: format!("Debian packages {} from backports", QEMU_PACKAGES.join(" ")),
        });
    }
    missing.extend(kernel::look(workspace));
    missing.extend(python::look(workspace));
    missing
}

/// The version `qemu-img` states, if it is there and states one.
fn qemu_version() -> Option<(u32, u32)> {
    let text = Run::new(find_program("qemu-img")?).arg("--version").read().ok()?;
    let version = text.strip_prefix("qemu-img version ")?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn install(workspace: &Workspace, missing: &[Missing]) -> Outcome {
    let mut packages: Vec<&str> = missing.iter().filter_map(|missing| missing.package).collect();
    packages.sort_unstable();
    packages.dedup();
    let needs_qemu = packages.iter().any(|package| QEMU_PACKAGES.contains(package));
    packages.retain(|package| !QEMU_PACKAGES.contains(package));
    if kernel::look(workspace).is_some() || !packages.is_empty() || needs_qemu {
        apt::update()?;
    }
    if needs_qemu {
        apt::install_together(&QEMU_PACKAGES, QEMU_AT_LEAST.0)?;
    }
    apt::install(&packages, None)?;
    if kernel::look(workspace).is_some() {
        kernel::fetch(workspace)?;
    }
    if python::look(workspace).is_some() {
        python::install(workspace)?;
    }
    Ok(())
}
