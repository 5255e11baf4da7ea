//! The checkpoint: how far the relay is, kept in a JetStream key-value bucket (ADR-8). Every decision about it: when it
//! is written, what with, and what an answer means. Pure; [`super::bucket`] has the requests.
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

use super::core::memory::{Mark, Marks};
use crate::jetstream::ack::{AckError, AckErrorKind, PubAck};
use crate::jetstream::resume::Lineage;
use crate::outbox::position::SourcePosition;
use crate::postgres::Lsn;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often it is written while events flow.
const INTERVAL: Duration = Duration::from_secs(1);
/// A write without an answer is forgotten after this; the next one tells more anyway.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The same of an urgent one: a leader that steps down takes what it was sent along, and there is no time to lose.
const URGENT_PATIENCE: Duration = Duration::from_secs(2);

/// Writes that fail for so long are warned of, and again after as long.
const TELL_AFTER: Duration = Duration::from_secs(60);

/// The value of the key. Positions are written as the `Outbox-Position` header has them.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    streams: Vec<Entry>,
    reached: Option<String>,
    ripening: Option<Ripening>,
    /// Names the process that wrote it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    writer: String,
    /// [`super::preflight::publication_state::PublicationState`] as text.
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
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    at_rest: bool,
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
    /// Since when the key has held it, by the NATS server's time in milliseconds since 1970. `None`: since this very
    /// value was stored; when that would be was not known when it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since_ms: Option<i64>,
}

/// The key of one slot, and what was last read from or written to it.
#[derive(Debug)]
pub struct CheckpointStore {
    bucket: String,
    slot: String,
    writer: String,
    /// We wrote what the key holds.
    is_ours: bool,
    /// Another relay has written what nobody here has learned yet.
    unlearned: bool,
    state: State,
    /// How many writes there were.
    writes: u64,
    /// The sequence of the key's last value in the bucket's stream, as far as we know over all connections; 0: there is none.
    revision: u64,
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
        pending: Option<Pending>,
        next: Instant,
    },
    /// Not looked at yet on this connection, or unusable.
    Off,
    /// The server's permissions do not let us: it is not tried again.
    Forbidden,
}

/// A write that has no answer yet.
#[derive(Debug)]
struct Pending {
    number: u64,
    sent: Instant,
    content: Content,
    ripening: Option<Ripening>,
}

/// What is to be written to the key.
#[derive(Debug)]
pub struct Write {
    /// Names the answer.
    pub number: u64,
    /// The revision that must still be the key's last one; 0: it has none.
    pub revision: u64,
    /// The new value.
    pub body: Vec<u8>,
}

/// The key's last value.
#[derive(Debug, Default)]
pub struct Value {
    /// The sequence in the bucket's stream that it was read at; 0: there is none.
    pub seq: u64,
    /// The key's last revision by now: where it was read, or where the same was written once more.
    pub revision: u64,
    /// What [`Write::body`] was. What cannot be read says nothing.
    pub body: Vec<u8>,
    /// When it was stored, by the server's time in milliseconds since 1970, if that is known.
    pub stored_ms: Option<i64>,
    /// The server's time now, likewise.
    pub time_ms: Option<i64>,
}

impl Value {
    /// What to write to say the same once more.
    pub fn again(&self) -> Vec<u8> {
        match serde_json::from_slice(&self.body) {
            Ok(record) => self.since_stored(record).body(),
            Err(_) => self.body.clone(),
        }
    }

    fn since_stored(&self, mut record: Record) -> Record {
        if let Some(ripening) = &mut record.ripening {
            ripening.since_ms = ripening.since_ms.or(self.stored_ms);
        }
        record
    }
}

