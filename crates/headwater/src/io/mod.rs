//! `headwater io`, which is also what the program is when it is called `qemu-io`: reads and writes a disk by commands, for tests and
//! for looking. Texts and exit codes are that tool's.

mod number;
mod request;
mod session;

use crate::exit::{Exit, Outcome};
use crate::images::{Look, Naming, on_ring};
use crate::nbd::overlay;
use crate::tool;
use disk::DiskOptions;
use image::Format;
use session::Session;
use std::io::{BufRead, IsTerminal, Write};

#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "a command line is made of switches")]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// A command; several are carried out in order. Without one they are read from standard input
    #[arg(short, value_name = "COMMAND")]
    command: Vec<String>,
    /// Format of the image, instead of looking
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Write nothing
    #[arg(short, long)]
    read_only: bool,
    /// What is written goes to a temporary file and is lost at the end
    #[arg(short, long)]
    snapshot: bool,
    /// Past the page cache
    #[arg(short, long)]
    nocache: bool,
    /// Discards are: unmap (the default) or ignore
    #[arg(short, long, value_name = "MODE")]
    discard: Option<String>,
    /// How the image is written to: none, writeback, writethrough, directsync, unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Keep what is read from below
    #[arg(short = 'C', long)]
    copy_on_read: bool,
    /// Somebody may be writing to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: Option<String>,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let discard = match args.discard.as_deref() {
        None | Some("unmap" | "on") => true,
        Some("ignore" | "off") => false,
        Some(mode) => return Err(format!("Invalid discard option: {mode}")),
    };
    let cache = args.cache.as_deref().unwrap_or("writeback");
    if !["none", "writeback", "writethrough", "directsync", "unsafe", "off"].contains(&cache) {
        return Err(format!("invalid cache mode '{cache}'"));
    }
    let look = Look {
        writable: !args.read_only,
        direct: args.nocache || ["none", "off", "directsync"].contains(&cache),
        no_flush: cache == "unsafe",
        force_share: args.force_share,
        ..args.naming.look(args.format.as_deref())?
    };
    let write_through = ["writethrough", "directsync"].contains(&cache);
    let options = DiskOptions { copy_on_read: args.copy_on_read, write_through, discard };
    let temporary = match &args.file {
        Some(file) if args.snapshot => Some(overlay(&args.naming.name(file)?, &look)?),
        _ => None,
    };
    let look = match &temporary {
        Some(_) => Look { format: Some(Format::Qcow2), image_opts: false, ..look },
        None => look,
    };
    let good = on_ring(async {
        let mut session = Session::new(look, options);
        if let Some(file) = temporary.as_ref().map(|(_, file)| file).or(args.file.as_ref()) {
            session.open(file).await?;
        }
        let good =
            if args.command.is_empty() { interactive(&mut session).await } else { batch(args, &mut session).await };
        session.end().await?;
        Ok(good)
    })?;
    Ok(if good { Exit::Ok } else { Exit::Failed })
}

async fn batch(args: &Args, session: &mut Session) -> bool {
    let mut good = true;
    for command in &args.command {
        if session.is_over() {
            break;
        }
        good &= session.command(command).await;
    }
    good
}

/// Reads commands until there are no more; what they answer is seen at once, and does not end it.
async fn interactive(session: &mut Session) -> bool {
    let prompt = || {
        print!("{} ", format_args!("{}>", tool::name()));
        // Nobody is there to be told that nobody is there.
        let _ = std::io::stdout().flush();
    };
    prompt();
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        session.command(&line).await;
        if session.is_over() {
            return true;
        }
        prompt();
    }
    if std::io::stdin().is_terminal() {
        println!();
    }
    true
}
