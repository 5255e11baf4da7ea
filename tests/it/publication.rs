//! A publication that is dropped, made anew or narrowed halts the relay before rows are lost unseen.

use crate::rig::{DEADLINE, Rig, SLOT, UUID_SQL, uuid};
use crate::support::relay::Relay;
use crate::support::wait::eventually;
use serde_json::json;

const TABLE: &str = "(id uuid PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb)";

/// A change of the publication of the same name as its slot, and what is said of it.
const NARROWED: [(&str, &str, &str); 7] = [
    ("dropped", "DROP PUBLICATION {p}", "was dropped;"),
    (
        "anew",
        "DROP PUBLICATION {p}; CREATE PUBLICATION {p} FOR TABLE outbox WITH (publish = 'insert')",
        "was dropped and made anew",
    ),
    (
        "updates",
        "ALTER PUBLICATION {p} SET (publish = 'update')",
        "does not publish inserts any more",
    ),
    (
        "without",
        "ALTER PUBLICATION {p} SET TABLE other",
        "does not publish public.outbox any more",
    ),
    (
        "filtered",
        "ALTER PUBLICATION {p} SET TABLE outbox WHERE (aggregatetype <> 'x')",
        "has a row filter for public.outbox",
    ),
    (
        "cut",
        "ALTER PUBLICATION {p} SET TABLE outbox (id, aggregatetype, aggregateid)",
        "leaves out columns of public.outbox",
    ),
    (
        "partitions",
        "ALTER PUBLICATION {p} SET (publish_via_partition_root)",
        "names partitions in another way",
    ),
];

/// Two outbox tables, the first of them published for each of `names`, with a slot.
fn start(names: &[&str]) -> Rig {
    let rig = Rig::start();
    rig.pg.execute(&format!("CREATE TABLE other {TABLE}"));
    for name in names {
        add_publication(&rig, name);
    }
    rig
}

fn add_publication(rig: &Rig, name: &str) {
    rig.pg.execute(&format!(
        "CREATE PUBLICATION {name} FOR TABLE outbox WITH (publish = 'insert')"
    ));
    rig.add_slot(name);
    let config = json!({ "name": name, "subjects": [format!("{name}.>")] });
    rig.nats.client().add_stream_with(config);
}

fn insert(rig: &Rig, table: &str, number: u64) {
    rig.pg.execute(&format!(
        "INSERT INTO {table} SELECT {UUID_SQL}, 'account', 'a', jsonb_build_object('n', n) FROM generate_series({number}, {number}) AS n"
    ));
}

/// For the slot of that name, under the prefix of that name.
fn relay(rig: &Rig, name: &str, args: &[&str]) -> Relay {
    rig.relay(&[&["--slot", name, "--prefix", name][..], args].concat())
}

#[track_caller]
fn wait_for(rig: &Rig, name: &str, count: u64) {
    eventually(
        &format!("{count} messages of {name}"),
        DEADLINE,
        || match rig.nats.client().message_count(name) {
            found if found == count => Ok(()),
            found => Err(found),
        },
    );
}

/// It ends, and says why and what to do.
#[track_caller]
fn halts(mut relay: Relay, name: &str, word: &str) {
    let code = relay.wait_exit(DEADLINE);
    let last = relay.log().last().cloned().unwrap_or_default();
    assert_eq!(code, 78, "{last}");
    for word in [
        &format!("{name} {word}"),
        "level=error",
        "-resume-anyway",
        "compare the table",
    ] {
        assert!(last.contains(word), "{name}: {word:?} is not in {last}");
    }
}

#[test]
fn a_publication_that_is_narrowed_while_a_relay_runs_halts_it_and_so_it_does_the_next_one() {
    let names = NARROWED.map(|(name, ..)| name);
    let rig = start(&names);
    insert(&rig, "outbox", 1);
    let relays = names.map(|name| relay(&rig, name, &["--hold-back", "0"]));
    for name in names {
        wait_for(&rig, name, 1);
    }
    for (name, change, _) in NARROWED {
        rig.pg.execute(&change.replace("{p}", name));
    }
    for (relay, (name, _, word)) in relays.into_iter().zip(NARROWED) {
        halts(relay, name, word);
    }
    // what an earlier process has seen counts, until it is accepted, and then what is there counts
    for (name, _, word) in NARROWED {
        match name {
            "dropped" => rig.pg.execute(&format!(
                "CREATE PUBLICATION {name} FOR TABLE outbox WITH (publish = 'insert')"
            )),
            // another check says that, at each start
            "updates" => continue,
            _ => {}
        }
        let word = if name == "dropped" {
            "was dropped and made anew"
        } else {
            word
        };
        halts(relay(&rig, name, &["--drain"]), name, word);
        for args in [&["--drain", "--resume-anyway"][..], &["--drain"]] {
            let mut relay = relay(&rig, name, args);
            assert_eq!(relay.wait_exit(DEADLINE), 0, "{name}: {:?}", relay.log());
        }
    }
}

