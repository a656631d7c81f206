//! `headwater demo --boot`: the same with a real guest under QEMU.
//!
//! The guest needs no kernel and no distribution: it is a boot sector. The firmware loads it from the disk being streamed; it
//! reads the disk through the firmware from its first sector on, adds up every 32-bit word, and prints the sum on the serial
//! port. A sum that matches the master's proves that the machine has booted from, and read, the right bytes.

use super::{make_overlay, spec, step};
use crate::exit::{Exit, Outcome};
use crate::size::human;
use control::{Engine, EngineConfig, Failure, Happening, Stamped};
use export::nbd::Address;
use job::Event;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// Sectors the guest adds up, the boot sector included.
const SECTORS: u32 = 8192;

/// A machine that has not answered by then never will.
const PATIENCE: Duration = Duration::from_mins(2);

pub(super) fn run(folder: &Path, delay: u64) -> Outcome {
    let qemu = find("qemu-system-x86_64").ok_or(
        "--boot needs qemu-system-x86_64 (Debian: apt install qemu-system-x86); without it, `headwater demo` shows the same with a stand-in",
    )?;
    let master = folder.join("master.img");
    let top = folder.join("my.qed");
    let size = u64::from(SECTORS) * 512 * 4;
    let sum = write_master(&master, size).map_err(|e| format!("could not write '{}': {e}", master.display()))?;
    step(&format!("a bootable master image of {}, {delay} ms away", human(size)));
    make_overlay(&master, &top, size)?;
    super::block_on(boot(&qemu, folder, &top, delay, sum))?;
    fs::remove_file(&master).map_err(|e| e.to_string())?;
    step("the master is deleted; a second boot");
    super::block_on(boot(&qemu, folder, &top, 0, sum))?;
    step("the guest boots from the image alone");
    Ok(Exit::Ok)
}

fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(|path| path.is_file())
}

