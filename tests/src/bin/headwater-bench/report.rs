//! The table for people and the JSON for comparing runs.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use headwater_tests::Result;
use headwater_tests::process::run;
use serde_json::{Value, json};

use crate::side::Side;
use crate::workload::{Sample, Workload};

/// A workload's rounds.
pub(crate) struct Row {
    name: &'static str,
    unit: &'static str,
    goal: f64,
    samples: [Vec<Sample>; 2],
    errors: [Option<String>; 2],
}

impl Row {
    pub(crate) fn new(workload: &Workload) -> Self {
        Row {
            name: workload.name,
            unit: workload.unit,
            goal: workload.goal,
            samples: [Vec::new(), Vec::new()],
            errors: [None, None],
        }
    }

    pub(crate) fn add(&mut self, side: usize, sample: Result<Sample>) {
        match sample {
            Ok(sample) => self.samples[side].push(sample),
            Err(why) => self.errors[side] = Some(why.to_string()),
        }
    }

    /// True if a side failed: further rounds would, too.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.errors.iter().any(Option::is_some)
    }

    /// The ratio of the sides in each round.
    fn ratios(&self) -> Vec<f64> {
        let [a, b] = &self.samples;
        a.iter().zip(b).map(|(a, b)| a.rate / b.rate).collect()
    }

    fn reaches_its_goal(&self) -> bool {
        !self.is_hopeless() && Spread::of(self.ratios()).is_some_and(|ratio| ratio.median >= self.goal)
    }

    fn json(&self) -> Value {
        let samples = |side: usize| -> Value { self.samples[side].iter().map(Sample::json).collect() };
        json!({
            "workload": self.name, "unit": self.unit, "goal": self.goal, "ratios": self.ratios(),
            "a": samples(0), "b": samples(1), "errors": self.errors,
        })
    }
}

/// The middle and the ends of some figures.
#[derive(Clone, Copy)]
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Option<Spread> {
        figures.sort_by(f64::total_cmp);
        let (least, most) = (*figures.first()?, *figures.last()?);
        let middle = figures.len() / 2;
        let median =
            if figures.len() % 2 == 1 { figures[middle] } else { f64::midpoint(figures[middle - 1], figures[middle]) };
        Some(Spread { least, median, most })
    }
}

/// All rows, and what they were measured on.
pub(crate) struct Report {
    sides: [Side; 2],
    rounds: u32,
    seconds: f64,
    size: u64,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(sides: [Side; 2], rounds: u32, seconds: f64, size: u64) -> Self {
        Report { sides, rounds, seconds, size, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    pub(crate) fn reaches_its_goals(&self) -> bool {
        self.rows.iter().all(Row::reaches_its_goal)
    }

    /// Writes the JSON file and returns its path.
    pub(crate) fn write(&self, dir: &Path) -> Result<PathBuf> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let first_line = |program: &str, args: &[&str]| {
            let said = run(program, args).and_then(headwater_tests::process::Finished::ok);
            said.ok().and_then(|text| text.lines().next().map(str::to_owned))
        };
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name\t: ").map(str::to_owned));
        let report = json!({
            "time": time,
            "machine": {
                "processor": processor,
                "processors": std::thread::available_parallelism().map_or(1, usize::from),
                "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
                "qemu": first_line("qemu-storage-daemon", &["--version"]),
                "commit": first_line("git", &["rev-parse", "HEAD"]),
            },
            "sides": self.sides.map(Side::name),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "disk_bytes": self.size,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
        });
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("{time}.json"));
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(&path, &text)?;
        fs::write(dir.join("latest.json"), &text)?;
        Ok(path)
    }
}

/// Three figures that matter, whatever the size: 0.123, 12.3, 1230, 45.6k.
fn figure(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.1}k", value / 1000.0),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.sides.map(Side::name);
        writeln!(
            f,
            "Medians of {} rounds A B A B of {} s, in brackets the least and the most; disk of {} MiB; cpu: the server's \
             microseconds for one request or MiB.\n",
            self.rounds,
            self.seconds,
            self.size >> 20
        )?;
        let line = |f: &mut fmt::Formatter<'_>, cells: [&str; 7]| {
            let [name, unit, rate_a, rate_b, ratio, cpu, goal] = cells;
            writeln!(
                f,
                "| {name:<18} | {unit:<5} | {rate_a:>22} | {rate_b:>22} | {ratio:>19} | {cpu:>13} | {goal:<9} |"
            )
        };
        line(f, ["workload", "unit", a, b, "ratio", "cpu A : B", "goal"])?;
        line(f, ["---", "---", "---:", "---:", "---:", "---:", "---"])?;
        for row in &self.rows {
            let spread = |spread: Option<Spread>| {
                spread.map_or("-".to_owned(), |Spread { least, median, most }| {
                    format!("{} ({}–{})", figure(median), figure(least), figure(most))
                })
            };
            let side = |side: usize, of: fn(&Sample) -> f64| Spread::of(row.samples[side].iter().map(of).collect());
            let rate = |index: usize| match &row.errors[index] {
                Some(_) => "failed".to_owned(),
                None => spread(side(index, |sample| sample.rate)),
            };
            let cpu = |index: usize| side(index, |sample| sample.cpu).map_or("-".to_owned(), |cpu| figure(cpu.median));
            let verdict = if row.reaches_its_goal() { "reached" } else { "missed" };
            let cells = [
                rate(0),
                rate(1),
                spread(Spread::of(row.ratios())),
                format!("{} : {}", cpu(0), cpu(1)),
                format!("{} {verdict}", row.goal),
            ];
            let [rate_a, rate_b, ratio, cpu, goal] = cells.each_ref().map(String::as_str);
            line(f, [row.name, row.unit, rate_a, rate_b, ratio, cpu, goal])?;
        }
        for row in &self.rows {
            for (side, error) in self.sides.iter().zip(&row.errors) {
                if let Some(error) = error {
                    writeln!(f, "\n{} on {} failed: {error}", row.name, side.name())?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let median = |figures: &[f64]| Spread::of(figures.to_vec()).map(|spread| spread.median);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn figures_are_short() {
        assert_eq!([0.5, 12.34, 1234.4, 45_678.0].map(figure), ["0.50", "12.3", "1234", "45.7k"]);
    }
}
