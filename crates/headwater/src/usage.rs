//! Command lines, and what is said of one that makes no sense. The tools whose command lines others have written scripts for (`img`,
//! `io`, `nbd`, under these names or their own) take an option's last value, and end such a line with 1 and one message.

use crate::exit::Exit;
use crate::tool;
use clap::error::ErrorKind;
use clap::{ArgMatches, Command, CommandFactory, FromArgMatches, Parser};

/// Commands of `headwater` that are such tools.
const TOOLS: [&str; 3] = ["img", "io", "nbd"];

/// Reads the command line of a tool that is called by its own name.
pub(crate) fn tool<T: Parser>() -> Result<T, Exit> {
    read(true)
}

/// Reads the command line of `headwater`.
pub(crate) fn own<T: Parser>() -> Result<T, Exit> {
    let first = std::env::args_os().nth(1).unwrap_or_default();
    read(TOOLS.iter().any(|tool| first == *tool))
}

fn read<T: CommandFactory + FromArgMatches>(strict: bool) -> Result<T, Exit> {
    let command = if strict { last_value_counts(T::command()) } else { T::command() };
    let parsed = command.try_get_matches().and_then(|matches: ArgMatches| T::from_arg_matches(&matches));
    parsed.map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => error.exit(),
        _ if !strict => error.exit(),
        kind => {
            tool::complain(&said(kind, &error.to_string()));
            eprintln!("Try '{} --help' for more info", tool::name());
            Exit::Failed
        }
    })
}

fn last_value_counts(command: Command) -> Command {
    command.args_override_self(true).mut_subcommands(last_value_counts)
}

/// The message alone, in one line.
fn said(kind: ErrorKind, text: &str) -> String {
    if kind == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "Not enough arguments".to_owned();
    }
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_without_the_parsers_own_words() {
        let text = "error: the following required arguments were not provided:\n  <FILE>\n\nUsage: x <FILE>\n";
        let said = said(ErrorKind::MissingRequiredArgument, text);
        assert_eq!(said, "the following required arguments were not provided: <FILE>");
    }
}
