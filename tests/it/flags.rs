//! Flags that make events, or say what becomes of those that cannot be published, are changed between two runs: what is resolved
//! stays so, and what the new flags take is relayed.

use crate::operators::{capture, edit};
use crate::operators_bucket::record;
use crate::rig::{DEADLINE, Rig, SLOT, STREAM, counted};
use crate::support::natsclient::NatsClient;
use crate::support::relay::halts;
use serde_json::json;

const TABLES: &str = "\
    CREATE TABLE outbox (id text, aggregatetype text, aggregateid text, payload text, other text);\
    CREATE TABLE orders (LIKE outbox)";
/// Since the record was made a start with the same flags must not differ from the first with them.
const STARTS: u32 = 3;

fn row(table: &str, id: &str) -> String {
    format!("INSERT INTO {table} VALUES ('{id}', 't', 'a', '{{}}', 'other {id}')")
}

fn message(prefix: &str, id: &str) -> String {
    let event = format!(r#"{{"id":"{id}","aggregatetype":"t","aggregateid":"a"}}"#);
    format!("SELECT pg_logical_emit_message(true, '{prefix}', '{event}')")
}

/// Cannot be published.
fn poison(id: &str) -> String {
    format!("INSERT INTO outbox VALUES ('{id}', NULL, 'a', '{{}}')")
}

#[test]
fn a_change_of_the_flags_that_make_events_is_none_of_the_wal() {
    for (before, last, after, next, id) in [
        (
            &["-table=orders"][..],
            row("orders", "1"),
            &["-table=outbox"][..],
            row("outbox", "2"),
            "2",
        ),
        (
            &[],
            message(SLOT, "1"),
            &["-no-messages"],
            row("outbox", "2"),
            "2",
        ),
        (
            &[],
            message(SLOT, "1"),
            &["-message-prefix=another"],
            message("another", "2"),
            "2",
        ),
        (
            &[],
            row("outbox", "1"),
            &["-id-column=other"],
            row("outbox", "2"),
            "other 2",
        ),
        (
            &["-no-messages"],
            row("outbox", "1"),
            &[],
            message(SLOT, "2"),
            "2",
        ),
    ] {
        let rig = Rig::start_with_tables(TABLES);
        rig.pg.execute(&last);
        rig.drain(before);
        for _ in 0..STARTS {
            rig.drain(after);
        }
        assert_eq!(rig.ids(), ["1"], "{after:?}");
        rig.pg.execute(&next);
        for _ in 0..STARTS {
            rig.drain(after);
        }
        assert_eq!(rig.ids(), ["1", id], "{after:?}");
        // and back
        for _ in 0..STARTS {
            rig.drain(before);
        }
        assert_eq!(rig.ids(), ["1", id], "{before:?}");
    }
}

#[test]
fn what_was_parked_or_given_up_stays_so_whatever_is_to_be_done_with_the_next() {
    const POLICIES: [&[&str]; 4] = [
        &["-on-poison=park"],
        &[],
        &["-on-poison=skip", "-yes-lose-events"],
        &["-on-poison=park", "-on-bad-subject=park"],
    ];
    for first in [POLICIES[0], POLICIES[2]] {
        let rig = Rig::start_with_tables(TABLES);
        let parked = format!("{SLOT}.parked");
        capture(&mut rig.nats.client(), STREAM, &["events.>", &parked]);
        rig.pg.execute(&poison("1"));
        rig.drain(first);
        let mut expected = rig.ids();
        assert_eq!(expected.len(), usize::from(first == POLICIES[0]));
        for (number, policy) in POLICIES.iter().cycle().take(6).enumerate() {
            rig.drain(policy);
            assert_eq!(rig.ids(), expected, "{first:?}, {policy:?}");
            // the next begins behind an event that is well, and behind one that is not
            if number % 2 == 1 {
                rig.pg.execute(&row("outbox", &format!("well {number}")));
                expected.push(format!("well {number}"));
                rig.drain(policy);
            }
            rig.pg.execute(&poison(&format!("bad {number}")));
            rig.drain(first);
            if first == POLICIES[0] {
                expected.push(format!("bad {number}"));
            }
        }
        assert_eq!(rig.ids(), expected, "{first:?}");
    }
}

/// A row has its place, whether it is an event by these flags or not.
#[test]
fn a_table_may_come_and_go_after_a_kill() {
    const NARROW: [&str; 1] = ["-table=outbox"];
    const WIDE: [&str; 1] = ["-table=outbox,orders"];
    for (earlier, later) in [(NARROW, WIDE), (WIDE, NARROW)] {
        let rig = Rig::start_with_tables(TABLES);
        let mut client = rig.nats.client();
        forget_at_once(&mut client);
        rig.pg.execute(&row("outbox", "1"));
        rig.drain(&earlier);
        let (subject, older) = record(&mut client);
        let rows = [
            "BEGIN".into(),
            message("of another", "z"),
            row("orders", "x"),
            row("outbox", "2"),
            row("orders", "y"),
            row("outbox", "3"),
            "COMMIT".into(),
        ];
        rig.pg.execute(&rows.join("; "));
        rig.drain(&earlier);
        let mut expected = rig.ids();
        // put back, the record is what a killed relay leaves
        client.publish(&subject, &[], &older);
        rig.drain(&later);
        if later == WIDE {
            expected.extend(["x".into(), "y".into()]);
        }
        assert_eq!(rig.ids(), expected);
        let late = rig.messages();
        let late = late.iter().filter(|it| it.header("Outbox-Late").is_some());
        assert_eq!(late.count(), if later == WIDE { 2 } else { 0 });
        for flags in [earlier, later, earlier] {
            rig.drain(&flags);
            assert_eq!(rig.ids(), expected);
        }
    }
}

/// What JetStream remembers is no help.
fn forget_at_once(client: &mut NatsClient) {
    edit(client, STREAM, &json!({ "duplicate_window": 100_000_000 }));
}

#[test]
fn ids_of_another_column_may_begin_within_a_transaction() {
    const ROWS: usize = 30_000;
    let rig = Rig::start_with_tables(TABLES);
    forget_at_once(&mut rig.nats.client());
    let relay = rig.relay(&[]);
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT n, 't', 'a', '{{}}', 'other ' || n FROM generate_series(1, {ROWS}) n"
    ));
    rig.wait_for_messages(1_000);
    relay.kill();
    rig.drain(&["-id-column=other"]);
    let ids = rig.ids();
    let stored = ids
        .iter()
        .take_while(|id| !id.starts_with("other "))
        .count();
    assert!((1_000..ROWS).contains(&stored), "it was killed within");
    let expected = (1..=ROWS).map(|number| match number <= stored {
        true => number.to_string(),
        false => format!("other {number}"),
    });
    assert_eq!(ids, expected.collect::<Vec<_>>());
}

