//! Flags that make events, or say what becomes of those that cannot be published, are changed between two runs: what is resolved
//! stays so, and what the new flags take is relayed.

use crate::operators::halts;
use crate::operators_bucket::record;
use crate::rig::{Rig, SLOT, STREAM};

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

fn ids(rig: &Rig) -> Vec<String> {
    let messages = rig.messages();
    messages.iter().map(|it| it.id().to_string()).collect()
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
        assert_eq!(ids(&rig), ["1"], "{after:?}");
        rig.pg.execute(&next);
        for _ in 0..STARTS {
            rig.drain(after);
        }
        assert_eq!(ids(&rig), ["1", id], "{after:?}");
        // and back
        for _ in 0..STARTS {
            rig.drain(before);
        }
        assert_eq!(ids(&rig), ["1", id], "{before:?}");
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
        let mut client = rig.nats.client();
        let mut config = client.stream_info(STREAM)["config"].clone();
        config["subjects"] = serde_json::json!(["events.>", format!("{SLOT}.parked")]);
        client.api(&format!("STREAM.UPDATE.{STREAM}"), &config);
        rig.pg.execute(&poison("1"));
        rig.drain(first);
        let mut expected = ids(&rig);
        assert_eq!(expected.len(), usize::from(first == POLICIES[0]));
        for (number, policy) in POLICIES.iter().cycle().take(6).enumerate() {
            rig.drain(policy);
            assert_eq!(ids(&rig), expected, "{first:?}, {policy:?}");
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
        assert_eq!(ids(&rig), expected, "{first:?}");
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
    let mut config = client.stream_info(STREAM)["config"].clone();
    config["duplicate_window"] = serde_json::json!(100_000_000);
    client.api(&format!("STREAM.UPDATE.{STREAM}"), &config);
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
    assert_eq!(ids(&rig), ["1", "2"], "{last}");
    // what it asks for
    rig.drain(&BEFORE);
    rig.pg.execute(&format!(
        "BEGIN; {}; {}; COMMIT",
        row("orders", "3"),
        row("outbox", "4")
    ));
    rig.drain(&AFTER);
    assert_eq!(ids(&rig), ["1", "2", "3", "4"]);
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
    assert_eq!(ids(&rig), all);
}
