//! The tables of README and manual: flags, metrics, exit codes, rules and log lines are those of the program.

use crate::document::{all, chapter, quoted, root};
use argh::{ArgsInfo, FlagInfo, FlagInfoKind};
use jetstream_outbox::cli::Cli;
use jetstream_outbox::cli::commands::Word;
use jetstream_outbox::exit::Exit;
use jetstream_outbox::observe::metrics::{METRICS, Read};
use jetstream_outbox::relay::vitals::Vitals;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

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
    for (name, table) in [
        ("02_configuration.md", table()),
        ("06_commands.md", command_table()),
    ] {
        let text = chapter(name).text;
        assert!(
            text.contains(&table),
            "{name} must have this table:\n{table}"
        );
    }
}

/// The eight that README names.
#[test]
fn the_usual_flags_and_their_defaults_are_those_of_the_program() {
    let rows = all()[0].table("| flag | default |");
    let table = table();
    assert_eq!(rows.len(), 8);
    for row in rows {
        let flag = row[0].trim_matches('`');
        let line = table.lines().find(|line| {
            line.starts_with(&format!("| `{flag} ")) || line.starts_with(&format!("| `{flag}`"))
        });
        let line = line.unwrap_or_else(|| panic!("there is no flag {flag}"));
        if row[1].starts_with('`') {
            let default = format!("| {} |", row[1].trim_matches('`'));
            assert!(line.contains(&default), "{flag}: {line}");
        }
    }
}

#[test]
fn the_function_is_the_one_that_set_up_makes() {
    let function = jetstream_outbox::outbox::message::publish_function("jetstream_outbox");
    let text = chapter("03_messages.md").text;
    assert!(text.contains(&function), "{function}");
}

#[test]
fn the_metrics_are_those_that_are_served() {
    let rows = chapter("07_metrics.md").table("| metric | meaning |");
    let cells: Vec<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    let named: BTreeSet<&str> = (cells.iter())
        .map(|cell| cell.split('{').next().unwrap_or_default())
        .collect();
    let served: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
    assert_eq!(named, served);
    assert_eq!(cells.len(), served.len(), "one is named twice");
}

#[test]
fn the_causes_of_reconnects_are_those_that_are_served() {
    let metric = METRICS.iter().find(|it| it.name == "reconnects_total");
    let Some(Read::Counters("cause", read)) = metric.map(|it| &it.read) else {
        panic!("reconnects are counted by their causes");
    };
    let served: BTreeSet<&str> = read(&Vitals::default())
        .into_iter()
        .map(|(cause, _)| cause)
        .collect();
    let rows = chapter("07_metrics.md").table("| metric | meaning |");
    let row = rows.iter().find(|row| row[0].contains("reconnects_total"));
    let named: BTreeSet<&str> = quoted(&row.expect("a row")[1]).collect();
    assert_eq!(named, served);
}

/// Whoever adds one is led here by the compiler.
fn exits() -> Vec<Exit> {
    let next = |exit: Exit| match exit {
        Exit::Done => Some(Exit::Warning),
        Exit::Warning => Some(Exit::Failure),
        Exit::Failure => Some(Exit::Usage),
        Exit::Usage => Some(Exit::Data),
        Exit::Data => Some(Exit::Unavailable),
        Exit::Unavailable => Some(Exit::Internal),
        Exit::Internal => Some(Exit::SlotInUse),
        Exit::SlotInUse => Some(Exit::Configuration),
        Exit::Configuration => None,
    };
    std::iter::successors(Some(Exit::Done), |exit| next(*exit)).collect()
}

#[test]
fn the_exit_codes_are_those_of_the_program() {
    let numbers = |rows: Vec<Vec<String>>| -> Vec<u32> {
        let cells = rows.iter().flat_map(|row| row[0].split(", "));
        cells.map(|cell| cell.parse().expect("a number")).collect()
    };
    let head = "| exit code | meaning |";
    let program: Vec<u32> = exits().into_iter().map(|exit| exit as u32).collect();
    let of_signals = [130, 143];
    let expected = [&program[..], &of_signals].concat();
    assert_eq!(numbers(chapter("05_operation.md").table(head)), expected);
    // those of commands are not in README
    let of_relay: Vec<u32> = program
        .into_iter()
        .filter(|code| ![1, 2].contains(code))
        .collect();
    assert_eq!(numbers(all()[0].table(head)), of_relay);
}

