//! What operators and developers do to an outbox, its publication and what is around them: what is inserted goes on to arrive,
//! or the relay halts and says why.

use crate::rig::{DEADLINE, Rig, SLOT, uuid};
use crate::support::postgres::Postgres;
use crate::support::relay::{Relay, halts};
use crate::support::wait::{eventually, secs, throughout};
use serde_json::json;

const COLUMNS: &str =
    "(id uuid PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb, note text)";
/// The slot, the prefix and the stream of the relay that runs all the time.
const RUNNING: &str = "running";

/// An outbox with two relays: one that runs all the time, and one that starts after each change and compares with what the one
/// before it remembers.
struct Altered {
    rig: Rig,
    args: &'static [&'static str],
    relay: Relay,
    expected: Vec<String>,
}

impl Altered {
    /// `before` creates the table and the publication `{p}`.
    #[track_caller]
    fn start(before: &str, args: &'static [&'static str]) -> Altered {
        let rig = Rig::start();
        rig.pg
            .execute(&format!("DROP PUBLICATION {SLOT}; DROP TABLE outbox"));
        rig.pg
            .execute(&before.replace("{t}", COLUMNS).replace("{p}", SLOT));
        rig.pg
            .execute(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
        rig.add_slot(SLOT);
        rig.add_slot(RUNNING);
        let config = json!({ "name": RUNNING, "subjects": [format!("{RUNNING}.>")] });
        rig.nats.client().add_stream_with(config);
        let flags = ["-slot", RUNNING, "-prefix", RUNNING, "-publication", SLOT];
        let relay = rig.relay(&[&flags[..], args].concat());
        relay.wait_for_log("msg=\"connected\"", DEADLINE);
        Altered {
            rig,
            args,
            relay,
            expected: Vec::new(),
        }
    }

    /// The statements run one by one, and what is inserted then arrives by both relays.
    #[track_caller]
    fn passes(&mut self, change: &str, table: &str) {
        let mut client = self.rig.pg.client();
        for statement in change.split("; ") {
            let done = client.batch_execute(&statement.replace("{p}", SLOT));
            done.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        self.insert(table);
        self.arrives(change);
    }

    fn insert(&mut self, table: &str) {
        let id = uuid(self.expected.len() as u64 + 1);
        self.rig.pg.execute(&format!(
            "INSERT INTO {table} (id, aggregatetype, aggregateid, payload) VALUES ('{id}', 'account', 'a', '{{}}')"
        ));
        self.expected.push(id);
    }

    #[track_caller]
    fn arrives(&mut self, change: &str) {
        let (code, log) = self
            .rig
            .run(&[&["-drain", "-hold-back", "0"][..], self.args].concat());
        assert_eq!(code, 0, "{change}: {log:#?}");
        assert_eq!(self.rig.ids(), self.expected, "{change}: {log:#?}");
        eventually(&format!("the other relay after {change}"), DEADLINE, || {
            let count = self.rig.nats.client().message_count(RUNNING);
            match count == self.expected.len() as u64 {
                true => Ok(()),
                false => Err((count, self.relay.log())),
            }
        });
    }

    /// The relay that ran all the time has seen the last of it, and still runs.
    #[track_caller]
    fn ends_well(mut self) {
        let mut messages = self.rig.nats.client().read_all(RUNNING).into_iter();
        let ids: Vec<String> = messages.by_ref().map(|it| it.id().to_string()).collect();
        assert_eq!(ids, self.expected);
        self.relay.term();
        assert_eq!(self.relay.wait_exit(DEADLINE), 0, "{:#?}", self.relay.log());
    }
}

/// The text of a filter has the names of columns; what it lets through follows them when they are renamed.
#[test]
fn what_a_row_filter_is_about_may_be_renamed() {
    if Postgres::major_version() < 15 {
        return;
    }
    let mut altered = Altered::start(
        "CREATE TABLE outbox {t}; \
         CREATE PUBLICATION {p} FOR TABLE outbox WHERE (note IS NULL OR lower(note) <> 'x') WITH (publish = 'insert')",
        &[],
    );
    for (change, table) in [
        ("SELECT", "outbox"),
        ("ALTER TABLE outbox RENAME COLUMN note TO remark", "outbox"),
        (
            "ALTER TABLE outbox DROP COLUMN payload, ADD COLUMN payload jsonb",
            "outbox",
        ),
        ("ALTER TABLE outbox RENAME TO letters", "letters"),
        (
            "ALTER SCHEMA public RENAME TO shop; CREATE SCHEMA public",
            "shop.letters",
        ),
        ("ALTER TABLE shop.letters SET SCHEMA public", "letters"),
        (
            "ALTER DATABASE postgres SET standard_conforming_strings = off",
            "letters",
        ),
        // the same once more
        (
            "ALTER PUBLICATION {p} SET TABLE letters WHERE (  remark IS NULL OR lower(remark) <> 'x'  )",
            "letters",
        ),
    ] {
        altered.passes(change, table);
    }
    altered.ends_well();
}

/// A list of columns follows them when they are renamed.
#[test]
fn what_a_list_of_columns_is_about_may_be_renamed() {
    if Postgres::major_version() < 15 {
        return;
    }
    let mut altered = Altered::start(
        "CREATE TABLE outbox {t}; \
         CREATE PUBLICATION {p} FOR TABLE outbox (id, aggregatetype, aggregateid, payload, note) WITH (publish = 'insert')",
        &[],
    );
    for (change, table) in [
        ("SELECT", "outbox"),
        ("ALTER TABLE outbox RENAME COLUMN note TO remark", "outbox"),
        ("ALTER TABLE outbox ADD COLUMN later text", "outbox"),
        ("ALTER TABLE outbox RENAME TO letters", "letters"),
        (
            "ALTER SCHEMA public RENAME TO shop; CREATE SCHEMA public",
            "shop.letters",
        ),
        (
            "ALTER PUBLICATION {p} SET TABLE shop.letters (payload, id, aggregatetype, aggregateid)",
            "shop.letters",
        ),
    ] {
        altered.passes(change, table);
    }
    altered.ends_well();
}

/// Nothing is published as long as there is no partition, and all that is inserted once there is one.
#[test]
fn the_first_partition_may_come_under_a_running_relay() {
    const PARTED: &str = "CREATE TABLE outbox (id uuid, aggregatetype text, aggregateid text, payload jsonb) PARTITION BY RANGE (id); ";
    for (how, args) in [
        ("FOR TABLE outbox", &[][..]),
        ("FOR TABLE outbox", &["-table=outbox*"]),
        ("FOR ALL TABLES", &[]),
        ("FOR ALL TABLES", &["-table=outbox*"]),
        ("FOR TABLE outbox", &["-table=outbox,outbox_1,outbox_2"]),
    ] {
        for root in ["", ", publish_via_partition_root"] {
            let publication =
                format!("CREATE PUBLICATION {{p}} {how} WITH (publish = 'insert'{root})");
            let mut altered = Altered::start(&(PARTED.to_string() + &publication), args);
            altered.arrives("no partition yet");
            let first = "CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM (MINVALUE) TO ('00000000-0000-0000-0000-000000000002')";
            altered.passes(first, "outbox");
            altered.passes(
                "CREATE TABLE outbox_2 PARTITION OF outbox DEFAULT",
                "outbox",
            );
            // and none again
            altered.passes("DROP TABLE outbox_1", "outbox");
            altered.rig.pg.execute("DROP TABLE outbox_2");
            altered.arrives("no partition again");
            altered.passes(
                "CREATE TABLE outbox_1 PARTITION OF outbox DEFAULT",
                "outbox",
            );
            altered.ends_well();
        }
    }
}

/// None of it changes what a row says, or whether it comes.
#[test]
fn a_table_may_be_rewritten_and_guarded() {
    let mut altered = Altered::start(
        "CREATE TABLE outbox {t}; CREATE PUBLICATION {p} FOR TABLE outbox WITH (publish = 'insert')",
        &[],
    );
    for change in [
        "ALTER TABLE outbox ALTER payload TYPE json",
        "ALTER TABLE outbox ALTER payload TYPE text",
        "ALTER TABLE outbox ALTER payload TYPE bytea USING payload::bytea",
        "ALTER TABLE outbox ALTER payload TYPE jsonb USING convert_from(payload, 'UTF8')::jsonb",
        "ALTER TABLE outbox ALTER id TYPE text",
        "ALTER TABLE outbox ALTER id TYPE uuid USING id::uuid",
        "ALTER TABLE outbox DROP COLUMN payload, ADD COLUMN payload jsonb",
        "CLUSTER outbox USING outbox_pkey",
        "VACUUM FULL outbox",
        "VACUUM FULL pg_class",
        "REINDEX TABLE outbox",
        "TRUNCATE outbox",
        "ALTER TABLE outbox SET (fillfactor = 50)",
        "ALTER TABLE outbox REPLICA IDENTITY FULL",
        "ALTER TABLE outbox REPLICA IDENTITY NOTHING",
        "ALTER TABLE outbox REPLICA IDENTITY USING INDEX outbox_pkey",
        "ALTER TABLE outbox REPLICA IDENTITY DEFAULT",
        "ALTER TABLE outbox ENABLE ROW LEVEL SECURITY; ALTER TABLE outbox FORCE ROW LEVEL SECURITY",
        "CREATE POLICY nobody ON outbox USING (false)",
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no';END$$",
        "CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()",
        "DROP EVENT TRIGGER refuse",
        "CREATE RULE log AS ON INSERT TO outbox DO ALSO SELECT 1",
        "DROP RULE log ON outbox",
        "ALTER TABLE outbox ADD COLUMN headers jsonb",
        "ALTER TABLE outbox DROP COLUMN headers",
        "CREATE TABLE parent (LIKE outbox); ALTER TABLE outbox INHERIT parent",
        "ALTER TABLE outbox NO INHERIT parent",
        "ALTER DATABASE postgres SET search_path = 'nowhere'; ALTER DATABASE postgres RESET search_path",
        "SELECT pg_replication_origin_create('elsewhere')",
    ] {
        altered.passes(change, "outbox");
    }
    if Postgres::major_version() >= 19 {
        altered.passes("REPACK outbox", "outbox");
        altered.passes("REPACK (CONCURRENTLY) outbox", "outbox");
    }
    // what came by another subscription, of which the stream says so
    let id = uuid(altered.expected.len() as u64 + 1);
    altered.rig.pg.execute(&format!(
        "SELECT pg_replication_origin_session_setup('elsewhere'); \
         INSERT INTO outbox (id, aggregatetype, aggregateid, payload) VALUES ('{id}', 'account', 'a', '{{}}')"
    ));
    altered.expected.push(id);
    altered.arrives("an origin");
    // and all within one transaction
    let mut statements = String::from("BEGIN;");
    for change in [
        "SELECT",
        "ALTER TABLE outbox ALTER payload TYPE text",
        "ALTER TABLE outbox RENAME COLUMN note TO remark",
        "ALTER TABLE outbox ADD COLUMN note text",
        "TRUNCATE outbox",
        "ALTER TABLE outbox ALTER payload TYPE jsonb USING payload::jsonb",
    ] {
        let id = uuid(altered.expected.len() as u64 + 1);
        statements += &format!(
            "{change}; INSERT INTO outbox (id, aggregatetype, aggregateid, payload) VALUES ('{id}', 'account', 'a', '{{}}');"
        );
        altered.expected.push(id);
    }
    altered.rig.pg.execute(&(statements + "COMMIT"));
    altered.arrives("one transaction");
    let bodies = altered.rig.messages().into_iter();
    for message in bodies {
        assert_eq!(message.text(), "{}");
    }
    altered.ends_well();
}

/// That Postgres leaves a publication out is a warning since 18, which nothing may hide.
#[test]
fn settings_of_the_database_hide_no_warning() {
    let mut altered = Altered::start(
        "CREATE TABLE outbox {t}; CREATE PUBLICATION {p} FOR TABLE outbox WITH (publish = 'insert'); \
         ALTER DATABASE postgres SET client_min_messages = 'error'",
        &[],
    );
    altered.passes("SELECT", "outbox");
    altered.rig.pg.execute(&format!("DROP PUBLICATION {SLOT}"));
    altered.insert("outbox");
    altered.rig.pg.execute(&format!(
        "CREATE PUBLICATION {SLOT} FOR TABLE outbox WITH (publish = 'insert')"
    ));
    let (code, log) = altered.rig.run(&["-drain", "-resume-anyway"]);
    let last = log.last().cloned().unwrap_or_default();
    assert_eq!(code, 78, "{last}");
    assert!(last.contains("leaves the publication's rows out"), "{last}");
}

/// A session that waits for NATS before it streams is none that may be ended.
#[test]
fn a_session_that_is_idle_is_not_ended_by_the_databases_settings() {
    if Postgres::major_version() < 14 {
        return;
    }
    let rig = Rig::start();
    rig.pg
        .execute("ALTER DATABASE postgres SET idle_session_timeout = '200ms'");
    rig.nats.freeze();
    let relay = rig.relay(&["-nats-connect-timeout", "2s"]);
    relay.wait_for_log("trying again", DEADLINE);
    rig.nats.thaw();
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    assert!(!rig.pg.log().contains("idle-session timeout"));
}

/// The relay reports in time whatever the setting was when it began, also while it reads nothing as NATS takes nothing.
#[test]
fn the_servers_timeout_may_change_under_a_running_relay() {
    let rig = Rig::start();
    let mut relay = rig.relay(&["-ack-timeout", "60s"]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    let mut count = 0;
    for timeout in ["0", "1s", "0", "60s", "1s"] {
        rig.pg.execute(&format!(
            "ALTER SYSTEM SET wal_sender_timeout = '{timeout}'"
        ));
        rig.pg.execute("SELECT pg_reload_conf()");
        rig.nats.freeze();
        // more than the relay takes before it is told that they are stored
        count += 10_000;
        rig.pg.execute(
            "INSERT INTO outbox SELECT gen_random_uuid(), 'account', 'a', to_jsonb(repeat('x', 1000)) FROM generate_series(1, 10000)"
        );
        throughout("the relay runs", secs(3), || relay.is_running());
        rig.nats.thaw();
        rig.wait_for_messages(count);
    }
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0, "{:#?}", relay.log());
    let messages = rig.messages().len() as u64;
    assert_eq!(messages, count);
    // the first time it is as short as that; from then on it is known
    let log = rig.pg.log();
    let ended = log.matches("terminating walsender process due to replication timeout");
    assert_eq!(ended.count(), 1, "{log}");
}

/// It goes on under the new name, with all that was committed meanwhile.
#[test]
fn a_database_that_is_renamed_is_named() {
    let rig = Rig::start();
    rig.pg.execute("CREATE DATABASE shop");
    let run = |db: &str, sql: &str| {
        let client = rig.pg.client_of(db);
        client.expect(db).batch_execute(sql).expect(sql);
    };
    let table =
        "CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload jsonb)";
    run("shop", table);
    run(
        "shop",
        "CREATE PUBLICATION p FOR TABLE outbox WITH (publish = 'insert')",
    );
    run(
        "shop",
        "SELECT pg_create_logical_replication_slot('shop', 'pgoutput')",
    );
    let relay = |db: &str, args: &[&str]| {
        let db = rig.pg.url("postgres", db);
        let flags = [
            "-db",
            &db,
            "-slot",
            "shop",
            "-publication",
            "p",
            "-hold-back",
            "0",
        ];
        rig.relay(&[&flags[..], args].concat())
    };
    let insert = |db: &str, id: u32| {
        run(
            db,
            &format!("INSERT INTO outbox VALUES ('{id}', 'a', 'b', '{{}}')"),
        );
    };
    let mut runs = relay("shop", &[]);
    insert("shop", 1);
    rig.wait_for_messages(1);
    eventually("the database to be renamed", DEADLINE, || {
        rig.pg.terminate_walsender();
        let mut client = rig.pg.client();
        client.batch_execute("ALTER DATABASE shop RENAME TO store")
    });
    halts(&mut runs, 78, &["database \\\"shop\\\" does not exist"]);
    insert("store", 2);
    // another one that is called so is no help
    run("postgres", "CREATE DATABASE shop TEMPLATE store");
    halts(
        relay("shop", &["-drain"]),
        78,
        &["slot shop belongs to database store"],
    );
    let mut runs = relay("store", &["-drain"]);
    assert_eq!(runs.wait_exit(DEADLINE), 0, "{:#?}", runs.log());
    assert_eq!(rig.ids(), ["1", "2"]);
}

/// Nothing of what is stored is taken for another event, whatever its id is called by now.
#[test]
fn what_an_id_is_made_of_may_be_renamed() {
    for (kind, value, text, change) in [
        (
            "mood",
            "'sad'",
            "sad",
            "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
        ),
        (
            "pair",
            "'(1,a)'",
            "(1,a)",
            "ALTER TYPE pair ADD ATTRIBUTE more int CASCADE",
        ),
        (
            "regclass",
            "'things'",
            "things",
            "ALTER TABLE things RENAME TO stuff",
        ),
        (
            "regtype",
            "'mood'",
            "mood",
            "ALTER TYPE mood RENAME TO temper",
        ),
        (
            "regrole",
            "'svc'",
            "svc",
            "ALTER ROLE svc RENAME TO service",
        ),
        ("regclass", "'things'", "things", "DROP TABLE things"),
        (
            "money",
            "1.5",
            "$1.50",
            "ALTER DATABASE postgres SET lc_monetary = 'C.UTF-8'",
        ),
    ] {
        let rig = Rig::start_with_tables(&format!(
            "CREATE ROLE svc; CREATE TABLE things (); CREATE TYPE mood AS ENUM ('sad'); CREATE TYPE pair AS (n int, t text); \
             CREATE TABLE outbox (id {kind}, aggregatetype text, aggregateid text, payload text)"
        ));
        rig.pg.execute(&format!(
            "INSERT INTO outbox VALUES ({value}, 'a', 'b', 'c')"
        ));
        rig.drain(&["-hold-back", "0"]);
        rig.pg.execute(change);
        for _ in 0..2 {
            let (code, log) = rig.run(&["-drain", "-hold-back", "0"]);
            assert_eq!(code, 0, "{change}: {log:#?}");
        }
        assert_eq!(rig.ids(), [text], "{change}");
    }
}

/// What an administrator does to keep the relay out, the code it ends with unless it waits to be let in again, what it says, and how
/// it is.
const SHUT_OUT: [(&str, Option<i32>, &str, &str); 6] = [
    (
        "ALTER ROLE svc NOLOGIN",
        None,
        "not permitted to log in",
        "ALTER ROLE svc LOGIN",
    ),
    (
        "ALTER ROLE svc NOREPLICATION",
        Some(78),
        "the role needs REPLICATION",
        "ALTER ROLE svc REPLICATION",
    ),
    (
        "ALTER ROLE svc RENAME TO other",
        None,
        "role \\\"svc\\\" does not exist",
        "ALTER ROLE other RENAME TO svc",
    ),
    (
        "REVOKE CONNECT ON DATABASE shop FROM PUBLIC",
        Some(78),
        "permission denied for database",
        "GRANT CONNECT ON DATABASE shop TO PUBLIC",
    ),
    (
        "ALTER DATABASE shop ALLOW_CONNECTIONS false",
        Some(78),
        "not currently accepting connections",
        "ALTER DATABASE shop ALLOW_CONNECTIONS true",
    ),
    (
        "ALTER DATABASE shop CONNECTION LIMIT 0",
        None,
        "too many connections for database",
        "ALTER DATABASE shop CONNECTION LIMIT -1",
    ),
];

#[test]
fn who_is_kept_out_says_so_and_goes_on_later() {
    let rig = Rig::start();
    rig.pg
        .execute("CREATE ROLE svc LOGIN REPLICATION; CREATE ROLE writer SUPERUSER LOGIN");
    rig.pg.execute("CREATE DATABASE shop");
    let mut shop = rig.pg.client_of("shop").expect("shop");
    let mut run = |sql: &str| shop.batch_execute(sql).expect(sql);
    run("CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload jsonb)");
    run("CREATE PUBLICATION p FOR TABLE outbox WITH (publish = 'insert')");
    run("SELECT pg_create_logical_replication_slot('shop', 'pgoutput')");
    let db = rig.pg.url("svc", "shop");
    let flags = [
        "-db",
        &db,
        "-slot",
        "shop",
        "-publication",
        "p",
        "-hold-back",
        "0",
    ];
    let relay = |args: &[&str]| rig.relay(&[&flags[..], args].concat());
    for (number, (change, code, word, undo)) in SHUT_OUT.into_iter().enumerate() {
        let mut runs = relay(&[]);
        runs.wait_for_log("msg=\"connected\"", DEADLINE);
        rig.pg.execute(change);
        run(&format!(
            "INSERT INTO outbox VALUES ('{number}', 'a', 'b', '{{}}')"
        ));
        rig.wait_for_messages(number as u64 + 1);
        rig.pg.terminate_walsender();
        match code {
            Some(code) => drop(halts(&mut runs, code, &[word])),
            None => drop(runs.wait_for_log(word, DEADLINE)),
        }
        rig.pg.execute(undo);
        if code.is_none() {
            runs.term();
            assert_eq!(runs.wait_exit(DEADLINE), 0, "{:#?}", runs.log());
        }
        let mut runs = relay(&["-drain"]);
        assert_eq!(runs.wait_exit(DEADLINE), 0, "{undo}: {:#?}", runs.log());
    }
    assert_eq!(rig.ids(), ["0", "1", "2", "3", "4", "5"]);
}

/// A trigger on logging in refuses the relay for a while.
#[test]
fn a_login_trigger_that_refuses_is_named_and_waited_for() {
    if Postgres::major_version() < 17 {
        return;
    }
    let rig = Rig::start();
    rig.pg.execute("CREATE ROLE svc LOGIN REPLICATION");
    let db = rig.pg.url("svc", "postgres");
    let relay = rig.relay(&["-db", &db]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    rig.pg.execute(
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS \
         $$BEGIN IF session_user = 'svc' THEN RAISE EXCEPTION 'closed for tonight'; END IF; END$$; \
         CREATE EVENT TRIGGER refuse ON login EXECUTE FUNCTION refuse(); ALTER EVENT TRIGGER refuse ENABLE ALWAYS",
    );
    rig.commit_event(1, "a");
    rig.wait_for_messages(1);
    rig.pg.terminate_walsender();
    relay.wait_for_log("closed for tonight", DEADLINE);
    rig.pg.execute("DROP EVENT TRIGGER refuse");
    rig.commit_event(2, "a");
    rig.wait_for_messages(2);
    assert!(relay.is_running());
}
