//! What others set or change around the relay, and what it must not depend on or must not pass over.

use crate::operators::{capture, edit};
use crate::operators_bucket::{BUCKET, record};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, counted, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::relay::halts;
use crate::support::wait::eventually;
use serde_json::json;

const TABLE: &str =
    "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload text)";

/// The text of an id or a body is not to change with what role, database or server have set, before a start or under the relay.
#[test]
fn settings_of_the_server_change_no_id_and_no_body() {
    const SETTINGS: [&str; 5] = [
        "timezone = 'Asia/Tokyo'",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'sql_standard'",
        "extra_float_digits = 0",
        "bytea_output = 'escape'",
    ];
    for (kind, value, text) in [
        (
            "timestamptz",
            "'2026-01-02 03:04:05+00'",
            "2026-01-02 03:04:05+00",
        ),
        ("date", "'2026-02-01'", "2026-02-01"),
        ("interval", "'1 day 2 hours'", "1 day 02:00:00"),
        ("float8", "0.1::float8 + 0.2::float8", "0.30000000000000004"),
        ("bytea", r"'\x00ff5c'", r"\x00ff5c"),
    ] {
        let rig = Rig::start_with_tables(&format!(
            "CREATE TABLE outbox (id {kind}, aggregatetype text, aggregateid text, payload text)"
        ));
        let insert = format!("INSERT INTO outbox VALUES ({value}, 'a', 'b', 'c')");
        rig.pg.execute(&insert);
        rig.drain(&[]);
        let id = rig.ids().pop().expect("an event");
        assert_eq!(id, text, "{kind}");
        for setting in SETTINGS {
            rig.pg
                .execute(&format!("ALTER DATABASE postgres SET {setting}"));
        }
        // the last event is compared with what Postgres sends of it now
        rig.drain(&[]);
        assert_eq!(rig.ids(), [text], "{kind}");
    }
}

#[test]
fn a_table_whose_columns_are_renamed_while_no_relay_runs_is_not_passed_over() {
    let rig = Rig::start_with_tables(TABLE);
    let insert = |id: u64| format!("INSERT INTO outbox VALUES ('{id}', 'a', 'b', '{{}}')");
    rig.pg.execute(&insert(1));
    rig.drain(&["-hold-back", "0"]);
    rig.pg.execute(
        "ALTER TABLE outbox RENAME aggregatetype TO \"aggregateType\";
         ALTER TABLE outbox RENAME aggregateid TO \"aggregateId\"",
    );
    rig.pg.execute(&insert(2));
    for _ in 0..2 {
        halts(
            rig.relay(&[]),
            78,
            &["has not the columns of an outbox any more", "-table"],
        );
    }
    assert_eq!(rig.ids(), ["1"]);
    let flags = [
        "-aggregatetype-column",
        "aggregateType",
        "-aggregateid-column",
        "aggregateId",
    ];
    rig.drain(&flags);
    assert_eq!(rig.ids(), ["1", "2"]);
}

/// No flags fit both rows: the log says how to get past them, and that is so.
#[test]
fn a_column_that_is_renamed_within_a_transaction_can_be_passed() {
    let rig = Rig::start_with_tables(TABLE);
    rig.pg.execute(
        "BEGIN; INSERT INTO outbox VALUES ('1', 'a', 'b', 'c'); ALTER TABLE outbox RENAME payload TO body; \
         INSERT INTO outbox VALUES ('2', 'a', 'b', 'c'); ALTER TABLE outbox RENAME body TO payload; COMMIT",
    );
    rig.pg
        .execute("INSERT INTO outbox VALUES ('3', 'a', 'b', 'c')");
    let last = halts(
        rig.relay(&[]),
        65,
        &["it lacks payload", "pg_replication_slot_advance"],
    );
    let (_, advance) = last.split_once("past it: ").expect("a statement");
    let (advance, _) = advance.split_once(';').expect("its end");
    rig.pg.execute(advance);
    rig.drain(&["-resume-anyway"]);
    // what came before the change may be published by then
    let found = rig.ids();
    assert!(found == ["3"] || found == ["1", "3"], "{found:?}");
}

