//! What a shell needs to complete flags and commands: `jetstream-outbox completions bash|zsh|fish`.
//!
//! The scripts are argh_complete's, made from the same definitions as `--help`. They complete the spelling with two dashes.

use super::commands::Word;
use super::{Cli, PROGRAM, UsageError, is_help};
use argh::{ArgsInfo, SubCommandInfo};
use argh_complete::{Generator, bash::Bash, fish::Fish, zsh::Zsh};

/// The script, if the arguments ask for one.
pub(super) fn asked_for(args: &[String]) -> Option<Result<String, UsageError>> {
    let mut args = args.iter().map(String::as_str);
    if args.next() != Some("completions") {
        return None;
    }
    let mut info = Cli::get_args_info();
    let command = |word: Word| {
        let mut command = word.info();
        command.name = word.name();
        SubCommandInfo {
            name: word.name(),
            command,
        }
    };
    info.name = PROGRAM;
    info.commands = Word::ALL.map(command).into();
    Some(match (args.next(), args.next()) {
        (Some(help), None) if is_help(help) => Ok(format!(
            "Usage: {PROGRAM} completions bash|zsh|fish\n\nPrints what the shell needs to complete commands and flags: \
             source <({PROGRAM} completions bash)\n"
        )),
        (Some("bash"), None) => Ok(Bash::generate(PROGRAM, &info)),
        (Some("zsh"), None) => Ok(Zsh::generate(PROGRAM, &info)),
        (Some("fish"), None) => Ok(Fish::generate(PROGRAM, &info)),
        _ => Err(UsageError::UnknownShell),
    })
}