async fn boot(qemu: &Path, folder: &Path, top: &Path, delay: u64, sum: u32) -> Result<(), String> {
    let failed = |e: Failure| e.to_string();
    let engine = Engine::start(&EngineConfig::default()).map_err(|e| format!("could not start: {e}"))?;
    engine.add_disk(spec(top, delay)).await.map_err(failed)?;
    let socket = folder.join("nbd.sock");
    engine.serve_nbd(Address::Unix(socket.clone()), vec!["my".into()]).await.map_err(failed)?;
    let mut events = engine.subscribe();
    super::stream(&engine).await.map_err(failed)?;
    let begun = Instant::now();
    let disk = format!("driver=nbd,server.type=unix,server.path={},export=my,if=virtio", socket.display());
    let guest = Command::new(qemu)
        .args(["-machine", "pc", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4", "-drive", &disk])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(PATIENCE, guest).await {
        Ok(output) => output.map_err(|e| format!("could not start QEMU: {e}"))?,
        Err(_) => return Err(format!("the guest said nothing for {} s", PATIENCE.as_secs())),
    };
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if said != format!("{sum:08x}") {
        return Err(format!(
            "the guest read other bytes: '{said}', not '{sum:08x}'; {}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    step(&format!(
        "the guest booted and read its disk in {:.1} s; its checksum {said} is right",
        begun.elapsed().as_secs_f64()
    ));
    let ended = loop {
        match events.recv().await {
            Some(Stamped { event: Happening::Job(Event::Completed { error, .. }), .. }) => break error,
            Some(_) => {}
            None => break Some("the engine ended".into()),
        }
    };
    engine.shut_down().await.map_err(failed)?;
    ended.map_or(Ok(()), |error| Err(format!("the stream failed: {error}")))
}

/// Writes a disk whose first sector is the program below; returns the sum the guest must find.
fn write_master(path: &Path, size: u64) -> std::io::Result<u32> {
    let file = File::create(path)?;
    file.set_len(size)?;
    let mut bytes = vec![0_u8; SECTORS as usize * 512];
    let mut state = 1_u32;
    for word in bytes[512..].chunks_mut(4) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        word.copy_from_slice(&state.to_le_bytes());
    }
    let program = boot_sector();
    bytes[..program.len()].copy_from_slice(&program);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&bytes, 0)?;
    let words = bytes.chunks(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    Ok(words.fold(0, u32::wrapping_add))
}

/// The guest: 16-bit code that the firmware loads to 0x7c00 with the boot drive in DL. It reads 64 sectors at a time with
/// INT 13h/42h to 0x1000:0, adds their words in EBX, prints EBX in hex on COM1, and switches the machine off through the
/// debug-exit port.
fn boot_sector() -> Vec<u8> {
    let mut code: Vec<u8> = vec![
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xd0, // mov ss, ax
        0xbc, 0x00, 0x7c, // mov sp, 0x7c00
        0xfb, // sti
        0x66, 0x31, 0xdb, // xor ebx, ebx
        // next: read the packet's sectors
        0xbe, 0x00, 0x7d, // mov si, 0x7d00 (the packet, below)
        0xb4, 0x42, // mov ah, 0x42
        0xcd, 0x13, // int 0x13 (DL is kept)
        0x72, 0x4e, // jc fail (patched below)
        0xb8, 0x00, 0x10, // mov ax, 0x1000
        0x8e, 0xc0, // mov es, ax
        0x31, 0xff, // xor di, di
        0xb9, 0x00, 0x20, // mov cx, 8192 words of 32 bits
        // add:
        0x26, 0x66, 0x03, 0x1d, // add ebx, es:[di]
        0x83, 0xc7, 0x04, // add di, 4
        0xe2, 0xf7, // loop add
        0x66, 0x83, 0x06, 0x08, 0x7d, 0x40, // add dword [0x7d08], 64
        0x66, 0x81, 0x3e, 0x08, 0x7d, // cmp dword [0x7d08], SECTORS
    ];
    code.extend_from_slice(&SECTORS.to_le_bytes());
    let jump = code.len();
    code.extend_from_slice(&[0x72, 0x00]); // jb next (patched)
    // print EBX, eight digits, highest first
    code.extend_from_slice(&[0xb9, 0x08, 0x00]); // mov cx, 8
    let digit = code.len();
    code.extend_from_slice(&[
        0x66, 0xc1, 0xc3, 0x04, // rol ebx, 4
        0x88, 0xd8, // mov al, bl
        0x24, 0x0f, // and al, 15
        0x3c, 0x0a, // cmp al, 10
        0x72, 0x02, // jb +2
        0x04, 0x27, // add al, 'a' - '0' - 10
        0x04, 0x30, // add al, '0'
        0xba, 0xf8, 0x03, // mov dx, COM1
        0xee, // out dx, al
        0xe2, 0x00, // loop digit (patched)
    ]);
    let end = code.len();
    code[end - 1] = (digit as isize - end as isize) as u8;
    let fail = code.len();
    code.extend_from_slice(&[
        0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xee, // out dx, al: the machine goes off
        0xf4, // hlt
        0xeb, 0xfd, // jmp hlt
    ]);
    let next = 14;
    code[jump + 1] = (next as isize - (jump as isize + 2)) as u8;
    let carry = 21;
    code[carry + 1] = (fail as isize - (carry as isize + 2)) as u8;
    code.resize(0x100, 0);
    // The disk address packet: 16 bytes, 64 sectors to 0x1000:0000, from sector 0 on.
    code.extend_from_slice(&[0x10, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x10]);
    code.extend_from_slice(&[0; 8]);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_fits_its_sector_and_its_jumps_land() {
        let code = boot_sector();
        assert!(code.len() <= 510);
        // The carry jump is where it was patched, and both jumps land on instructions of ours.
        assert_eq!(code[21], 0x72);
        assert_eq!(code[14], 0xbe);
    }
}
