//! The manual page, section 1: `jetstream-outbox man`, made from the same definitions as `--help`.
//!
//! The language is that of [man(7)](https://man7.org/linux/man-pages/man7/man.7.html).

use super::commands::Word;
use super::{Cli, PROGRAM, UsageError, is_help};
use argh::{ArgsInfo, CommandInfoWithArgs, ErrorCodeInfo, FlagInfo, FlagInfoKind};

/// The page, if the arguments ask for it.
pub(super) fn asked_for(args: &[String]) -> Option<Result<String, UsageError>> {
    match args {
        [word] if word == "man" => Some(Ok(page())),
        [word, help] if word == "man" && is_help(help) => Some(Ok(format!(
            "Usage: {PROGRAM} man\n\nPrints the manual page: {PROGRAM} man | man -l -\n"
        ))),
        [word, more, ..] if word == "man" => Some(Err(UsageError::UnknownFlag(more.clone()))),
        _ => None,
    }
}

fn page() -> String {
    let relay = Cli::get_args_info();
    let version = env!("CARGO_PKG_VERSION");
    let (name, description) = (text(PROGRAM), text(relay.description));
    let mut page = format!(
        ".TH JETSTREAM\\-OUTBOX 1 \"\" \"{name} {version}\" \"User Commands\"\n.SH NAME\n{name} \\- relays a Postgres outbox to NATS JetStream\n\
         .SH SYNOPSIS\n.B {name}\n[\\fIcommand\\fR] [\\fIflags\\fR]\n.SH DESCRIPTION\n{description}\n"
    );
    paragraphs(&mut page, relay.notes);
    page += ".SH OPTIONS\n";
    for flag in relay.flags {
        let name = flag.long.trim_start_matches('-');
        let variable = match name {
            "help" | "version" => String::new(),
            name => format!(
                "\nFrom the environment: \\fBJETSTREAM_OUTBOX_{}\\fR.",
                name.to_ascii_uppercase().replace('-', "_")
            ),
        };
        option(&mut page, flag, &variable);
    }
    page += ".SH COMMANDS\n";
    for word in Word::ALL {
        command(&mut page, word.name(), &word.info());
    }
    page += ".SS completions\nPrints what a shell needs to complete commands and flags: bash, zsh or fish.\n\
             .SS man\nPrints this page.\n.SH EXIT STATUS\n";
    exit_codes(&mut page, relay.error_codes);
    page += ".SH EXAMPLES\n";
    examples(&mut page, relay.examples, PROGRAM);
    page
}

fn command(page: &mut String, name: &str, info: &CommandInfoWithArgs) {
    *page += &format!(".SS {}\n{}\n", text(name), text(info.description));
    paragraphs(page, info.notes);
    let flags = info.flags.iter().filter(|flag| flag.long != "--help");
    flags.for_each(|flag| option(page, flag, ""));
    if !info.error_codes.is_empty() {
        *page += ".PP\nExit status:\n";
        exit_codes(page, info.error_codes);
    }
    examples(page, info.examples, &format!("{PROGRAM} {name}"));
}

fn option(page: &mut String, flag: &FlagInfo<'_>, more: &str) {
    let name = text(flag.long.trim_start_matches('-'));
    let value = match flag.kind {
        FlagInfoKind::Switch => "",
        FlagInfoKind::Option { .. } => " \\fIVALUE\\fR",
    };
    let description = text(flag.description);
    *page += &format!(".TP\n\\fB\\-{name}\\fR{value}\n{description}{more}\n");
}

fn paragraphs(page: &mut String, notes: &[&str]) {
    for note in notes {
        *page += &format!(".PP\n{}\n", text(note));
    }
}

fn exit_codes(page: &mut String, codes: &[ErrorCodeInfo<'_>]) {
    for code in codes {
        *page += &format!(".TP\n{}\n{}\n", code.code, text(code.description));
    }
}

fn examples(page: &mut String, examples: &[&str], command: &str) {
    for example in examples {
        let example = text(&example.replace("{command_name}", command));
        *page += &format!(".PP\n.nf\n{example}\n.fi\n");
    }
}

/// As it is to be read: nothing in it is a request, and a dash can be copied.
fn text(plain: &str) -> String {
    // argh doubles braces
    let plain = plain.replace("{{", "{").replace("}}", "}");
    let escaped = plain.replace('\\', "\\e").replace('-', "\\-");
    let lines = escaped
        .lines()
        .map(|line| match line.starts_with(['.', '\'']) {
            true => format!("\\&{line}"),
            false => line.to_string(),
        });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_text_is_a_request() {
        assert_eq!(text(".so x"), "\\&.so x");
        assert_eq!(text("a\n'b"), "a\n\\&'b");
        assert_eq!(text("-db C:\\x {{a}}"), "\\-db C:\\ex {a}");
    }

    #[test]
    fn every_flag_of_the_relay_and_of_its_commands_is_in_the_page() {
        let page = page();
        let relay = Cli::get_args_info().flags;
        let infos = Word::ALL.map(Word::info);
        let flags = relay.iter().chain(infos.iter().flat_map(|info| info.flags));
        for flag in flags {
            let name = text(flag.long.trim_start_matches('-'));
            assert!(page.contains(&format!("\n\\fB\\-{name}\\fR")), "{name}");
        }
    }
}
