//! What operators do while everything else fails: they move subjects between streams, split, merge, edit, fill and delete these,
//! others publish into them, and Postgres is put back to a snapshot, or to clones of one.
//!
//! Each act is whole when it ends: every subject of the prefix is captured, and a relay runs. Where a halt is due, the advice that
//! it prints is followed.

use crate::events::AGGREGATE_TYPES;
use crate::faults::{On, Part};
use crate::fleet::{Fleet, Settings};
use crate::streams::{FOREIGN, Streams, idle_subject};
use crate::support::process::lock;
use crate::support::proxy::Mode;
use crate::support::wait::{poll, secs};
use crate::world::{NAME, PREFIX, World};
use fastrand::Rng;
use jetstream_outbox::postgres::Lsn;
use serde_json::{Value, json};
use std::time::Duration;
use tempfile::TempDir;

/// What an act waits for may take so long, while servers fail.
const LIMIT: Duration = secs(120);

/// A relay gets to work so soon, or NATS is away for it.
const SOON: Duration = secs(10);

/// The halt that is due when the WAL is another one, and what it advises.
const OTHER_WAL: &str = "this is not the WAL that the streams were written from";
const ADVICE: &str = "-resume-anyway";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Move,
    Swap,
    Split,
    Merge,
    Fill,
    FillAndMove,
    Edit,
    Delete,
    Foreign,
    Copies,
    BesideKilled,
    PutBack,
    Clones,
}

/// Each as often as it is in a deck.
pub const ACTS: [Act; 24] = [
    Act::Move,
    Act::Move,
    Act::Move,
    Act::Swap,
    Act::Swap,
    Act::Split,
    Act::Split,
    Act::Split,
    Act::Merge,
    Act::Merge,
    Act::Fill,
    Act::FillAndMove,
    Act::FillAndMove,
    Act::Edit,
    Act::Delete,
    Act::Delete,
    Act::Foreign,
    Act::Foreign,
    Act::Copies,
    Act::Copies,
    Act::BesideKilled,
    Act::PutBack,
    Act::PutBack,
    Act::Clones,
];

impl Act {
    pub fn parts(self) -> &'static [Part] {
        match self {
            Act::Foreign | Act::Copies => &[],
            Act::BesideKilled => &[Part::Beside],
            Act::PutBack => &[Part::Relay, Part::Postgres],
            // nobody is let in before the promotion
            Act::Clones => &[Part::Relay, Part::Postgres, Part::ToPostgres],
            _ => &[Part::Streams],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Act::Move => "a subject moved to another stream",
            Act::Swap => "two streams swap their subjects",
            Act::Split => "a stream split in two",
            Act::Merge => "two streams merged",
            Act::Fill => "a stream full for a while",
            Act::FillAndMove => "a subject moved from a full stream",
            Act::Edit => "a stream edited",
            Act::Delete => "a stream deleted",
            Act::Foreign => "foreign messages",
            Act::Copies => "copies of messages",
            Act::BesideKilled => "relay of the service beside killed",
            Act::PutBack => "Postgres put back to a snapshot",
            Act::Clones => "two clones of Postgres promoted",
        }
    }
}

/// A snapshot of Postgres.
struct Snapshot {
    disk: TempDir,
    /// How many events it has.
    events: usize,
    end: Lsn,
}

