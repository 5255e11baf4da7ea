//! The decoder against bytes that real servers sent.
//!
//! `data/pgoutput/<version>.hex` holds messages of that version, one a line, and `<version>.decoded` what
//! each says. The live test sends the same work to a server of this machine and compares what comes back.
//! To capture anew: `PG_BIN=<its bin folder> PGOUTPUT_CAPTURE=<version> cargo test --test pgoutput_golden`,
//! then read the difference.

mod support;

use jetstream_outbox::postgres::pgoutput::{Message, OldTuple, Tuple, TupleValue, decode};
use postgres::Client;
use std::fmt::Write as _;
use support::postgres::Postgres;

struct Golden {
    version: &'static str,
    hex: &'static str,
    decoded: &'static str,
}

const GOLDEN: [Golden; 3] = [
    Golden {
        version: "12",
        hex: include_str!("data/pgoutput/12.hex"),
        decoded: include_str!("data/pgoutput/12.decoded"),
    },
    Golden {
        version: "15",
        hex: include_str!("data/pgoutput/15.hex"),
        decoded: include_str!("data/pgoutput/15.decoded"),
    },
    Golden {
        version: "18",
        hex: include_str!("data/pgoutput/18.hex"),
        decoded: include_str!("data/pgoutput/18.decoded"),
    },
];

impl Golden {
    fn messages(&self) -> Vec<Vec<u8>> {
        self.hex.lines().map(from_hex).collect()
    }
}

fn all_messages() -> Vec<Vec<u8>> {
    GOLDEN.iter().flat_map(Golden::messages).collect()
}

fn from_hex(line: &str) -> Vec<u8> {
    let digit = |c: u8| char::from(c).to_digit(16).unwrap() as u8;
    let bytes = line.as_bytes().chunks(2);
    bytes
        .map(|pair| digit(pair[0]) << 4 | digit(pair[1]))
        .collect()
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the message says, values included, on one line.
fn exact(message: Message<'_>) -> String {
    render(message, |number| number.to_string())
}

/// The same without the numbers that differ from server to server: positions, times and ids.
fn shape(message: Message<'_>) -> String {
    render(message, |_| "*".to_string())
}

fn render(message: Message<'_>, n: impl Fn(&dyn std::fmt::Display) -> String) -> String {
    match message {
        Message::Begin {
            final_lsn,
            commit_time_us,
            xid,
        } => format!(
            "Begin final_lsn={} commit_time_us={} xid={}",
            n(&final_lsn),
            n(&commit_time_us),
            n(&xid)
        ),
        Message::Message {
            transactional,
            lsn,
            prefix,
            content,
        } => format!(
            "Message transactional={transactional} lsn={} prefix={prefix:?} content={}",
            n(&lsn),
            value(content.0)
        ),
        Message::Commit {
            commit_lsn,
            end_lsn,
            commit_time_us,
        } => format!(
            "Commit commit_lsn={} end_lsn={} commit_time_us={}",
            n(&commit_lsn),
            n(&end_lsn),
            n(&commit_time_us)
        ),
        // this position is the workload's own
        Message::Origin { commit_lsn, name } => {
            format!("Origin commit_lsn={commit_lsn} name={name:?}")
        }
        Message::Relation(relation) => {
            let mut text = format!(
                "Relation id={} namespace={:?} name={:?} replica_identity={} columns={}:",
                n(&relation.id),
                relation.namespace,
                relation.name,
                char::from(relation.replica_identity),
                relation.column_count()
            );
            for column in relation.columns() {
                let key = if column.key { "key " } else { "" };
                // ids below are built in, the same everywhere
                let type_id = if column.type_id < 16384 {
                    column.type_id.to_string()
                } else {
                    n(&column.type_id)
                };
                write!(
                    text,
                    " [{key}{:?} type_id={type_id} type_modifier={}]",
                    column.name, column.type_modifier
                )
                .unwrap();
            }
            text
        }
        Message::Type {
            id,
            namespace,
            name,
        } => {
            format!("Type id={} namespace={namespace:?} name={name:?}", n(&id))
        }
        Message::Insert { relation_id, tuple } => {
            format!("Insert relation_id={} new={}", n(&relation_id), row(tuple))
        }
        Message::Update {
            relation_id,
            old,
            new,
        } => {
            let old = old.map_or("none".to_string(), old_row);
            format!(
                "Update relation_id={} old={old} new={}",
                n(&relation_id),
                row(new)
            )
        }
        Message::Delete { relation_id, old } => {
            format!(
                "Delete relation_id={} old={}",
                n(&relation_id),
                old_row(old)
            )
        }
        Message::Truncate {
            cascade,
            restart_identity,
            relation_ids,
        } => {
            let ids: Vec<String> = relation_ids.iter().map(|id| n(&id)).collect();
            format!(
                "Truncate cascade={cascade} restart_identity={restart_identity} relation_ids={}",
                ids.join(",")
            )
        }
    }
}

fn old_row(old: OldTuple<'_>) -> String {
    match old {
        OldTuple::Key(tuple) => format!("key {}", row(tuple)),
        OldTuple::Full(tuple) => format!("full {}", row(tuple)),
    }
}

fn row(tuple: Tuple<'_>) -> String {
    let values: Vec<String> = tuple
        .iter()
        .map(|v| match v {
            TupleValue::Null => "null".to_string(),
            TupleValue::UnchangedToast => "unchanged".to_string(),
            TupleValue::Text(text) => format!("text {}", value(text)),
            TupleValue::Binary(bytes) => format!("binary {}", value(bytes)),
        })
        .collect();
    assert_eq!(values.len(), tuple.len());
    format!("({})", values.join(", "))
}

/// The value, or the ends of a long one.
fn value(bytes: &[u8]) -> String {
    match bytes {
        [first @ .., a, b, c] if bytes.len() > 200 => {
            format!(
                "{} bytes \"{}...{}\"",
                bytes.len(),
                first[..3].escape_ascii(),
                [*a, *b, *c].escape_ascii()
            )
        }
        _ => format!("\"{}\"", bytes.escape_ascii()),
    }
}

#[test]
fn golden_messages_decode_to_what_the_server_meant() {
    for golden in GOLDEN {
        let decoded: Vec<String> = golden
            .messages()
            .iter()
            .map(|data| exact(decode(data).unwrap()))
            .collect();
        let expected: Vec<&str> = golden.decoded.lines().collect();
        assert_eq!(decoded, expected, "version {}", golden.version);
    }
}

#[test]
fn golden_messages_are_of_every_kind() {
    let mut kinds: Vec<u8> = all_messages().iter().map(|data| data[0]).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds, b"BCDIMORTUY");
}

