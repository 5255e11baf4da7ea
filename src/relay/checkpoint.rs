//! The checkpoint: how far the relay is, kept in a JetStream key-value bucket (ADR-8).
//!
//! Its marks are for streams whose tail does not stay: work-queue and interest retention, purges, max_age. What
//! they say is true whenever it is read (an event that was acknowledged at a sequence stays so), so they are
//! written lazily, and an old one is as good as a new one followed by what the stream itself tells.
//!
//! What it says was reached bounds what is confirmed: nothing is, before it has stood here for the hold-back. So
//! a slot that is found beyond was moved by somebody else, or dropped and made anew.
//!
//! Each write expects the revision that was read or written before it. A relay that was frozen and revived
//! is refused here, as it is by the fence.

use super::core::{Mark, Marks};
use super::error::Error;
use crate::jetstream::ack::{AckError, AckErrorKind, PubAck, parse_ack};
use crate::jetstream::client::Link;
use crate::jetstream::resume::Lineage;
use crate::jetstream::streams;
use crate::jetstream::{self};
use crate::outbox::position::SourcePosition;
use crate::postgres::Lsn;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often it is written while events flow.
const INTERVAL: Duration = Duration::from_secs(1);
/// A write without an answer is forgotten after this; the next one tells more anyway.
const PATIENCE: Duration = Duration::from_secs(10);

/// Writes that fail for so long are warned of, and again after as long.
const TELL_AFTER: Duration = Duration::from_secs(60);

/// The value of the key. Positions are written as the `Outbox-Position` header has them.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    streams: Vec<Entry>,
    reached: Option<String>,
    ripening: Option<Ripening>,
    /// [`super::publication::Published`] as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    publication: Option<String>,
}

/// A [`Mark`].
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    name: String,
    created: String,
    #[serde(flatten)]
    last: Option<Last>,
    #[serde(default)]
    shared: bool,
    confirmed_seq: u64,
}

/// An event, and the sequence that it stands at.
#[derive(Debug, Serialize, Deserialize)]
struct Last {
    seq: u64,
    position: String,
}

/// A settled position on its way to being confirmed. Runs that are shorter than the hold-back would never
/// confirm what they settle themselves; they confirm what an earlier one has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ripening {
    position: String,
    /// The NATS server's time at which it was settled, in milliseconds since 1970.
    since_ms: i64,
}

/// The key of one slot, and what was last read from or written to it.
#[derive(Debug)]
pub struct CheckpointStore {
    bucket: String,
    slot: String,
    state: State,
    /// What the key holds, as far as we know.
    kept: Option<Content>,
    ripening: Option<Ripening>,
    /// What the key says of a ripening position is no longer true.
    distrusted: bool,
    /// The server's time in milliseconds since 1970, and when it was that.
    clock: Option<(i64, Instant)>,
    /// Writes fail; when that is to be told.
    failing: Option<Instant>,
    publication: SeenPublication,
}

/// What the publication was last seen to publish, as text. It is shared, since one thread sees it and
/// another writes it.
#[derive(Clone, Debug, Default)]
pub struct SeenPublication(Arc<Mutex<Option<String>>>);

impl SeenPublication {
    /// `None`: not yet.
    pub fn get(&self) -> Option<String> {
        self.lock().clone()
    }

