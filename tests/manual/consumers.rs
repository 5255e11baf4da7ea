//! The consumers of the chapter on consuming: killed in the middle, and made to read everything again, they apply each event once.
//!
//! Their libraries come from PyPI and npm: `scripts/test` gets them, and says where by `CONSUMERS`.

use crate::document::chapter;
use crate::support::command;
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::process::Process;
use crate::support::wait::{eventually, secs};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const DEADLINE: Duration = secs(60);
const STREAM: &str = "jetstream_outbox";
/// The programs in Python, by their place in the chapter.
const PYTHON: [&str; 2] = ["reader.py", "transactions.py"];
/// Entities that the events are of.
const ACCOUNTS: u64 = 7;

fn libraries() -> Option<PathBuf> {
    let found = std::env::var_os("CONSUMERS").map(PathBuf::from);
    if found.is_none() {
        eprintln!(
            "skipped: the consumers' libraries are not here (CONSUMERS; scripts/test gets them)"
        );
    }
    found
}

/// Both servers, set up, and the consumer's program in a folder.
struct Stage {
    pg: Postgres,
    nats: Nats,
    folder: tempfile::TempDir,
    written: u64,
}

impl Stage {
    fn start(language: &str, files: &[&str], libraries: &Path) -> Stage {
        let text = chapter("10_consuming.md");
        let blocks = text.blocks();
        let programs = blocks.iter().filter(|block| block.info == language);
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(programs.clone().count(), files.len());
        for (program, file) in programs.zip(files) {
            std::fs::write(folder.path().join(file), &program.body).expect("write the program");
        }
        // node looks for modules beside the program
        std::os::unix::fs::symlink(
            libraries.join("node_modules"),
            folder.path().join("node_modules"),
        )
        .expect("a link");
        let stage = Stage {
            pg: Postgres::start(),
            nats: Nats::start(),
            folder,
            written: 0,
        };
        stage.pg.seed_setup();
        stage.nats.client().add_seed_stream();
        stage
    }

    /// Commits as many more transactions of two events, and publishes them. The foreign message is nobody's.
    fn publish(&mut self, transactions: u64) {
        let mut client = self.pg.client();
        for _ in 0..transactions {
            let mut sql = "BEGIN;".to_string();
            for _ in 0..2 {
                self.written += 1;
                let (number, account) = (self.written, self.written % ACCOUNTS);
                let id = id(number);
                sql += &format!(
                    "INSERT INTO outbox VALUES ('{id}', 'account', '{account}', '{number}');"
                );
            }
            client.batch_execute(&(sql + "COMMIT")).expect("commit");
        }
        self.nats.client().publish("events.foreign", &[], b"x");
        let (db, nats) = (self.pg.url("postgres", "postgres"), self.nats.url());
        let drained = command::run(
            &[
                "-drain",
                "-db",
                &db,
                "-nats",
                &nats,
                "-hold-back",
                "0",
                "-transaction-headers",
            ],
            &[],
        );
        assert_eq!(drained.code, 0, "{}", drained.stderr);
    }

    /// Runs the consumer; it ends with what is returned.
    fn consume(&self, program: &str, file: &str, libraries: &Path) -> Process {
        let mut command = Command::new(program);
        command.arg(file).current_dir(&self.folder);
        command.env("PYTHONPATH", libraries.join("python"));
        command.env("DATABASE", self.pg.url("postgres", "postgres"));
        command.env("NATS", self.nats.url());
        command.stdout(Stdio::null());
        Process::spawn("the consumer", &mut command)
    }

    fn count(&self, table: &str) -> i64 {
        let exists = format!("SELECT to_regclass('{table}') IS NOT NULL");
        if self.pg.scalar::<bool>(&exists) != Some(true) {
            return 0;
        }
        let count = self.pg.scalar(&format!("SELECT count(*) FROM {table}"));
        count.unwrap_or_default()
    }

    #[track_caller]
    fn wait_for(&self, table: &str, count: u64) {
        eventually("the consumer to apply events", DEADLINE, || {
            match self.count(table) {
                found if found >= count as i64 => Ok(()),
                found => Err(format!("{found} of {count}")),
            }
        });
    }

    /// The column of all rows, as one text.
    fn column(&self, sql: &str) -> String {
        self.pg.scalar::<String>(sql).unwrap_or_default()
    }
}

fn id(number: u64) -> String {
    format!("00000000-0000-0000-0000-{number:012}")
}

