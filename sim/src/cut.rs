//! Power cuts: taken while a run goes on, looked at when its phase is over.
//!
//! For every state that a cut may leave: it opens, by itself it is clean afterwards (by our check, and now and then by
//! `qemu-img check`), its backing reference is one it may have, and every sector is legal. Since a state is read through
//! its own chain, a reference that is gone too early shows as missing bytes.

use crate::content::{SECTOR, Value, decode};
use crate::dice::Dice;
use crate::oracle::{AfterCut, Run};
use crate::run::Context;
use crate::world::World;
use disk::{Disk, DiskOptions};
use image::{CheckReport, Repair};
use layout::GuestOffset;
use ring::Iov;
use std::fmt::Write as _;
use std::process::Command;
use std::rc::Rc;
use store::fault::{PowerCut, State};
use store::memory::Snapshot;

/// Bytes read at a time.
const READ_MAX: u64 = 1 << 20;

/// A disk of up to so many sectors is always read as a whole.
const SMALL: u64 = 256;

/// A moment at which the power might have failed.
pub(crate) struct Cut {
    pub(crate) why: String,
    power: PowerCut,
    after: AfterCut,
    /// What the header may name.
    backings: Vec<Option<String>>,
}

impl Cut {
    pub(crate) fn take(why: String, power: PowerCut, after: AfterCut, backings: Vec<Option<String>>) -> Self {
        Self { why, power, after, backings }
    }

    /// Looks at some of the states.
    pub(crate) async fn verify(&self, context: &Context, dice: &Dice) -> Result<(), String> {
        for (number, state) in self.power.states(context.options.states, dice.next()).enumerate() {
            let whole = number == 0 || dice.percent(10);
            self.verify_state(context, &state, whole, dice).await?;
        }
        Ok(())
    }

    /// One state, chosen at random, and what a disk over it holds.
    pub(crate) async fn choose(&self, context: &Context, dice: &Dice) -> Result<(Snapshot, Vec<Value>), String> {
        let states = self.power.states(dice.between(1, 40) as usize, dice.next());
        let Some(state) = states.last() else { return Err("a cut without a state".to_owned()) };
        let content = self.verify_state(context, &state, true, dice).await?;
        Ok((state.image, content))
    }

    async fn verify_state(
        &self,
        context: &Context,
        state: &State,
        whole: bool,
        dice: &Dice,
    ) -> Result<Vec<Value>, String> {
        context.tally(|tally| tally.states += 1);
        let looked = self.look(context, &state.image, whole, dice).await;
        looked.map_err(|what| {
            let mut text = format!("after a power cut ({}): {what}", self.why);
            let _ = write!(text, "\n  state: {}\n  of {:?}", state.choice, self.power);
            text
        })
    }

    async fn look(&self, context: &Context, image: &Snapshot, whole: bool, dice: &Dice) -> Result<Vec<Value>, String> {
        let world: &World = &context.world;
        sound(world, image).await?;
        let (bytes, chain) = world.chain_over(image).await.map_err(|error| format!("it does not open: {error}"))?;
        let top = Rc::clone(&chain[0].image);
        let backing = top.backing().map(|backing| backing.name);
        if !self.backings.contains(&backing) {
            return Err(format!("its backing file is {backing:?}, and may be one of {:?}", self.backings));
        }
        let size = top.size() / SECTOR;
        if !self.after.sizes().contains(&size) {
            return Err(format!("it has {size} sectors, and may have one of {:?}", self.after.sizes()));
        }
        let disk = Disk::new("after the cut", chain, DiskOptions::default());
        let runs = if whole || size <= SMALL {
            vec![Run::new(0, size)]
        } else {
            self.after.touched(size, context.shape.cluster())
        };
        let mut content = Vec::new();
        for run in runs {
            self.read(&disk, run, &mut content).await?;
        }
        disk.close().await.map_err(|error| format!("it does not close: {error}"))?;
        clean(world, &bytes.snapshot(), context.shape.top().may_leak()).await?;
        if dice.below(100_000) < context.options.qemu_img && context.shape.qemu_takes_it() {
            context.tally(|tally| tally.qemu_checks += 1);
            qemu_img_check(context, &bytes.to_vec())?;
        }
        Ok(content)
    }

