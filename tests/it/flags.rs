//! Flags that make events, or say what becomes of those that cannot be published, are changed between two runs: what is resolved
//! stays so, and what the new flags take is relayed.

use crate::operators::{capture, edit, halts};
use crate::operators_bucket::record;
use crate::rig::{Rig, SLOT, STREAM};
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

/// What is in the streams behind the record was counted by the earlier flags: the same place is another event's by others.
#[test]
fn other_flags_have_to_wait_until_what_the_earlier_ones_published_is_recorded() {
    const BEFORE: [&str; 1] = ["-table=outbox"];
    const AFTER: [&str; 1] = ["-table=outbox,orders"];
    let rig = Rig::start_with_tables(TABLES);
    let mut client = rig.nats.client();
    // what JetStream remembers is no help
    edit(
        &mut client,
        STREAM,
        &json!({ "duplicate_window": 100_000_000 }),
    );
    rig.pg.execute(&row("outbox", "1"));
    rig.drain(&BEFORE);
    let (subject, older) = record(&mut client);
    // put back, the record is what a killed relay leaves
    let (order, event) = (row("orders", "x"), row("outbox", "2"));
    rig.pg.execute(&format!("BEGIN; {order}; {event}; COMMIT"));
    rig.drain(&BEFORE);
    client.publish(&subject, &[], &older);
    let last = halts(
        rig.relay(&AFTER),
        78,
        &["start once with the earlier flags"],
    );
    assert_eq!(rig.ids(), ["1", "2"], "{last}");
    // what it asks for
    rig.drain(&BEFORE);
    rig.pg.execute(&format!(
        "BEGIN; {}; {}; COMMIT",
        row("orders", "3"),
        row("outbox", "4")
    ));
    rig.drain(&AFTER);
    assert_eq!(rig.ids(), ["1", "2", "3", "4"]);
}

#[test]
fn other_flags_do_not_begin_within_a_transaction() {
    const ROWS: u64 = 30_000;
    let rig = Rig::start_with_tables(TABLES);
    let relay = rig.relay(&[]);
    rig.pg.execute(&format!(
        "INSERT INTO outbox SELECT n, 't', 'a', '{{}}', 'other ' || n FROM generate_series(1, {ROWS}) n"
    ));
    rig.wait_for_messages(1_000);
    relay.kill();
    let other = ["-id-column=other"];
    halts(
        rig.relay(&other),
        78,
        &["start once with the earlier flags"],
    );
    rig.drain(&[]);
    rig.drain(&other);
    let all: Vec<String> = (1..=ROWS).map(|number| number.to_string()).collect();
    assert_eq!(rig.ids(), all);
}
