//! What the streams hold: the events of ours, told from what others have put there.
//!
//! [`Streams`] are several, which operators edit, split, merge and delete. They are read on while they change, so that it is known
//! what a stream held when it is deleted.

use crate::events::{AGGREGATE_TYPES, EventId};
use crate::ledger::Violations;
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::process::lock;
use crate::support::wait::{pause, poll, secs};
use crate::world::{DUPLICATE_WINDOW, JetStream, NAME, PREFIX, PREFIX_BESIDE};
use jetstream_outbox::outbox::position::SourcePosition;
use jetstream_outbox::postgres::Lsn;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Marks what others have published, copies of ours too.
pub const FOREIGN: &str = "Foreign";

/// The stream of the service that has a prefix of its own.
pub const BESIDE: &str = "beside";

/// Streams of the events are named so, as far as there are any.
const NAMES: [&str; 4] = [NAME, "second", "third", "fourth"];

/// What a change of the streams may take, while servers fail.
const CHANGE_LIMIT: Duration = secs(60);

/// What was on its way to a stream that captures nothing any more has arrived by then.
const ARRIVED: Duration = Duration::from_millis(500);

/// An event in a stream.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    pub id: EventId,
    pub seq: u64,
    pub time_ns: u64,
    pub is_late: bool,
    /// Which system it is of.
    pub system_id: u64,
}

impl Stored {
    /// Sees that it is a message as a relay publishes it.
    pub fn read(
        message: &StreamMessage,
        prefix: &str,
        violations: &mut Violations,
    ) -> Option<Stored> {
        let position = message.header("Outbox-Position").unwrap_or("no position");
        let place = format!("{:?} at sequence {}, {position}", message.id(), message.seq);
        let Some(id) = EventId::parse(message.id()) else {
            violations.add("never written, but in the stream", place);
            return None;
        };
        let position: Option<SourcePosition> = position.parse().ok();
        let fence = (message.seq - 1).to_string();
        if position.is_none()
            || message.header("Nats-Expected-Last-Sequence") != Some(fence.as_str())
        {
            violations.add("without position or fence", place.clone());
        }
        if message.body != id.payload().as_bytes() {
            violations.add("with another payload", place.clone());
        }
        if message.subject != id.subject(prefix) {
            violations.add("under another subject", place);
        }
        Some(Stored {
            id,
            seq: message.seq,
            time_ns: message.time_ns,
            is_late: message.header("Outbox-Late").is_some(),
            system_id: position.map_or(0, |it| it.source.system_id),
        })
    }

    pub fn place(&self) -> String {
        format!("sequence {}, stored at {} ns", self.seq, self.time_ns)
    }
}

/// A stream from its creation on.
#[derive(Debug)]
struct Stream {
    name: &'static str,
    prefix: &'static str,
    /// Indexes of the aggregate types whose subjects it captures.
    kinds: Vec<usize>,
    next_seq: u64,
    stored: Vec<Stored>,
    foreign: u64,
}

/// A stream that is gone.
struct Deleted {
    stored: Vec<Stored>,
    time_ns: u64,
    /// What each Postgres had been told before, by its system.
    confirmed: Vec<(u64, Lsn)>,
}

#[derive(Default)]
struct Inner {
    streams: Vec<Stream>,
    deleted: Vec<Deleted>,
    /// Every event that was seen.
    found: HashSet<EventId>,
    /// Those of deleted streams: what the slot still has comes again. And those that nobody knows of any more.
    may_repeat: HashSet<EventId>,
    /// In a stream that captured nothing of the prefix when a Postgres was put back, and recorded for the hold-back by then: the
    /// relay has forgotten such a stream, and the slot may be at a time before.
    forgotten: Vec<EventId>,
    violations: Violations,
}

/// All there are.
pub struct Streams {
    replicas: u8,
    inner: Mutex<Inner>,
}

impl Streams {
    /// One that captures the prefix, and one for a service beside it.
    pub fn create(jetstream: &JetStream) -> Streams {
        let streams = Streams {
            replicas: jetstream.nodes().len() as u8,
            inner: Mutex::default(),
        };
        streams.add(jetstream, NAME, PREFIX, vec![0, 1, 2]);
        streams.add(jetstream, BESIDE, PREFIX_BESIDE, vec![0, 1, 2]);
        streams
    }

    fn add(
        &self,
        jetstream: &JetStream,
        name: &'static str,
        prefix: &'static str,
        kinds: Vec<usize>,
    ) {
        let stream = Stream {
            name,
            prefix,
            kinds,
            next_seq: 1,
            stored: Vec::new(),
            foreign: 0,
        };
        self.call(jetstream, "CREATE", name, &self.config(&stream, &json!({})));
        lock(&self.inner).streams.push(stream);
    }