    /// From now on this.
    pub fn set(&self, text: Option<String>) {
        *self.lock() = text;
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is worth writing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Content {
    marks: Marks,
    publication: Option<String>,
}

#[derive(Debug)]
enum State {
    /// The bucket can be written.
    On {
        /// The sequence of the key's last value in the bucket's stream; 0: there is none.
        revision: u64,
        /// When the write that has no answer yet was sent, and what it says.
        pending: Option<(Instant, Content, Option<Ripening>)>,
        next: Instant,
    },
    /// Not looked at yet on this connection, or unusable.
    Off,
    /// The server's permissions do not let us: it is not tried again.
    Forbidden,
}

impl CheckpointStore {
    /// The key of `slot` in `bucket`; an empty bucket's name turns it off.
    pub fn new(bucket: &str, slot: &str) -> CheckpointStore {
        let state = if bucket.is_empty() {
            State::Forbidden
        } else {
            State::Off
        };
        CheckpointStore {
            bucket: bucket.to_string(),
            slot: slot.to_string(),
            state,
            kept: None,
            ripening: None,
            distrusted: false,
            clock: None,
            failing: None,
            publication: SeenPublication::default(),
        }
    }

    /// What the publication was last seen to publish.
    pub fn publication(&self) -> SeenPublication {
        self.publication.clone()
    }

    /// On a new connection: creates the bucket if it is missing and reads the key. What keeps it from being
    /// used is warned of, and no error, unless the connection was lost by it.
    pub fn open(&mut self, link: &Link, replicas: u32, timeout: Duration) -> Result<Marks, Error> {
        if matches!(self.state, State::Forbidden) {
            return Ok(Marks::default());
        }
        self.state = State::Off;
        match self.read(link, replicas, timeout) {
            Ok((revision, record)) => {
                self.state = State::On {
                    revision,
                    pending: None,
                    next: Instant::now(),
                };
                self.ripening = record.ripening.clone().filter(|_| !self.distrusted);
                let kept = record.content();
                if self.publication.get().is_none() {
                    self.publication.set(kept.publication.clone());
                }
                let marks = kept.marks.clone();
                self.kept = Some(kept);
                Ok(marks)
            }
            Err(error @ (jetstream::Error::Lost { .. } | jetstream::Error::Permission { .. })) => {
                Err(self.lost(error))
            }
            Err(error) if is_passing(&error) => Err(Error::Nats(error)),
            Err(error) => {
                log::warn!(
                    bucket = self.bucket.as_str(), cause:% = error;
                    "going on without the checkpoint: {WITHOUT}"
                );
                self.forbid();
                Ok(Marks::default())
            }
        }
    }

    fn forbid(&mut self) {
        self.state = State::Forbidden;
        self.kept = None;
    }

    /// The connection was lost; if it was by what the checkpoint may not do, it is not tried again. Returns
    /// what to say of it.
    pub fn lost(&mut self, error: jetstream::Error) -> Error {
        let ours = |reason: &str| {
            reason.contains("$KV.") || reason.contains(&format!("KV_{}", self.bucket))
        };
        match error {
            jetstream::Error::Permission { reason } if ours(&reason) => {
                self.forbid();
                Error::WithoutCheckpoint(reason)
            }
            error => {
                if matches!(self.state, State::On { .. }) {
                    self.state = State::Off;
                }
                Error::Nats(error)
            }
        }
    }

    fn read(
        &mut self,
        link: &Link,
        replicas: u32,
        timeout: Duration,
    ) -> Result<(u64, Record), jetstream::Error> {
        let stream = format!("KV_{}", self.bucket);
        let info = match streams::info(link, &stream, timeout)? {
            Some(info) => Some(info),
            None => {
                let (api, body) = streams::create_bucket_request(&self.bucket, replicas);
                let answer = link.call(&api, body, timeout)?;
                streams::parse_info(&answer)
                    .map_err(|source| jetstream::Error::Api { api, source })?
            }
        };
        let is_replicated = info
            .as_ref()
            .is_some_and(|info| info.config.num_replicas > 1);
        let time = info.and_then(|info| info.ts.parse::<jiff::Timestamp>().ok());
        self.clock = time.map(|time| (time.as_millisecond(), Instant::now()));
        let last = streams::last_message_request(&stream, &self.subject());
        let Some(message) = streams::message(link, last, timeout)? else {
            return Ok((0, Record::default()));
        };
        let record = serde_json::from_slice(&message.data).unwrap_or_default();
        let mut revision = message.seq;
        if is_replicated {
            // a leader that does not know yet that it no longer is one answers with what it has; but it can write nothing
            let written = self.put(link, revision, message.data, timeout)?;
            revision = written.seq;
        }
        Ok((revision, record))
    }

    /// Writes the key, and waits for the answer.
    fn put(
        &self,
        link: &Link,
        revision: u64,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<PubAck, jetstream::Error> {
        let api = self.subject();
        let answer = link.put_now(&api, revision, body, timeout)?;
        parse_ack(&answer, None).map_err(|source| jetstream::Error::Api { api, source })
    }

    /// There is a checkpoint.
    pub fn is_kept(&self) -> bool {
        matches!(self.state, State::On { .. })
    }

    /// The position that an earlier run has settled long enough ago to be confirmed.
    pub fn ripe(&self, lineage: &Lineage, hold_back: Duration) -> Option<Lsn> {
        let ripening = self.ripening.as_ref()?;
        let age_ms = self.time_ms()?.checked_sub(ripening.since_ms)?;
        let is_ripe = u128::try_from(age_ms).is_ok_and(|age_ms| age_ms >= hold_back.as_millis());
        let position = ripening.position.parse().ok().filter(|_| is_ripe)?;
        lineage.reach(&position)
    }

    /// A stream went backwards: what was settled no longer is.
    pub fn unripe(&mut self) {
        self.ripening = None;
        self.distrusted = true;
    }

    /// The server's time.
    fn time_ms(&self) -> Option<i64> {
        let (time_ms, at) = self.clock?;
        time_ms.checked_add_unsigned(at.elapsed().as_millis() as u64)
    }

    /// The ripening position to be written with `marks`: the one before, until it is confirmed.
    fn next_ripening(&self, marks: &Marks, confirmed: Lsn) -> Option<Ripening> {
        let source = &marks.reached.as_ref()?.source;
        let waits = |ripening: &&Ripening| {
            let position: Option<SourcePosition> = ripening.position.parse().ok();
            position.is_some_and(|at| at.source == *source && at.position.commit_lsn > confirmed)
        };
        match self.ripening.as_ref().filter(waits) {
            Some(ripening) => Some(ripening.clone()),
            None if marks.settled <= confirmed => None,
            None => Some(Ripening {
                position: format!("{source} {} 0", marks.settled),
                since_ms: self.time_ms()?,
            }),
        }
    }

    fn subject(&self) -> String {
        format!("$KV.{}.{}", self.bucket, self.slot)
    }

    /// Writes `marks` if they are news and it is time, or at once if it is `urgent`. `token` names the answer.
    pub fn write(
        &mut self,
        link: &Link,
        marks: impl FnOnce() -> Marks,
        confirmed: Lsn,
        token: u64,
        now: Instant,
        urgent: bool,
    ) {
        let State::On {
            pending,
            next,
            revision,
        } = &mut self.state
        else {
            return;
        };
        let waits = |(sent, ..): &(Instant, Content, _)| now < *sent + PATIENCE;
        if now < *next && !urgent || pending.as_ref().is_some_and(waits) {
            return;
        }
        if pending.is_some() {
            self.failing.get_or_insert(now + TELL_AFTER);
        }
        if self.failing.is_some_and(|tell| now >= tell) {
            self.failing = Some(now + TELL_AFTER);
            log::warn!(
                bucket = self.bucket.as_str();
                "the checkpoint cannot be written; nothing is confirmed meanwhile, so Postgres keeps its log"
            );
        }
        *next = now + INTERVAL;
        let revision = *revision;
        let content = self.content(marks());
        if self.kept.as_ref() == Some(&content) {
            return;
        }
        let ripening = self.next_ripening(&content.marks, confirmed);
        let body = body(&content, ripening.clone());
        link.put(token, self.subject(), revision, body);
        if let State::On { pending, .. } = &mut self.state {
            *pending = Some((now, content, ripening));
        }
    }

    /// The key holds `marks`, or never will.
    pub fn holds(&self, marks: &Marks) -> bool {
        let kept = self.kept.as_ref();
        !self.is_kept() || kept.is_some_and(|kept| kept.marks == *marks)
    }

    fn content(&self, marks: Marks) -> Content {
        Content {
            marks,
            publication: self.publication.get(),
        }
    }

    /// Before anything is published to a stream there is a first mark of it, and it says whether others write there:
    /// whatever is consumed away later is counted from there. Returns what was written, if there was need to.
    pub fn begin(
        &mut self,
        link: &Link,
        marks: Marks,
        timeout: Duration,
    ) -> Result<Option<&Marks>, Error> {
        let State::On { revision, .. } = self.state else {
            return Ok(None);
        };
        let kept = self.kept.as_ref();
        let told = kept.is_some_and(|kept| tells(&kept.marks, &marks));
        if told && !self.distrusted {
            return Ok(None);
        }
        let content = self.content(marks);
        let ripening = self.next_ripening(&content.marks, Lsn::INVALID);
        let body = body(&content, ripening.clone());
        match self.put(link, revision, body, timeout) {
            Ok(ack) => Ok(Some(self.was_written(ack.seq, content, ripening))),
            Err(error) => Err(self.lost(error)),
        }
    }

    fn was_written(&mut self, seq: u64, content: Content, ripening: Option<Ripening>) -> &Marks {
        if let State::On { revision, .. } = &mut self.state {
            *revision = seq;
        }
        self.ripening = ripening;
        self.distrusted = false;
        self.failing = None;
        &self.kept.insert(content).marks
    }

    /// The answer to a write, and what the key holds by it. `Err`: somebody else has written the key.
    pub fn written(
        &mut self,
        answer: Result<Vec<u8>, AckError>,
    ) -> Result<Option<&Marks>, Overtaken> {
        let State::On { pending, .. } = &mut self.state else {
            return Ok(None);
        };
        let Some((_, content, ripening)) = pending.take() else {
            return Ok(None);
        };
        match answer.and_then(|body| parse_ack(&body, None)) {
            Ok(ack) => Ok(Some(self.was_written(ack.seq, content, ripening))),
            Err(error) if matches!(error.kind(), AckErrorKind::WrongLastSequence(_)) => {
                Err(Overtaken)
            }
            Err(error) => {
                self.failing.get_or_insert(Instant::now() + TELL_AFTER);
                log::debug!(cause:% = error; "the checkpoint was not written; it is tried again");
                Ok(None)
            }
        }
    }
}

/// Whether another try may go better: what was read was not the newest, nobody leads the bucket, or no answer came.
fn is_passing(error: &jetstream::Error) -> bool {
    match error {
        jetstream::Error::ApiTimeout { .. } => true,
        jetstream::Error::Api { source, .. } => matches!(
            source.kind(),
            AckErrorKind::WrongLastSequence(_) | AckErrorKind::Busy
        ),
        _ => false,
    }
}

/// Whether a restart from `kept` would find what it needs before anything is published.
fn tells(kept: &Marks, marks: &Marks) -> bool {
    let is_known = |mark: &Mark| {
        let mut kept = kept.streams.iter();
        kept.any(|old| old.name == mark.name && old.shared == mark.shared)
    };
    kept.reached == marks.reached && marks.streams.iter().all(is_known)
}

fn body(content: &Content, ripening: Option<Ripening>) -> Vec<u8> {
    let marks = &content.marks;
    let record = Record {
        streams: marks.streams.iter().map(Entry::of).collect(),
        reached: marks.reached.as_ref().map(SourcePosition::to_string),
        ripening,
        publication: content.publication.clone(),
    };
    serde_json::to_vec(&record).expect("strings and numbers have a JSON form")
}

impl Record {
    fn content(self) -> Content {
        let marks = Marks {
            streams: self.streams.into_iter().filter_map(Entry::mark).collect(),
            reached: self.reached.and_then(|text| text.parse().ok()),
            settled: Lsn::INVALID,
        };
        Content {
            marks,
            publication: self.publication,
        }
    }
}

/// What the relay does without.
pub const WITHOUT: &str = "a stream whose messages are consumed away can get repeats after a restart, and a slot that was moved or \
                       made anew is not noticed";

/// Another relay has written the checkpoint of this slot.
#[derive(Debug, PartialEq, Eq)]
pub struct Overtaken;

impl Entry {
    fn of(mark: &Mark) -> Entry {
        Entry {
            name: mark.name.clone(),
            created: mark.created.clone(),
            last: mark.last.as_ref().map(|(seq, at)| Last {
                seq: *seq,
                position: at.to_string(),
            }),
            shared: mark.shared,
            confirmed_seq: mark.confirmed_seq,
        }
    }

    fn mark(self) -> Option<Mark> {
        let last = match self.last {
            Some(last) => Some((last.seq, last.position.parse().ok()?)),
            None => None,
        };
        Some(Mark {
            last,
            name: self.name,
            created: self.created,
            shared: self.shared,
            settled_seq: 0,
            confirmed_seq: self.confirmed_seq,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> CheckpointStore {
        CheckpointStore {
            clock: Some((1_000_000, Instant::now())),
            ..CheckpointStore::new("bucket", "s")
        }
    }

    fn marks(settled: u64) -> Marks {
        Marks {
            streams: vec![Mark {
                name: "EV".into(),
                created: "2026-11-23T09:26:06Z".into(),
                last: Some((7, "s 1 2 0/16B3748 3".parse().unwrap())),
                shared: true,
                settled_seq: 0,
                confirmed_seq: 5,
            }],
            reached: Some("s 1 2 0/99 0".parse().unwrap()),
            settled: Lsn(settled),
        }
    }

    #[test]
    fn a_record_reads_back_and_what_is_none_is_passed_over() {
        let content = Content {
            marks: marks(0),
            publication: Some("all".into()),
        };
        let text = String::from_utf8(body(&content, None)).unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(read.content(), content);
        let broken: Record = serde_json::from_str(&text.replace("0/16B3748", "x")).unwrap();
        assert_eq!(broken.content().marks.streams, []);
    }

    #[test]
    fn a_position_ripens_over_runs_until_it_is_confirmed() {
        let lineage = Lineage {
            source: "s 1 2 0/0 0".parse::<SourcePosition>().unwrap().source,
            switch_points: Vec::new(),
        };
        let hold_back = Duration::from_secs(150);
        let mut store = store();
        store.ripening = store.next_ripening(&marks(0x10), Lsn(0));
        let first = store.ripening.clone();
        assert_eq!(store.ripe(&lineage, hold_back), None);
        // another run goes on, and leaves it
        store.clock = Some((1_100_000, Instant::now()));
        store.ripening = store.next_ripening(&marks(0x20), Lsn(5));
        assert_eq!(store.ripening, first);
        store.clock = Some((1_150_000, Instant::now()));
        assert_eq!(store.ripe(&lineage, hold_back), Some(Lsn(0x10)));
        // confirmed: the next one begins
        store.ripening = store.next_ripening(&marks(0x30), Lsn(0x10));
        assert_eq!(store.ripe(&lineage, hold_back), None);
        assert_eq!(store.ripe(&lineage, Duration::ZERO), Some(Lsn(0x30)));
        // on another timeline it reaches to where the two parted, on another system nowhere
        let mut later = lineage.clone();
        later.source.timeline = 3;
        later.switch_points = vec![(2, Lsn(0x28))];
        assert_eq!(store.ripe(&later, Duration::ZERO), Some(Lsn(0x28)));
        later.source.system_id = 9;
        assert_eq!(store.ripe(&later, Duration::ZERO), None);
    }
}
