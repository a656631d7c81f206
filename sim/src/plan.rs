//! What a seed stands for: the chain, how the disk behaves, what goes wrong, and what happens when.

use crate::content::SECTOR;
use crate::dice::Dice;
use image::{Format, qcow2};
use job::OnError;
use std::fmt;
use std::time::Duration;

/// Formats that are written to. A new format adds itself here and is simulated from then on.
pub(crate) const TOPS: [Format; 2] = [Format::Qed, Format::Qcow2];

/// One image of the chain.
#[derive(Clone, Debug)]
pub(crate) struct LayerShape {
    pub(crate) format: Format,
    /// In sectors.
    pub(crate) size: u64,
    pub(crate) cluster_size: u64,
    pub(crate) table_size: u32,
    pub(crate) qcow2: qcow2::Options,
    /// It holds an internal snapshot, taken in the middle of what was written before.
    pub(crate) snapshot: bool,
    /// Made byte by byte, with kinds of clusters that nobody here writes.
    pub(crate) by_hand: bool,
}

impl LayerShape {
    /// Whether a power cut may leave clusters that are counted and not used.
    pub(crate) fn may_leak(&self) -> bool {
        self.format == Format::Qcow2
    }
}

/// The chain and the disk over it.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Bottom first; the last one is the top.
    pub(crate) layers: Vec<LayerShape>,
    pub(crate) copy_on_read: bool,
    pub(crate) write_through: bool,
    pub(crate) discard: bool,
}

impl Shape {
    pub(crate) fn top(&self) -> &LayerShape {
        &self.layers[self.layers.len() - 1]
    }

    /// QEMU refuses QED tables of one cluster, which the specification allows.
    pub(crate) fn qemu_takes_it(&self) -> bool {
        self.layers.iter().all(|layer| layer.format != Format::Qed || layer.table_size > 1)
    }

    /// Sectors of a cluster of the top.
    pub(crate) fn cluster(&self) -> u64 {
        self.top().cluster_size / SECTOR
    }

    /// What a layer is called.
    pub(crate) fn name(&self, layer: usize) -> String {
        match layer {
            _ if layer + 1 == self.layers.len() => "top".to_owned(),
            0 => "master".to_owned(),
            _ => format!("middle{layer}"),
        }
    }
}

/// What goes wrong in a phase. Shares are in a hundred operations.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Operations take up to this long.
    pub(crate) jitter: Duration,
    /// Reads of the layers below fail.
    pub(crate) source_eio: u64,
    /// The layers below do not answer for a while, now and then.
    pub(crate) source_away: bool,
    /// Reads of the layers below take very long.
    pub(crate) source_hangs: bool,
    /// Reads and writes are done in pieces.
    pub(crate) split: bool,
    /// Writes to the top take very long: longer than the disk waits before it marks itself as clean.
    pub(crate) top_hangs: bool,
    /// Reads of the top fail.
    pub(crate) top_read_eio: u64,
    /// Writes to the top fail, some of their sectors written.
    pub(crate) top_write_eio: u64,
    /// The top has no space, for writes and growth.
    pub(crate) top_no_space: u64,
    /// One flush of the top fails: which.
    pub(crate) flush_fails: Option<u64>,
}

impl Faults {
    /// Whether reads may fail.
    pub(crate) fn reads_may_fail(&self) -> bool {
        self.source_eio > 0 || self.top_read_eio > 0
    }

    /// Whether changes may fail: they read too, what they do not cover and tables.
    pub(crate) fn changes_may_fail(&self) -> bool {
        self.reads_may_fail() || self.top_may_fail()
    }

    /// Whether what is kept may fail to be: a flush, the end of a stream.
    pub(crate) fn top_may_fail(&self) -> bool {
        self.top_write_eio > 0 || self.top_no_space > 0 || self.flush_fails.is_some() || self.top_read_eio > 0
    }
}

/// A stream in a phase.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream {
    /// When it starts.
    pub(crate) after: Duration,
    /// The layer (0 the bottom) to stream down to; none: all.
    pub(crate) base: Option<usize>,
    pub(crate) speed: u64,
    pub(crate) on_error: OnError,
    pub(crate) auto_finalize: bool,
    /// How many verbs it is given.
    pub(crate) verbs: u64,
    /// Whether it may be cancelled.
    pub(crate) cancelled: bool,
}

/// How a phase ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The disk is closed and opened again.
    Close,
    /// The power is cut.
    PowerCut,
}

/// One time that the disk is open.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    /// Guests' queues, each one request after the other.
    pub(crate) queues: u64,
    /// Requests for each queue.
    pub(crate) requests: u64,
    pub(crate) faults: Faults,
    pub(crate) stream: Option<Stream>,
    /// Sectors to grow to, one after the other.
    pub(crate) growth: Vec<u64>,
    /// Power cuts to look at.
    pub(crate) cuts: u64,
    pub(crate) end: End,
}

/// All that a seed stands for.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) shape: Shape,
    pub(crate) phases: Vec<Phase>,
}

impl Plan {
    pub(crate) fn new(dice: &Dice) -> Self {
        let shape = shape(dice);
        let count = dice.between(1, 3);
        let mut size = shape.top().size;
        let phases = (0..count).map(|_| phase(dice, &shape, &mut size)).collect();
        Self { shape, phases }
    }
}

