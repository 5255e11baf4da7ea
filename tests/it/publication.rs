//! What is inserted into an outbox and does not reach the relay halts it, before more rows are lost unseen.

use crate::rig::{DEADLINE, Rig, SLOT, UUID_SQL, uuid};
use crate::support::relay::{Relay, halts};
use crate::support::wait::eventually;
use serde_json::json;

const TABLE: &str = "(id uuid PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb)";

/// A change of the publication of the same name as its slot, and what is said of it.
const NARROWED: [(&str, &str, &str); 6] = [
    ("dropped", "DROP PUBLICATION {p}", "dropped was dropped:"),
    (
        "anew",
        "DROP PUBLICATION {p}; CREATE PUBLICATION {p} FOR TABLE outbox WITH (publish = 'insert')",
        "anew was dropped and created again",
    ),
    (
        "updates",
        "ALTER PUBLICATION {p} SET (publish = 'update')",
        "updates does not publish inserts any more",
    ),
    (
        "without",
        "ALTER PUBLICATION {p} SET TABLE other",
        "public.outbox is not in the publication",
    ),
    (
        "filtered",
        "ALTER PUBLICATION {p} SET TABLE outbox WHERE (aggregatetype <> 'x')",
        "filtered has a row filter for public.outbox",
    ),
    (
        "cut",
        "ALTER PUBLICATION {p} SET TABLE outbox (id, aggregatetype, aggregateid)",
        "cut leaves out column payload of public.outbox",
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
fn halts_as_rows_are_missing(relay: Relay, word: &str) {
    halts(
        relay,
        78,
        &[word, "level=error", "-resume-anyway", "compare the table"],
    );
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
    for (relay, (_, _, word)) in relays.into_iter().zip(NARROWED) {
        halts_as_rows_are_missing(relay, word);
    }
    // what an earlier process has seen counts, until it is accepted, and then what is there counts
    for (name, _, word) in NARROWED {
        match name {
            "dropped" => rig.pg.execute(&format!(
                "CREATE PUBLICATION {name} FOR TABLE outbox WITH (publish = 'insert')"
            )),
            // with these no relay works, whatever was before
            "updates" | "cut" => continue,
            _ => {}
        }
        let word = if name == "dropped" {
            "dropped was dropped and created again"
        } else {
            word
        };
        halts_as_rows_are_missing(relay(&rig, name, &["--drain"]), word);
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
        // three of them are missing or wrong at any start
        if !["dropped", "updates", "cut"].contains(&name) {
            halts_as_rows_are_missing(relay(&rig, name, &["--drain"]), word);
        }
    }
}

#[test]
fn a_publication_that_is_mistyped_is_named_and_nothing_else() {
    let rig = start(&["correct"]);
    let relay = |publication: &str| {
        let flag = format!("-publication={publication}");
        relay(&rig, "correct", &[&flag, "-drain"])
    };
    insert(&rig, "outbox", 1);
    assert_eq!(relay("correct").wait_exit(DEADLINE), 0);
    rig.pg
        .execute("CREATE PUBLICATION of_others FOR TABLE other");
    for (wrong, said) in [
        ("mistyped", "publication mistyped does not exist"),
        ("of_others", "public.outbox is not in the publication"),
    ] {
        halts(relay(wrong), 78, &[said]);
        assert_eq!(relay("correct").wait_exit(DEADLINE), 0);
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
        last.contains("public.other is not in the publication"),
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
    halts_as_rows_are_missing(rig.relay(&["--drain"]), "was dropped and created again");
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
fn halts_for_the_name(relay: Relay, code: i32, word: &str) {
    halts(relay, code, &[word, "level=error", "name both in -"]);
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
    let both = "table public.outbox is called public.letters now";
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

/// Also where nothing is written: it is looked for by what it was, not by what it is called.
#[test]
fn a_table_that_is_renamed_out_of_the_named_ones_halts_the_relay_that_runs() {
    let rig = start(&[]);
    let relay = rig.relay(&["-table", "outbox"]);
    insert(&rig, "outbox", 1);
    rig.wait_for_messages(1);
    rig.pg.execute("ALTER TABLE outbox RENAME TO letters");
    let both = "table public.outbox is called public.letters now";
    halts_for_the_name(relay, 78, both);
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
    let both = "table public.outbox is called shop.outbox now";
    for table in ["public.outbox", "shop.outbox"] {
        halts_for_the_name(rig.relay(&["-table", table, "--drain"]), 78, both);
    }
    rig.drain(&["-table", "public.outbox,shop.outbox"]);
    let ids: Vec<_> = rig.messages().iter().map(|m| m.id().to_string()).collect();
    assert_eq!(ids, [1, 2, 3].map(uuid));
}

/// What somebody does to an outbox `{p}.outbox`, so that what is inserted does not reach the publication `{p}` any more.
struct Lost {
    /// Of schema, publication and slot.
    name: &'static str,
    /// Creates the table and the publication; empty: the table alone is published.
    before: &'static str,
    /// The flags of the relay.
    args: &'static [&'static str],
    change: &'static str,
    /// What the relay says of it.
    word: &'static str,
    /// What mends it.
    fix: &'static str,
}

const PARTED: &str = "CREATE TABLE {p}.outbox (id uuid, aggregatetype text, aggregateid text, payload jsonb) \
    PARTITION BY LIST (aggregatetype); CREATE TABLE {p}.outbox_1 PARTITION OF {p}.outbox FOR VALUES IN ('account'); ";

const LOST: [Lost; 10] = [
    Lost {
        name: "renamed",
        before: "",
        args: &[],
        change: "BEGIN; ALTER TABLE {p}.outbox RENAME TO outbox_old; \
            CREATE TABLE {p}.outbox (LIKE {p}.outbox_old INCLUDING ALL); COMMIT",
        word: "renamed.outbox was renamed to renamed.outbox_old and created again, and publication renamed does not hold it",
        fix: "ALTER PUBLICATION {p} ADD TABLE {p}.outbox",
    },
    Lost {
        name: "moved",
        before: "CREATE TABLE {p}.outbox {t}; CREATE PUBLICATION {p} FOR TABLES IN SCHEMA {p} WITH (publish = 'insert')",
        args: &[],
        change: "CREATE SCHEMA archive; ALTER TABLE {p}.outbox SET SCHEMA archive",
        word: "archive.outbox is not in the publication",
        fix: "ALTER TABLE archive.outbox SET SCHEMA {p}",
    },
    Lost {
        name: "unlogged",
        before: "CREATE TABLE {p}.outbox {t}; CREATE PUBLICATION {p} FOR TABLES IN SCHEMA {p} WITH (publish = 'insert')",
        args: &[],
        change: "ALTER TABLE {p}.outbox SET UNLOGGED",
        word: "unlogged.outbox is unlogged",
        fix: "ALTER TABLE {p}.outbox SET LOGGED",
    },
    Lost {
        name: "child",
        before: "",
        args: &[],
        change: "CREATE TABLE {p}.outbox_2027 () INHERITS ({p}.outbox)",
        word: "child.outbox_2027 is not in the publication",
        fix: "ALTER PUBLICATION {p} ADD TABLE ONLY {p}.outbox_2027",
    },
    Lost {
        name: "attached",
        before: "{parted} CREATE PUBLICATION {p} FOR TABLE {p}.outbox_1 WITH (publish = 'insert')",
        args: &[],
        change: "CREATE TABLE {p}.elsewhere (LIKE {p}.outbox); ALTER TABLE {p}.outbox ATTACH PARTITION {p}.elsewhere DEFAULT",
        word: "attached.elsewhere is not in the publication",
        fix: "ALTER PUBLICATION {p} ADD TABLE {p}.outbox",
    },
    Lost {
        name: "misnamed",
        before: "{parted} CREATE PUBLICATION {p} FOR TABLE {p}.outbox WITH (publish = 'insert')",
        args: &["-table", "misnamed.outbox*"],
        change: "CREATE TABLE {p}.elsewhere (LIKE {p}.outbox); ALTER TABLE {p}.outbox ATTACH PARTITION {p}.elsewhere DEFAULT",
        word: "holds the partitions of table misnamed.outbox under their own names",
        fix: "ALTER TABLE {p}.elsewhere RENAME TO outbox_2",
    },
    Lost {
        name: "scratch",
        before: "{parted} CREATE PUBLICATION {p} FOR TABLE {p}.outbox WITH (publish = 'insert', publish_via_partition_root)",
        args: &["-table", "scratch.outbox"],
        change: "CREATE UNLOGGED TABLE {p}.outbox_2 (LIKE {p}.outbox); ALTER TABLE {p}.outbox ATTACH PARTITION {p}.outbox_2 DEFAULT",
        word: "scratch.outbox_2 is unlogged",
        fix: "ALTER TABLE {p}.outbox_2 SET LOGGED",
    },
    Lost {
        name: "remote",
        before: "{parted} CREATE PUBLICATION {p} FOR TABLE {p}.outbox WITH (publish = 'insert')",
        args: &[],
        change: "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER away FOREIGN DATA WRAPPER none; \
            CREATE FOREIGN TABLE {p}.outbox_2 PARTITION OF {p}.outbox DEFAULT SERVER away",
        word: "remote.outbox_2 is a foreign table",
        fix: "ALTER TABLE {p}.outbox DETACH PARTITION {p}.outbox_2",
    },
    Lost {
        name: "switched",
        before: "{parted} CREATE PUBLICATION {p} FOR TABLE {p}.outbox WITH (publish = 'insert', publish_via_partition_root)",
        args: &["-table", "switched.outbox"],
        change: "ALTER PUBLICATION {p} SET (publish_via_partition_root = false)",
        word: "publication switched sends the rows of switched.outbox by other names than before",
        fix: "ALTER PUBLICATION {p} SET (publish_via_partition_root = true)",
    },
    Lost {
        name: "adopted",
        before: "CREATE TABLE {p}.outbox {t}; CREATE PUBLICATION {p} FOR TABLES IN SCHEMA {p} \
            WITH (publish = 'insert', publish_via_partition_root)",
        args: &["-table", "adopted.outbox"],
        change: "CREATE TABLE {p}.events (LIKE {p}.outbox) PARTITION BY LIST (aggregatetype); \
            ALTER TABLE {p}.events ATTACH PARTITION {p}.outbox DEFAULT",
        word: "adopted.outbox come under the name of adopted.events now, which -table does not name",
        fix: "ALTER TABLE {p}.events DETACH PARTITION {p}.outbox",
    },
];

impl Lost {
    fn sql(&self, text: &str) -> String {
        let text = text.replace("{parted}", PARTED).replace("{t}", TABLE);
        text.replace("{p}", self.name)
    }

    fn set_up(&self, rig: &Rig) {
        let name = self.name;
        rig.pg.execute(&format!("CREATE SCHEMA {name}"));
        let table = "CREATE TABLE {p}.outbox {t}; CREATE PUBLICATION {p} FOR TABLE {p}.outbox WITH (publish = 'insert')";
        let before = if self.before.is_empty() {
            table
        } else {
            self.before
        };
        rig.pg.execute(&self.sql(before));
        rig.add_slot(name);
        let config = json!({ "name": name, "subjects": [format!("{name}.>")] });
        rig.nats.client().add_stream_with(config);
        insert(rig, &format!("{name}.outbox"), 1);
    }

    fn relay(&self, rig: &Rig, args: &[&str]) -> Relay {
        relay(rig, self.name, &[self.args, args].concat())
    }

    /// After the fix and `-resume-anyway` everything arrives again.
    fn mends(&self, rig: &Rig) {
        rig.pg.execute(&self.sql(self.fix));
        let found = rig.nats.client().message_count(self.name);
        insert(rig, &format!("{}.outbox", self.name), 7);
        for args in [&["--drain", "--resume-anyway"][..], &["--drain"]] {
            let mut relay = self.relay(rig, args);
            assert_eq!(
                relay.wait_exit(DEADLINE),
                0,
                "{}: {:?}",
                self.name,
                relay.log()
            );
        }
        wait_for(rig, self.name, found + 1);
    }
}

#[test]
fn an_outbox_whose_rows_do_not_come_any_more_halts_the_relay_that_runs() {
    let rig = Rig::start();
    for lost in &LOST {
        lost.set_up(&rig);
    }
    let relays: Vec<Relay> = LOST.iter().map(|lost| lost.relay(&rig, &[])).collect();
    for lost in &LOST {
        wait_for(&rig, lost.name, 1);
    }
    for lost in &LOST {
        rig.pg.execute(&lost.sql(lost.change));
    }
    for (mut relay, lost) in relays.into_iter().zip(&LOST) {
        let code = relay.wait_exit(DEADLINE);
        let last = relay.log().last().cloned().unwrap_or_default();
        assert_eq!(code, 78, "{}: {last}", lost.name);
        assert!(last.contains(lost.word), "{}: {last}", lost.name);
    }
    for lost in &LOST {
        lost.mends(&rig);
    }
}

#[test]
fn an_outbox_whose_rows_do_not_come_any_more_halts_the_next_relay() {
    let rig = Rig::start();
    for lost in &LOST {
        lost.set_up(&rig);
        let mut relay = lost.relay(&rig, &["--drain"]);
        assert_eq!(
            relay.wait_exit(DEADLINE),
            0,
            "{}: {:?}",
            lost.name,
            relay.log()
        );
        rig.pg.execute(&lost.sql(lost.change));
        for _ in 0..2 {
            let mut relay = lost.relay(&rig, &["--drain"]);
            let code = relay.wait_exit(DEADLINE);
            let last = relay.log().last().cloned().unwrap_or_default();
            assert_eq!(code, 78, "{}: {last}", lost.name);
            assert!(last.contains("fix:"), "{}: {last}", lost.name);
        }
        lost.mends(&rig);
    }
}

/// Whatever the statements look like: what is inserted arrives, so nothing halts.
#[test]
fn an_outbox_may_change_where_its_rows_still_come() {
    let rig = Rig::start_with_tables(&PARTED.replace("{p}", "public"));
    rig.pg.execute(&format!(
        "DROP PUBLICATION {SLOT}; CREATE PUBLICATION {SLOT} FOR TABLES IN SCHEMA public WITH (publish = 'insert');
         CREATE ROLE other SUPERUSER"
    ));
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    rig.add_slot(SLOT);
    let parts = "ALTER TABLE outbox ATTACH PARTITION later DEFAULT";
    for (number, change) in [
        "SELECT".to_string(),
        format!("CREATE TABLE later (LIKE outbox INCLUDING ALL); {parts}"),
        "ALTER TABLE outbox OWNER TO other".into(),
        format!("ALTER PUBLICATION {SLOT} OWNER TO other"),
        "TRUNCATE outbox".into(),
        format!("ALTER PUBLICATION {SLOT} SET (publish_via_partition_root)"),
        format!("ALTER PUBLICATION {SLOT} SET (publish = 'insert, update, delete, truncate')"),
        "TRUNCATE outbox".into(),
        "ALTER TABLE outbox DETACH PARTITION later; DROP TABLE later".into(),
        // it is in the publication from its first row on
        format!("BEGIN; DROP TABLE outbox; CREATE TABLE outbox {TABLE}; COMMIT"),
        format!("ALTER PUBLICATION {SLOT} SET TABLE outbox"),
        format!(
            "BEGIN; ALTER TABLE outbox RENAME TO outbox_old; CREATE TABLE outbox (LIKE outbox_old INCLUDING ALL); \
             ALTER PUBLICATION {SLOT} ADD TABLE outbox; COMMIT"
        ),
        "DROP TABLE outbox_old".into(),
        "CREATE VIEW letters AS SELECT * FROM outbox".into(),
    ]
    .into_iter()
    .enumerate()
    {
        rig.pg.execute(&change);
        let number = number as u64 + 1;
        insert(&rig, "outbox", number);
        let (code, log) = rig.run(&["--drain", "--hold-back", "0"]);
        assert_eq!(code, 0, "{change}: {log:#?}");
        assert_eq!(rig.messages().len() as u64, number, "{change}: {log:#?}");
    }
}

/// The statement that looks does not grow with the tables, nor does what is remembered of them.
#[test]
fn thirteen_thousand_outboxes_are_watched_and_remembered() {
    const MANY: u32 = 13_000;
    let rig = Rig::start_with(
        crate::support::postgres::Postgres::builder().setting("max_locks_per_transaction", "256"),
    );
    for part in 0..26 {
        rig.pg.execute(&format!(
            "DO $$BEGIN FOR n IN 500 * {part} + 1 .. 500 * ({part} + 1) LOOP EXECUTE format('CREATE TABLE o%s (LIKE outbox)', n); \
             END LOOP; END$$"
        ));
    }
    let publication = format!(
        "DROP PUBLICATION {SLOT}; CREATE PUBLICATION {SLOT} FOR TABLES IN SCHEMA public WITH (publish = 'insert')"
    );
    rig.pg.execute(&publication);
    rig.pg
        .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    rig.add_slot(SLOT);
    let mut relay = rig.relay(&["--hold-back", "0"]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    insert(&rig, &format!("o{MANY}"), 1);
    rig.wait_for_messages(1);
    let size = || {
        rig.nats
            .client()
            .checkpoint()
            .map(|kept| kept.to_string().len())
    };
    assert!(size().is_some_and(|size| size < 2_000), "{:?}", size());
    rig.pg.execute("ALTER TABLE o77 SET UNLOGGED");
    assert_eq!(relay.wait_exit(DEADLINE), 78, "{:?}", relay.log());
    let last = relay.log().last().cloned().unwrap_or_default();
    assert!(last.contains("public.o77 is unlogged"), "{last}");
    let (code, log) = rig.run(&["--drain"]);
    let last = log.last().cloned().unwrap_or_default();
    assert_eq!(code, 78, "{last}");
    assert!(last.contains("of 13001 outboxes some are gone"), "{last}");
    rig.pg.execute("ALTER TABLE o77 SET LOGGED");
    rig.drain(&["--resume-anyway"]);
    rig.drain(&[]);
}
