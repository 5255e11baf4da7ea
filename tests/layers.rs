//! The house: layers import downwards only, and what decides does nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From the ground up. What stands beside each other in a row knows nothing of the other.
const LAYERS: &[&[&str]] = &[
    &["random", "uri"],
    &["lookup", "loopback", "exit", "cli", "logging"],
    &["nats", "postgres"],
    &["outbox"],
    &["jetstream"],
    &["config"],
    &["relay"],
    &["observe"],
    &["admin"],
];

/// State machines: events in, decisions out.
const PURE: &[&str] = &[
    "relay/core",
    "relay/checkpoint/record.rs",
    "relay/checkpoint/store.rs",
    "outbox",
    "postgres/pgoutput.rs",
    "nats/protocol.rs",
    "jetstream/ack.rs",
    "jetstream/wire.rs",
];
const IMPURE: &[&str] = &[
    "std::net",
    "std::thread",
    "std::fs",
    "std::env",
    "Instant::now()",
    "SystemTime::now()",
];

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Each source file under `path`, named from `src`, and its lines without comments and unit tests.
fn code(path: &Path) -> Vec<(String, Vec<String>)> {
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("read a folder");
        let paths = entries.map(|entry| entry.expect("read a folder").path());
        return paths.flat_map(|path| code(&path)).collect();
    }
    let name = path.strip_prefix(src()).expect("it is under src");
    let name = name.to_str().expect("it is UTF-8").to_string();
    if !name.ends_with(".rs") || name.ends_with("tests.rs") {
        return Vec::new();
    }
    let text = fs::read_to_string(path).expect("read a file");
    let lines = text.lines().take_while(|line| *line != "mod tests {");
    let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
    vec![(name, lines.map(str::to_string).collect())]
}

/// The modules that a line names by `crate::`, one or several in braces.
fn named(line: &str) -> impl Iterator<Item = &str> {
    line.split("crate::").skip(1).flat_map(|rest| {
        let (list, is_list) = match rest.strip_prefix('{') {
            Some(list) => (list.split('}').next().unwrap_or(list), true),
            None => (rest, false),
        };
        let names = list.split(',').take(if is_list { usize::MAX } else { 1 });
        names.map(|name| {
            let name = name.trim();
            let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            &name[..end.unwrap_or(name.len())]
        })
    })
}

#[test]
fn layers_import_downwards_only() {
    let rank = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let mut modules = BTreeSet::new();
    for (name, lines) in code(&src()) {
        let own = name.split(['/', '.']).next().expect("it has a name");
        if ["main", "lib", "manual"].contains(&own) {
            continue;
        }
        let own_rank = rank(own).unwrap_or_else(|| panic!("{own} has no layer"));
        modules.insert(own.to_string());
        for line in &lines {
            for used in named(line).filter(|used| *used != own) {
                assert!(rank(used) < Some(own_rank), "src/{name} looks up: {line}");
                assert!(rank(used).is_some(), "src/{name}: {line}");
            }
        }
    }
    let layered: BTreeSet<_> = LAYERS.iter().flat_map(|it| it.iter()).collect();
    assert_eq!(layered.len(), modules.len(), "{modules:?}");
}

#[test]
fn what_decides_has_no_clock_no_thread_and_no_socket() {
    for pure in PURE {
        let files = code(&src().join(pure));
        assert!(!files.is_empty(), "{pure}");
        for (name, lines) in files {
            for line in lines {
                let does = IMPURE.iter().find(|it| line.contains(**it));
                assert_eq!(does, None, "src/{name}: {line}");
            }
        }
    }
}
