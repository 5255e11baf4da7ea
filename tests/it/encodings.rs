//! Databases that are not UTF-8, and what their servers cannot send: each is one value's matter, or stops the relay by name.

use crate::rig::{DEADLINE, Rig, SLOT};
use crate::support::nats::Nats;
use crate::support::natsclient::StreamMessage;
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use jetstream_outbox::postgres::encoding::{Encoding, single_byte_names};
use std::fs;

const PARKED: &str = "PARKED";

/// A database of this encoding on servers of its own.
struct Legacy {
    rig: Rig,
    client: postgres::Client,
}

impl Legacy {
    fn start(encoding: &str) -> Legacy {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::start(),
        };
        rig.pg.execute(&format!(
            "CREATE DATABASE legacy ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
        ));
        let client = rig.pg.client_of("legacy").expect("connect");
        let mut legacy = Legacy { rig, client };
        legacy.sql("CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload json, other text)");
        legacy.sql(&format!("CREATE PUBLICATION {SLOT} FOR ALL TABLES"));
        legacy.sql(&format!(
            "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')"
        ));
        let mut nats = legacy.rig.nats.client();
        nats.add_seed_stream();
        nats.add_stream(PARKED, &["jetstream_outbox.parked"]);
        legacy
    }

    #[track_caller]
    fn sql(&mut self, sql: &str) {
        if let Err(error) = self.client.batch_execute(sql) {
            panic!("execute {sql}: {error:?}");
        }
    }

    /// Exit code and log of a relay that ends by itself.
    fn run(&self, args: &[&str]) -> (i32, Vec<String>) {
        let (db, nats) = (self.rig.pg.url("postgres", "legacy"), self.rig.nats.url());
        let args = [&["-db", &db, "-nats", &nats, "-hold-back", "0"], args].concat();
        let mut relay = Relay::run(&args, &[]);
        (relay.wait_exit(DEADLINE), relay.log())
    }

    #[track_caller]
    fn drain(&self, args: &[&str]) {
        let (code, log) = self.run(&[&["-drain"], args].concat());
        assert_eq!(code, 0, "{log:#?}");
    }

    fn parked(&self) -> Vec<StreamMessage> {
        self.rig.nats.client().read_all(PARKED)
    }

    /// Inserts a row by the bytes of its columns, in hexadecimal.
    #[track_caller]
    fn insert(&mut self, id: &str, aggregateid: &str, payload: &str, other: &str) {
        let text = |hex: &str| format!("convert_from('\\x{hex}', getdatabaseencoding())");
        let (aggregateid, payload, other) = (text(aggregateid), text(payload), text(other));
        self.sql(&format!(
            "INSERT INTO outbox VALUES ('{id}', 't', {aggregateid}, {payload}::json, {other})"
        ));
    }
}

/// Id, subject and body of each.
fn events(messages: &[StreamMessage]) -> Vec<(&str, &str, &str)> {
    messages
        .iter()
        .map(|message| {
            let body = std::str::from_utf8(&message.body).unwrap_or("(bytes)");
            (message.id(), message.subject.as_str(), body)
        })
        .collect()
}

/// The tables in the program are those of the server.
#[test]
fn each_encoding_is_read_as_the_server_converts_it() {
    let pg = Postgres::start();
    let mut client = pg.client();
    client
        .batch_execute(
            "CREATE FUNCTION utf8(byte int, encoding name) RETURNS text LANGUAGE plpgsql AS $$ BEGIN
             RETURN convert_from(convert(set_byte('\\x00', 0, byte), encoding, 'UTF8'), 'UTF8');
             EXCEPTION WHEN untranslatable_character THEN RETURN NULL; END $$",
        )
        .expect("create a function");
    for name in single_byte_names() {
        let encoding = Encoding::of_database(name).expect("it is listed");
        let rows = client
            .query(
                "SELECT b, utf8(b, $1::text::name) FROM generate_series(1, 255) b",
                &[&name],
            )
            .expect("convert");
        assert_eq!(rows.len(), 255);
        for row in rows {
            let (byte, expected): (i32, Option<String>) = (row.get(0), row.get(1));
            let byte = u8::try_from(byte).expect("it is one");
            assert_eq!(
                encoding.decode(&[byte]).as_deref(),
                expected.as_deref(),
                "{name} {byte:#x}"
            );
        }
    }
}

