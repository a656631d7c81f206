//! For fuzz/: one request out of guest memory that holds anything at all.

use super::chain::Chain;
use super::config::Features;
use super::memory::GuestMap;
use super::request::{Request, Terms};
use disk::Disk;
use vm_memory::{Bytes, GuestAddress};

/// Two regions that touch, as guests have them.
const MEMORY: [(u64, usize); 2] = [(0, 0x6000), (0x6000, 0xa000)];

/// Entries of the descriptor table, which begins at the memory's start.
const ENTRIES: u16 = 64;

/// Puts `memory` into a guest's memory, follows the chain that begins at `head`, and carries the request out on `disk`.
/// Returns the status the guest reads and the bytes the used ring counts; `None` where the chain breaks its queue.
pub async fn request(memory: &[u8], head: u16, indirect: bool, disk: &Disk) -> Option<(u8, u32)> {
    let map = GuestMap::anonymous(&MEMORY);
    let room: usize = MEMORY.iter().map(|(_, len)| len).sum();
    map.memory().write_slice(&memory[..memory.len().min(room)], GuestAddress(0)).ok()?;
    let chain = Chain::follow(map.memory(), GuestAddress(0), ENTRIES, head, indirect).ok()?;
    let terms = Terms { features: Features::offered(false), size: disk.size(), read_only: false };
    let request = Request::parse(&chain, &map, &terms).ok()?;
    let last = chain.writable.len().checked_sub(1)?;
    let place = chain.writable.cut(last..last + 1).next()?.at;
    let (work, answer) = request.split();
    let status = work.carry_out(disk, "fuzzed", false).await;
    let written = answer.give(status);
    Some((map.memory().read_obj(place).ok()?, written))
}