/// An UPDATE that a row filter lets in comes as an insert, without what it has left unchanged out of line.
#[test]
fn a_row_that_a_filter_lets_in_later_is_poison_where_its_payload_is_not_sent() {
    if Postgres::major_version() < 15 {
        return;
    }
    let rig = Rig::start_with_tables(&format!(
        "{TABLE}; ALTER TABLE outbox ADD ready bool NOT NULL; ALTER TABLE outbox ALTER id SET NOT NULL; \
         ALTER TABLE outbox ALTER payload SET STORAGE EXTERNAL; CREATE UNIQUE INDEX filtered ON outbox (id, ready); \
         ALTER TABLE outbox REPLICA IDENTITY USING INDEX filtered"
    ));
    rig.pg.execute(&format!(
        "DROP PUBLICATION {SLOT}; CREATE PUBLICATION {SLOT} FOR TABLE outbox WHERE (ready)"
    ));
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    rig.add_slot(SLOT);
    let parked = format!("{SLOT}.parked");
    capture(&mut rig.nats.client(), STREAM, &["events.>", &parked]);
    let insert = |id: u32, payload: &str, ready: bool| {
        format!("INSERT INTO outbox VALUES ('{id}', 'a', 'b', {payload}, {ready})")
    };
    rig.pg.execute(&insert(1, "repeat('x', 9000)", false));
    rig.pg.execute("UPDATE outbox SET ready = true");
    rig.pg.execute(&insert(2, "'c'", true));
    let words = ["id 1", "publish = 'insert'", "pg_replication_slot_advance"];
    halts(rig.relay(&[]), 65, &words);
    rig.drain(&["-on-poison", "park"]);
    assert_eq!(rig.ids(), ["1", "2"]);
}

/// To put the publication back brings nothing back.
#[test]
fn a_loss_that_was_seen_is_remembered_until_it_is_accepted() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    let relay = rig.relay(&[]);
    rig.wait_for_messages(1);
    rig.pg
        .execute(&format!("ALTER PUBLICATION {SLOT} DROP TABLE outbox"));
    rig.commit_event(2, "a");
    let said = "does not reach the relay any more";
    halts(relay, 78, &[said]);
    rig.pg
        .execute(&format!("ALTER PUBLICATION {SLOT} ADD TABLE outbox"));
    rig.commit_event(3, "a");
    for _ in 0..2 {
        halts(rig.relay(&[]), 78, &[said, "-resume-anyway"]);
    }
    rig.drain(&["-resume-anyway"]);
    rig.drain(&[]);
    assert_eq!(rig.ids(), [uuid(1), uuid(3)]);
}

#[test]
fn what_an_outbox_inherits_from_may_have_other_children() {
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::start(),
    };
    rig.pg.execute(&format!(
        "CREATE TABLE base (made timestamptz DEFAULT now()); {TABLE}; ALTER TABLE outbox ADD made timestamptz DEFAULT now(); \
         CREATE PUBLICATION {SLOT} FOR TABLE outbox WITH (publish = 'insert')"
    ));
    rig.add_slot(SLOT);
    rig.nats.client().add_seed_stream();
    let insert = |id: u64| format!("INSERT INTO outbox VALUES ('{id}', 'a', 'b', '{{}}')");
    rig.pg.execute(&insert(1));
    rig.drain(&[]);
    rig.pg
        .execute("ALTER TABLE outbox INHERIT base; CREATE TABLE customers () INHERITS (base)");
    rig.pg.execute(&insert(2));
    rig.drain(&[]);
    assert_eq!(rig.ids(), ["1", "2"]);
}

/// As the manual has it: drained, copied, and started under the new name.
#[test]
fn a_slot_gets_another_name_after_a_drain() {
    let rig = Rig::start();
    for number in 1..=5 {
        rig.commit_event(number, "a");
    }
    rig.drain(&["-hold-back", "0"]);
    rig.pg.execute(&format!(
        "SELECT pg_copy_logical_replication_slot('{SLOT}', 'another')"
    ));
    rig.commit_event(6, "a");
    let flags = ["-slot", "another", "-publication", SLOT];
    rig.drain(&flags);
    rig.drain(&flags);
    assert_eq!(rig.ids(), (1..=6).map(uuid).collect::<Vec<_>>());
}

