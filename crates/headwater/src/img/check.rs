//! `headwater check`: qemu-img's texts and exit codes.

use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, Output, on_ring};
use crate::tool;
use clap::ValueEnum;
use image::{CheckReport, Format, Repair};
use serde_json::{Map, Value, json};

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fix {
    /// Leaked clusters only.
    Leaks,
    /// Everything that can be repaired.
    All,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Repair what is found
    #[arg(short, long, value_enum, value_name = "WHAT")]
    repair: Option<Fix>,
    /// How it is read: none, writeback, … (accepted; metadata are read through the page cache)
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
    /// Even while somebody writes to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    args.cache.as_deref().map_or(Ok(()), |mode| images::check_cache(mode, "source cache"))?;
    let look = Look {
        force_share: args.force_share,
        no_backing: true,
        for_check: true,
        writable: args.repair.is_some(),
        ..args.naming.look(args.format.as_deref())?
    };
    let checked = on_ring(async {
        let chain = images::open(&args.file, &look).await?;
        let image = chain.first().ok_or("no image")?.image.clone();
        let unchecked = match image.format() {
            Format::Qed | Format::Qcow2 => None,
            _ => Some("This image format does not support checks"),
        };
        if let Some(why) = unchecked {
            images::close(&chain).await?;
            return Ok(Err(why));
        }
        let repair = match args.repair {
            None => Repair::None,
            Some(Fix::Leaks) => Repair::Leaks,
            Some(Fix::All) => Repair::All,
        };
        let report = image.check(repair).await.map_err(|e| e.to_string());
        let closed = images::close(&chain).await;
        let report = report?;
        closed?;
        Ok(Ok((image.format(), report)))
    })?;
    let (format, report) = match checked {
        Ok(checked) => checked,
        Err(why) => {
            tool::complain(why);
            return Ok(Exit::NoChecks);
        }
    };
    match args.output {
        Output::Json => println!("{:#}", as_json(&args.file, format, &report)),
        Output::Human => print_human(args.quiet, format, &report),
    }
    Ok(if report.check_errors > 0 {
        Exit::Failed
    } else if report.corruptions > 0 {
        Exit::Corrupt
    } else if report.leaks > 0 {
        Exit::Leaks
    } else {
        Exit::Ok
    })
}

fn print_human(quiet: bool, format: Format, report: &CheckReport) {
    for message in &report.messages {
        eprintln!("{message}");
    }
    if quiet {
        return;
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        println!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n",
            report.leaks_fixed, report.corruptions_fixed
        );
        println!("Double checking the fixed image now...");
    }
    if report.is_clean() {
        println!("No errors were found on the image.");
    } else {
        if report.corruptions > 0 {
            println!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
                report.corruptions
            );
        }
        if report.leaks > 0 {
            println!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
                report.leaks
            );
        }
        if report.check_errors > 0 {
            println!("\n{} internal errors have occurred during the check.", report.check_errors);
        }
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
        println!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    // As qemu-img has it, which does not know where a QED image ends.
    if format == Format::Qcow2 {
        println!("Image end offset: {}", report.image_end_offset);
    }
}

fn as_json(file: &str, format: Format, report: &CheckReport) -> Value {
    let mut fields = Map::new();
    // As qemu-img has it: counts that are zero are left out, save the first three.
    let mut optional = |name: &str, value: u64| {
        if value > 0 {
            fields.insert(name.into(), json!(value));
        }
    };
    optional("corruptions", report.corruptions);
    optional("leaks", report.leaks);
    optional("corruptions-fixed", report.corruptions_fixed);
    optional("leaks-fixed", report.leaks_fixed);
    optional("total-clusters", report.total_clusters);
    optional("allocated-clusters", report.allocated_clusters);
    optional("fragmented-clusters", report.fragmented_clusters);
    optional("compressed-clusters", report.compressed_clusters);
    if format == Format::Qcow2 {
        fields.insert("image-end-offset".into(), json!(report.image_end_offset));
    }
    fields.insert("check-errors".into(), json!(report.check_errors));
    fields.insert("filename".into(), json!(file));
    fields.insert("format".into(), json!(format.name()));
    Value::Object(fields)
}
