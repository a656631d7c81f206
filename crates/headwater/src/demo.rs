//! `headwater demo`.

use crate::exit::Outcome;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Outcome {
    Err("not built yet".into())
}
