//! The blocks that are to be run: `sh run` and `sql run`, and `text output` after one for what it must print.
//!
//! All blocks of a file share a Postgres and a nats-server of their own, in which nothing is set up.

use crate::document::{Block, Document, all};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use std::path::Path;
use std::process::Command;

struct Servers {
    pg: Postgres,
    nats: Nats,
    folder: tempfile::TempDir,
}

impl Servers {
    fn start() -> Servers {
        Servers {
            pg: Postgres::start(),
            nats: Nats::start(),
            folder: tempfile::tempdir().expect("a folder"),
        }
    }

    /// Runs the block; what it prints.
    fn run(&self, block: &Block<'_>, at: &str) -> String {
        let mut command = match block.info {
            "sh run" => Command::new("bash"),
            "sql run" => Command::new("psql"),
            other => panic!("{at}: {other} cannot be run"),
        };
        match block.info {
            "sh run" => command.args(["-euo", "pipefail"]),
            _ => command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1"]),
        };
        let script = self.folder.path().join("script");
        std::fs::write(&script, &block.body).expect("write the script");
        command.arg(match block.info {
            "sh run" => "script",
            // not by -c, which makes one transaction of all
            _ => "--file=script",
        });
        let program = Path::new(env!("CARGO_BIN_EXE_jetstream-outbox"));
        let old = std::env::var_os("PATH").unwrap_or_default();
        let folders = [program.parent().expect("a folder"), Postgres::bin()];
        let folders = folders.map(Path::to_path_buf).into_iter();
        let path = std::env::join_paths(folders.chain(std::env::split_paths(&old)));
        command.current_dir(&self.folder).env_clear();
        command.env("PATH", path.expect("no colon in a folder"));
        command.env("HOME", self.folder.path());
        for (name, value) in [
            ("PGHOST", "127.0.0.1"),
            ("PGPORT", &self.pg.port().to_string()),
            ("PGUSER", "postgres"),
            ("PGDATABASE", "postgres"),
            ("JETSTREAM_OUTBOX_DB", &self.pg.url("postgres", "postgres")),
            ("JETSTREAM_OUTBOX_NATS", &self.nats.url()),
        ] {
            command.env(name, value);
        }
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("{at}: {error}"));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{at}: {}\n{printed}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        printed
    }
}

/// `…` in what is expected is anything within a line; a line that is `…` alone, any lines.
fn is_as_expected(expected: &[&str], printed: &[&str]) -> bool {
    match (expected, printed) {
        ([], []) => true,
        (["…", rest @ ..], _) => {
            (0..=printed.len()).any(|skipped| is_as_expected(rest, &printed[skipped..]))
        }
        ([line, rest @ ..], [found, others @ ..]) => {
            line_matches(line, found) && is_as_expected(rest, others)
        }
        _ => false,
    }
}

fn line_matches(expected: &str, found: &str) -> bool {
    let mut parts = expected.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = found.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, between)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in between {
        let Some((_, after)) = rest.split_once(part) else {
            return false;
        };
        rest = after;
    }
    rest.ends_with(last)
}

fn check(document: &Document) {
    let blocks = document.blocks();
    if !blocks.iter().any(|block| block.info.ends_with(" run")) {
        return;
    }
    let servers = Servers::start();
    let mut printed = None;
    for block in &blocks {
        let at = format!("{}:{}", document.path.display(), block.line);
        if block.info.ends_with(" run") {
            printed = Some(servers.run(block, &at));
        } else if block.info == "text output" {
            let printed = printed.take().unwrap_or_else(|| panic!("{at}: of what?"));
            let expected: Vec<&str> = block.body.trim_end().lines().collect();
            let lines: Vec<&str> = printed.trim_end().lines().collect();
            assert!(
                is_as_expected(&expected, &lines),
                "{at}: it prints\n{printed}"
            );
        }
    }
}

#[test]
fn the_blocks_to_run_do_what_they_say() {
    for document in all() {
        check(&document);
    }
}

#[test]
fn what_is_not_as_expected_is_noticed() {
    for (expected, printed, is_alike) in [
        ("a", "a", true),
        ("a", "ab", false),
        ("a … b", "a 1 2 b", true),
        ("a … b", "a 1 2 c", false),
        ("a\n…\nb", "a\n1\n2\nb", true),
        ("a\n…\nb", "a\nb", true),
        ("a\n…\nb", "a\n1", false),
        ("a\nb", "a", false),
        ("a", "a\nb", false),
    ] {
        let lines = |text: &'static str| text.lines().collect::<Vec<_>>();
        let found = is_as_expected(&lines(expected), &lines(printed));
        assert_eq!(found, is_alike, "{expected:?} {printed:?}");
    }
}