#[test]
fn a_byte_without_an_equivalent_is_the_matter_of_its_event_alone() {
    let mut db = Legacy::start("WIN1252");
    // 0x80 is the euro sign, 0x81 nothing
    db.insert("1", "80", "2280e922", "61");
    db.insert("2", "636166e9", "22818022", "61");
    db.insert("3", "61", "31", "81");
    db.insert("4", "6181", "34", "61");
    db.sql("SELECT pg_logical_emit_message(true, convert_from('\\x81', 'WIN1252'), 'x'), pg_logical_emit_message(false, convert_from('\\x81', 'WIN1252'), 'x')");
    db.sql(
        "DO $$ BEGIN EXECUTE 'CREATE TABLE \"t' || convert_from('\\x81', 'WIN1252') || '\" (\"c' || convert_from('\\x81', 'WIN1252')
         || '\" int)'; EXECUTE 'INSERT INTO \"t' || convert_from('\\x81', 'WIN1252') || '\" VALUES (1)'; END $$",
    );
    db.insert("5", "61", "35", "61");
    db.drain(&["-on-poison", "park"]);
    let messages = db.rig.messages();
    let expected = [
        ("1", "events.t.€", "\"€é\""),
        ("3", "events.t.a", "1"),
        ("5", "events.t.a", "5"),
    ];
    assert_eq!(events(&messages), expected);
    let parked = db.parked();
    let causes: Vec<_> = parked
        .iter()
        .map(|message| {
            (
                message.id(),
                message.header("Outbox-Parked").unwrap_or_default(),
            )
        })
        .collect();
    let cause = |column: &str| {
        format!(
            "row of \"public\".\"outbox\": column {column} has a byte without an equivalent in UTF-8, by the database's encoding"
        )
    };
    let expected = [("2", cause("payload")), ("4", cause("aggregateid"))];
    assert!(
        causes
            .iter()
            .copied()
            .eq(expected.iter().map(|(id, cause)| (*id, cause.as_str()))),
        "{causes:?}"
    );
    // the bytes as they are in the database
    assert_eq!(parked[0].body, b"\"\x81\x80\"");
}

#[test]
fn of_bytes_that_nobody_explains_those_that_are_utf8_are_events() {
    let mut db = Legacy::start("SQL_ASCII");
    db.sql("ALTER TABLE outbox ALTER payload TYPE text");
    db.sql("SET client_encoding TO 'SQL_ASCII'");
    let insert = |id: &str, aggregateid: &str, payload: &str| {
        let text = |hex: &str| format!("convert_from('\\x{hex}', 'SQL_ASCII')");
        let (aggregateid, payload) = (text(aggregateid), text(payload));
        format!("INSERT INTO outbox VALUES ('{id}', 't', {aggregateid}, {payload}, {payload})")
    };
    db.sql(&insert("1", "e282ac", "e282ac"));
    db.sql(&insert("2", "61", "81"));
    db.sql(&insert("3", "81", "61"));
    db.sql(&insert("4", "61", "61"));
    db.drain(&["-on-poison", "park"]);
    let messages = db.rig.messages();
    let expected = [
        ("1", "events.t.€", "€"),
        // a text body is whatever its bytes are
        ("2", "events.t.a", "(bytes)"),
        ("4", "events.t.a", "a"),
    ];
    assert_eq!(events(&messages), expected);
    let parked = db.parked();
    assert_eq!(parked.len(), 1);
    let cause = parked[0].header("Outbox-Parked").unwrap_or_default();
    assert!(
        cause.contains("column aggregateid has a byte without an equivalent"),
        "{cause}"
    );
}

/// The statement in a line of the log that begins with SELECT.
#[track_caller]
fn statement(line: &str) -> String {
    let start = line.find("SELECT").unwrap_or_else(|| panic!("{line}"));
    let end = line[start..].find(')').unwrap_or_else(|| panic!("{line}"));
    line[start..=start + end].to_string()
}