impl CheckpointStore {
    /// The key of `slot` in `bucket`; an empty bucket's name turns it off. `writer` is what no other process calls itself.
    pub fn new(bucket: &str, slot: &str, writer: String) -> CheckpointStore {
        let state = if bucket.is_empty() {
            State::Forbidden
        } else {
            State::Off
        };
        CheckpointStore {
            bucket: bucket.to_string(),
            slot: slot.to_string(),
            writer,
            is_ours: false,
            unlearned: false,
            state,
            writes: 0,
            revision: 0,
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

    /// The bucket's name.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The key's subject.
    pub fn subject(&self) -> String {
        format!("$KV.{}.{}", self.bucket, self.slot)
    }

    /// What the key holds, read over a new connection.
    pub fn opened(&mut self, value: Value, now: Instant) -> Opened {
        let record = value.since_stored(serde_json::from_slice(&value.body).unwrap_or_default());
        let went_back = value.seq < self.revision;
        self.is_ours = record.writer == self.writer;
        self.unlearned |= value.seq > 0 && value.seq != self.revision && !self.is_ours;
        // what was lost may have said that the ripening position no longer is
        self.distrusted |= went_back;
        self.revision = value.revision;
        self.state = State::On {
            pending: None,
            next: now,
        };
        self.clock = value.time_ms.map(|time_ms| (time_ms, now));
        self.ripening = record.ripening.clone().filter(|_| !self.distrusted);
        let kept = record.content();
        if self.publication.get().is_none() {
            self.publication.set(kept.publication.clone());
        }
        let marks = kept.marks.clone();
        self.kept = Some(kept);
        Opened {
            marks,
            went_back,
            by_another: self.unlearned,
        }
    }

    /// The connection is gone.
    pub fn closed(&mut self) {
        if self.is_kept() {
            self.state = State::Off;
        }
    }

    /// It may not be read or written: it is not tried again.
    pub fn forbid(&mut self) {
        self.state = State::Forbidden;
        self.kept = None;
    }

    /// It was never to be used, or may not be.
    pub fn is_forbidden(&self) -> bool {
        matches!(self.state, State::Forbidden)
    }

    /// There is a checkpoint.
    pub fn is_kept(&self) -> bool {
        matches!(self.state, State::On { .. })
    }

    /// What another relay had written is known now.
    pub fn learned(&mut self) {
        self.unlearned = false;
    }

    /// The key was never written, as far as is known.
    pub fn is_new(&self) -> bool {
        self.revision == 0
    }

    /// The number of the last write.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The position that an earlier run has settled long enough ago to be confirmed.
    pub fn ripe(&self, lineage: &Lineage, hold_back: Duration, now: Instant) -> Option<Lsn> {
        let ripening = self.ripening.as_ref()?;
        let age_ms = self.time_ms(now)?.checked_sub(ripening.since_ms?)?;
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
    fn time_ms(&self, now: Instant) -> Option<i64> {
        let (time_ms, at) = self.clock?;
        time_ms.checked_add_unsigned(now.saturating_duration_since(at).as_millis() as u64)
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
                since_ms: None,
            }),
        }
    }

    /// Before anything is published to a stream there is a first mark of it, and it says whether others write there:
    /// whatever is consumed away later is counted from there. `None`: nothing needs to be written.
    pub fn begin(&mut self, marks: Marks, now: Instant) -> Option<Write> {
        if !self.is_kept() {
            return None;
        }
        let kept = self.kept.as_ref();
        // whoever comes next has to see that we were here
        let told = self.is_ours && kept.is_some_and(|kept| tells(&kept.marks, &marks));
        if told && !self.distrusted {
            return None;
        }
        let content = self.content(marks);
        self.send(content, Lsn::INVALID, now)
    }

