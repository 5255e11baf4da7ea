//! Failover: a standby is promoted, with or without what the primary committed last, and the relay goes on there.
//!
//! Before Postgres 17 a standby has no logical slots, and operators make the slot anew on the promoted server
//! before they let the writers in, and tell the relay so with `--resume-anyway`: that runs everywhere. Slots that the standby keeps synchronized need 17, so
//! these tests are ignored unless asked for; `scripts/test --matrix` asks.
//!
//! What a lost primary had published stays in the stream: it was committed once. So the stream is to hold all that
//! was committed on either server, in that order, each event once.

use crate::rig::{DEADLINE, SLOT, STREAM, UUID_SQL, uuid};
use crate::support::nats::Nats;
use crate::support::natsclient::StreamMessage;
use crate::support::oracle::{Event, Expected};
use crate::support::postgres::{Builder, Postgres, SEED_SETUP};
use crate::support::relay::{Relay, halts};
use crate::support::wait::{eventually, secs, throughout};
use jetstream_outbox::outbox::position::SourcePosition;

/// The physical slot of the standby.
const STANDBY: &str = "standby";
/// What follows on a primary lies above all that its standby writes after a promotion without it.
const FILLER: &str = "SELECT pg_logical_emit_message(true, 'filler', repeat('x', 1000000))";

const EVENTS_PER_TRANSACTION: u64 = 3;

/// How the promoted server comes by the slot.
#[derive(Clone, Copy, PartialEq)]
enum Slot {
    /// It is made anew after the promotion.
    ByHand,
    /// The standby keeps that of the primary (17).
    Synchronized,
}

/// Whether what the primary committed last is on the standby.
#[derive(Clone, Copy, PartialEq)]
enum Tail {
    Arrived,
    Lost,
}

/// What the relay does meanwhile.
#[derive(Clone, Copy, PartialEq)]
enum During {
    /// It lives through the failover and finds the new primary by itself.
    Lives,
    /// It is killed with the primary and starts when the new one is there.
    Restarts,
    /// That, and it is killed again before the new primary commits anything.
    RestartsTwice,
    /// It starts when the new one is there, and loses NATS before that commits anything.
    LosesNats,
}

/// A primary, its standby, and what was committed on either.
struct Pair {
    old: Postgres,
    new: Postgres,
    nats: Nats,
    slot: Slot,
    expected: Expected,
    next: u64,
}

impl Pair {
    fn start(slot: Slot) -> Pair {
        Pair::start_with(slot, Postgres::builder())
    }

    fn start_with(slot: Slot, primary: Builder) -> Pair {
        let old = primary.build();
        SEED_SETUP[..3].iter().for_each(|sql| old.execute(sql));
        let new = Postgres::builder().build_standby_of(&old, STANDBY);
        let pair = Pair {
            old,
            new,
            nats: Nats::start(),
            slot,
            expected: Expected::new(),
            next: 1,
        };
        pair.nats.client().add_seed_stream();
        pair.create_slot();
        if slot == Slot::Synchronized {
            wait_for_synchronized_slot(&pair.new);
        }
        pair
    }

    /// The relay's slot on the old primary, as it was set up.
    fn create_slot(&self) {
        let failover = match self.slot {
            Slot::ByHand => "",
            Slot::Synchronized => ", failover => true",
        };
        self.old.execute(&format!(
            "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput'{failover})"
        ));
    }

    /// One command for both servers: whichever is the primary.
    fn relay(&self, extra: &[&str]) -> Relay {
        relay_of(&[&self.old, &self.new], &self.nats, extra)
    }

    /// Commits events on one of the two.
    fn commit(&mut self, server: fn(&Pair) -> &Postgres, transactions: u64) {
        let mut client = server(self).client();
        for _ in 0..transactions {
            let (first, last) = (self.next, self.next + EVENTS_PER_TRANSACTION - 1);
            let sql = format!(
                "BEGIN; INSERT INTO outbox SELECT {UUID_SQL}, 'account', 'a', jsonb_build_object('n', n) \
                 FROM generate_series({first}, {last}) AS n; DELETE FROM outbox; COMMIT"
            );
            client.batch_execute(&sql).expect("commit events");
            let event = |n| {
                let body = format!("{{\"n\":{n}}}");
                Event::new(uuid(n), "events.account.a", body.as_bytes())
            };
            self.expected.commit(0, (first..=last).map(event));
            self.next = last + 1;
        }
    }