/// Postgres sends other rows then, and may leave out the transaction that the record names.
#[test]
fn another_publication_is_another_flag() {
    const OTHER: [&str; 1] = ["-publication=other"];
    let rig = Rig::start_with_tables(TABLES);
    let publish = |name: &str, tables: &str| {
        rig.pg
            .execute(&format!("CREATE PUBLICATION {name} FOR TABLE {tables}"));
    };
    publish("other", "orders");
    publish("wide", "outbox, orders");
    let mut client = rig.nats.client();
    forget_at_once(&mut client);
    const OWN: [&str; 1] = ["-publication=own"];
    publish("own", "outbox");
    rig.pg.execute(&row("outbox", "1"));
    rig.drain(&OWN);
    let (subject, older) = record(&mut client);
    let (order, event) = (row("orders", "x"), row("outbox", "2"));
    rig.pg.execute(&format!("BEGIN; {order}; {event}; COMMIT"));
    rig.drain(&OWN);
    // put back, the record is what a killed relay leaves
    client.publish(&subject, &[], &older);
    halts(
        rig.relay(&["-publication=wide"]),
        78,
        &["start once with the earlier flags"],
    );
    rig.drain(&OWN);
    rig.pg.execute(&row("outbox", "3"));
    rig.drain(&["-publication=wide"]);
    assert_eq!(rig.ids(), ["1", "2", "3"]);
    // the last event is of a table that this one does not have
    rig.pg.execute(&row("orders", "4"));
    rig.drain(&[OTHER[0], "-resume-anyway"]);
    rig.pg.execute(&row("orders", "5"));
    rig.drain(&OTHER);
    assert_eq!(rig.ids(), ["1", "2", "3", "4", "5"]);
}