    /// What to write if `marks` are news and it is time, or at once if it is `urgent`.
    pub fn write(
        &mut self,
        marks: impl FnOnce() -> Marks,
        confirmed: Lsn,
        now: Instant,
        urgent: bool,
    ) -> Option<Write> {
        let State::On { pending, next, .. } = &mut self.state else {
            return None;
        };
        let patience = if urgent { URGENT_PATIENCE } else { PATIENCE };
        let waits = |pending: &Pending| now < pending.sent + patience;
        if now < *next && !urgent || pending.as_ref().is_some_and(waits) {
            return None;
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
        let content = self.content(marks());
        if self.kept.as_ref() == Some(&content) {
            return None;
        }
        self.send(content, confirmed, now)
    }

    fn content(&self, marks: Marks) -> Content {
        Content {
            marks,
            publication: self.publication.get(),
        }
    }

    fn send(&mut self, content: Content, confirmed: Lsn, now: Instant) -> Option<Write> {
        let ripening = self.next_ripening(&content.marks, confirmed);
        let State::On { pending, .. } = &mut self.state else {
            return None;
        };
        self.writes += 1;
        let write = Write {
            number: self.writes,
            revision: self.revision,
            body: Record {
                writer: self.writer.clone(),
                ..Record::of(&content, ripening.clone())
            }
            .body(),
        };
        *pending = Some(Pending {
            number: write.number,
            sent: now,
            content,
            ripening,
        });
        Some(write)
    }

    /// The answer to a write, and what the key holds by it. `Err`: the key had been written before.
    ///
    /// An answer that comes after another write was sent says nothing of that one. Had the earlier write been stored,
    /// the later one is refused, and the key is read again.
    pub fn written(
        &mut self,
        number: u64,
        answer: Result<PubAck, AckError>,
        now: Instant,
    ) -> Result<Option<&Marks>, Overtaken> {
        let time_ms = self.time_ms(now);
        let State::On { pending, .. } = &mut self.state else {
            return Ok(None);
        };
        let Some(answered) = pending.take_if(|pending| pending.number == number) else {
            return Ok(None);
        };
        match answer {
            Ok(ack) => {
                self.revision = ack.seq;
                self.ripening = answered.ripening.map(|ripening| Ripening {
                    since_ms: ripening.since_ms.or(time_ms),
                    ..ripening
                });
                self.distrusted = false;
                self.is_ours = true;
                self.failing = None;
                Ok(Some(&self.kept.insert(answered.content).marks))
            }
            Err(error) if matches!(error.kind(), AckErrorKind::WrongLastSequence(_)) => {
                Err(Overtaken)
            }
            Err(error) => {
                self.failing.get_or_insert(now + TELL_AFTER);
                log::debug!(cause:% = error; "the checkpoint was not written; it is tried again");
                Ok(None)
            }
        }
    }

    /// The key holds `marks`, or never will.
    pub fn holds(&self, marks: &Marks) -> bool {
        let kept = self.kept.as_ref();
        !self.is_kept() || kept.is_some_and(|kept| kept.marks == *marks)
    }
}

/// Whether a restart from `kept` would find what it needs before anything is published.
fn tells(kept: &Marks, marks: &Marks) -> bool {
    let is_known = |mark: &Mark| {
        let mut kept = kept.streams.iter();
        kept.any(|old| {
            (&old.name, old.shared, old.at_rest) == (&mark.name, mark.shared, mark.at_rest)
        })
    };
    kept.reached == marks.reached && marks.streams.iter().all(is_known)
}

impl Record {
    fn of(content: &Content, ripening: Option<Ripening>) -> Record {
        let marks = &content.marks;
        Record {
            streams: marks.streams.iter().map(Entry::of).collect(),
            reached: marks.reached.as_ref().map(SourcePosition::to_string),
            ripening,
            writer: String::new(),
            publication: content.publication.clone(),
        }
    }

    fn body(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers have a JSON form")
    }

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

/// Another relay has written the checkpoint of this slot, or an earlier write of ours has been stored after all.
#[derive(Debug, PartialEq, Eq)]
pub struct Overtaken;

/// What the key held when it was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The marks.
    pub marks: Marks,
    /// The server has lost what the key was known to hold.
    pub went_back: bool,
    /// It was written since by another relay, and what that one says was not learned yet: see [`CheckpointStore::learned`].
    pub by_another: bool,
}

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
            at_rest: mark.at_rest,
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
            at_rest: self.at_rest,
            settled_seq: 0,
            confirmed_seq: self.confirmed_seq,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::ack::ApiError;

    fn store(now: Instant) -> CheckpointStore {
        let mut store = CheckpointStore::new("bucket", "s", "we".into());
        store.opened(value(4, Vec::new(), 1_000_000), now);
        store
    }

    fn value(seq: u64, body: Vec<u8>, time_ms: i64) -> Value {
        Value {
            seq,
            revision: seq,
            body,
            stored_ms: Some(time_ms),
            time_ms: Some(time_ms),
        }
    }

    fn stored(seq: u64) -> Result<PubAck, AckError> {
        Ok(PubAck {
            seq,
            duplicate: false,
        })
    }