    /// Waits until all that was committed is in the stream.
    #[track_caller]
    fn wait_for_all(&self) {
        let target = self.expected.committed() as u64;
        let mut client = self.nats.client();
        eventually(&format!("{target} messages"), DEADLINE, || {
            match client.last_seq(STREAM) {
                found if found >= target => Ok(()),
                found => Err(found),
            }
        });
    }

    fn last_message(&self) -> StreamMessage {
        let messages = self.nats.client().read_all(STREAM);
        messages
            .into_iter()
            .last()
            .expect("the stream holds events")
    }

    /// The standby becomes the primary, and has the slot before anybody writes.
    fn promote(&self) {
        self.new.promote();
        if self.slot == Slot::ByHand {
            self.new.execute(&format!(
                "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')"
            ));
        }
    }

    /// The first relay after the promotion. A slot that was made anew halts it until it is told that this was meant.
    #[track_caller]
    fn restart(&self) -> Relay {
        if self.slot == Slot::Synchronized {
            return self.relay(&[]);
        }
        let mut halted = self.relay(&[]);
        assert_eq!(halted.wait_exit(DEADLINE), 78);
        let last = halted.log().pop().expect("it says why");
        assert!(last.contains("re-created"), "{last}");
        self.relay(&["--resume-anyway"])
    }

    /// Ends the relay in order, and compares the whole stream.
    #[track_caller]
    fn finish(&self, mut relay: Relay) {
        self.wait_for_all();
        relay.term();
        assert_eq!(relay.wait_exit(DEADLINE), 0, "exit code after SIGTERM");
        let messages = self.nats.client().read_all(STREAM);
        self.expected.check(&messages).assert_clean();
    }
}

fn url(servers: &[&Postgres], attributes: &str) -> String {
    let hosts: Vec<String> = servers
        .iter()
        .map(|server| format!("127.0.0.1:{}", server.port()))
        .collect();
    format!(
        "postgres://postgres@{}/postgres{attributes}",
        hosts.join(",")
    )
}

fn relay_of(servers: &[&Postgres], nats: &Nats, extra: &[&str]) -> Relay {
    let db = url(servers, "?target_session_attrs=primary");
    let nats = format!("127.0.0.1:{}", nats.port());
    let mut args = vec!["-db", &db, "-nats", &nats];
    args.extend(extra);
    Relay::run(&args, &[])
}

/// A synchronized slot that is still temporary would be dropped by a promotion.
#[track_caller]
fn wait_for_synchronized_slot(standby: &Postgres) {
    let sql = format!(
        "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
    );
    eventually("the slot to be synchronized", DEADLINE, || {
        standby.scalar::<bool>(&sql) == Some(true)
    });
}

fn position(message: &StreamMessage) -> SourcePosition {
    let header = message.header("Outbox-Position");
    header
        .and_then(|text| text.parse().ok())
        .expect("an event bears its position")
}

#[track_caller]
fn check(slot: Slot, tail: Tail, during: During) {
    let mut pair = Pair::start(slot);
    let mut relay = pair.relay(&[]);
    pair.commit(|pair| &pair.old, 20);
    pair.wait_for_all();
    pair.old.wait_for_standby(&pair.new);
    if tail == Tail::Lost {
        pair.new.stop_fast();
        pair.old.execute(FILLER);
        pair.commit(|pair| &pair.old, 20);
        pair.wait_for_all();
    }
    let last_of_old = position(&pair.last_message());

    // frozen, it cannot see the new primary before that has the slot
    relay.freeze();
    pair.old.kill();
    if tail == Tail::Lost {
        pair.new.start_again();
    }
    pair.promote();
    if during == During::Lives {
        relay.thaw();
    } else {
        drop(relay);
        relay = pair.restart();
    }
    match during {
        During::Lives | During::Restarts => {}
        During::RestartsTwice => {
            relay.wait_for_log("msg=\"connected\"", DEADLINE);
            drop(relay);
            relay = pair.relay(&[]);
        }
        During::LosesNats => {
            relay.wait_for_log("msg=\"connected\"", DEADLINE);
            pair.nats.restart();
            relay.wait_for_log("connected to NATS again", DEADLINE);
        }
    }
    pair.commit(|pair| &pair.new, 20);
    pair.wait_for_all();
    let last_of_new = position(&pair.last_message());
    assert_eq!(
        (last_of_old.source.timeline, last_of_new.source.timeline),
        (1, 2)
    );
    if tail == Tail::Lost {
        assert!(
            last_of_new.position < last_of_old.position,
            "or nothing is shown: {last_of_new} after {last_of_old}"
        );
    }
    // a relay that reads back what was written after the failover
    drop(relay);
    let relay = pair.relay(&[]);
    pair.commit(|pair| &pair.new, 1);
    pair.finish(relay);
}

