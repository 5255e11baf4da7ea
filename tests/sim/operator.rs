//! What fails, and what operators do.

use crate::nats::{SYNC_INTERVAL, Stream};
use crate::postgres::{PARKED, SLOT, Setting, TOPICS};
use crate::relay::Wire;
use crate::world::{Env, State, World, trace};
use jetstream_outbox::nats::EndedBy;
use jetstream_outbox::outbox::position::{Position, Source, SourcePosition};
use jetstream_outbox::postgres::Lsn;
use jetstream_outbox::relay::core::evidence::Message;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    // processes and connections
    Crash,
    Stop,
    Zombie,
    Disconnect,
    ServerRestart,
    LeaderChange,
    // streams
    Regress,
    Foreign,
    Flood,
    OtherService,
    Copy,
    BareCopy,
    Move,
    Split,
    Full,
    Recreate,
    Delete,
    Created,
    Purge,
    DeleteOne,
    Consume,
    // the bucket
    KeyLost,
    KeyBack,
    KeyDown,
    // Postgres
    PgCrash,
    Failover,
    Noise,
    // events
    ReuseIds,
    Park,
    Lose,
    HangUp,
    // the flags that make events
    Flags,
    // a publish goes to another stream of the same name, which answers
    Namesake,
    // after these a halt is due
    Restore,
    Clone,
    SlotMoved,
    Elsewhere,
}

const HARMLESS: [Fault; 30] = [
    Fault::Crash,
    Fault::Stop,
    Fault::Zombie,
    Fault::Disconnect,
    Fault::ServerRestart,
    Fault::LeaderChange,
    Fault::Regress,
    Fault::Foreign,
    Fault::Flood,
    Fault::OtherService,
    Fault::Copy,
    Fault::BareCopy,
    Fault::Move,
    Fault::Split,
    Fault::Full,
    Fault::Recreate,
    Fault::Delete,
    Fault::Created,
    Fault::Purge,
    Fault::DeleteOne,
    Fault::Consume,
    Fault::KeyLost,
    Fault::KeyBack,
    Fault::KeyDown,
    Fault::PgCrash,
    Fault::Failover,
    Fault::Noise,
    Fault::ReuseIds,
    Fault::Park,
    Fault::Lose,
];

impl Fault {
    /// Those of one run: some, so that each meets each other, or all.
    pub fn choose(rng: &mut fastrand::Rng) -> Vec<Fault> {
        let mut faults = HARMLESS.to_vec();
        rng.shuffle(&mut faults);
        let many = [2, 4, 8, faults.len()][rng.usize(..4)];
        faults.truncate(many);
        if rng.u32(..4) == 0 {
            let due = [
                Fault::Restore,
                Fault::Clone,
                Fault::SlotMoved,
                Fault::Elsewhere,
            ];
            faults.push(due[rng.usize(..due.len())]);
        }
        faults
    }
}

impl Env {
    pub fn set_up(&mut self) {
        let replicated = self.rng.u32(..3);
        let queue = self.rng.u32(..3) == 0;
        let names = ["A", "B", "C"];
        let many = self.rng.usize(1..=2);
        for name in names.iter().take(many) {
            let replicated = replicated == 2 || replicated == 1 && self.rng.bool();
            self.add_stream(name, replicated, queue);
        }
        for topic in 0..=TOPICS {
            let index = self.rng.usize(..many);
            self.streams[index].topics.insert(topic);
        }
        if self.rng.u32(..3) == 0 {
            self.streams.iter_mut().for_each(|it| {
                it.topics.remove(&PARKED);
            });
            let index = self.add_stream("PARKED", replicated == 2, false);
            self.streams[index].topics.insert(PARKED);
        }
    }

    fn add_stream(&mut self, name: &str, is_replicated: bool, is_queue: bool) -> usize {
        self.serial += 1;
        let window = Duration::from_secs([60, 120][self.rng.usize(..2)]);
        let stream = Stream::new(self.serial, name, is_replicated, is_queue, window, self.now);
        trace!(
            self,
            "stream {name}, replicated {is_replicated}, queue {is_queue}, window {window:?}"
        );
        self.streams.push(stream);
        self.streams.len() - 1
    }

    fn any_stream(&mut self) -> Option<usize> {
        match self.streams.len() {
            0 => None,
            many => Some(self.rng.usize(..many)),
        }
    }

    fn foreign(&mut self, index: usize, message: Message) {
        let now = self.now;
        if self.streams[index].down_until > now {
            return;
        }
        self.has_foreign = true;
        self.streams[index].store(None, message, now, false);
    }

