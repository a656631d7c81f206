//! `nbd --list`: what a server offers.

use super::Args;
use crate::exit::{Exit, Outcome};
use crate::images::on_ring;
use nbd::proto::{BASE_ALLOCATION, TransmissionFlags};
use store::nbd::{Address, Session, list};

/// Flags by the names that qemu-nbd has for them.
const FLAGS: [(u16, &str); 12] = [
    (1 << 1, "readonly"),
    (1 << 2, "flush"),
    (1 << 3, "fua"),
    (1 << 4, "rotational"),
    (1 << 5, "trim"),
    (1 << 6, "zeroes"),
    (1 << 7, "df"),
    (1 << 8, "multi"),
    (1 << 9, "resize"),
    (1 << 10, "cache"),
    (1 << 11, "fast-zero"),
    (1 << 12, "block-status-payload"),
];

pub(super) fn run(args: &Args) -> Outcome {
    let address = match &args.socket {
        Some(path) => Address::Unix(path.clone()),
        None => Address::Tcp(args.bind.clone(), args.port),
    };
    let exports = on_ring(async {
        list(&address).await.map_err(|error| {
            let said = error.to_string();
            let said = said.split(" (os error").next().unwrap_or(&said).to_owned();
            match error.raw_os_error() {
                Some(_) => format!("Failed to connect to '{address}': {said}"),
                None => said,
            }
        })
    })?;
    println!("exports available: {}", exports.len());
    for (export, session) in exports {
        println!(" export: '{}'", export.name);
        if !export.description.is_empty() {
            println!("  description: {}", export.description);
        }
        if let Some(session) = session {
            describe(&session);
        }
    }
    Ok(Exit::Ok)
}

fn describe(session: &Session) {
    println!("  size:  {}", session.size);
    if session.flags & TransmissionFlags::HAS_FLAGS.bits() != 0 {
        let names: Vec<&str> =
            FLAGS.iter().filter(|(bit, _)| session.flags & bit != 0).map(|(_, name)| *name).collect();
        println!("  flags: {:#x} ( {} )", session.flags, names.join(" "));
    }
    if let Some(sizes) = session.block_size {
        println!("  min block: {}", sizes.minimum);
        println!("  opt block: {}", sizes.preferred);
        println!("  max block: {}", sizes.maximum);
    }
    // Longer requests are not asked for yet.
    println!("  transaction size: {}", if session.structured { "32-bit" } else { "simple" });
    let contexts = match &session.contexts[..] {
        [] if session.allocation.is_some() => vec![BASE_ALLOCATION.to_owned()],
        known => known.to_vec(),
    };
    if !contexts.is_empty() {
        println!("  available meta contexts: {}", contexts.len());
        for context in contexts {
            println!("   {context}");
        }
    }
}