#[test]
fn a_relay_goes_on_with_a_promoted_standby_and_a_slot_made_anew() {
    check(Slot::ByHand, Tail::Arrived, During::Restarts);
}

#[test]
fn a_relay_that_starts_skips_nothing_new_although_the_standby_lacks_what_was_published() {
    check(Slot::ByHand, Tail::Lost, During::Restarts);
}

#[test]
fn a_relay_that_starts_twice_skips_nothing_new_although_the_standby_lacks_what_was_published() {
    check(Slot::ByHand, Tail::Lost, During::RestartsTwice);
}

#[test]
fn a_relay_that_loses_nats_too_skips_nothing_new_although_the_standby_lacks_what_was_published() {
    check(Slot::ByHand, Tail::Lost, During::LosesNats);
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn with_a_synchronized_slot_a_relay_that_lives_goes_on() {
    check(Slot::Synchronized, Tail::Arrived, During::Lives);
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn with_a_synchronized_slot_a_relay_that_starts_goes_on() {
    check(Slot::Synchronized, Tail::Arrived, During::Restarts);
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn with_a_synchronized_slot_and_a_lost_tail_a_relay_that_lives_skips_nothing_new() {
    check(Slot::Synchronized, Tail::Lost, During::Lives);
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn with_a_synchronized_slot_and_a_lost_tail_a_relay_that_starts_skips_nothing_new() {
    check(Slot::Synchronized, Tail::Lost, During::Restarts);
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn with_a_synchronized_slot_and_a_lost_tail_a_relay_that_starts_twice_skips_nothing_new() {
    check(Slot::Synchronized, Tail::Lost, During::RestartsTwice);
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn with_a_synchronized_slot_and_a_lost_tail_a_relay_that_loses_nats_too_skips_nothing_new() {
    check(Slot::Synchronized, Tail::Lost, During::LosesNats);
}

/// The old primary is back, and nobody told the relay.
#[test]
fn a_relay_that_starts_on_the_abandoned_primary_halts() {
    let pair = fail_over();
    pair.old.start_again();
    let relay = relay_of(&[&pair.old], &pair.nats, &[]);
    assert_halts(&pair, relay);
}

/// It has to ask the stream, not its memory.
#[test]
fn a_relay_that_is_led_back_to_the_abandoned_primary_halts() {
    let pair = fail_over();
    let mark_message = pair.last_message();
    let relay = pair.relay(&[]);
    relay.wait_for_log("msg=\"connected\"", DEADLINE);
    relay.freeze();
    pair.new.kill();
    pair.old.start_again();
    relay.thaw();
    assert_halts(&pair, relay);
    assert_eq!(pair.last_message().seq, mark_message.seq);
}

/// It is no outage that could pass: a standby that is named first is reached before the primary.
#[test]
fn a_relay_that_does_not_ask_for_the_primary_halts_on_the_standby() {
    let mut pair = Pair::start(Slot::ByHand);
    pair.commit(|pair| &pair.old, 1);
    pair.old.wait_for_standby(&pair.new);
    let servers = [&pair.new, &pair.old];
    let relay = |attributes: &str| {
        let db = url(&servers, attributes);
        Relay::run(&["-db", &db, "-nats", &pair.nats.url()], &[])
    };
    let mut halted = relay("");
    let (code, log) = (halted.wait_exit(DEADLINE), halted.log());
    let last = log.last().expect("it says why");
    assert_eq!(code, 78, "{last}");
    assert!(last.contains(SLOT), "{last}");
    assert_eq!(pair.nats.client().last_seq(STREAM), 0);
    pair.finish(relay("?target_session_attrs=primary"));
}

/// A clean failover, after which the new primary has published.
fn fail_over() -> Pair {
    let mut pair = Pair::start(Slot::ByHand);
    let relay = pair.relay(&[]);
    pair.commit(|pair| &pair.old, 5);
    pair.wait_for_all();
    pair.old.wait_for_standby(&pair.new);
    drop(relay);
    pair.old.kill();
    pair.promote();
    let relay = pair.restart();
    pair.commit(|pair| &pair.new, 5);
    pair.finish(relay);
    pair
}

#[track_caller]
fn assert_halts(pair: &Pair, relay: Relay) {
    pair.old
        .execute("INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'abandoned', '{}')");
    halts(
        relay,
        78,
        &["on a timeline that is not in this server's history"],
    );
    let messages = pair.nats.client().read_all(STREAM);
    pair.expected.check(&messages).assert_clean();
}

#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn what_a_synchronized_slot_lags_behind_is_found_in_the_stream() {
    let mut pair = Pair::start(Slot::Synchronized);
    let relay = pair.relay(&["--hold-back", "0"]);
    pair.commit(|pair| &pair.old, 5);
    pair.wait_for_all();
    pair.new
        .execute("ALTER SYSTEM SET sync_replication_slots = off");
    pair.new.execute("SELECT pg_reload_conf()");
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'slotsync worker'";
    eventually("slots to be synchronized no more", DEADLINE, || {
        pair.new.scalar::<i64>(workers) == Some(0)
    });
    pair.commit(|pair| &pair.old, 20);
    pair.wait_for_all();
    let end = pair.old.current_wal_lsn();
    pair.commit(|pair| &pair.old, 1);
    eventually("the slot to be confirmed", DEADLINE, || {
        pair.old.confirmed_flush_lsn(SLOT) > end
    });
    pair.old.wait_for_standby(&pair.new);
    drop(relay);
    pair.old.kill();
    pair.promote();
    let lags = pair.new.confirmed_flush_lsn(SLOT);
    assert!(lags < end, "{lags} is not behind {end}: nothing is shown");
    let relay = pair.relay(&[]);
    pair.commit(|pair| &pair.new, 5);
    pair.finish(relay);
}

/// With `synchronized_standby_slots` the relay never gets ahead of the standby.
#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn what_the_standby_has_not_received_is_not_published_where_the_primary_waits_for_it() {
    let primary = Postgres::builder().setting("synchronized_standby_slots", STANDBY);
    let mut pair = Pair::start_with(Slot::Synchronized, primary);
    let relay = pair.relay(&[]);
    pair.commit(|pair| &pair.old, 5);
    pair.wait_for_all();
    pair.new.stop_fast();
    let before = pair.last_message().seq;
    // lost with the old primary: neither on the new one nor in the stream
    pair.old
        .execute("INSERT INTO outbox VALUES (gen_random_uuid(), 'account', 'lost', '{}')");
    let mut client = pair.nats.client();
    throughout("nothing being published", secs(3), || {
        client.last_seq(STREAM) == before
    });
    pair.old.kill();
    pair.new.start_again();
    pair.promote();
    pair.commit(|pair| &pair.new, 5);
    pair.finish(relay);
}

/// The stream's tail is of the timeline before the one that the relay's server was promoted from.
#[test]
#[ignore = "needs Postgres 17: scripts/test --matrix"]
fn two_failovers_with_the_relay_away_in_between_lose_and_repeat_nothing() {
    const OTHER: &str = "other_standby";
    let mut pair = Pair::start(Slot::Synchronized);
    let third = Postgres::builder().build_standby_of(&pair.old, OTHER);
    // a standby takes over no slot that is behind its own start
    let drop_slot = format!("SELECT pg_drop_replication_slot('{SLOT}')");
    pair.old.execute(&drop_slot);
    pair.create_slot();
    wait_for_synchronized_slot(&third);
    wait_for_synchronized_slot(&pair.new);
    let relay = pair.relay(&[]);
    pair.commit(|pair| &pair.old, 5);
    pair.wait_for_all();
    // the last that the first primary has published is on neither standby
    third.stop_fast();
    pair.new.stop_fast();
    pair.old.execute(FILLER);
    pair.commit(|pair| &pair.old, 5);
    pair.wait_for_all();
    let last_of_first = position(&pair.last_message());
    drop(relay);
    pair.old.kill();
    pair.new.start_again();
    pair.promote();
    pair.new.add_standby_slot(OTHER);
    third.start_again();
    third.follow(&pair.new);
    pair.commit(|pair| &pair.new, 5);
    pair.new.wait_for_standby(&third);
    pair.new.kill();
    third.promote();
    pair.new = third;
    pair.commit(|pair| &pair.new, 5);
    let relay = relay_of(&[&pair.new], &pair.nats, &[]);
    pair.wait_for_all();
    let last_of_third = position(&pair.last_message());
    assert_eq!(last_of_third.source.timeline, 3);
    assert!(
        last_of_third.position < last_of_first.position,
        "or nothing is shown: {last_of_third} after {last_of_first}"
    );
    pair.finish(relay);
}