fn shape(dice: &Dice) -> Shape {
    let format = dice.pick(&TOPS);
    let cluster_size = match format {
        Format::Qcow2 => dice.pick(&[512, 512, 1024, 4096, 4096, 16384, 65536]),
        _ => dice.pick(&[4096, 4096, 4096, 8192, 16384, 65536]),
    };
    let table_size = dice.pick(&[1, 1, 2, 4]);
    let sectors = cluster_size / SECTOR;
    // Most disks are small, so that requests meet; some reach over several L2 tables.
    let clusters = match dice.below(10) {
        0..6 => dice.between(2, 24),
        6..9 => dice.between(24, 200),
        _ => dice.between(500, 1400).min(6 << 20 >> cluster_size.trailing_zeros()).max(2),
    };
    // The end often lies inside a cluster.
    let size = (clusters * sectors - if dice.percent(40) { dice.below(sectors) } else { 0 }).max(1);
    let depth = dice.pick(&[1, 2, 2, 2, 3, 3, 4]);
    let mut layers = Vec::new();
    for layer in 0..depth - 1 {
        // Shorter and longer than the top, in any order.
        let size = match dice.below(6) {
            0 | 1 => size,
            2 => dice.between(1, size),
            3 => size + dice.between(1, 4 * sectors),
            4 => (size / 2).max(1),
            _ => dice.between(1, 2 * size),
        };
        let (format, by_hand) = match dice.below(10) {
            0..5 if layer == 0 => (Format::Raw, false),
            5..8 if layer == 0 => (Format::Qcow2, true),
            _ => (dice.pick(&TOPS), false),
        };
        let cluster_size = match format {
            Format::Qcow2 => dice.pick(&[512, 4096, 16384, 65536]),
            _ => dice.pick(&[4096, 4096, 8192, 65536]),
        };
        let qcow2 = qcow2_options(dice, cluster_size);
        let table_size = dice.pick(&[1, 2, 4]);
        layers.push(LayerShape { format, size, cluster_size, table_size, qcow2, snapshot: false, by_hand });
    }
    let qcow2 = qcow2_options(dice, cluster_size);
    let snapshot = format == Format::Qcow2 && qcow2.refcount_bits > 1 && dice.percent(40);
    layers.push(LayerShape { format, size, cluster_size, table_size, qcow2, snapshot, by_hand: false });
    Shape { layers, copy_on_read: dice.percent(60), write_through: dice.percent(10), discard: dice.percent(90) }
}

fn qcow2_options(dice: &Dice, cluster_size: u64) -> qcow2::Options {
    let plain = qcow2::Options::default();
    if dice.percent(20) {
        return qcow2::Options { version: 2, ..plain };
    }
    qcow2::Options {
        refcount_bits: dice.pick(&[1, 2, 8, 16, 16, 16, 64]),
        lazy_refcounts: dice.percent(20),
        extended_l2: cluster_size >= 16384 && dice.percent(40),
        ..plain
    }
}

fn phase(dice: &Dice, shape: &Shape, size: &mut u64) -> Phase {
    let mut growth = Vec::new();
    if dice.percent(15) {
        for _ in 0..dice.between(1, 2) {
            *size += dice.between(1, 6 * shape.cluster());
            growth.push(*size);
        }
    }
    Phase {
        queues: dice.between(1, 5),
        requests: dice.between(4, 30),
        faults: faults(dice),
        stream: dice.percent(65).then(|| stream(dice, shape)),
        growth,
        cuts: dice.between(1, 4),
        end: if dice.percent(50) { End::PowerCut } else { End::Close },
    }
}

fn faults(dice: &Dice) -> Faults {
    let mut faults = Faults {
        jitter: Duration::from_micros(dice.pick(&[0, 20, 200, 2000])),
        split: dice.percent(20),
        ..Faults::default()
    };
    // Most runs go well: then no error is excused.
    match dice.below(16) {
        0 => faults.source_eio = dice.between(1, 30),
        1 => faults.source_away = true,
        2 => faults.source_hangs = true,
        3 => faults.top_read_eio = dice.between(1, 5),
        4 => faults.top_write_eio = dice.between(1, 8),
        5 => faults.top_no_space = dice.between(1, 20),
        6 => faults.flush_fails = Some(dice.below(12)),
        7 => {
            faults.source_eio = dice.between(0, 10);
            faults.source_away = dice.percent(50);
            faults.top_no_space = dice.between(0, 10);
            faults.flush_fails = dice.percent(50).then(|| dice.below(30));
        }
        8 => faults.top_hangs = true,
        _ => {}
    }
    faults
}

fn stream(dice: &Dice, shape: &Shape) -> Stream {
    let below = shape.layers.len() - 1;
    let base = (below > 1 && dice.percent(30)).then(|| dice.below(below as u64 - 1) as usize);
    Stream {
        after: Duration::from_micros(dice.below(3000)),
        base,
        speed: if dice.percent(30) { dice.between(1 << 20, 64 << 20) } else { 0 },
        on_error: dice.pick(&OnError::ALL),
        auto_finalize: dice.percent(80),
        verbs: dice.below(6),
        cancelled: dice.percent(15),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, layer) in self.shape.layers.iter().enumerate() {
            let name = self.shape.name(number);
            writeln!(
                f,
                "{name}: {}, {} sectors, clusters of {} bytes, tables of {}, {:?}, snapshot {}",
                layer.format, layer.size, layer.cluster_size, layer.table_size, layer.qcow2, layer.snapshot
            )?;
        }
        let Shape { copy_on_read, write_through, discard, .. } = &self.shape;
        writeln!(f, "copy-on-read {copy_on_read}, write-through {write_through}, discard {discard}")?;
        self.phases.iter().try_for_each(|phase| writeln!(f, "{phase:?}"))
    }
}
