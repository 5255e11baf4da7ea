//! A stream that was written from another history of Postgres than that of the server which the relay reads.

use crate::rig::{Rig, SLOT, uuid};
use crate::support::nats::Nats;
use crate::support::postgres::Postgres;
use crate::support::relay::halts;
use jetstream_outbox::postgres::Lsn;

fn ids(rig: &Rig) -> Vec<String> {
    let messages = rig.messages();
    messages.iter().map(|m| m.id().to_string()).collect()
}

/// A database that was dumped and restored, or went through pg_upgrade: one flag accepts it.
#[test]
fn another_system_halts_until_it_is_accepted_and_goes_on_behind_what_is_there() {
    let rig = |nats: Nats, tables: u32| {
        let pg = Postgres::builder().own_system_id().build();
        // so that the publication has another oid, as pg_upgrade gives it
        for number in 0..tables {
            pg.execute(&format!("CREATE TABLE other_{number} (n int)"));
        }
        pg.seed_setup();
        Rig { pg, nats }
    };
    let old = rig(Nats::start(), 0);
    old.nats.client().add_seed_stream();
    // more log than the new one has at first: its events have lower positions
    old.pg
        .execute("SELECT pg_logical_emit_message(true, 'filler', repeat('x', 1000000))");
    for number in 1..=3 {
        old.commit_event(number, "a");
    }
    old.drain(&["--hold-back", "0"]);

    let new = rig(old.nats, 3);
    for number in 4..=5 {
        new.commit_event(number, "a");
    }
    for _ in 0..2 {
        let last = halts(new.relay(&[]), 78, &[]);
        assert!(
            last.contains("was written from another Postgres system")
                && last.contains("-accept-new-system"),
            "{last}"
        );
        assert_eq!(new.messages().len(), 3);
    }
    new.drain(&["--accept-new-system", "--hold-back", "0"]);
    // once: its own events are the stream's end now
    new.commit_event(6, "a");
    new.drain(&["--hold-back", "0"]);
    assert_eq!(ids(&new), (1..=6).map(uuid).collect::<Vec<_>>());
}

/// Two copies of one cluster have the same system and timeline, and both have committed something at one position.
#[test]
fn another_event_at_the_same_position_halts() {
    let rig = Rig::start();
    rig.commit_event(1, "a");
    rig.drain(&[]);
    rig.commit_event(2, "a");
    let slot = SLOT;
    let sql = format!(
        "SELECT encode(substr(data, 2, 8), 'hex') FROM pg_logical_slot_peek_binary_changes('{slot}', NULL, NULL, \
         'proto_version', '1', 'publication_names', '{slot}') WHERE substr(data, 1, 1) = 'B' ORDER BY lsn DESC LIMIT 1"
    );
    let commit_lsn: String = rig.pg.scalar(&sql).expect("the second event's transaction");
    let commit_lsn = Lsn(u64::from_str_radix(&commit_lsn, 16).expect("hexadecimal"));
    let of_first = rig.messages()[0]
        .header("Outbox-Position")
        .map(String::from);
    let of_first = of_first.expect("an event bears its position");
    let source = of_first
        .splitn(4, ' ')
        .take(3)
        .collect::<Vec<_>>()
        .join(" ");
    // as the other copy's relay has stored it
    let (position, other) = (format!("{source} {commit_lsn} 1"), uuid(9));
    let headers = [
        ("Nats-Expected-Last-Sequence", "1"),
        ("Nats-Msg-Id", other.as_str()),
        ("Outbox-Position", &position),
    ];
    rig.nats
        .client()
        .publish("events.account.a", &headers, b"{}");
    // whoever supervises it starts it again
    for _ in 0..2 {
        let last = halts(rig.relay(&[]), 65, &[]);
        for part in [
            "another event than Postgres",
            &commit_lsn.to_string(),
            &uuid(2),
        ] {
            assert!(last.contains(part), "{part:?} is not in {last}");
        }
    }
    assert_eq!(ids(&rig), [uuid(1), other]);
}