impl On<'_> {
    pub fn operate(&self, act: Act, random: &mut Rng) {
        let Some(streams) = &self.world.streams else {
            return;
        };
        match act {
            Act::Foreign => self.publish_foreign(streams, random),
            Act::Copies => self.publish_copies(streams, random),
            Act::BesideKilled => {
                if let Some(fleet) = self.beside {
                    self.away(fleet, random, |fleet, relay| fleet.kill(relay));
                }
            }
            Act::PutBack => self.put_back(random),
            Act::Clones => self.clones(random),
            Act::Delete => self.delete_stream(streams, random),
            Act::Fill => {
                let (name, _) = owner(streams, random);
                self.fill(streams, name);
                self.pause(random, 500..5_000);
                streams.edit(&self.world.jetstream, name, &json!({}));
            }
            Act::Edit => {
                let all = streams.all();
                let (name, _) = all[random.usize(0..all.len())];
                let fields = match random.bool() {
                    true => json!({ "max_msgs": 1_000_000_000, "description": "edited" }),
                    false => json!({ "allow_direct": true, "max_age": 86_400_000_000_000_u64 }),
                };
                streams.edit(&self.world.jetstream, name, &fields);
                self.pause(random, 0..2_000);
                streams.edit(&self.world.jetstream, name, &json!({}));
            }
            Act::Move | Act::FillAndMove | Act::Swap | Act::Split | Act::Merge => {
                self.move_subjects(act, streams, random);
            }
        }
    }

    fn capture(&self, streams: &Streams, name: &'static str, kinds: Vec<usize>) {
        self.world.note(&format!("{name} captures {kinds:?}"));
        streams.capture(&self.world.jetstream, name, kinds);
    }

    /// It takes no more than it has.
    fn fill(&self, streams: &Streams, name: &str) {
        let jetstream = &self.world.jetstream;
        let count = poll(LIMIT, || {
            let info = format!("STREAM.INFO.{name}");
            let info = jetstream.client()?.try_api(&info, &Value::Null)?;
            Ok::<_, std::io::Error>(info["state"]["messages"].as_u64().unwrap_or(0))
        });
        let count = count.expect("ask for a stream");
        let full = json!({ "max_msgs": count.max(1), "discard": "new" });
        self.world.note(&format!("{name} is full with {count}"));
        streams.edit(jetstream, name, &full);
    }

    /// Taken from the one, given to the other; in between nobody captures them, for a moment or longer.
    fn move_subjects(&self, act: Act, streams: &Streams, random: &mut Rng) {
        let (from, mut kinds) = owner(streams, random);
        let mut others = streams.all();
        others.retain(|(name, _)| *name != from);
        random.shuffle(&mut others);
        let new = streams.free_name();
        let other = others.pop();
        // with no other there, or no name left, one act becomes the other
        let (to, of_to) = match (act, new, other) {
            (Act::Split, Some(new), _) => (new, Vec::new()),
            (_, _, Some(other)) => other,
            (_, Some(new), None) => (new, Vec::new()),
            (_, None, None) => return,
        };
        if act == Act::FillAndMove {
            self.fill(streams, from);
            self.pause(random, 300..3_000);
        } else {
            self.burst_maybe(random);
        }
        let moved = match act {
            Act::Merge | Act::Swap => std::mem::take(&mut kinds),
            _ => vec![kinds.remove(random.usize(0..kinds.len()))],
        };
        self.capture(streams, from, kinds.clone());
        self.gap(random);
        if act == Act::Swap && !of_to.is_empty() {
            self.capture(streams, to, moved);
            self.gap(random);
            self.capture(streams, from, of_to);
        } else {
            self.capture(streams, to, [of_to, moved].concat());
        }
    }

    fn burst_maybe(&self, random: &mut Rng) {
        if random.bool() {
            self.burst(random);
        }
    }

    fn gap(&self, random: &mut Rng) {
        if random.bool() {
            self.pause(random, 0..3_000);
        }
    }

    /// It takes along what it held; its name is used again at once, by a stream under the prefix or by one that is not, or not.
    fn delete_stream(&self, streams: &Streams, random: &mut Rng) {
        let mut all = streams.all();
        random.shuffle(&mut all);
        let Some((name, kinds)) = all.pop().filter(|_| !all.is_empty()) else {
            return;
        };
        self.capture(streams, name, Vec::new());
        let confirmed = self.confirmed_everywhere();
        self.world
            .note(&format!("{name} is deleted; told: {confirmed:?}"));
        streams.delete(&self.world.jetstream, name, confirmed);
        self.gap(random);
        match random.u32(0..3) {
            0 => return self.capture(streams, name, kinds),
            1 => {
                self.capture(streams, name, Vec::new());
                for _ in 0..random.u32(0..5) {
                    self.publish(&idle_subject(name), &[(FOREIGN, "yes")], b"of others");
                }
            }
            _ => {}
        }
        let (to, of_to) = all[random.usize(0..all.len())].clone();
        if !kinds.is_empty() {
            self.capture(streams, to, [of_to, kinds].concat());
        }
    }

    /// What each Postgres has been told, by its system.
    fn confirmed_everywhere(&self) -> Vec<(u64, Lsn)> {
        let worlds = [Some(self.world), self.beside.map(Fleet::world)];
        let worlds = worlds.into_iter().flatten();
        worlds.map(|it| (it.system_id, confirmed(it))).collect()
    }

    /// Once, whether somebody answers or not.
    fn publish(&self, subject: &str, headers: &[(&str, &str)], body: &[u8]) {
        let answer = self.world.jetstream.client();
        let answer = answer.and_then(|mut client| client.try_publish(subject, headers, body));
        if let Err(error) = answer {
            self.world.note(&format!("publish to {subject}: {error}"));
        }
    }

    /// A flood of them at once, or some over a while.
    fn publish_foreign(&self, streams: &Streams, random: &mut Rng) {
        let kinds = AGGREGATE_TYPES.map(|kind| format!("{PREFIX}.{kind}.foreign"));
        if random.bool() {
            let count = random.u32(1..4_000);
            self.world.note(&format!("{count} foreign messages"));
            let sent = self.world.jetstream.client().and_then(|mut client| {
                for _ in 0..count {
                    let subject = &kinds[random.usize(0..kinds.len())];
                    client.try_send(subject, "", &[(FOREIGN, "yes")], b"of others")?;
                }
                // answered when all before it has arrived
                client.try_api("INFO", &Value::Null)
            });
            if let Err(error) = sent {
                self.world.note(&format!("foreign messages: {error}"));
            }
        } else {
            self.burst_maybe(random);
            for _ in 0..random.u32(1..40) {
                let subject = &kinds[random.usize(0..kinds.len())];
                self.publish(subject, &[(FOREIGN, "yes")], b"of others");
                self.pause(random, 0..100);
            }
        }
        // seen where they are, while it is known
        let _ = streams.look(&self.world.jetstream);
    }

    /// With all headers but those that JetStream would not take; under the subject of the original or another.
    fn publish_copies(&self, streams: &Streams, random: &mut Rng) {
        let _ = streams.look(&self.world.jetstream);
        for _ in 0..random.u32(1..30) {
            let Some((name, seq)) = streams.any_message(random) else {
                return;
            };
            let original = self.world.jetstream.client();
            let Ok(original) = original.and_then(|mut client| client.try_message(name, seq)) else {
                continue;
            };
            let headers = original.headers.iter();
            let mut headers: Vec<(&str, &str)> = headers
                .map(|(name, value)| (name.as_str(), value.as_str()))
                .filter(|(name, _)| !name.starts_with("Nats-Expected") && *name != FOREIGN)
                .collect();
            headers.push((FOREIGN, "copy"));
            let kind = AGGREGATE_TYPES[random.usize(0..AGGREGATE_TYPES.len())];
            let other = format!("{PREFIX}.{kind}.copy");
            let subject = match random.u32(0..4) {
                0 => &other,
                _ => &original.subject,
            };
            self.publish(subject, &headers, &original.body);
            self.pause(random, 0..50);
        }
    }

    /// Stops Postgres and copies its disk, and knows what was committed by then.
    fn take_snapshot(&self) -> Snapshot {
        let pg = &self.world.pg;
        let _gate = self.written.close_gate();
        pg.stop_fast();
        let disk = pg.snapshot();
        pg.start_again();
        let mut ledger = lock(self.ledger);
        ledger.read_all(pg);
        self.world.note("Postgres is copied");
        Snapshot {
            disk,
            events: ledger.events(),
            end: ledger.end(),
        }
    }

    /// Postgres is stopped, `replace`d, and what was committed since the snapshot is undone.
    fn replace(&self, snapshot: &Snapshot, replace: impl FnOnce(&TempDir)) {
        let pg = &self.world.pg;
        let _gate = self.written.close_gate();
        let mut ledger = lock(self.ledger);
        ledger.read_all(pg);
        self.forget_left();
        pg.stop_immediate();
        // whatever was confirmed is of the history that ends here
        ledger.put_back(snapshot.events);
        replace(&snapshot.disk);
        ledger.is_put_back_at(confirmed(self.world));
        let undone = ledger.undone_events();
        self.world.note(&format!(
            "Postgres is put back: {undone} events undone so far"
        ));
    }

    /// What has matured by now, or soon, in streams that have left the prefix is not known to be stored when the slot is put back.
    fn forget_left(&self) {
        let hold_back = self.hold_back.saturating_sub(SOON);
        if let Some(streams) = &self.world.streams {
            streams.forget_left(&self.world.jetstream, hold_back);
        }
    }

    /// Waits until the relay's record is of what was committed after the snapshot: only then can it know that this is undone.
    fn wait_until_recorded(&self, snapshot: &Snapshot) -> bool {
        let key = format!("{NAME}-{}", self.world.system_id);
        let recorded = poll(LIMIT, || {
            self.fleet.check();
            let record = self.world.jetstream.client()?.try_value(NAME, &key)?;
            let anchor = &record["young"]["anchor"];
            // without an event it is where a history ended
            let is_event = anchor["id"].is_string();
            let anchor = anchor["position"].as_str().unwrap_or_default();
            let anchor = anchor.split(' ').next().unwrap_or_default();
            let anchor: Lsn = anchor.parse().unwrap_or_default();
            match is_event && anchor >= snapshot.end {
                true => Ok(()),
                false if self.world.is_broken() => Ok(()),
                false => Err(std::io::Error::other(format!(
                    "{anchor} is recorded, {} is due: {record}",
                    snapshot.end
                ))),
            }
        });
        if let Err(reason) = recorded {
            self.world
                .violation("stands still", format!("after {LIMIT:?}: {reason}"));
            self.world.give_up();
        }
        !self.world.is_broken()
    }

    fn put_back(&self, random: &mut Rng) {
        let snapshot = self.take_snapshot();
        self.pause(random, 0..4_000);
        self.burst_maybe(random);
        if !self.wait_until_recorded(&snapshot) {
            return;
        }
        self.change_under_the_relay(random, || {
            self.replace(&snapshot, |disk| {
                self.world.pg.restore(disk);
                self.world.pg.start_again();
            });
        });
        self.follow_the_advice(&snapshot, random);
    }

    /// The first is a failover, as the relay knows it: what was published since the snapshot stays, and it goes on. The second
    /// is on a timeline of the same number.
    fn clones(&self, random: &mut Rng) {
        let snapshot = self.take_snapshot();
        self.pause(random, 0..3_000);
        let promote = || {
            self.world.to_pg.set(Mode::Refuse);
            self.world.to_pg.cut();
            self.replace(&snapshot, |disk| self.world.pg.restore_promoted(disk));
            self.world.to_pg.set(Mode::Pass);
        };
        self.change_under_the_relay(random, promote);
        if !self.wait_for_event_after(&snapshot) {
            return;
        }
        self.burst_maybe(random);
        if !self.wait_until_recorded(&snapshot) {
            return;
        }
        self.change_under_the_relay(random, promote);
        self.follow_the_advice(&snapshot, random);
    }

    /// While it runs, or while it is away.
    fn change_under_the_relay(&self, random: &mut Rng, change: impl FnOnce()) {
        match self.fleet.oldest().filter(|_| random.bool()) {
            Some(relay) => {
                match random.bool() {
                    true => self.fleet.kill(relay),
                    false => self.fleet.term(relay),
                }
                change();
                self.fleet.start(Settings::any(random));
            }
            None => change(),
        }
    }

    /// The relay halts by name, also when it is started again; then once with what it advises. In the end it runs without.
    fn follow_the_advice(&self, snapshot: &Snapshot, random: &mut Rng) {
        for _ in 0..random.u32(1..3) {
            let relay = self.fleet.oldest();
            let relay = relay.unwrap_or_else(|| self.fleet.start(Settings::any(random)));
            if !self.fleet.wait_for_halt(relay, 65, OTHER_WAL, LIMIT) {
                self.world.give_up();
                return;
            }
        }
        // those that halted have still looked at the record
        self.forget_left();
        let relay = self.fleet.start_with(Settings::any(random), &[ADVICE]);
        if self.wait_for_event_after(snapshot) && random.bool() {
            self.fleet.term(relay);
            self.fleet.start(Settings::any(random));
        }
    }

    /// Waits until something is stored that was committed since Postgres was put back.
    fn wait_for_event_after(&self, snapshot: &Snapshot) -> bool {
        let Some(streams) = &self.world.streams else {
            return false;
        };
        let stored = poll(LIMIT, || {
            self.fleet.check();
            if self.world.is_broken() {
                return Ok(());
            }
            streams
                .look(&self.world.jetstream)
                .map_err(|error| error.to_string())?;
            let mut ledger = lock(self.ledger);
            let read = ledger.read_on(&self.world.pg);
            read.map_err(|error| error.to_string())?;
            let first = ledger.from(snapshot.events).first().copied();
            let first = first.ok_or("nothing is committed")?;
            streams
                .hold(&[first])
                .map_err(|id| format!("{} is not stored", id.uuid()))
        });
        if let Err(reason) = stored {
            self.world
                .violation("stands still", format!("after {LIMIT:?}: {reason}"));
            self.world.give_up();
        }
        !self.world.is_broken()
    }
}

/// A stream that captures something, and what.
fn owner(streams: &Streams, random: &mut Rng) -> (&'static str, Vec<usize>) {
    let mut all = streams.all();
    all.retain(|(_, kinds)| !kinds.is_empty());
    all.swap_remove(random.usize(0..all.len()))
}

/// Of a Postgres that may be down for the moment.
fn confirmed(world: &World) -> Lsn {
    let sql = format!(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{NAME}'"
    );
    let text = poll(LIMIT, || {
        let row = world.pg.try_client()?.query_one(&sql, &[])?;
        Ok::<String, postgres::Error>(row.get(0))
    });
    let text = text.expect("ask for the slot");
    text.parse().expect("Postgres prints LSNs")
}