fn ids(numbers: impl Iterator<Item = u64>) -> String {
    numbers.map(id).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_consumer_that_keeps_its_place_applies_each_event_once_in_order() {
    let Some(libraries) = libraries() else { return };
    let mut stage = Stage::start("python", &PYTHON, &libraries);
    let run = |stage: &Stage| stage.consume("python3", "reader.py", &libraries);
    stage.publish(300);
    let reader = run(&stage);
    stage.wait_for("ledger", 50);
    drop(reader);
    let reader = run(&stage);
    stage.wait_for("ledger", 600);
    drop(reader);
    // it begins at the start of the stream again: positions alone say what is known
    for forget in [
        "UPDATE reader_stream SET sequence = 0",
        "DELETE FROM reader_stream",
    ] {
        stage.pg.execute(forget);
        stage.publish(5);
        let reader = run(&stage);
        stage.wait_for("ledger", stage.written);
        drop(reader);
    }
    // the event was stored a second time, as at-least-once delivery may do
    let mut client = stage.nats.client();
    let repeated = client.read_all(STREAM).swap_remove(3);
    let headers = [(
        "Outbox-Position",
        repeated.header("Outbox-Position").expect("one"),
    )];
    let headers = [&headers[..], &[("Nats-Msg-Id", "again")]].concat();
    client.publish(&repeated.subject, &headers, &repeated.body);
    // one that is late has a lower position, and is new
    let late = [
        &headers[..1],
        &[("Nats-Msg-Id", "late"), ("Outbox-Late", "true")],
    ]
    .concat();
    client.publish(&repeated.subject, &late, b"0");
    let reader = run(&stage);
    stage.wait_for("ledger", stage.written + 1);
    stage.publish(1);
    stage.wait_for("ledger", stage.written + 1);
    drop(reader);
    let found = stage.column("SELECT string_agg(id, ' ' ORDER BY line) FROM ledger");
    let before = ids(1..=stage.written - 2);
    let after = ids(stage.written - 1..=stage.written);
    assert_eq!(found, format!("{before} late {after}"));
}

#[test]
fn the_consumer_of_whole_transactions_applies_each_as_one() {
    let Some(libraries) = libraries() else { return };
    let mut stage = Stage::start("python", &PYTHON, &libraries);
    let run = |stage: &Stage| stage.consume("python3", "transactions.py", &libraries);
    stage.publish(300);
    let reader = run(&stage);
    stage.wait_for("ledger", 50);
    drop(reader);
    let reader = run(&stage);
    // the last one, too, of which nothing but the mark says that it is whole
    stage.wait_for("ledger", stage.written);
    drop(reader);
    stage.pg.execute("UPDATE reader_stream SET sequence = 0");
    stage.publish(5);
    let reader = run(&stage);
    stage.wait_for("ledger", stage.written);
    drop(reader);
    let found = stage.column("SELECT string_agg(id, ' ' ORDER BY line) FROM ledger");
    assert_eq!(found, ids(1..=stage.written));
    // two events each
    let whole = "SELECT count(*) FROM ledger AS one JOIN ledger AS two \
                 ON one.body::int + 1 = two.body::int AND one.xmin = two.xmin WHERE one.body::int % 2 = 1";
    assert_eq!(
        stage.pg.scalar::<i64>(whole),
        Some(stage.written as i64 / 2)
    );
    let all = "SELECT count(DISTINCT xmin::text) FROM ledger";
    assert_eq!(stage.pg.scalar::<i64>(all), Some(stage.written as i64 / 2));
}

#[test]
fn the_workers_that_keep_ids_apply_each_event_once() {
    let Some(libraries) = libraries() else { return };
    let mut stage = Stage::start("js", &["workers.mjs"], &libraries);
    let run = |stage: &Stage| stage.consume("node", "workers.mjs", &libraries);
    stage.publish(300);
    let workers = run(&stage);
    stage.wait_for("mails", 50);
    drop(workers);
    let workers = run(&stage);
    stage.wait_for("mails", 600);
    drop(workers);
    // everything is delivered again
    let mut client = stage.nats.client();
    client.api(&format!("CONSUMER.DELETE.{STREAM}.workers"), &json!(null));
    stage.publish(5);
    let workers = run(&stage);
    stage.wait_for("mails", stage.written);
    eventually("all to be acknowledged", DEADLINE, || {
        let info = client.api(&format!("CONSUMER.INFO.{STREAM}.workers"), &json!(null));
        match (&info["num_pending"], &info["num_ack_pending"]) {
            (pending, unacknowledged) if *pending == 0 && *unacknowledged == 0 => Ok(()),
            found => Err(format!("{found:?}")),
        }
    });
    drop(workers);
    let found = stage.column("SELECT string_agg(id, ' ' ORDER BY id) FROM mails");
    assert_eq!(found, ids(1..=stage.written));
    // the last event of each account
    let bodies = stage.column("SELECT string_agg(body, ' ' ORDER BY body::int) FROM accounts");
    let newest = stage.written - ACCOUNTS + 1..=stage.written;
    let newest: Vec<String> = newest.map(|number| number.to_string()).collect();
    assert_eq!(bodies, newest.join(" "));
}
