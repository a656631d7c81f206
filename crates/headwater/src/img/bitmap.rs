//! `img bitmap`: persistent bitmaps.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, on_ring};
use crate::size;
use clap::{Arg, ArgAction, ArgMatches};
use image::{Bitmap, BitmapAction, Bits, Image};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes that a bit stands for where nothing is said: a cluster, but no less and no more than this (as QEMU has it).
const GRANULARITY: std::ops::RangeInclusive<u64> = 4 << 10..=64 << 10;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    #[command(flatten)]
    steps: Steps,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Bytes one bit of a new bitmap stands for
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    granularity: Option<u64>,
    /// Where the bitmap is that is merged, if not in the same image
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<String>,
    /// The format of that file
    #[arg(short = 'F', long, value_name = "FMT")]
    source_format: Option<String>,
    /// The image, and the bitmap's name
    #[arg(value_name = "FILE BITMAP", num_args = 0..)]
    names: Vec<String>,
}

/// One action of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

/// What each is called, and what it does.
const STEPS: [(&str, Step, &str); 5] = [
    ("add", Step::Add, "Make the bitmap; it records"),
    ("remove", Step::Remove, "Forget the bitmap"),
    ("clear", Step::Clear, "Nothing was written, says the bitmap"),
    ("enable", Step::Enable, "The bitmap records from now on"),
    ("disable", Step::Disable, "The bitmap does not record any more"),
];

impl Step {
    /// What qemu-img calls it in messages.
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// The actions of a line, in its order.
#[derive(Clone, Debug, Default)]
struct Steps(Vec<Step>);

impl clap::Args for Steps {
    fn augment_args(command: clap::Command) -> clap::Command {
        let switch = |(name, _, help): &(&'static str, Step, &'static str)| {
            Arg::new(*name).long(*name).num_args(0).default_missing_value("").action(ArgAction::Append).help(*help)
        };
        let merge = Arg::new("merge").long("merge").value_name("SOURCE").action(ArgAction::Append);
        let merge = merge.help("What this bitmap says was written, the bitmap says, too");
        command.args(STEPS.iter().map(switch)).arg(merge)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Steps {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut steps = BTreeMap::new();
        for (name, step, _) in STEPS {
            let places = matches.indices_of(name).into_iter().flatten();
            steps.extend(places.map(|place| (place, step.clone())));
        }
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        steps.extend(places.zip(sources.map(|source| Step::Merge(source.clone()))));
        Ok(Self(steps.into_values().collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(crate) fn run(args: &Args) -> Outcome {
    let steps = &args.steps.0;
    if steps.is_empty() {
        return Err("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge".into());
    }
    if args.granularity.is_some() && !steps.contains(&Step::Add) {
        return Err("granularity only supported with --add".into());
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        return Err("-F only supported with -b".into());
    }
    if args.source_file.is_some() && !steps.iter().any(|step| matches!(step, Step::Merge(_))) {
        return Err("Merge bitmap source file only supported with --merge".into());
    }
    let [file, name] = &args.names[..] else { return Err("Expecting filename and bitmap name".into()) };
    on_ring(carry_out(args, file, name))?;
    Ok(Exit::Ok)
}

async fn carry_out(args: &Args, file: &str, name: &str) -> Result<(), String> {
    let look = Look { writable: true, no_guest: true, no_backing: true, ..args.naming.look(args.format.as_deref())? };
    let chain = images::open(file, &look).await?;
    let done = each(args, &chain[0].image, name).await;
    let closed = images::close(&chain).await;
    done.and(closed)
}

async fn each(args: &Args, image: &Rc<dyn Image>, name: &str) -> Result<(), String> {
    for step in &args.steps.0 {
        let action = match step {
            Step::Add => BitmapAction::Add(name.to_owned(), args.granularity.unwrap_or_else(|| granularity(image))),
            Step::Remove => BitmapAction::Remove(name.to_owned()),
            Step::Clear => BitmapAction::Clear(name.to_owned()),
            Step::Enable => BitmapAction::Enable(name.to_owned()),
            Step::Disable => BitmapAction::Disable(name.to_owned()),
            Step::Merge(source) => {
                let bits = bits(args, image, source).await;
                BitmapAction::Merge(name.to_owned(), bits.map_err(|error| failed(step, name, &error))?)
            }
        };
        image.bitmap(action).await.map_err(|error| failed(step, name, &error.to_string()))?;
    }
    Ok(())
}

fn failed(step: &Step, name: &str, error: &str) -> String {
    format!("Operation {} on bitmap {name} failed: {error}", step.name())
}

/// What a bit of a new bitmap stands for where nothing is said.
fn granularity(image: &Rc<dyn Image>) -> u64 {
    let cluster = image.info().cluster_size.unwrap_or(*GRANULARITY.end());
    cluster.clamp(*GRANULARITY.start(), *GRANULARITY.end())
}

/// What the bitmap says that is to be merged.
async fn bits(args: &Args, image: &Rc<dyn Image>, name: &str) -> Result<Bits, String> {
    let Some(file) = &args.source_file else {
        return image.bitmap_bits(name).await.map_err(|error| error.to_string());
    };
    let format = args.source_format.as_deref().map(images::format_named).transpose()?;
    let look = Look { format, objects: args.naming.objects()?, no_backing: true, ..Look::default() };
    let chain = images::open(file, &look).await?;
    let bits = chain[0].image.bitmap_bits(name).await.map_err(|error| error.to_string());
    images::close(&chain).await.and(bits)
}

/// The same bitmaps as `from` has, in `to`, which has none of these names.
pub(crate) async fn copy_all(from: &Rc<dyn Image>, to: &Rc<dyn Image>, bitmaps: &[Bitmap]) -> Result<(), String> {
    for Bitmap { name, granularity, enabled, .. } in bitmaps {
        let failed = |error: image::Error| format!("Failed to populate bitmap {name}: {error}");
        to.bitmap(BitmapAction::Add(name.clone(), *granularity))
            .await
            .map_err(|error| format!("Failed to create bitmap {name}: {error}"))?;
        let bits = from.bitmap_bits(name).await.map_err(failed)?;
        to.bitmap(BitmapAction::Merge(name.clone(), bits)).await.map_err(failed)?;
        if !enabled {
            to.bitmap(BitmapAction::Disable(name.clone())).await.map_err(failed)?;
        }
    }
    Ok(())
}