    fn marks(settled: u64) -> Marks {
        Marks {
            streams: vec![Mark {
                name: "EV".into(),
                created: "2026-11-23T09:26:06Z".into(),
                last: Some((7, "s 1 2 0/16B3748 3".parse().unwrap())),
                shared: true,
                at_rest: true,
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
        let text = String::from_utf8(Record::of(&content, None).body()).unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(read.content(), content);
        let broken: Record = serde_json::from_str(&text.replace("0/16B3748", "x")).unwrap();
        assert_eq!(broken.content().marks.streams, []);
    }

    /// What a relay reads that read `seq` last, or nothing yet.
    #[track_caller]
    fn check_another(seq: u64, found: u64, writer: &str, expected: bool) {
        let now = Instant::now();
        let mut store = CheckpointStore::new("bucket", "s", "we".into());
        store.opened(value(seq, Vec::new(), 0), now);
        store.learned();
        let body = format!(r#"{{"streams":[],"writer":"{writer}"}}"#);
        let opened = store.opened(value(found, body.into(), 0), now);
        assert_eq!(opened.by_another, expected, "{seq} {found} {writer}");
        // until it is known what that one has to say
        assert_eq!(
            store.opened(value(found, Vec::new(), 0), now).by_another,
            expected
        );
        store.learned();
        assert!(!store.opened(value(found, Vec::new(), 0), now).by_another);
    }

    #[test]
    fn what_another_relay_has_written_is_to_be_learned() {
        check_another(4, 4, "they", false);
        check_another(4, 5, "they", true);
        // of an older release
        check_another(4, 5, "", true);
        check_another(4, 5, "we", false);
        // before we wrote anything, or in a bucket that was made anew
        check_another(0, 1, "they", true);
        check_another(4, 1, "they", true);
        check_another(4, 0, "", false);
    }

    #[test]
    fn an_answer_says_nothing_of_a_later_write() {
        let now = Instant::now();
        let mut store = store(now);
        let first = store.write(|| marks(0x10), Lsn(0), now, false).unwrap();
        let soon = now + PATIENCE - Duration::from_millis(1);
        assert!(store.write(|| marks(0x20), Lsn(0), soon, false).is_none());
        let late = now + PATIENCE;
        let second = store.write(|| marks(0x20), Lsn(0), late, false).unwrap();
        assert_eq!((first.revision, second.revision), (4, 4));
        assert_eq!(store.written(first.number, stored(5), late), Ok(None));
        assert!(!store.holds(&marks(0x20)));
        let refused = AckError::Api(ApiError {
            code: 400,
            err_code: 10071,
            description: "wrong last sequence: 5".into(),
        });
        assert_eq!(
            store.written(second.number, Err(refused), late),
            Err(Overtaken)
        );
        // read again: what the key holds is the first
        let opened = store.opened(value(5, first.body, 0), late);
        assert_eq!((opened.marks, opened.went_back), (marks(0), false));
    }

    #[test]
    fn an_urgent_write_waits_less_for_an_answer_that_may_never_come() {
        let now = Instant::now();
        let mut store = store(now);
        assert!(store.write(|| marks(0x10), Lsn(0), now, true).is_some());
        let soon = now + URGENT_PATIENCE - Duration::from_millis(1);
        assert!(store.write(|| marks(0x10), Lsn(0), soon, true).is_none());
        let late = now + URGENT_PATIENCE;
        assert!(store.write(|| marks(0x10), Lsn(0), late, false).is_none());
        assert!(store.write(|| marks(0x10), Lsn(0), late, true).is_some());
    }

    #[test]
    fn what_the_server_has_lost_of_the_key_is_told() {
        let now = Instant::now();
        let mut store = store(now);
        let write = store.write(|| marks(0x10), Lsn(0), now, false).unwrap();
        let is_kept = |marks: Result<Option<&Marks>, _>| marks.unwrap().is_some();
        assert!(is_kept(store.written(write.number, stored(5), now)));
        assert!(!store.opened(value(5, write.body, 0), now).went_back);
        assert!(store.opened(value(4, Vec::new(), 0), now).went_back);
        assert!(!store.opened(value(4, Vec::new(), 0), now).went_back);
    }

    #[test]
    fn a_position_ripens_over_runs_until_it_is_confirmed() {
        let lineage = Lineage {
            source: "s 1 2 0/0 0".parse::<SourcePosition>().unwrap().source,
            switch_points: Vec::new(),
        };
        let hold_back = Duration::from_secs(150);
        let start = Instant::now();
        let mut store = store(start);
        let after = |seconds| start + Duration::from_secs(seconds);
        let write = |store: &mut CheckpointStore, settled, confirmed, seconds| {
            let now = after(seconds);
            let write = store.write(|| marks(settled), Lsn(confirmed), now, true);
            let number = write.unwrap().number;
            assert!(store.written(number, stored(5), now).unwrap().is_some());
        };
        write(&mut store, 0x10, 0, 0);
        let first = store.ripening.clone();
        assert_eq!(store.ripe(&lineage, hold_back, after(0)), None);
        // another run goes on, and leaves it
        write(&mut store, 0x20, 5, 100);
        assert_eq!(store.ripening, first);
        assert_eq!(store.ripe(&lineage, hold_back, after(149)), None);
        assert_eq!(store.ripe(&lineage, hold_back, after(150)), Some(Lsn(0x10)));
        // confirmed: the next one begins
        write(&mut store, 0x30, 0x10, 150);
        let now = after(150);
        assert_eq!(store.ripe(&lineage, hold_back, now), None);
        assert_eq!(store.ripe(&lineage, Duration::ZERO, now), Some(Lsn(0x30)));
        // on another timeline it reaches to where the two parted, on another system nowhere
        let mut later = lineage.clone();
        later.source.timeline = 3;
        later.switch_points = vec![(2, Lsn(0x28))];
        assert_eq!(store.ripe(&later, Duration::ZERO, now), Some(Lsn(0x28)));
        later.source.system_id = 9;
        assert_eq!(store.ripe(&later, Duration::ZERO, now), None);
    }
}