#[test]
fn the_rules_are_those_of_the_code() {
    let source = include_str!("../../src/relay/core/rules.rs");
    let mut lines = source.lines().map(str::trim).peekable();
    let mut expected = Vec::new();
    while let Some(line) = lines.next() {
        if let (Some(text), Some(next)) = (line.strip_prefix("/// R"), lines.peek()) {
            let (number, text) = text.split_once(": ").expect("R1: what it says");
            let name = next.split(' ').next().expect("a name");
            expected.push((format!("R{number} {name}"), text.to_string()));
        }
    }
    assert_eq!(
        expected.len(),
        jetstream_outbox::relay::core::rules::ALL.len()
    );
    let rows = chapter("15_architecture.md").table("| rule | what it says |");
    let found: Vec<_> = (rows.iter())
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    assert_eq!(found, expected);
    // and each file cites its rule
    for row in rows {
        let number = row[0].split(' ').next().expect("a number");
        let file = quoted(&row[2]).next().expect("a file");
        let source = fs::read_to_string(root().join(file)).expect("read the file");
        let cites = |word: &str| word == number;
        let mut words = source.split(|c: char| !c.is_ascii_alphanumeric());
        assert!(words.any(cites), "{file} does not cite {number}");
    }
}

/// All of the program's source, with strings that go over several lines made one.
fn source() -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                read(&path, text);
            } else if path.extension().is_some_and(|it| it == "rs") {
                text.push_str(&fs::read_to_string(&path).expect("a source"));
            }
        }
    }
    let mut text = String::new();
    read(&root().join("src"), &mut text);
    let mut parts = text.split("\\\n");
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |text, part| text + part.trim_start())
}

/// What Postgres or the system says, or what is put together from several texts.
const NOT_OURS: [&str; 9] = [
    "it did not answer to signing in within",
    "is physical",
    "FATAL 42501: must be superuser or replication role",
    "permission denied to start WAL sender",
    "FATAL 28P01: password authentication failed",
    ": Connection refused",
    ": maximum connections exceeded",
    "invalid peer certificate",
    "it is not primary",
];

#[test]
fn the_log_lines_of_troubleshooting_are_those_of_the_program() {
    let source = source();
    let text = chapter("11_troubleshooting.md").text;
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let mut count = 0;
    for row in rows {
        let (line, _) = row.split_once(" | ").expect("two cells");
        for quote in quoted(line) {
            let mut rest = quote;
            for prefix in [
                "create the slot: ",
                "check Postgres: ",
                "check the session: ",
                "agree on TLS: ",
            ] {
                rest = rest.strip_prefix(prefix).unwrap_or(rest);
            }
            for part in rest.split("...").map(|it| it.trim_matches([' ', ','])) {
                let is_known = NOT_OURS
                    .iter()
                    .any(|it| it.trim_matches([' ', ',']) == part);
                assert!(is_known || source.contains(part), "{quote}: {part:?}");
                count += 1;
            }
        }
    }
    assert!(count > 80, "{count}");
}

/// The manual spells flags with one dash, as the Go program's users do. What other programs take is theirs.
#[test]
fn flags_have_one_dash() {
    let mut flags: Vec<&str> = Cli::get_args_info()
        .flags
        .iter()
        .map(|it| it.long)
        .collect();
    for word in Word::ALL {
        flags.extend(word.info().flags.iter().map(|it| it.long));
    }
    // scripts, cargo and the nats tool have flags of these names
    let others = ["scripts/", "cargo ", "nats stream", "docker "];
    for document in all() {
        for line in document.text.lines() {
            let is_help = line.starts_with("| `-") || line.starts_with("| `setup");
            // a log line, as it is
            let is_log = line.starts_with("| `no working session");
            if is_help || is_log || others.iter().any(|it| line.contains(it)) {
                continue;
            }
            let words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
            let found: Vec<&str> = words.filter(|word| flags.contains(word)).collect();
            assert!(
                found.is_empty(),
                "{}: {found:?} in {line}",
                document.path.display()
            );
        }
    }
}
