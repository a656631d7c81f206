//! `img commit`: what an image holds goes into its backing file; the image is empty afterwards, where its format can be.

use super::copy::{How, copy};
use super::source::Source;
use crate::exit::{Exit, Outcome};
use crate::images::{self, Look, Naming, check_cache, on_ring};
use crate::progress::Steps;
use crate::size;
use disk::chain::Opener;
use disk::{Disk, DiskOptions};
use std::rc::Rc;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    naming: Naming,
    /// Format of the image, instead of looking
    #[arg(short, long = "format", value_name = "FMT")]
    format: Option<String>,
    /// How images are written to
    #[arg(short = 't', long = "cache", value_name = "CACHE")]
    cache: Option<String>,
    /// Not into the backing file, but into this one further down the chain
    #[arg(short, long = "base", value_name = "BASE")]
    base: Option<String>,
    /// Leave the image as it is
    #[arg(short = 'd', long = "drop")]
    keep: bool,
    /// Bytes a second at most
    #[arg(short, long, value_name = "RATE", value_parser = size::parse)]
    rate: Option<u64>,
    /// Show progress
    #[arg(short, long = "progress")]
    progress: bool,
    /// Print nothing
    #[arg(short, long = "quiet")]
    quiet: bool,
    file: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    args.cache.as_deref().map_or(Ok(()), |mode| check_cache(mode, "cache"))?;
    on_ring(commit(args))?;
    if !args.quiet {
        println!("Image committed.");
    }
    Ok(Exit::Ok)
}

async fn commit(args: &Args) -> Result<(), String> {
    // Who is below, and what lies between.
    let look = args.naming.look(args.format.as_deref())?;
    let chain = images::open(&args.file, &look).await?;
    let opener = images::sources(&look);
    let found = match &args.base {
        None => chain.get(1).map(|_| 1),
        Some(base) => {
            let wanted = opener.identify(base, None);
            let is = |name: &str| name == base || opener.identify(name, None) == wanted;
            (1..chain.len()).find(|layer| is(chain[*layer].image.file().name()) || chain[*layer].name == *base)
        }
    };
    let base = found.map(|layer| (layer, chain[layer].image.file().name().to_owned(), chain[layer].image.format()));
    let top_format = chain[0].image.format();
    let size = chain[0].image.size();
    images::close(&chain).await?;
    let Some((layer, base, base_format)) = base else {
        return Err(match &args.base {
            None => "Image does not have a backing file".to_owned(),
            Some(base) => format!("Did not find '{base}' in the backing chain of '{}'", args.file),
        });
    };
    // What is read: the image and what lies between. The base itself is written to, so it is not in that chain.
    let upper = Look { format: Some(top_format), layers: Some(layer), force_share: true, ..look.clone() };
    let source = Disk::new(&args.file, images::open(&args.file, &upper).await?, DiskOptions::default());
    let lower = Look { format: Some(base_format), writable: true, image_opts: false, ..look.clone() };
    let target = Disk::new(&base, images::open(&base, &lower).await?, DiskOptions::default());
    let done = into(args, source.clone(), &target, size).await;
    let closed = target.close().await.map_err(|error| error.to_string());
    source.close().await.map_err(|error| error.to_string())?;
    done.and(closed)?;
    if args.keep || layer > 1 {
        return Ok(());
    }
    let top = Look { format: Some(top_format), writable: true, no_backing: true, ..look };
    let chain = images::open(&args.file, &top).await?;
    let emptied = match chain[0].image.empty().await {
        Err(error) if error.kind() == image::ErrorKind::Unsupported => Ok(()),
        other => other.map_err(|error| error.to_string()),
    };
    images::close(&chain).await.and(emptied)
}

async fn into(args: &Args, source: Rc<Disk>, target: &Rc<Disk>, size: u64) -> Result<(), String> {
    if target.size() < size {
        target.resize(size).await.map_err(|error| error.to_string())?;
    }
    let steps = Steps::new(size, args.progress && !args.quiet);
    let how = How { target_is_zero: false, only_allocated: true, rate: args.rate, ..How::default() };
    copy(&Rc::new(Source::of(source)), target, size, how, &steps).await?;
    target.flush().await.map_err(|error| error.to_string())?;
    steps.end();
    Ok(())
}