#[test]
fn a_publication_that_is_narrowed_while_no_relay_runs_halts_the_next_one() {
    let names = NARROWED.map(|(name, ..)| name);
    let rig = start(&names);
    insert(&rig, "outbox", 1);
    for name in names {
        let mut relay = relay(&rig, name, &["--drain"]);
        assert_eq!(relay.wait_exit(DEADLINE), 0, "{name}: {:?}", relay.log());
    }
    for (name, change, word) in NARROWED {
        rig.pg.execute(&change.replace("{p}", name));
        // two of them are missing or wrong at any start
        if !["dropped", "updates"].contains(&name) {
            halts(relay(&rig, name, &["--drain"]), name, word);
        }
    }
}

/// More is published, less of what is no outbox, and a table is dropped: none of it loses an event.
#[test]
fn a_publication_may_grow_and_shrink_where_nothing_is_lost() {
    let rig = start(&[]);
    rig.pg.execute(&format!(
        "CREATE TABLE users (id int PRIMARY KEY); CREATE TABLE old {TABLE};
         ALTER PUBLICATION {SLOT} ADD TABLE users, old"
    ));
    let mut relay = rig.relay(&[]);
    insert(&rig, "outbox", 1);
    rig.wait_for_messages(1);
    rig.pg.execute(&format!(
        "ALTER PUBLICATION {SLOT} ADD TABLE other; ALTER PUBLICATION {SLOT} DROP TABLE users; DROP TABLE old"
    ));
    insert(&rig, "other", 2);
    rig.wait_for_messages(2);
    // the table that came later counts as well, once it was seen
    let remembers = || {
        let kept = rig.nats.client().checkpoint();
        let kept = kept.map(|kept| kept["publication"].to_string());
        kept.is_some_and(|kept| kept.contains("other") && !kept.contains("old"))
    };
    eventually("the new table to be remembered", DEADLINE, remembers);
    assert!(relay.is_running());
    rig.pg
        .execute(&format!("ALTER PUBLICATION {SLOT} DROP TABLE other"));
    assert_eq!(relay.wait_exit(DEADLINE), 78, "{:?}", relay.log());
    let last = relay.log().last().cloned().unwrap_or_default();
    assert!(
        last.contains("does not publish public.other any more"),
        "{last}"
    );
    let ids: Vec<_> = rig.messages().iter().map(|m| m.id().to_string()).collect();
    assert_eq!(ids, [uuid(1), uuid(2)]);
}

