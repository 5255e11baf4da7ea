//! `setup`, `teardown`, and what `setup` prints for administrators.

use crate::check_postgres::{check, finding};
use crate::command::{Ended, on, run, servers};
use crate::rig::{DEADLINE, Rig, SLOT, STREAM};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::process::Process;
use crate::support::relay::Relay;
use jetstream_outbox::postgres::identifier::identifier;
use serde_json::{Value, json};
use std::process::{Command, Stdio};

/// Nothing is there yet.
fn bare() -> Rig {
    Rig {
        pg: Postgres::start(),
        nats: Nats::start(),
    }
}

/// The first word of each line.
fn outcomes(ended: &Ended) -> Vec<&str> {
    let lines = ended.stdout.lines();
    lines
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

#[test]
fn setup_makes_all_that_the_relay_needs_and_finds_it_the_next_time() {
    let rig = bare();
    let first = on(
        &rig,
        &["setup", "--max-age", "24h", "--duplicate-window", "5m"],
    );
    first.with(0);
    assert_eq!(outcomes(&first), ["created"; 6], "{first:?}");
    let config = &rig.nats.client().stream_info(STREAM)["config"];
    for (name, value) in [
        ("subjects", json!(["events.>"])),
        ("storage", json!("file")),
        ("num_replicas", json!(1)),
        ("max_age", json!(86_400_000_000_000_u64)),
        ("duplicate_window", json!(300_000_000_000_u64)),
    ] {
        assert_eq!(config[name], value, "{name}");
    }
    assert_eq!(
        rig.pg.scalar::<bool>(
            "SELECT pubinsert AND NOT pubupdate AND NOT pubdelete FROM pg_publication"
        ),
        Some(true)
    );
    rig.commit_event(1, "a");
    rig.drain(&["--hold-back", "0"]);
    assert_eq!(rig.subjects(), ["events.account.a"]);

    let confirmed = rig.pg.confirmed_flush_lsn(SLOT);
    let second = on(&rig, &["setup"]);
    second.with(0);
    assert_eq!(outcomes(&second), ["found"; 6], "{second:?}");
    assert_eq!(rig.pg.confirmed_flush_lsn(SLOT), confirmed);
    assert_eq!(rig.messages().len(), 1);
}

#[test]
fn setup_takes_the_relays_names() {
    let rig = bare();
    let flags = [
        "-slot",
        "orders",
        "-publication",
        "Orders of all",
        "-prefix",
        "shop.v1",
        "-table",
        "orders,\"My\".\"Outbox\"",
        "-checkpoint",
        "shop",
        "-logging=debug",
    ];
    rig.pg.execute("CREATE SCHEMA \"My\"");
    let ended = on(
        &rig,
        &[&flags[..], &["setup", "-stream", "ORDERS"]].concat(),
    );
    assert_eq!(
        ended.with(0),
        "created  stream ORDERS of shop.v1.>\ncreated  checkpoint bucket shop\ncreated  table orders\ncreated  table \"My\".\"Outbox\"\n\
         created  function outbox_publish\ncreated  publication \"Orders of all\"\ncreated  slot orders\n"
    );
    let tables = "SELECT string_agg(schemaname || '.' || tablename, ' ' ORDER BY 1) FROM pg_publication_tables";
    assert_eq!(
        rig.pg.scalar::<String>(tables).as_deref(),
        Some("public.orders My.Outbox")
    );
    rig.pg
        .execute("INSERT INTO \"My\".\"Outbox\" VALUES (gen_random_uuid(), 'order', '7', '{}')");
    rig.drain(&flags);
    assert_eq!(rig.nats.client().read_all("ORDERS").len(), 1);
}

/// The manual's example: one of its columns is called by a reserved word.
#[test]
fn setup_quotes_what_sql_keeps_for_itself() {
    let rig = bare();
    rig.pg.execute("CREATE SCHEMA shop");
    let flags = [
        "-table",
        "orders",
        "-table",
        "shop.\"Mail\":id=nr,payload=body,subject={prefix}.mail.{to},header=lang=X-Lang",
    ];
    let chapter = include_str!("../../src/manual/03_messages.md");
    assert!(chapter.contains(&format!("-table '{}' -table '{}'", flags[1], flags[3])));
    on(&rig, &[&flags[..], &["setup"]].concat()).with(0);
    rig.pg.execute(
        "INSERT INTO shop.\"Mail\" (nr, \"to\", lang, body) VALUES (gen_random_uuid(), 'ann', 'en', '{}')",
    );
    rig.drain(&flags);
    assert_eq!(rig.subjects(), ["events.mail.ann"]);

    // every word of this server's
    let words = "SELECT string_agg(word, ' ' ORDER BY word) FROM pg_get_keywords() WHERE catcode IN ('R', 'T')";
    let words = rig.pg.scalar::<String>(words).expect("key words");
    let unquoted = words.split(' ').filter(|word| identifier(word) == *word);
    assert_eq!(unquoted.collect::<Vec<_>>(), [""; 0]);
}

/// What setup makes by the flags is what the relay, and the doctor, take with the same flags.
#[test]
fn setup_follows_the_mapping_and_parking() {
    let rig = bare();
    let flags = [
        "-table",
        "events:id=event_id,payload=body,subject={prefix}.{kind}.{key},header=tenant=Tenant,headers=meta",
        "-on-bad-subject",
        "park",
    ];
    let ended = on(&rig, &[&flags[..], &["setup"]].concat());
    assert_eq!(
        ended.with(0),
        "created  stream jetstream_outbox of events.>\ncreated  stream jetstream_outbox_parked of jetstream_outbox.parked\n\
         created  checkpoint bucket jetstream_outbox\ncreated  table events\ncreated  function outbox_publish\n\
         created  publication jetstream_outbox\ncreated  slot jetstream_outbox\n"
    );
    on(&rig, &[&flags[..], &["check", "-strict"]].concat()).with(0);
    let again = on(&rig, &[&flags[..], &["setup"]].concat());
    again.with(0);
    assert_eq!(outcomes(&again), ["found"; 7], "{again:?}");

    rig.pg.execute(
        "INSERT INTO events (event_id, kind, key, tenant, meta, body) \
         VALUES (gen_random_uuid(), 'order', '7', 't1', '{\"A\": \"b\"}', '{}'), (gen_random_uuid(), '', '7', 't1', NULL, '{}')",
    );
    rig.drain(&flags);
    assert_eq!(rig.subjects(), ["events.order.7"]);
    assert_eq!(
        rig.nats.client().message_count("jetstream_outbox_parked"),
        1
    );

    let ended = on(&rig, &["setup", "-table", "events", "-header", "region"]);
    let text = ended.with(78);
    assert!(
        text.contains("differs  table events: it has no column id, aggregatetype, aggregateid, payload, region\n"),
        "{text}"
    );
}

/// The function is the application's way to publish without a table; the relay takes what it emits, with its own prefix.
#[test]
fn setup_makes_the_function_for_the_prefix() {
    let rig = bare();
    let ended = on(&rig, &["setup", "-no-messages"]);
    assert!(!ended.with(0).contains("function"), "{ended:?}");
    let flags = ["-message-prefix", "it's"];
    let ended = on(&rig, &[&flags[..], &["setup"]].concat());
    assert!(
        ended.with(0).contains("created  function outbox_publish\n"),
        "{ended:?}"
    );
    rig.pg
        .execute("SELECT outbox_publish('account', 'a', '{}')");
    rig.drain(&flags);
    assert_eq!(rig.subjects(), ["events.account.a"]);
    // with another prefix it would publish nothing, and nobody would be told
    let ended = on(&rig, &["setup"]);
    assert!(
        ended
            .with(78)
            .contains("differs  function outbox_publish: it is not the one"),
        "{ended:?}"
    );
    check(&rig, &[], &[("postgres.messages", "warn")]);
    check(&rig, &flags, &[]);
    // the statement that it prints mends that, and keeps what was granted
    rig.pg.execute(
        "CREATE ROLE app; REVOKE EXECUTE ON FUNCTION outbox_publish FROM PUBLIC; GRANT EXECUTE ON FUNCTION outbox_publish TO app",
    );
    let (_, rest) = (ended.stdout.split_once("\nCREATE OR REPLACE ")).expect("a statement");
    let (statement, _) = rest.split_once("END $$;").expect("its end");
    rig.pg
        .execute(&format!("CREATE OR REPLACE {statement}END $$;"));
    let again = on(&rig, &["setup"]);
    assert!(
        again.with(0).contains("found    function outbox_publish\n"),
        "{again:?}"
    );
    check(&rig, &[], &[]);
    let granted = "SELECT has_function_privilege('app', 'outbox_publish(text, text, json, jsonb, uuid)', 'EXECUTE')";
    assert_eq!(rig.pg.scalar::<bool>(granted), Some(true));
}

/// The application may have one of that name; the statement that replaces ours would leave it, and make calls ambiguous.
#[test]
fn a_function_with_other_arguments_is_told_apart() {
    let rig = bare();
    let line = |ended: &Ended, word: &str| {
        let lines = ended.stdout.lines();
        let mut lines = lines.filter(|line| line.starts_with(&format!("{word:<7}  function ")));
        lines.next().unwrap_or_default().to_string()
    };
    for (arguments, result, told, dropped) in [
        (
            "aggregatetype text, aggregateid text, payload jsonb",
            "uuid",
            "outbox_publish(aggregatetype text, aggregateid text, payload jsonb) RETURNS uuid, and not",
            "DROP ROUTINE outbox_publish(text,text,jsonb);",
        ),
        // of the same types, which CREATE OR REPLACE refuses as well
        (
            "a text, b text, c json, d jsonb, e uuid",
            "uuid",
            "outbox_publish(a text, b text, c json, d jsonb, e uuid) RETURNS uuid, and not",
            "DROP ROUTINE outbox_publish(text,text,json,jsonb,uuid);",
        ),
        (
            "aggregatetype text, aggregateid text, payload json, headers jsonb, id uuid",
            "text",
            "id uuid) RETURNS text, and not",
            "DROP ROUTINE outbox_publish(text,text,json,jsonb,uuid);",
        ),
    ] {
        rig.pg.execute(&format!(
            "CREATE FUNCTION outbox_publish({arguments}) RETURNS {result} LANGUAGE sql AS 'SELECT NULL::{result}'"
        ));
        let ended = on(&rig, &["setup"]);
        ended.with(78);
        let found = line(&ended, "differs");
        assert!(found.contains(told) && found.contains(dropped), "{ended:?}");
        let count = "SELECT count(*) FROM pg_proc WHERE proname = 'outbox_publish'";
        assert_eq!(
            rig.pg.scalar::<i64>(count),
            Some(1),
            "none is put beside it"
        );
        rig.pg.execute(dropped);
    }
    let ended = on(&rig, &["setup"]);
    ended.with(0);
    assert!(!line(&ended, "created").is_empty(), "{ended:?}");
    // beside ours another is the application's own affair
    rig.pg
        .execute("CREATE FUNCTION outbox_publish(a int) RETURNS int LANGUAGE sql AS 'SELECT 1'");
    let ended = on(&rig, &["setup"]);
    ended.with(0);
    assert!(!line(&ended, "found").is_empty(), "{ended:?}");
}

#[test]
fn setup_sends_a_partitioned_table_under_its_own_name() {
    let rig = bare();
    rig.pg.execute(
        "CREATE TABLE outbox (id uuid, aggregatetype text, aggregateid text, payload jsonb) PARTITION BY LIST (aggregatetype); \
         CREATE TABLE outbox_account PARTITION OF outbox FOR VALUES IN ('account')",
    );
    on(&rig, &["setup", "-table", "outbox"]).with(0);
    assert_eq!(
        rig.pg
            .scalar::<String>("SELECT string_agg(tablename, ' ') FROM pg_publication_tables")
            .as_deref(),
        Some("outbox")
    );
    check(&rig, &["-table", "outbox"], &[]);
    rig.commit_event(1, "a");
    rig.drain(&["-table", "outbox"]);
    assert_eq!(rig.subjects(), ["events.account.a"]);
    rig.pg.execute(&format!(
        "ALTER PUBLICATION {SLOT} SET (publish_via_partition_root = false)"
    ));
    let ended = on(&rig, &["setup", "-table", "outbox"]);
    assert!(
        ended
            .with(78)
            .contains("SET (publish_via_partition_root = true);"),
        "{ended:?}"
    );
}

#[test]
fn setup_says_where_things_differ_and_leaves_them() {
    let rig = bare();
    rig.pg.execute("CREATE TABLE outbox (id uuid, aggregatetype text, payload jsonb); CREATE TABLE other (n int)");
    rig.pg.execute(&format!(
        "CREATE PUBLICATION {SLOT} FOR TABLE other WITH (publish = 'update')"
    ));
    rig.pg.execute(&format!(
        "SELECT pg_create_logical_replication_slot('{SLOT}', 'test_decoding')"
    ));
    let mut nats = rig.nats.client();
    nats.add_stream_with(json!({
        "name": "EV", "subjects": ["events.account.>"], "storage": "memory", "duplicate_window": 60_000_000_000_u64
    }));
    nats.add_stream_with(json!({
        "name": "KV_jetstream_outbox", "subjects": ["$KV.jetstream_outbox.>"], "storage": "memory", "max_msgs_per_subject": 1
    }));
    let before = nats.stream_info("EV")["config"].clone();
    let ended = on(
        &rig,
        &[
            "setup",
            "-replicas=3",
            "-max-age=1h",
            "-duplicate-window=2m",
        ],
    );
    let text = ended.with(78);
    for difference in [
        "stream EV of events.account.>: it is kept in memory",
        "stream EV of events.account.>: its number of replicas is 1, not 3",
        "stream EV of events.account.>: its max_age is 0s, not 3600s",
        "stream EV of events.account.>: its duplicate_window is 60s, not 120s",
        "stream EV of events.account.>: it does not capture all of events.>",
        "checkpoint bucket jetstream_outbox: it is kept in memory",
        "checkpoint bucket jetstream_outbox: it has 1 of the 3 replicas",
        "table outbox: it has no column aggregateid",
        "publication jetstream_outbox: publication jetstream_outbox does not publish inserts",
        "publication jetstream_outbox: publication jetstream_outbox does not hold public.outbox",
        "slot jetstream_outbox: slot jetstream_outbox is of plugin test_decoding",
    ] {
        assert!(
            text.contains(&format!("differs  {difference}")),
            "{difference}:\n{text}"
        );
    }
    assert_eq!(text.lines().count(), 12, "{text}");
    assert_eq!(nats.stream_info("EV")["config"], before);
    assert_eq!(
        rig.pg
            .scalar::<String>("SELECT plugin::text FROM pg_replication_slots")
            .as_deref(),
        Some("test_decoding")
    );
}

#[test]
fn setup_does_not_trust_a_slot_that_is_older_than_the_publication() {
    let rig = bare();
    rig.add_slot(SLOT);
    let ended = on(&rig, &["setup"]);
    let text = ended.with(78);
    assert!(
        text.contains("differs  slot jetstream_outbox: it is older than the publication"),
        "{text}"
    );
    rig.pg.execute("CREATE DATABASE other");
    let servers = servers(&rig.pg, &rig.nats);
    let other = rig.pg.url("postgres", "other");
    let ended = run(&["setup", "-db", &other, "-nats", &servers[3]], &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (78, ""));
    for part in [
        "belongs to database postgres",
        "setup -slot ",
        "nothing was created",
    ] {
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
    }
    let mut client = rig.pg.client_of("other").expect("the database");
    let made = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    assert_eq!(client.query_one(made, &[]).unwrap().get::<_, i64>(0), 0);
    let (_, slot) = ended.stderr.split_once("setup -slot ").expect("a command");
    let slot = slot.split([';', '\n']).next().expect("a name");
    let args = ["setup", "-slot", slot, "-db", &other, "-nats", &servers[3]];
    run(&args, &[]).with(0);
}

/// Without a table there is no publication, and a slot that is older than it is of no use: the next run makes both.
#[test]
fn setup_makes_no_slot_before_there_is_a_publication() {
    let rig = bare();
    let args = ["setup", "-table", "events_*"];
    let ended = on(&rig, &args);
    let text = ended.with(78);
    for line in [
        "differs  tables \"events_\"*: there is none;",
        "differs  publication jetstream_outbox: it does not exist, and there is no table for it\n",
        "differs  slot jetstream_outbox: it is not created before the publication",
    ] {
        assert!(text.contains(line), "{line}:\n{text}");
    }
    let slots = "SELECT count(*) FROM pg_replication_slots";
    assert_eq!(rig.pg.scalar::<i64>(slots), Some(0));
    rig.pg.execute(
        "CREATE TABLE events_a (id uuid, aggregatetype text, aggregateid text, payload jsonb)",
    );
    let ended = on(&rig, &args);
    assert!(
        ended.with(0).contains("created  slot jetstream_outbox\n"),
        "{ended:?}"
    );
}

#[test]
fn setup_names_a_stream_that_has_the_name_and_other_subjects() {
    let rig = bare();
    rig.nats.client().add_stream(STREAM, &["other.>"]);
    let ended = on(&rig, &["setup"]);
    assert!(
        ended.with(78).contains("it captures other.>, not events.>"),
        "{ended:?}"
    );
}

/// A slot that nobody reads fills the disk: it must not be left behind by what fails after it.
#[test]
fn setup_makes_no_slot_when_something_else_fails() {
    let rig = bare();
    let db = rig.pg.url("postgres", "postgres");
    let ended = run(&["setup", "-db", &db, "-nats", "127.0.0.1:1"], &[]);
    assert_eq!(ended.code, 69, "{ended:?}");
    rig.pg.execute("CREATE ROLE weak LOGIN");
    let weak = rig.pg.url("weak", "postgres");
    let ended = run(&["setup", "-db", &weak, "-nats", &rig.nats.url()], &[]);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(
        ended.stderr.contains("42501") && ended.stderr.contains("-print-sql"),
        "{ended:?}"
    );
    assert_eq!(
        rig.pg
            .scalar::<i64>("SELECT count(*) FROM pg_replication_slots"),
        Some(0)
    );
}

#[test]
fn a_slot_for_standbys_needs_postgres_17() {
    let rig = bare();
    let sql = "SELECT current_setting('server_version_num')::int >= 170000";
    let ended = on(&rig, &["setup", "-failover"]);
    if rig.pg.scalar::<bool>(sql) == Some(true) {
        ended.with(0);
        let slot = "SELECT failover FROM pg_replication_slots";
        assert_eq!(rig.pg.scalar::<bool>(slot), Some(true));
    } else {
        ended.with(78);
        assert!(ended.stderr.contains("no failover slots"), "{ended:?}");
        let slots = "SELECT count(*) FROM pg_replication_slots";
        assert_eq!(rig.pg.scalar::<i64>(slots), Some(0));
    }
}

#[test]
fn teardown_removes_slot_and_publication_when_told_so() {
    let rig = Rig::start();
    let count = || {
        rig.pg.scalar::<i64>(
            "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)",
        )
    };
    let ended = on(&rig, &["teardown"]);
    assert_eq!(
        ended.with(64),
        "would remove  slot jetstream_outbox\nwould remove  publication jetstream_outbox\n"
    );
    assert!(ended.stderr.contains("pass -yes"), "{ended:?}");
    assert_eq!(count(), Some(2));

    let mut relay = rig.relay(&[]);
    relay.wait_for_log("connected", DEADLINE);
    crate::support::wait::eventually("the slot to be used", DEADLINE, || rig.pg.slot_active(SLOT));
    let ended = on(&rig, &["teardown", "-yes"]);
    assert_eq!(ended.code, 75, "{ended:?}");
    assert_eq!(count(), Some(2));
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);

    rig.pg.execute("CREATE DATABASE other");
    let other = rig.pg.url("postgres", "other");
    let ended = run(&["teardown", "-yes", "-db", &other], &[]);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(
        ended.stderr.contains("belongs to database postgres"),
        "{ended:?}"
    );
    assert_eq!(count(), Some(2));

    // who may drop the slot alone drops nothing
    rig.pg.execute("CREATE ROLE svc LOGIN REPLICATION");
    let svc = rig.pg.url("svc", "postgres");
    let ended = run(&["teardown", "-yes", "-db", &svc], &[]);
    assert_eq!(ended.code, 78, "{ended:?}");
    for part in ["belongs to postgres", "nothing was removed"] {
        assert!(ended.stderr.contains(part), "{ended:?}");
    }
    assert_eq!(count(), Some(2));

    let ended = on(&rig, &["teardown", "-yes"]);
    assert_eq!(
        ended.with(0),
        "removed  slot jetstream_outbox\nremoved  publication jetstream_outbox\n"
    );
    assert_eq!(count(), Some(0));
    assert_eq!(
        on(&rig, &["teardown", "-yes"]).with(0),
        "nothing to remove\n"
    );
    assert_eq!(
        rig.pg.scalar::<i64>("SELECT count(*) FROM outbox"),
        Some(0),
        "the table stays"
    );
}