    /// Those that have the prefix: the name of each, and which aggregate types it captures.
    pub fn all(&self) -> Vec<(&'static str, Vec<usize>)> {
        let inner = lock(&self.inner);
        let streams = inner.streams.iter().filter(|it| it.prefix == PREFIX);
        streams.map(|it| (it.name, it.kinds.clone())).collect()
    }

    /// A name that no stream has.
    pub fn free_name(&self) -> Option<&'static str> {
        let taken = self.all();
        let is_free = |name: &&str| taken.iter().all(|(known, _)| known != name);
        NAMES.into_iter().find(is_free)
    }

    /// Has a stream, which may be new, capture just these.
    pub fn capture(&self, jetstream: &JetStream, name: &'static str, kinds: Vec<usize>) {
        if !self.all().iter().any(|(known, _)| *known == name) {
            return self.add(jetstream, name, PREFIX, kinds);
        }
        if let Some(stream) = (lock(&self.inner).streams.iter_mut()).find(|it| it.name == name) {
            stream.kinds = kinds;
        }
        self.edit(jetstream, name, &json!({}));
    }

    /// Changes other fields of its configuration; those that are not given are as at its creation.
    pub fn edit(&self, jetstream: &JetStream, name: &str, fields: &Value) {
        let config = {
            let inner = lock(&self.inner);
            let stream = inner.streams.iter().find(|it| it.name == name);
            stream.map(|stream| self.config(stream, fields))
        };
        if let Some(config) = config {
            self.call(jetstream, "UPDATE", name, &config);
        }
    }

    /// Deletes one that captures nothing, and notes what it held. `confirmed`: what each Postgres was told before.
    pub fn delete(&self, jetstream: &JetStream, name: &str, confirmed: Vec<(u64, Lsn)>) {
        pause(ARRIVED);
        let read = poll(CHANGE_LIMIT, || self.look(jetstream));
        read.expect("read a stream before it is deleted");
        self.call(jetstream, "DELETE", name, &Value::Null);
        let mut inner = lock(&self.inner);
        let Some(index) = inner.streams.iter().position(|it| it.name == name) else {
            return;
        };
        let Stream { stored, .. } = inner.streams.remove(index);
        inner.may_repeat.extend(stored.iter().map(|it| it.id));
        inner.deleted.push(Deleted {
            stored,
            time_ns: now_ns(),
            confirmed,
        });
    }

    /// A Postgres is put back, whose relays hold back for so long.
    pub fn forget_left(&self, jetstream: &JetStream, hold_back: Duration) {
        let read = poll(CHANGE_LIMIT, || self.look(jetstream));
        read.expect("read the streams before Postgres is put back");
        let until_ns = now_ns() - hold_back.as_nanos() as u64;
        let mut inner = lock(&self.inner);
        let left = inner.streams.iter().filter(|it| it.kinds.is_empty());
        let stored = left.flat_map(|it| &it.stored);
        let forgotten = stored.filter(|it| it.time_ns < until_ns).map(|it| it.id);
        let forgotten: Vec<EventId> = forgotten.collect();
        inner.may_repeat.extend(&forgotten);
        inner.forgotten.extend(forgotten);
    }

    /// What relays have forgotten by [`forget_left`](Self::forget_left).
    pub fn forgotten(&self) -> Vec<EventId> {
        lock(&self.inner).forgotten.clone()
    }

    fn config(&self, stream: &Stream, fields: &Value) -> Value {
        let Stream { name, prefix, .. } = stream;
        let kinds = stream.kinds.iter();
        let mut subjects: Vec<String> = kinds
            .map(|kind| format!("{prefix}.{}.>", AGGREGATE_TYPES[*kind]))
            .collect();
        if subjects.is_empty() {
            subjects.push(idle_subject(name));
        }
        let mut config = json!({
            "name": name, "subjects": subjects, "num_replicas": self.replicas,
            "duplicate_window": DUPLICATE_WINDOW.as_nanos() as u64,
        });
        if let (Some(config), Some(fields)) = (config.as_object_mut(), fields.as_object()) {
            config.extend(fields.clone());
        }
        config
    }

    /// A call that can be repeated until somebody answers: what was done already is no error, or is looked for.
    fn call(&self, jetstream: &JetStream, verb: &str, name: &str, body: &Value) {
        let done = poll(CHANGE_LIMIT, || {
            let mut client = jetstream.client()?;
            match client.try_api(&format!("STREAM.{verb}.{name}"), body) {
                Err(error) if verb == "DELETE" && error.to_string().contains("10059") => Ok(()),
                answer => answer.map(drop),
            }
        });
        if let Err(reason) = done {
            panic!("{verb} the stream {name}: {reason}");
        }
    }

    /// Reads on in all streams, to their ends.
    pub fn look(&self, jetstream: &JetStream) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        let mut client = jetstream.client()?;
        for stream in &mut inner.streams {
            if last_seq(&mut client, stream.name)? < stream.next_seq {
                continue;
            }
            let (name, from) = (stream.name, stream.next_seq);
            client.try_visit_from(name, from, |message| {
                if message.seq < stream.next_seq {
                    return;
                }
                if message.seq > stream.next_seq {
                    let gap = format!("{} of {name}", stream.next_seq);
                    inner.violations.add("gone from the stream", gap);
                }
                stream.next_seq = message.seq + 1;
                if message.header(FOREIGN).is_some() {
                    stream.foreign += 1;
                    return;
                }
                let found = &mut inner.violations;
                let Some(stored) = Stored::read(&message, stream.prefix, found) else {
                    return;
                };
                stream.stored.push(stored);
                if !inner.found.insert(stored.id) && !inner.may_repeat.remove(&stored.id) {
                    let place = format!("{} in {name} at {}", stored.id.uuid(), stored.place());
                    found.add("seen more than once", place);
                }
            })?;
        }
        Ok(())
    }

    /// Whether all these were seen; else the first that was not.
    pub fn hold(&self, ids: &[EventId]) -> Result<(), EventId> {
        let inner = lock(&self.inner);
        let missing = ids.iter().find(|id| !inner.found.contains(id));
        missing.map_or(Ok(()), |id| Err(*id))
    }

    /// Whether nothing was found wrong so far.
    pub fn is_sound(&self) -> bool {
        lock(&self.inner).violations.is_empty()
    }

    /// What was found wrong, once.
    pub fn take_violations(&self) -> Violations {
        std::mem::take(&mut lock(&self.inner).violations)
    }

    /// Sees that what was read is still there, to the end, once nothing changes any more.
    pub fn judge_whole(&self, jetstream: &JetStream, violations: &mut Violations) {
        let inner = lock(&self.inner);
        for stream in &inner.streams {
            let count = poll(secs(60), || {
                let call = format!("STREAM.INFO.{}", stream.name);
                let info = jetstream.client()?.try_api(&call, &Value::Null)?;
                Ok::<_, io::Error>(info["state"]["messages"].as_u64().unwrap_or(0))
            });
            let count = count.expect("ask for a stream");
            let read = stream.stored.len() as u64 + stream.foreign;
            if count != read {
                let example = format!("{} has {count} messages, {read} were read", stream.name);
                violations.add("gone from the stream", example);
            }
        }
    }

    /// Shows what each stream held, or holds, of a system's: first those that were deleted, in that order.
    pub fn visit(&self, system_id: u64, mut visit: impl FnMut(Vec<Stored>, Option<(u64, Lsn)>)) {
        let of_it = |stored: &[Stored]| -> Vec<Stored> {
            let stored = stored.iter().filter(|it| it.system_id == system_id);
            stored.copied().collect()
        };
        let inner = lock(&self.inner);
        for deleted in &inner.deleted {
            let confirmed = deleted.confirmed.iter().find(|(id, _)| *id == system_id);
            let confirmed = confirmed.map_or(Lsn::INVALID, |(_, lsn)| *lsn);
            visit(of_it(&deleted.stored), Some((deleted.time_ns, confirmed)));
        }
        for stream in &inner.streams {
            visit(of_it(&stream.stored), None);
        }
    }

    /// How many messages of others were seen in the streams that are there.
    pub fn foreign(&self) -> u64 {
        lock(&self.inner).streams.iter().map(|it| it.foreign).sum()
    }

    /// A message of one of the streams that was there when they were read last.
    pub fn any_message(&self, random: &mut fastrand::Rng) -> Option<(&'static str, u64)> {
        let inner = lock(&self.inner);
        let read: Vec<&Stream> = inner.streams.iter().filter(|it| it.next_seq > 1).collect();
        let stream = read.get(random.usize(0..read.len().max(1)))?;
        Some((stream.name, random.u64(1..stream.next_seq)))
    }
}

/// By the clock that nats-server stamps messages with: nanoseconds since 1970.
fn now_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    since_1970.expect("it is after 1970").as_nanos() as u64
}

/// What a stream captures that captures nothing of the prefix.
pub fn idle_subject(name: &str) -> String {
    format!("idle.{name}")
}

/// The sequence of a stream's last message.
pub fn last_seq(client: &mut NatsClient, stream: &str) -> io::Result<u64> {
    let info = client.try_api(&format!("STREAM.INFO.{stream}"), &Value::Null)?;
    Ok(info["state"]["last_seq"].as_u64().unwrap_or(0))
}
