//! The README's table of flags is the one that `--help` makes.

use argh::{ArgsInfo, FlagInfoKind};
use jetstream_outbox::cli::Cli;

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
        // argh doubles braces, and prints them as they were
        let description = flag.description.replace("{{", "{").replace("}}", "}");
        let (meaning, default) = description
            .split_once(" (default")
            .expect("every flag names its default last");
        let default = default.trim_start_matches(':').trim_end_matches(')').trim();
        let value = match flag.kind {
            FlagInfoKind::Switch => "",
            FlagInfoKind::Option { .. } => " VALUE",
        };
        let variable = name.to_ascii_uppercase().replace('-', "_");
        rows += &format!(
            "| `-{name}{value}` | `JETSTREAM_OUTBOX_{variable}` | {default} | {meaning} |\n"
        );
    }
    rows
}

#[test]
fn the_table_of_flags_is_that_of_help() {
    let readme = include_str!("../README.md");
    let table = table();
    assert!(
        readme.contains(&table),
        "README.md must have this table:\n{table}"
    );
}

#[test]
fn the_function_is_the_one_that_set_up_makes() {
    let function = jetstream_outbox::outbox::message::publish_function("jetstream_outbox");
    let indented: Vec<String> = function.lines().map(|line| format!("    {line}")).collect();
    let readme = include_str!("../README.md");
    assert!(readme.contains(&indented.join("\n")), "{function}");
}
