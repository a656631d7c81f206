//! `img snapshot`: internal snapshots.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, on_ring};
use crate::size::human;
use image::{Snapshot, SnapshotAction};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Make this snapshot the present state
    #[arg(short, long = "apply", value_name = "SNAPSHOT", conflicts_with_all = ["create", "delete", "list"])]
    apply: Option<String>,
    /// Take a snapshot
    #[arg(short, long = "create", value_name = "SNAPSHOT", conflicts_with_all = ["delete", "list"])]
    create: Option<String>,
    /// Delete a snapshot
    #[arg(short, long = "delete", value_name = "SNAPSHOT", conflicts_with = "list")]
    delete: Option<String>,
    /// List them
    #[arg(short, long = "list")]
    list: bool,
    /// Format of the image, instead of looking
    #[arg(short, long = "format", value_name = "FMT")]
    format: Option<String>,
    /// Print nothing
    #[arg(short, long = "quiet")]
    quiet: bool,
    /// Somebody may be writing to it (with -l)
    #[arg(short = 'U', long)]
    force_share: bool,
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let date = (now.as_secs() as u32, now.subsec_nanos());
    let action = match (&args.apply, &args.create, &args.delete) {
        (Some(name), _, _) => Some(SnapshotAction::Apply(name.clone())),
        (_, Some(name), _) => Some(SnapshotAction::Create(name.clone(), date)),
        (_, _, Some(name)) => Some(SnapshotAction::Delete(name.clone())),
        (None, None, None) => None,
    };
    let (writable, force_share) = (action.is_some(), args.force_share && action.is_none());
    // What is written stays what it was, unless another state takes its place.
    let no_guest = !matches!(action, Some(SnapshotAction::Apply(_)));
    let look = Look { writable, force_share, no_guest, no_backing: true, ..args.naming.look(args.format.as_deref())? };
    let list = on_ring(async {
        let chain = images::open(&args.file, &look).await?;
        let image = &chain[0].image;
        let done = match action {
            Some(action) => image.snapshot(action).await.map(|()| Vec::new()),
            None => image.snapshots().await,
        };
        let closed = images::close(&chain).await;
        let list = done.map_err(|error| error.to_string())?;
        closed.map(|()| list)
    })?;
    if !args.quiet && (args.list || args.create.is_none() && args.apply.is_none() && args.delete.is_none()) {
        print!("{}", text(&list));
    }
    Ok(Exit::Ok)
}

/// The table that qemu-img prints; nothing where there are no snapshots.
pub(crate) fn text(list: &[Snapshot]) -> String {
    use std::fmt::Write;
    if list.is_empty() {
        return String::new();
    }
    let mut text = String::from("Snapshot list:\n");
    let _ =
        writeln!(text, "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}", "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for snapshot in list {
        let Snapshot { id, name, vm_state_size, date, vm_clock, icount, .. } = snapshot;
        let icount = icount.filter(|count| *count != u64::MAX).map_or_else(|| "--".to_owned(), |n| n.to_string());
        let seconds = vm_clock / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            vm_clock / 1_000_000 % 1000
        );
        let (size, date) = (human(*vm_state_size), utc(date.0.into()));
        let _ = writeln!(text, "{id:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}");
    }
    text
}

/// A moment as people write it: `2026-11-26 20:15:00`, in UTC.
fn utc(seconds: u64) -> String {
    // Days into years and months: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_out() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56");
        assert_eq!(utc(1_795_723_200), "2026-11-26 20:00:00");
    }
}