    fn any_of_ours(&mut self) -> Option<(String, Message)> {
        let ours = self.streams.iter().flat_map(|stream| {
            let messages = stream.messages.values().filter(|it| it.uid.is_some());
            messages.map(|it| (stream.name.clone(), it.message.clone()))
        });
        let ours: Vec<_> = ours.collect();
        match ours.len() {
            0 => None,
            many => ours.into_iter().nth(self.rng.usize(..many)),
        }
    }

    fn give_topic(&mut self, topic: usize, to: usize) {
        self.streams.iter_mut().for_each(|it| {
            it.topics.remove(&topic);
        });
        self.streams[to].topics.insert(topic);
        let left = self.streams.iter().filter(|it| it.topics.is_empty());
        self.left.extend(left.map(|it| it.serial));
        self.moved[topic] = Some(self.now);
        self.forget_late(topic);
    }

    fn delete_stream(&mut self, index: usize) -> Stream {
        let stream = self.streams.remove(index);
        self.has_deleted_streams = true;
        self.take_away(stream.serial);
        stream
    }

    /// Somebody deletes what is in a stream; also what a crash has taken before: he does not ask what was in it.
    fn take_away(&mut self, serial: u64) {
        self.has_lost = true;
        for copy in self.stories.values_mut().flat_map(|it| &mut it.copies) {
            if copy.at.0 == serial {
                copy.state = State::Gone;
            }
        }
    }

    fn remove(&mut self, index: usize, seq: u64) {
        self.has_lost = true;
        let stream = &mut self.streams[index];
        let serial = stream.serial;
        if let Some(stored) = stream.remove(seq) {
            self.mark(serial, seq, stored.uid, State::Gone);
        }
    }

    fn regress(&mut self, index: usize) -> bool {
        let stream = &self.streams[index];
        let synced = self.now.checked_sub(SYNC_INTERVAL);
        let young = stream.messages.iter().rev();
        let young = young.take_while(|(_, it)| synced.is_none_or(|synced| it.time > synced));
        let Some((lowest, _)) = young.last() else {
            return false;
        };
        let (lowest, last_seq) = (*lowest, stream.last_seq);
        let end = match self.rng.bool() {
            true => self.rng.u64(lowest - 1..=last_seq),
            false => last_seq.saturating_sub(self.rng.u64(..4)).max(lowest - 1),
        };
        let stream = &mut self.streams[index];
        let (serial, name) = (stream.serial, stream.name.clone());
        let lost = stream.regress(end);
        trace!(self, "{name} regresses from {last_seq} to {end}");
        (self.has_lost, self.has_regressed) = (true, true);
        for stored in lost {
            self.mark(serial, stored.message.seq, stored.uid, State::Lost);
        }
        true
    }
}