/// The statements without comments, as psql would run them: one a transaction.
fn statements(sql: &str) -> Vec<String> {
    let is_sql = |line: &&str| !line.starts_with("--") && !line.starts_with('\\');
    let lines: Vec<&str> = sql.lines().filter(is_sql).collect();
    let text = lines.join("\n") + "\n";
    let mut statements = vec![String::new()];
    // what stands between dollar quotes is one statement's
    for (index, part) in text.split("$$").enumerate() {
        let mut pieces = match index % 2 {
            0 => part.split(";\n").collect(),
            _ => vec![part],
        }
        .into_iter();
        let last = statements.last_mut().expect("it has one");
        if index > 0 {
            last.push_str("$$");
        }
        last.push_str(pieces.next().unwrap_or_default());
        statements.extend(pieces.map(str::to_string));
    }
    let statements = statements.iter().map(|sql| sql.trim());
    let statements = statements.filter(|sql| !sql.is_empty());
    statements.map(str::to_string).collect()
}

/// What is printed is all there is: the relay runs under exactly this role and these permissions.
#[test]
fn the_relay_runs_with_what_is_printed_and_no_more() {
    let pg = Postgres::start();
    // what a careful administrator has done already
    pg.execute("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC");
    let db = pg.url("postgres", "postgres");
    let printed = run(
        &["setup", "--print-sql", "--role", "relay", "-db", &db],
        &[],
    );
    let statements = statements(printed.with(0));
    assert_eq!(statements.len(), 6, "{statements:?}");
    statements.iter().for_each(|sql| pg.execute(sql));

    let printed = run(&["setup", "--print-nats", "-db", &db], &[]);
    let (config, requests) = printed
        .with(0)
        .split_once("# Then")
        .expect("a configuration, then requests");
    let lines: Vec<&str> = requests.lines().collect();
    let nats = permitting(config, &lines);

    let relay_db = pg.url("relay", "postgres");
    let relay_nats = format!("nats://relay:choose-a-better-one@127.0.0.1:{}", nats.port());
    let flags = ["-db", &relay_db, "-nats", &relay_nats];
    let rig = Rig { pg, nats };
    rig.commit_event(1, "a");
    let mut relay = Relay::run(&[&flags[..], &["-drain", "-hold-back=0"]].concat(), &[]);
    assert_eq!(relay.wait_exit(DEADLINE), 0, "{:?}", relay.log());
    assert!(
        !relay.log().join("\n").contains("without the checkpoint"),
        "{:?}",
        relay.log()
    );
    assert_eq!(rig.nats.client().read_all(STREAM).len(), 1);
    assert_eq!(rig.nats.client().message_count("KV_jetstream_outbox"), 1);

    // the doctor, as the relay's own user, finds nothing wrong either
    let ended = run(&[&flags[..], &["check", "--strict"]].concat(), &[]);
    ended.with(0);

    // and it is the least: each permission that is taken away is missed
    let allowed: Vec<&str> = config
        .lines()
        .filter(|line| line.trim_start().starts_with('"'))
        .collect();
    assert_eq!(allowed.len(), 7, "{config}");
    let requests: Vec<&str> = requests.lines().collect();
    let each = allowed.iter().copied().map(Some);
    for (index, removed) in (2..).zip([None].into_iter().chain(each)) {
        let permitted = match removed {
            Some(line) => config.replace(&format!("{line}\n"), ""),
            None => config.to_string(),
        };
        let nats = permitting(&permitted, &requests);
        rig.commit_event(index, "a");
        let at = format!("nats://relay:choose-a-better-one@127.0.0.1:{}", nats.port());
        let mut relay = Relay::run(
            &["-db", &relay_db, "-nats", &at, "-drain", "-max-outage=1s"],
            &[],
        );
        let (code, log) = (relay.wait_exit(DEADLINE), relay.log().join("\n"));
        let ends_well = code == 0 && !log.contains("without the checkpoint");
        assert_eq!(ends_well, removed.is_none(), "{removed:?}\n{log}");
        // and it is this one that is missed: `events.>` by what is published under it
        let subject = removed
            .unwrap_or_default()
            .trim()
            .trim_matches(['"', '>', '*']);
        let denied = format!(r#"Permissions Violation for Publish to \"{subject}"#);
        assert_eq!(
            log.contains(&denied),
            removed.is_some(),
            "{removed:?}\n{log}"
        );
    }
}

/// A server with the printed configuration, on which an administrator has run the printed requests.
fn permitting(config: &str, requests: &[&str]) -> Nats {
    let admin = "authorization {\n  users: [\n    { user: admin, password: admin }";
    let nats = Nats::builder()
        .config(&config.replace("authorization {\n  users: [", admin))
        .client_options(json!({ "user": "admin", "pass": "admin" }))
        .build();
    for line in requests
        .iter()
        .filter(|line| line.starts_with("nats request"))
    {
        let words: Vec<&str> = line.split('\'').collect();
        let [_, subject, _, body, _] = words.as_slice() else {
            panic!("{line}")
        };
        let body: Value = serde_json::from_str(body).expect("JSON");
        let call = subject.strip_prefix("$JS.API.").expect("the API");
        nats.client().api(call, &body);
    }
    nats
}

/// As an administrator runs what was printed.
#[track_caller]
fn psql(rig: &Rig, statements: &str) {
    let file = rig.nats.dir().join("setup.sql");
    std::fs::write(&file, statements).expect("write the statements");
    let own = Postgres::bin().join("psql");
    // some distributions of the server come without it
    let mut command = Command::new(if own.exists() { own } else { "psql".into() });
    command
        .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d"])
        .arg(rig.pg.url("postgres", "postgres"))
        .arg("-f")
        .arg(&file)
        .stdout(Stdio::null());
    let mut psql = Process::spawn("psql", &mut command);
    assert!(psql.wait_exit(DEADLINE).success(), "{statements}");
}

/// The tables of the publication, in the order of their names.
fn published(rig: &Rig) -> Option<String> {
    rig.pg.scalar::<Option<String>>(
        "SELECT string_agg(tablename::text, ' ' ORDER BY tablename) FROM pg_publication_tables \
         WHERE pubname = 'jetstream_outbox'",
    )?
}

/// A table that is named in full stands among them; it may be in a schema, and in need of quotes.
#[test]
fn the_sql_of_both_kinds_of_names_gathers_all() {
    let rig = bare();
    rig.pg.execute(
        "CREATE TABLE events_a (id uuid, aggregatetype text, aggregateid text, payload jsonb); \
         CREATE SCHEMA \"My\"; CREATE SCHEMA other; CREATE TABLE other.orders (LIKE events_a)",
    );
    let flags = ["-table", "orders,events_*,\"My\".\"Outbox\""];
    let printed = on(&rig, &[&flags[..], &["setup", "-print-sql"]].concat());
    psql(&rig, printed.with(0));
    let tables = "SELECT string_agg(schemaname || '.' || tablename, ' ' ORDER BY tablename) FROM pg_publication_tables";
    assert_eq!(
        rig.pg.scalar::<String>(tables).as_deref(),
        Some("My.Outbox public.events_a public.orders")
    );
    // nothing is left to do
    let ended = on(&rig, &[&flags[..], &["setup"]].concat());
    assert!(
        ended
            .with(0)
            .contains("found    publication jetstream_outbox\nfound    slot"),
        "{ended:?}"
    );
    check(&rig, &flags, &[]);
}

/// Nothing is connected to, so nobody has to know where the database is.
#[test]
fn what_is_printed_needs_no_database() {
    let rig = bare();
    for args in [["setup", "-print-sql"], ["setup", "-print-nats"]] {
        run(&args, &[]).with(0);
    }
    for args in [&["setup"][..], &["check"], &["status"], &["teardown"]] {
        let ended = run(args, &[]);
        assert_eq!(ended.code, 64, "{ended:?}");
        assert!(ended.stderr.contains("no database is named"), "{ended:?}");
    }
    // in psql it is the one that psql is connected to
    rig.pg
        .execute("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC");
    psql(&rig, run(&["setup", "-print-sql"], &[]).with(0));
    let granted = "SELECT has_database_privilege('relay', 'postgres', 'CONNECT')";
    assert_eq!(rig.pg.scalar::<bool>(granted), Some(true));
}

/// With no table named in full there is none to write down: psql looks for those that begin so.
#[test]
fn the_sql_of_tables_named_by_their_beginning_finds_them() {
    let rig = bare();
    rig.pg.execute(
        "CREATE TABLE events_a (id uuid, aggregatetype text, aggregateid text, payload jsonb); \
         CREATE TABLE \"events_B\" (LIKE events_a); CREATE TABLE event (LIKE events_a)",
    );
    let flags = ["-table", "events_*"];
    let printed = on(&rig, &[&flags[..], &["setup", "-print-sql"]].concat());
    psql(&rig, printed.with(0));
    assert_eq!(published(&rig).as_deref(), Some("events_B events_a"));
    on(&rig, &[&flags[..], &["setup"]].concat()).with(0);
    check(&rig, &flags, &[]);

    // without the publication, its remedy is one that can be run
    rig.pg.execute("DROP PUBLICATION jetstream_outbox");
    let findings = check(&rig, &flags, &[("postgres.publication", "fail")]);
    let fix = finding(&findings, "postgres.publication")["fix"].as_str();
    let fix = fix.expect("a remedy");
    let (command, statements) = fix
        .split_once("; then: ")
        .expect("a command and statements");
    assert_eq!(
        command,
        "when there is a table \"events_\"*: jetstream-outbox setup"
    );
    on(&rig, &[&flags[..], &["setup"]].concat()).with(78);
    let (statements, _) = statements.split_once(" -- ").expect("a reason");
    for statement in statements.split_inclusive(';') {
        rig.pg.execute(statement);
    }
    check(&rig, &flags, &[]);
}
