//! The README's tables of flags are those that `--help` makes.

use argh::{ArgsInfo, FlagInfo, FlagInfoKind};
use jetstream_outbox::cli::Cli;
use jetstream_outbox::cli::commands::Word;

const HEAD: &str =
    "| flag | environment variable | default | meaning |\n| --- | --- | --- | --- |\n";

/// One row a flag, from its description: `what it is (default this)`.
fn table() -> String {
    let mut rows = HEAD.to_string();
    for flag in Cli::get_args_info().flags {
        let name = flag.long.trim_start_matches('-');
        // these two are for people, and are not read from the environment
        if matches!(name, "help" | "version") {
            continue;
        }
        let (meaning, default) = meaning_and_default(flag);
        let value = value(flag);
        let variable = name.to_ascii_uppercase().replace('-', "_");
        rows += &format!(
            "| `-{name}{value}` | `JETSTREAM_OUTBOX_{variable}` | {default} | {meaning} |\n"
        );
    }
    rows
}

/// The same for the flags of a command, which are read from nowhere else.
fn command_table() -> String {
    let mut rows =
        "| command | flag | default | meaning |\n| --- | --- | --- | --- |\n".to_string();
    for word in Word::ALL {
        for flag in word
            .info()
            .flags
            .iter()
            .filter(|flag| flag.long != "--help")
        {
            let (command, name) = (word.name(), flag.long.trim_start_matches('-'));
            let (meaning, default) = meaning_and_default(flag);
            let value = value(flag);
            rows += &format!("| `{command}` | `-{name}{value}` | {default} | {meaning} |\n");
        }
    }
    rows
}

/// From a description of the form `what it is (default this)`.
fn meaning_and_default(flag: &FlagInfo<'static>) -> (String, String) {
    // argh doubles braces, and prints them as they were
    let description = flag.description.replace("{{", "{").replace("}}", "}");
    let (meaning, default) = description
        .split_once(" (default")
        .expect("every flag names its default last");
    let default = default.trim_start_matches(':').trim_end_matches(')').trim();
    (meaning.to_string(), default.to_string())
}

fn value(flag: &FlagInfo<'_>) -> &'static str {
    match flag.kind {
        FlagInfoKind::Switch => "",
        FlagInfoKind::Option { .. } => " VALUE",
    }
}

#[test]
fn the_tables_of_flags_are_those_of_help() {
    let readme = include_str!("../README.md");
    for table in [table(), command_table()] {
        assert!(
            readme.contains(&table),
            "README.md must have this table:\n{table}"
        );
    }
}

#[test]
fn the_function_is_the_one_that_set_up_makes() {
    let function = jetstream_outbox::outbox::message::publish_function("jetstream_outbox");
    let indented: Vec<String> = function.lines().map(|line| format!("    {line}")).collect();
    let readme = include_str!("../README.md");
    assert!(readme.contains(&indented.join("\n")), "{function}");
}