impl World {
    pub fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Crash
            | Fault::Stop
            | Fault::Zombie
            | Fault::Disconnect
            | Fault::ServerRestart => self.strike_relay(fault),
            Fault::KeyLost | Fault::KeyBack | Fault::KeyDown => self.strike_key(fault),
            Fault::PgCrash
            | Fault::Failover
            | Fault::Noise
            | Fault::Restore
            | Fault::Clone
            | Fault::SlotMoved => {
                self.strike_postgres(fault);
            }
            Fault::ReuseIds | Fault::Park | Fault::Lose | Fault::HangUp | Fault::Namesake => {}
            Fault::Flags => self.change_flags(),
            _ => self.strike_streams(fault),
        }
    }

    fn disconnect(&mut self, why: &str) {
        let Some(relay) = &mut self.relay else {
            return;
        };
        if !self.faults.contains(&Fault::HangUp) {
            return relay.disconnect(&mut self.env, why);
        }
        // no event is to blame for it
        trace!(self.env, "relay {}: {why}", relay.name);
        relay.hang_up(&mut self.env);
        relay.ended = Some(match self.env.rng.bool() {
            true => EndedBy::Silence,
            false => EndedBy::Other,
        });
    }

    fn strike_relay(&mut self, fault: Fault) {
        let env = &mut self.env;
        match fault {
            Fault::Disconnect => self.disconnect("the network"),
            Fault::ServerRestart => {
                trace!(env, "the servers restart");
                env.streams.iter_mut().for_each(Stream::restart);
                self.disconnect("the server restarts");
            }
            Fault::Stop => {
                if let Some(relay) = &mut self.relay
                    && relay.stop(env)
                {
                    self.relay = None;
                }
            }
            Fault::Crash => {
                if let Some(mut relay) = self.relay.take() {
                    trace!(env, "relay {} is killed", relay.name);
                    relay.hang_up(env);
                }
            }
            _ => {
                if let Some(mut relay) = self.relay.take_if(|relay| relay.is_up()) {
                    trace!(
                        env,
                        "relay {} is frozen, and goes on as a zombie", relay.name
                    );
                    relay.zombie_since = Some(env.now);
                    self.zombies.push(relay);
                }
            }
        }
    }

    /// The relay is stopped or killed, and the next one has other flags. That takes a while: nothing is on its way any more.
    fn change_flags(&mut self) {
        if !self.zombies.is_empty() || self.env.key_was_touched {
            return;
        }
        let fault = match self.env.rng.bool() {
            true => Fault::Stop,
            false => Fault::Crash,
        };
        self.strike_relay(fault);
        if self.relay.is_some() {
            self.strike_relay(Fault::Crash);
        }
        self.env.forget_all_late();
        let env = &mut self.env;
        let mut setting = Setting::WIDE;
        match env.rng.u32(..8) {
            0..3 => setting.takes_wide = false,
            3..5 => setting.other_ids = true,
            5 if env.due.is_none() => setting.sends_wide = false,
            _ => {}
        }
        env.setting = setting;
        env.flags_changed = true;
        env.counted_otherwise |= !setting.sends_wide;
        trace!(env, "the flags are {setting:?}");
        self.were_refused = false;
    }

    fn strike_key(&mut self, fault: Fault) {
        let env = &mut self.env;
        match fault {
            // without a record nothing tells by which flags was written what the streams hold
            Fault::KeyLost | Fault::KeyBack if env.flags_changed => {}
            Fault::KeyLost => {
                trace!(env, "the bucket is lost");
                env.key.lose();
                env.key_was_touched = true;
                env.forget_accepted();
            }
            Fault::KeyBack => {
                let age = Duration::from_secs(env.rng.u64(..20));
                trace!(env, "the bucket is put back by {age:?}");
                if let Some(time) = env.now.checked_sub(age) {
                    env.key.put_back(time);
                    env.key_was_touched = true;
                    env.forget_accepted();
                }
            }
            _ => {
                let time = Duration::from_millis(env.rng.u64(..25_000));
                trace!(env, "the bucket is down for {time:?}");
                env.key_down_until = env.now + time;
            }
        }
    }

    fn strike_postgres(&mut self, fault: Fault) {
        let env = &mut self.env;
        if !matches!(
            fault,
            Fault::PgCrash | Fault::Failover | Fault::Noise | Fault::SlotMoved
        ) && self.snapshot.is_none()
        {
            trace!(env, "a snapshot of Postgres is taken at {}", env.pg.wal_end);
            self.snapshot = Some(env.pg.clone());
            return;
        }
        if env.due.is_some() && matches!(fault, Fault::Failover | Fault::Clone | Fault::Restore) {
            // what was promoted or restored twice before the relay has seen it is beyond all proof
            return;
        }
        if env.counted_otherwise && matches!(fault, Fault::Clone | Fault::Restore) {
            // what another publication sends need not have what was stored last
            return;
        }
        match fault {
            Fault::Noise => {
                env.pg.wal_end = Lsn(env.pg.wal_end.0 + env.rng.u64(1..40));
                return;
            }
            Fault::PgCrash => {
                trace!(
                    env,
                    "Postgres crashes: confirmed {} again", env.pg.persisted
                );
                env.pg.confirmed = env.pg.persisted;
            }
            Fault::Failover => {
                let many = env.pg.transactions.len();
                let kept = many - env.rng.usize(..=many.min(3));
                let end = env.pg.transactions.get(..kept).and_then(|it| it.last());
                let end = end.map_or(Lsn(100), |it| it.end_lsn);
                // a synced slot is not ahead of its standby, whose history is that of the primary
                let left = env.pg.switch_points.last().map_or(Lsn(0), |(_, lsn)| *lsn);
                if end < env.pg.confirmed.max(left) {
                    return;
                }
                let lacking = env.pg.transactions.split_off(kept);
                env.give_up(&lacking);
                env.pg.promote(end);
                trace!(env, "fail-over at {end} to timeline {}", env.pg.timeline);
                self.snapshot = None;
                self.repeats.clear();
            }
            Fault::SlotMoved => {
                if env.rng.u32(..4) > 0 {
                    return;
                }
                env.due = Some("slot moved");
                // where all is stored that is skipped, a record on its way may say so yet
                let wal_end = env.pg.wal_end;
                let record = env.key.record().filter(|record| record.told_lsn < wal_end);
                let writer = record.map(|record| record.writer.clone());
                env.moved_slot = writer
                    .filter(|_| env.has_unresolved())
                    .map(|it| (wal_end, it));
                let skipped = env.pg.transactions.clone();
                env.give_up(&skipped);
                env.pg.confirmed = env.pg.wal_end;
                env.pg.persisted = env.pg.wal_end;
                trace!(env, "the slot is moved to {}", env.pg.wal_end);
            }
            _ => {
                let Some(mut other) = self.snapshot.take() else {
                    return;
                };
                let is_other = |it: &&std::rc::Rc<crate::postgres::Transaction>| {
                    it.commit_lsn >= other.wal_end
                };
                let lacking: Vec<_> = env
                    .pg
                    .transactions
                    .iter()
                    .filter(is_other)
                    .cloned()
                    .collect();
                env.give_up(&lacking);
                if fault == Fault::Clone {
                    let end = other.wal_end;
                    other.promote(end);
                    trace!(
                        env,
                        "a clone is promoted at {end} to timeline {}", other.timeline
                    );
                    if other.timeline > env.pg.timeline {
                        // a fail-over to a standby that lags; the slot is as old as that, too
                    } else {
                        env.due = Some("clone");
                    }
                    // the next one promoted is a clone of the same
                    if env.rng.bool() && env.due.is_none() {
                        let mut twin = other.clone();
                        twin.timeline -= 1;
                        twin.switch_points.pop();
                        self.snapshot = Some(twin);
                    }
                } else {
                    trace!(env, "Postgres is restored to {}", other.wal_end);
                    env.due = Some("restored");
                    if env.rng.bool() {
                        self.repeats = lacking.into();
                    }
                }
                env.pg = other;
            }
        }
        env.pg_epoch += 1;
    }

    fn strike_streams(&mut self, fault: Fault) {
        let Some(index) = self.env.any_stream() else {
            return;
        };
        let env = &mut self.env;
        let topic = env.rng.usize(..=TOPICS);
        match fault {
            // what is lost of a stream that has left the prefix and whose `created` the server has changed cannot be told from a
            // stream of another owner under that name
            Fault::Regress if !env.streams[index].topics.is_empty() => {
                // a replicated stream loses something only if all servers crash
                let is_replicated = env.streams[index].is_replicated;
                let down_until = env.now + Duration::from_secs(2);
                if env.regress(index) && (is_replicated || env.rng.u32(..5) < 3) {
                    self.disconnect("the server has crashed");
                } else {
                    // another server than the one that we are connected to
                    self.env.streams[index].down_until = down_until;
                }
            }
            Fault::LeaderChange if env.streams[index].is_replicated => {
                trace!(env, "a leader steps down");
                if let Some(relay) = &mut self.relay {
                    let name = &env.streams[index].topics;
                    let lost = env.rng.usize(..3);
                    let of_it = relay.out.iter().enumerate().filter(
                        |(_, it)| matches!(it, Wire::Publish(it) if name.contains(&it.topic)),
                    );
                    let of_it: Vec<usize> = of_it.map(|(at, _)| at).take(lost).collect();
                    for at in of_it.into_iter().rev() {
                        relay.out.remove(at);
                    }
                }
                for _ in 0..env.rng.usize(..3) {
                    env.foreign(index, Message::default());
                }
            }
            Fault::Foreign => {
                for _ in 0..env.rng.usize(1..5) {
                    env.foreign(index, Message::default());
                }
                trace!(
                    env,
                    "foreign messages in {}, which ends at {}",
                    env.streams[index].name,
                    env.streams[index].last_seq
                );
            }
            Fault::Flood if env.one_in(10) => {
                for _ in 0..2000 {
                    env.foreign(index, Message::default());
                }
                trace!(
                    env,
                    "thousands in {}, which ends at {}",
                    env.streams[index].name,
                    env.streams[index].last_seq
                );
            }
            Fault::OtherService => {
                let seq = env.streams[index].last_seq;
                let lsn = Lsn(env.pg.wal_end.0 + env.rng.u64(..50));
                env.foreign(
                    index,
                    Message {
                        position: Some(SourcePosition {
                            source: Source {
                                slot: SLOT.into(),
                                system_id: 2,
                                timeline: 1,
                            },
                            position: Position {
                                commit_lsn: lsn,
                                ordinal: 1,
                            },
                        }),
                        id: Some(format!("other-{seq}")),
                        expected_last_sequence: Some(seq),
                        ..Default::default()
                    },
                );
                trace!(env, "another service writes to {}", env.streams[index].name);
            }
            Fault::Copy | Fault::BareCopy => {
                env.has_bare_copies |= fault == Fault::BareCopy;
                if let Some((from, message)) = env.any_of_ours() {
                    trace!(
                        env,
                        "a copy of {:?} in {}", message.id, env.streams[index].name
                    );
                    let id = message.id.clone().unwrap_or_default();
                    env.copied.insert((env.streams[index].serial, id));
                    let message = Message {
                        expected_last_sequence: None,
                        copied_from: (fault == Fault::Copy).then_some(from),
                        ..message
                    };
                    env.foreign(index, message);
                }
            }
            Fault::Move if env.is_late(topic) => {}
            Fault::Move => {
                trace!(env, "topic {topic} is moved to {}", env.streams[index].name);
                env.give_topic(topic, index);
            }
            Fault::Split => {
                let free = ["D", "E", "F"]
                    .into_iter()
                    .find(|name| env.streams.iter().all(|it| it.name != *name));
                if let Some(name) = free
                    && !env.is_late(topic)
                {
                    let (replicated, queue) = (
                        env.streams[index].is_replicated,
                        env.streams[index].is_queue,
                    );
                    let new = env.add_stream(name, replicated, queue);
                    trace!(env, "topic {topic} is moved to the new {name}");
                    env.give_topic(topic, new);
                }
            }
            Fault::Full => {
                env.streams[index].is_full ^= true;
                trace!(
                    env,
                    "{} is full: {}", env.streams[index].name, env.streams[index].is_full
                );
            }
            Fault::Recreate => {
                let old = env.delete_stream(index);
                trace!(env, "{} is deleted and created again", old.name);
                let new = env.add_stream(&old.name, old.is_replicated, old.is_queue);
                env.streams[new].topics = old.topics;
            }
            Fault::Delete => {
                let old = env.delete_stream(index);
                trace!(env, "{} is deleted", old.name);
                if env.streams.is_empty() {
                    env.add_stream("Z", old.is_replicated, old.is_queue);
                }
                if env.rng.bool() {
                    for topic in old.topics {
                        env.give_topic(topic, 0);
                    }
                }
            }
            // who has left the prefix is known by it alone
            Fault::Created if env.streams[index].topics.is_empty() => {}
            Fault::Created => {
                env.serial += 1;
                let created = format!("created-{}", env.serial);
                trace!(
                    env,
                    "created of {} changes, the servers restart", env.streams[index].name
                );
                env.streams[index].created = created;
                env.has_other_created = true;
                env.streams.iter_mut().for_each(Stream::restart);
                self.disconnect("the server restarts");
            }
            Fault::Purge => {
                let seqs: Vec<u64> = env.streams[index].messages.keys().copied().collect();
                trace!(env, "{} is purged", env.streams[index].name);
                let serial = env.streams[index].serial;
                env.take_away(serial);
                for seq in seqs {
                    env.remove(index, seq);
                }
            }
            Fault::DeleteOne => {
                let seqs: Vec<u64> = env.streams[index].messages.keys().copied().collect();
                if !seqs.is_empty() {
                    let seq = seqs[env.rng.usize(..seqs.len())];
                    trace!(
                        env,
                        "message {seq} of {} is deleted", env.streams[index].name
                    );
                    env.remove(index, seq);
                }
            }
            Fault::Consume if env.streams[index].is_queue => {
                let many = env.rng.usize(1..8);
                let seqs: Vec<u64> = env.streams[index]
                    .messages
                    .keys()
                    .copied()
                    .take(many)
                    .collect();
                trace!(env, "consumed of {}: {seqs:?}", env.streams[index].name);
                for seq in seqs {
                    env.remove(index, seq);
                }
            }
            Fault::Elsewhere if env.one_in(8) => {
                trace!(env, "topic {topic} goes elsewhere");
                env.leaf = Some(topic);
                env.due = Some("elsewhere");
            }
            _ => {}
        }
    }

    /// Everything works again.
    pub fn end_faults(&mut self) {
        let env = &mut self.env;
        env.key_down_until = env.now;
        if env.streams.is_empty() {
            env.add_stream("A", false, false);
        }
        for stream in &mut env.streams {
            stream.is_full = false;
        }
        for topic in 0..=TOPICS {
            if env.streams.iter().all(|it| !it.topics.contains(&topic)) {
                env.give_topic(topic, 0);
            }
        }
    }
}