/// What cannot be compared is published again: nothing is taken for stored that only has the place of something else.
#[test]
fn another_publication_that_is_accepted_loses_nothing() {
    let rig = Rig::start_with_tables(TABLES);
    let mut client = rig.nats.client();
    forget_at_once(&mut client);
    rig.pg.execute(
        "CREATE PUBLICATION both_tables FOR TABLE outbox, orders; CREATE PUBLICATION one FOR TABLE outbox",
    );
    let earlier = ["-publication=both_tables", "-table=outbox"];
    rig.pg.execute(&row("outbox", "1"));
    rig.drain(&earlier);
    let (subject, older) = record(&mut client);
    let rows = ["orders", "outbox", "outbox", "outbox"]
        .iter()
        .zip(["x", "2", "3", "4"]);
    let rows: Vec<String> = rows.map(|(table, id)| row(table, id)).collect();
    rig.pg
        .execute(&format!("BEGIN; {}; COMMIT", rows.join("; ")));
    rig.drain(&earlier);
    // a relay that was killed when the first of them was stored
    client.publish(&subject, &[], &older);
    for seq in [3, 4] {
        client.api(
            &format!("STREAM.MSG.DELETE.{STREAM}"),
            &json!({ "seq": seq }),
        );
    }
    let later = ["-publication=one", "-table=outbox"];
    let hint = "start once with the earlier flags";
    halts(rig.relay(&later), 78, &[hint]);
    rig.drain(&[&later[..], &["-resume-anyway"]].concat());
    assert_eq!(rig.ids(), ["1", "2", "2", "3", "4"]);
    rig.drain(&later);
    assert_eq!(rig.ids(), ["1", "2", "2", "3", "4"]);
}

#[test]
fn another_publication_that_is_accepted_within_a_transaction_loses_nothing() {
    const ROWS: usize = 30_000;
    let rig = Rig::start_with_tables(TABLES);
    forget_at_once(&mut rig.nats.client());
    rig.pg.execute(
        "CREATE PUBLICATION both_tables FOR TABLE outbox, orders; CREATE PUBLICATION one FOR TABLE outbox",
    );
    // slow enough to be stopped within the transaction
    let mut relay = rig.relay(&["-publication=both_tables", "-table=outbox", "-inflight=1"]);
    rig.pg.execute(&format!(
        "BEGIN; {}; INSERT INTO outbox SELECT n, 't', 'a', '{{}}' FROM generate_series(1, {ROWS}) n; COMMIT",
        row("orders", "x")
    ));
    rig.wait_for_messages(1);
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    assert!(rig.nats.client().message_count(STREAM) < ROWS as u64);
    let later = ["-publication=one", "-table=outbox"];
    halts(
        rig.relay(&later),
        78,
        &["start once with the earlier flags"],
    );
    rig.drain(&[&later[..], &["-resume-anyway"]].concat());
    let mut ids: Vec<usize> = rig.ids().iter().map(|id| id.parse().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids, (1..=ROWS).collect::<Vec<_>>());
}

/// JetStream knows the ids, and says of each event that it is a duplicate of one at another place: it is the same one.
#[test]
fn what_jetstream_remembers_of_another_publication_is_no_other_event() {
    let rig = Rig::start_with_tables(TABLES);
    rig.pg.execute(
        "CREATE PUBLICATION both_tables FOR TABLE outbox, orders; CREATE PUBLICATION one FOR TABLE outbox",
    );
    let earlier = ["-publication=both_tables", "-table=outbox"];
    rig.pg.execute(&row("outbox", "1"));
    rig.drain(&earlier);
    let mut client = rig.nats.client();
    let (subject, older) = record(&mut client);
    let rows = ["orders", "outbox", "outbox"].iter().zip(["x", "2", "3"]);
    let rows: Vec<String> = rows.map(|(table, id)| row(table, id)).collect();
    rig.pg
        .execute(&format!("BEGIN; {}; COMMIT", rows.join("; ")));
    rig.drain(&earlier);
    client.publish(&subject, &[], &older);
    let log = rig.drain(&["-publication=one", "-table=outbox", "-resume-anyway"]);
    assert_eq!(rig.ids(), ["1", "2", "3"]);
    assert_eq!(counted(&log, "dropped"), 0, "{log:#?}");
}