/// `nats kv del` and `nats kv purge` leave a marker, as a bucket with lifetimes does.
#[test]
fn a_record_that_was_deleted_is_none() {
    for (operation, runs) in [("DEL", false), ("PURGE", false), ("DEL", true)] {
        let rig = Rig::start();
        let mut client = rig.nats.client();
        rig.commit_event(1, "a");
        rig.drain(&[]);
        let relay = runs.then(|| rig.relay(&[]));
        if let Some(relay) = &relay {
            relay.wait_for_log("connected", DEADLINE);
        }
        let (subject, _) = record(&mut client);
        client.publish(&subject, &[("KV-Operation", operation)], b"");
        rig.commit_event(2, "a");
        if relay.is_some() {
            rig.wait_for_messages(2);
            eventually("the record again", DEADLINE, || {
                let last = json!({ "last_by_subj": subject });
                let found = client.api(&format!("STREAM.MSG.GET.{BUCKET}"), &last);
                let data = found["message"]["data"].as_str();
                data.filter(|it| !it.is_empty()).map(drop).ok_or(found)
            });
        }
        drop(relay);
        rig.drain(&[]);
        assert_eq!(rig.ids(), [uuid(1), uuid(2)], "{operation}");
    }
}

#[test]
fn a_bucket_that_cannot_hold_the_record_halts_the_relay_by_name() {
    for (setting, value, part) in [
        ("sealed", json!(true), "is sealed"),
        ("no_ack", json!(true), "no_ack"),
        (
            "subject_transform",
            json!({ "src": "$KV.jetstream_outbox.>", "dest": "elsewhere.>" }),
            "subject_transform",
        ),
    ] {
        let rig = Rig::start();
        let mut client = rig.nats.client();
        rig.commit_event(1, "a");
        rig.drain(&[]);
        edit(&mut client, BUCKET, &json!({ setting: value }));
        rig.commit_event(2, "a");
        halts(rig.relay(&[]), 78, &["the key-value bucket", part]);
        // by what it says
        client.api(&format!("STREAM.DELETE.{BUCKET}"), &json!(null));
        rig.drain(&[]);
        assert_eq!(rig.ids(), [uuid(1), uuid(2)], "{setting}");
    }
}

#[test]
fn a_record_that_nats_does_not_take_halts_the_relay_by_name() {
    const STREAMS: u32 = 120;
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder().config("max_payload: 16384").build(),
    };
    rig.pg.seed_setup();
    let mut client = rig.nats.client();
    for number in 1..=STREAMS {
        client.add_stream_with(json!({
            "name": format!("EV{number}"), "subjects": [format!("events.account.{number}")]
        }));
    }
    for number in 1..=STREAMS {
        rig.commit_event(number.into(), &number.to_string());
    }
    halts(rig.relay(&[]), 78, &["max_payload", "fewer streams"]);
}

/// What was stored and is gone since is asked for again, and answered as a duplicate: nothing is late then.
#[test]
fn a_duplicate_does_not_count_as_late() {
    let rig = Rig::start();
    edit(&mut rig.nats.client(), STREAM, &json!({ "max_msgs": 1 }));
    let relay = rig.relay(&[]);
    for number in 1..=20 {
        rig.commit_event(number, "a");
    }
    let mut client = rig.nats.client();
    eventually("the events", DEADLINE, || match client.last_seq(STREAM) {
        20 => Ok(()),
        other => Err(other),
    });
    relay.kill();
    rig.commit_event(21, "a");
    let log = rig.drain(&[]);
    assert_eq!(
        (counted(&log, "late"), client.last_seq(STREAM)),
        (0, 21),
        "{log:#?}"
    );
    assert!(
        !log.iter().any(|line| line.contains("Outbox-Late")),
        "{log:#?}"
    );
}

/// A server that drops requests over its limit is asked for fewer at a time until it manages.
#[test]
fn a_server_that_drops_requests_is_read_back_all_the_same() {
    const EVENTS: u32 = 3_000;
    let rig = Rig {
        pg: Postgres::start(),
        nats: Nats::builder()
            .without_jetstream()
            .config("jetstream { store_dir: \"{dir}/store\", request_queue_limit: 8 }")
            .build(),
    };
    rig.pg.seed_setup();
    rig.nats.client().add_seed_stream();
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), 'account', 'a', '{{}}' FROM generate_series(1, {EVENTS})"
    ));
    rig.drain(&[]);
    // all of them are to be read
    let mut client = rig.nats.client();
    client.api(&format!("STREAM.DELETE.{BUCKET}"), &json!(null));
    rig.commit_event(1, "a");
    rig.drain(&[]);
    assert_eq!(rig.messages().len() as u32, EVENTS + 1);
}