/// Every field has a fixed or a stated length, so no prefix of a message is one.
#[test]
fn every_prefix_is_refused_and_so_is_a_byte_too_many() {
    for mut data in all_messages() {
        for len in 0..data.len() {
            assert!(
                decode(&data[..len]).is_err(),
                "{len} bytes of {}",
                to_hex(&data)
            );
        }
        data.push(0);
        assert!(decode(&data).is_err(), "{}", to_hex(&data));
    }
}

/// No allocation is by construction: what `decode` returns is `Copy` and so owns no memory. That what it
/// borrows is no more than the message is checked on each.
#[test]
fn mutated_messages_never_panic_and_never_claim_more_than_they_are() {
    fn owns_no_memory<T: Copy>(_: &T) {}

    let golden = all_messages();
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..300_000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut data = rng.choice(&golden).unwrap().clone();
        for _ in 0..rng.usize(1..=4) {
            mutate(&mut rng, &mut data);
        }
        let decoded = decode(&data);
        owns_no_memory(&decoded);
        match decoded {
            Ok(message) => {
                accepted += 1;
                assert!(borrowed_bytes(message) <= data.len(), "seed {seed}");
                let _ = (exact(message), format!("{message:?}"));
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().len() < 200, "seed {seed}");
            }
        }
    }
    // were it all one or the other, the mutations would be too weak or too strong to test anything
    assert!(
        accepted > 20_000 && refused > 100_000,
        "{accepted} accepted, {refused} refused"
    );
}

fn mutate(rng: &mut fastrand::Rng, data: &mut Vec<u8>) {
    const LENGTHS: [i32; 9] = [0, 1, -1, 255, 1600, 32767, 65536, i32::MAX, i32::MIN];
    if data.is_empty() {
        return data.push(rng.u8(..));
    }
    let at = rng.usize(..data.len());
    match rng.u8(..7) {
        0 => data[at] ^= 1 << rng.u8(..8),
        1 => data[at] = rng.u8(..),
        2 => data[at] = *rng.choice(b"BMCORYIUDTNKOntub\0").unwrap(),
        3 => data.truncate(at),
        4 => data.insert(at, rng.u8(..)),
        5 => drop(data.remove(at)),
        _ => {
            // a length or count of four or two bytes, wherever one may stand
            let length = rng.choice(LENGTHS).unwrap().to_be_bytes();
            let length = if rng.bool() {
                &length[..]
            } else {
                &length[2..]
            };
            let end = data.len().min(at + length.len());
            data.splice(at..end, length.iter().copied());
        }
    }
}

fn borrowed_bytes(message: Message<'_>) -> usize {
    let row = |tuple: Tuple<'_>| {
        let len = |value| match value {
            TupleValue::Null | TupleValue::UnchangedToast => 0,
            TupleValue::Text(bytes) | TupleValue::Binary(bytes) => bytes.len(),
        };
        assert_eq!(tuple.iter().count(), tuple.len());
        tuple.len() + tuple.iter().map(len).sum::<usize>()
    };
    let old_row = |old| match old {
        OldTuple::Key(tuple) | OldTuple::Full(tuple) => row(tuple),
    };
    match message {
        Message::Begin { .. } | Message::Commit { .. } => 0,
        Message::Message {
            prefix, content, ..
        } => prefix.0.len() + content.0.len(),
        Message::Origin { name, .. } => name.0.len(),
        Message::Relation(relation) => {
            assert_eq!(relation.columns().count(), relation.column_count());
            let columns: usize = relation
                .columns()
                .map(|column| column.name.0.len() + 10)
                .sum();
            relation.namespace.0.len() + relation.name.0.len() + columns
        }
        Message::Type {
            namespace, name, ..
        } => namespace.0.len() + name.0.len(),
        Message::Insert { tuple, .. } => row(tuple),
        Message::Update { old, new, .. } => old.map_or(0, old_row) + row(new),
        Message::Delete { old, .. } => old_row(old),
        Message::Truncate { relation_ids, .. } => relation_ids.iter().len() * 4,
    }
}