    async fn read(&self, disk: &Disk, run: Run, content: &mut Vec<Value>) -> Result<(), String> {
        let step = READ_MAX / SECTOR;
        for first in (run.first..run.first + run.count).step_by(step as usize) {
            let count = step.min(run.first + run.count - first);
            let into = Iov::alloc((count * SECTOR) as usize);
            let read = disk.read(GuestOffset(first * SECTOR), into.clone()).await;
            read.map_err(|error| format!("it cannot be read: {error}"))?;
            for (sector, bytes) in (first..).zip(into.to_vec().chunks(SECTOR as usize)) {
                let value = decode(bytes, sector);
                self.after.judge(sector, value)?;
                content.extend(value);
            }
        }
        Ok(())
    }
}

/// What an entry of an L2 table may be after a power cut although it is no good: its data and the file's new length, written
/// and never flushed, were both lost. (Where nothing lies below, an entry need not wait for its data.)
fn is_lost_data(message: &str) -> bool {
    message.contains(": L2 entry") && message.ends_with("points past the end of the image file")
}

/// Before anybody repairs anything: space may be lost, and what was never flushed; no entry is ever wrong otherwise.
async fn sound(world: &World, image: &Snapshot) -> Result<(), String> {
    let report = report(world, image).await?;
    let lost = report.messages.iter().filter(|message| is_lost_data(message)).count() as u64;
    if report.corruptions <= lost && report.check_errors == 0 { Ok(()) } else { Err(say(&report)) }
}

/// Once it was opened and closed there is nothing left to repair, but for leaks in a format that does not look for them.
async fn clean(world: &World, image: &Snapshot, may_leak: bool) -> Result<(), String> {
    let mut report = report(world, image).await?;
    if may_leak {
        report.leaks = 0;
    }
    if report.is_clean() { Ok(()) } else { Err(format!("opened and closed again, {}", say(&report))) }
}

async fn report(world: &World, image: &Snapshot) -> Result<CheckReport, String> {
    let top = world.for_check(image).await.map_err(|error| format!("it does not open for a check: {error}"))?;
    top.check(Repair::None).await.map_err(|error| format!("it cannot be checked: {error}"))
}

fn say(report: &CheckReport) -> String {
    let CheckReport { corruptions, leaks, check_errors, messages, .. } = report;
    let mut text = format!("the check finds {corruptions} corruptions, {leaks} leaks, {check_errors} errors");
    messages.iter().take(5).for_each(|message| {
        let _ = write!(text, "\n  {message}");
    });
    text
}

/// The same question to QEMU, whose own driver is the judge. It wants to see the files below.
fn qemu_img_check(context: &Context, bytes: &[u8]) -> Result<(), String> {
    let no_file = |error: std::io::Error| format!("no temporary file: {error}");
    let folder = tempfile::tempdir().map_err(no_file)?;
    for (name, bytes) in context.world.below() {
        std::fs::write(folder.path().join(name), bytes).map_err(no_file)?;
    }
    let file = folder.path().join("looked at");
    std::fs::write(&file, bytes).map_err(no_file)?;
    let output = Command::new("qemu-img").args(["check", "-f", context.world.format_name()]).arg(&file).output();
    let output = output.map_err(|error| format!("qemu-img could not be run: {error}"))?;
    /// What it exits with when it has found leaks and nothing else.
    const ONLY_LEAKS: i32 = 3;
    if output.status.success() || context.shape.top().may_leak() && output.status.code() == Some(ONLY_LEAKS) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    Err(format!("qemu-img check: {}\n{said}{}", output.status, String::from_utf8_lossy(&output.stderr)))
}