/// Whoever may not look, or cannot at the moment, is not stopped by it, nor is a relay that is to stop.
#[test]
fn a_look_that_fails_ends_nothing() {
    let rig = Rig::start();
    rig.pg.execute("CREATE ROLE narrow LOGIN REPLICATION");
    let db = rig.pg.url("narrow", "postgres");
    let mut relay = rig.relay(&["-db", &db, "--logging", "debug"]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    // it does not count replication
    rig.pg.execute("ALTER ROLE narrow CONNECTION LIMIT 0");
    relay.wait_for_log("cannot look", DEADLINE);
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
}

/// What was read before is published to its end; it comes again, should somebody put the publication back.
#[test]
fn nothing_is_confirmed_once_a_publication_was_seen_to_be_narrowed() {
    let rig = start(&[]);
    let mut relay = rig.relay(&["--hold-back", "0", "--ack-timeout", "60s"]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    rig.nats.freeze();
    let before = rig.pg.current_wal_lsn();
    insert(&rig, "outbox", 1);
    rig.pg
        .execute(&format!("ALTER PUBLICATION {SLOT} SET TABLE other"));
    relay.wait_for_log("nothing more is confirmed", DEADLINE);
    rig.nats.thaw();
    assert_eq!(relay.wait_exit(DEADLINE), 78);
    assert_eq!(rig.messages().len(), 1);
    let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
    assert!(confirmed <= before, "{confirmed} {before}");
}

/// Postgres decodes with the catalog of the time of writing, so that the publication stays missing there.
#[test]
fn what_was_written_without_the_publication_halts_the_relay_until_the_slot_is_moved_past_it() {
    let rig = start(&[]);
    insert(&rig, "outbox", 1);
    let mut relay = rig.relay(&["--hold-back", "0"]);
    rig.wait_for_messages(1);
    rig.pg.execute(&format!("DROP PUBLICATION {SLOT}"));
    insert(&rig, "outbox", 2);
    let advice = format!("SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn());");
    let missing = |code: i32, log: &[String]| {
        let last = log.last().cloned().unwrap_or_default();
        assert_eq!(code, 78, "{last}");
        for word in ["leaves the publication's rows out", SLOT, &advice] {
            assert!(last.contains(word), "{word:?} is not in {last}");
        }
    };
    let code = relay.wait_exit(DEADLINE);
    missing(code, &relay.log());
    rig.pg.execute(&format!(
        "CREATE PUBLICATION {SLOT} FOR TABLE outbox WITH (publish = 'insert')"
    ));
    insert(&rig, "outbox", 3);
    halts(rig.relay(&["--drain"]), SLOT, "was dropped and made anew");
    let (code, log) = rig.run(&["--drain", "--resume-anyway"]);
    missing(code, &log);
    rig.pg.execute(&advice);
    insert(&rig, "outbox", 4);
    rig.drain(&["--resume-anyway"]);
    rig.drain(&[]);
    let ids: Vec<_> = rig.messages().iter().map(|m| m.id().to_string()).collect();
    assert_eq!(
        ids,
        [uuid(1), uuid(4)],
        "the second and the third are the person's"
    );
}

/// It ends with this code, and says where the table's events are and how to get them.
#[track_caller]
fn halts_for_the_name(mut relay: Relay, code: i32, word: &str) {
    let found = relay.wait_exit(DEADLINE);
    let last = relay.log().last().cloned().unwrap_or_default();
    assert_eq!(found, code, "{last}");
    for word in [word, "level=error", "name both in -"] {
        assert!(last.contains(word), "{word:?} is not in {last}");
    }
}

/// Rows come under the name that their table had when they were written.
#[test]
fn a_table_that_is_renamed_out_of_the_named_ones_halts_the_relay_until_both_names_are_given() {
    let rig = start(&[]);
    let relay = rig.relay(&["-table", "outbox"]);
    insert(&rig, "outbox", 1);
    rig.wait_for_messages(1);
    rig.pg.execute(&format!(
        "BEGIN; ALTER TABLE outbox RENAME TO letters; \
         INSERT INTO letters VALUES ('{}', 'account', 'a', '{{\"n\": 2}}'); COMMIT",
        uuid(2)
    ));
    let said = r#"it was \"public\".\"outbox\" before"#;
    halts_for_the_name(relay, 65, said);
    // the next one knows it from what was seen, with whatever one name
    let both = "has a table public.outbox that is called public.letters now";
    for table in ["outbox", "letters"] {
        halts_for_the_name(rig.relay(&["-table", table, "--drain"]), 78, both);
    }
    insert(&rig, "letters", 3);
    rig.drain(&["-table", "outbox,letters"]);
    // from then on it is called so
    insert(&rig, "letters", 4);
    rig.drain(&["-table", "letters"]);
    let ids: Vec<_> = rig.messages().iter().map(|m| m.id().to_string()).collect();
    assert_eq!(ids, [1, 2, 3, 4].map(uuid));
}

#[test]
fn a_table_that_is_moved_to_another_schema_while_no_relay_runs_halts_the_next_one() {
    let rig = start(&[]);
    insert(&rig, "outbox", 1);
    rig.drain(&["-table", "public.outbox"]);
    insert(&rig, "outbox", 2);
    rig.pg
        .execute("CREATE SCHEMA shop; ALTER TABLE outbox SET SCHEMA shop");
    insert(&rig, "shop.outbox", 3);
    let both = "has a table public.outbox that is called shop.outbox now";
    for table in ["public.outbox", "shop.outbox"] {
        halts_for_the_name(rig.relay(&["-table", table, "--drain"]), 78, both);
    }
    rig.drain(&["-table", "public.outbox,shop.outbox"]);
    let ids: Vec<_> = rig.messages().iter().map(|m| m.id().to_string()).collect();
    assert_eq!(ids, [1, 2, 3].map(uuid));
}