#[test]
fn a_live_server_sends_what_the_golden_one_sent() {
    let server = Postgres::builder().setting("autovacuum", "off").build();
    let version = Postgres::major_version();
    let has_messages = version >= 14;
    let messages = capture(&mut server.client(), has_messages);

    if let Ok(version) = std::env::var("PGOUTPUT_CAPTURE") {
        let file = |extension| format!("tests/data/pgoutput/{version}.{extension}");
        let lines = |line: fn(&[u8]) -> String| {
            messages
                .iter()
                .map(|data| line(data) + "\n")
                .collect::<String>()
        };
        std::fs::write(file("hex"), lines(to_hex)).unwrap();
        std::fs::write(file("decoded"), lines(|data| exact(decode(data).unwrap()))).unwrap();
        return;
    }

    let golden = if has_messages { &GOLDEN[1] } else { &GOLDEN[0] };
    let shapes = |messages: Vec<Vec<u8>>| {
        messages
            .iter()
            .map(|data| shape(decode(data).unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        shapes(messages),
        shapes(golden.messages()),
        "server {version}"
    );
}

/// Names, types and identities of every sort; sizes that are stored out of line.
const TABLES: [&str; 2] = [
    r#"
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
    CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL,
        aggregateid varchar(255) NOT NULL, payload jsonb);
    CREATE TABLE kinds (id integer PRIMARY KEY, mood mood, positive positive, data bytea, large text);
    ALTER TABLE kinds ALTER COLUMN large SET STORAGE EXTERNAL;
    CREATE SCHEMA "Größe";
    CREATE TABLE "Größe"."two words" (a integer, "ключ" text);
    ALTER TABLE "Größe"."two words" REPLICA IDENTITY FULL;
    CREATE TABLE no_columns ();
    CREATE PUBLICATION golden FOR ALL TABLES;
    SELECT pg_replication_origin_create('elsewhere')"#,
    "SELECT pg_create_logical_replication_slot('golden', 'pgoutput')",
];

/// Each is one transaction.
const WORK: [&str; 11] = [
    r#"INSERT INTO outbox VALUES ('5f9e6a3c-8d57-4b0e-9d5c-0f4a6f1d2b3c', 'account', '1',
           '{"msg": "A test account creation event"}');
       DELETE FROM outbox"#,
    r"INSERT INTO kinds VALUES (1, 'happy', 7, '\x00ff41', repeat('x', 2100)), (2, NULL, NULL, '', NULL)",
    "UPDATE kinds SET mood = 'sad' WHERE id = 1",
    "UPDATE kinds SET id = 3 WHERE id = 1",
    "DELETE FROM kinds",
    r#"INSERT INTO "Größe"."two words" VALUES (-1, 'žluťoučký kůň'), (NULL, NULL)"#,
    r#"UPDATE "Größe"."two words" SET "ключ" = '' WHERE a = -1; DELETE FROM "Größe"."two words""#,
    r#"TRUNCATE kinds, "Größe"."two words" RESTART IDENTITY CASCADE;
       TRUNCATE outbox CASCADE; TRUNCATE outbox"#,
    "INSERT INTO no_columns DEFAULT VALUES",
    "SELECT pg_replication_origin_session_setup('elsewhere');
     SELECT pg_replication_origin_xact_setup('16/B374D848', '2024-02-29 12:00:00+00');
     INSERT INTO kinds VALUES (4)",
    "SELECT pg_replication_origin_session_reset()",
];

/// The transaction comes last: its commit flushes the messages before it, which no commit does for them.
const MESSAGES: [&str; 2] = [
    r"SELECT pg_logical_emit_message(false, 'größe', '\x00ff'::bytea), pg_logical_emit_message(false, '', '')",
    "SELECT pg_logical_emit_message(true, 'golden', 'in a transaction')",
];

/// What pgoutput sends for the work; with `messages` what is new in version 14 as well.
fn capture(client: &mut Client, messages: bool) -> Vec<Vec<u8>> {
    let mut read = |work: &[&str], options: &str| -> Vec<Vec<u8>> {
        for transaction in work {
            client.batch_execute(transaction).unwrap();
        }
        let get = format!(
            "SELECT data FROM pg_logical_slot_get_binary_changes('golden', NULL, NULL,
                 'proto_version', '1', 'publication_names', 'golden'{options})"
        );
        let rows = client.query(&get, &[]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    read(&TABLES, "");
    let mut captured = read(&WORK, "");
    if messages {
        captured.extend(read(&MESSAGES, ", 'messages', 'true'"));
        captured.extend(read(&WORK[1..2], ", 'binary', 'true'"));
    }
    captured
}