/// Where the server has to convert, what it cannot convert stops the relay, and the line says the way past it.
#[test]
fn what_the_server_cannot_convert_stops_the_relay_by_name() {
    let mut db = Legacy::start("EUC_JP");
    db.sql("CREATE TABLE stranger (a text)");
    db.insert("1", "a4a2", "31", "61");
    // legal in EUC_JP, without an equivalent in Unicode
    db.sql("INSERT INTO stranger VALUES (convert_from('\\xa9a1', 'EUC_JP'))");
    db.insert("2", "61", "32", "61");
    for on_poison in ["stop", "park"] {
        let (code, log) = db.run(&["-drain", "-on-poison", on_poison]);
        assert_eq!(code, 65, "{log:#?}");
        let last = log.last().expect("it says why");
        assert!(
            last.contains("22P05") && last.contains("decode the transaction"),
            "{last}"
        );
        assert_eq!(db.rig.messages().len(), 1);
        if on_poison == "park" {
            db.sql(&statement(last));
        }
    }
    db.drain(&["-resume-anyway"]);
    let messages = db.rig.messages();
    let expected = [("1", "events.t.あ", "1"), ("2", "events.t.a", "2")];
    assert_eq!(events(&messages), expected);
}

/// A message in no transaction is named by its own place in the WAL.
#[test]
fn a_message_that_the_server_cannot_convert_is_passed_by_its_own_place() {
    let mut db = Legacy::start("EUC_JP");
    db.insert("1", "61", "31", "61");
    db.sql("SELECT pg_logical_emit_message(false, convert_from('\\xa9a1', 'EUC_JP'), 'x')");
    db.insert("2", "61", "32", "61");
    let (code, log) = db.run(&["-drain"]);
    assert_eq!(code, 65, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(
        last.contains("22P05") && last.contains("decode the WAL at"),
        "{last}"
    );
    db.sql(&statement(last));
    db.drain(&["-resume-anyway"]);
    assert_eq!(db.rig.messages().len(), 2);
}

/// Decoding runs row filters, and what one raises comes again each time.
#[test]
fn a_row_filter_that_fails_stops_the_relay() {
    if Postgres::major_version() < 15 {
        return;
    }
    let mut db = Legacy::start("UTF8");
    db.sql("CREATE TABLE filtered (n int)");
    db.sql(&format!("ALTER PUBLICATION {SLOT} RENAME TO all_tables"));
    db.sql(&format!(
        "CREATE PUBLICATION {SLOT} FOR TABLE outbox, filtered WHERE (1 / n > 0) WITH (publish = 'insert')"
    ));
    db.insert("1", "61", "31", "61");
    db.sql("INSERT INTO filtered VALUES (0)");
    let (code, log) = db.run(&["-drain"]);
    assert_eq!(code, 65, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(
        last.contains("22012") && last.contains("pg_waldump"),
        "{last}"
    );
    assert_eq!(db.rig.messages().len(), 1);
}

/// Somebody has removed WAL that the slot still needs.
#[test]
fn wal_that_is_gone_is_no_outage() {
    if Postgres::major_version() < 15 {
        return;
    }
    let rig = Rig::start();
    rig.commit_event(1, "a");
    let first: Option<String> = rig
        .pg
        .scalar("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
    rig.pg.execute("SELECT pg_switch_wal()");
    rig.commit_event(2, "a");
    // the server has it open, or in its buffers, no longer than it runs
    rig.pg.stop_fast();
    rig.pg.start_again();
    let file = rig
        .pg
        .data_dir()
        .join("pg_wal")
        .join(first.expect("it has a name"));
    fs::remove_file(file).expect("remove a segment");
    let (code, log) = rig.run(&["-drain"]);
    assert_eq!(code, 78, "{log:#?}");
    let last = log.last().expect("it says why");
    assert!(
        last.contains("58P01") && last.contains(&format!("after {confirmed}")),
        "{last}"
    );
}
