//! The checkpoint's decisions: when the record is written, what with, and what an answer means. Pure;
//! [`kv`](super::kv) has the requests.
//!
//! The record carries three cuts. The *young* one is the newest. One of them *ripens*: it is kept, by later runs too,
//! until the key has held it for the hold-back; then it is the *matured* one, and the young one ripens. Postgres is told the
//! matured cut's `stored_lsn`, and never more.
//!
//! Each write expects the revision that was read or written before it, so a relay that was frozen and revived is refused
//! here, as it is by the fence. A bucket that was restored counts up again, so a revision that fits proves nothing: what is
//! read back is compared whole.

use super::record::{Cut, Record, Ripening};
use crate::jetstream::Delivery;
use crate::jetstream::ack::{AckError, AckErrorKind, PubAck};
use crate::outbox::flags::Flags;
use crate::outbox::lineage::{Conflict, Lineage};
use crate::postgres::Lsn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often it is written while events flow or WAL moves.
const INTERVAL: Duration = Duration::from_secs(1);
/// A write without an answer is forgotten after this, and the next one may go.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The same of an urgent one: a leader that steps down takes what it was sent along, and there is no time to lose.
const URGENT_PATIENCE: Duration = Duration::from_secs(2);
/// While something ripens the record is written at least as often.
const REFRESH: Duration = Duration::from_secs(20);
/// Longest time without having seen what the key holds, while Postgres is told anything.
const LONGEST_UNSEEN: Duration = Duration::from_secs(60);
/// Writes that fail for so long are warned of, and again after as long.
const WARN_AFTER: Duration = Duration::from_secs(60);

/// Of so many writers it is known that the key has held their values.
const MOST_WRITERS: usize = 16;

/// At-least-once delivery tells Postgres at once what is acknowledged.
pub const ANYTHING: Lsn = Lsn(u64::MAX);

/// What the publication was last seen to publish, as text. It is shared, since one thread sees it and another writes it.
#[derive(Clone, Debug, Default)]
pub struct SeenPublication(Arc<Mutex<Option<String>>>);

impl SeenPublication {
    /// `None`: not seen yet.
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

/// The subject of the key of a slot of a Postgres system.
pub fn key_subject(bucket: &str, slot: &str, system_id: u64) -> String {
    format!("$KV.{bucket}.{slot}-{system_id}")
}

/// What this process is to its slot's key.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The bucket's name.
    pub bucket: String,
    /// The slot.
    pub slot: String,
    /// A name for this process that no other has.
    pub writer: String,
    /// Its flags that make events.
    pub flags: Flags,
    /// How it delivers.
    pub delivery: Delivery,
}

/// The key's last value, as it was read.
#[derive(Debug, Default)]
pub struct Value {
    /// The key's last revision; 0: it has none.
    pub revision: u64,
    /// The record; `None`: the key was never written, or is gone.
    pub record: Option<Record>,
    /// When the value was stored, by the server's clock in milliseconds since 1970.
    pub stored_ms: i64,
    /// The server's clock now, likewise.
    pub time_ms: i64,
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

/// Another relay has written the record of this slot.
#[derive(Debug, PartialEq, Eq)]
pub struct Overtaken;

/// A write that has no answer yet.
#[derive(Debug)]
struct Pending {
    sent: Instant,
    record: Record,
}

/// The key of one slot, and what was last read from or written to it.
#[derive(Debug)]
pub struct Store {
    identity: Identity,
    hold_back: Duration,
    /// The server's timeline, which all LSNs of what is written are on.
    timeline: u32,
    /// The most that Postgres was told before this process.
    confirmed_lsn: Lsn,
    /// What the key holds, as far as we know.
    held: Option<Record>,
    /// Whose values the key was seen to hold, one after the other, and the last number of each.
    writers: Vec<(String, u64)>,
    /// The key's last revision, as far as we know; 0: it has none.
    revision: u64,
    /// The server's clock in milliseconds since 1970, and when it was that.
    clock: Option<(i64, Instant)>,
    pending: Option<Pending>,
    /// When the key was last seen to hold that.
    seen: Instant,
    next: Instant,
    /// So many, in the life of the process; and whether there were any since it last began.
    writes: u64,
    has_written: bool,
    /// Writes fail; when that is to be warned of, and what the last answer was.
    failing: Option<(Instant, AckError)>,
    publication: SeenPublication,
    /// See [`Store::distrust`].
    distrusted: Vec<String>,
}

impl Store {
    /// Of a key that was not read yet.
    pub fn new(identity: Identity, hold_back: Duration, now: Instant) -> Store {
        Store {
            identity,
            hold_back,
            timeline: 0,
            confirmed_lsn: Lsn::INVALID,
            held: None,
            writers: Vec::new(),
            revision: 0,
            clock: None,
            pending: None,
            seen: now,
            next: now,
            writes: 0,
            has_written: false,
            failing: None,
            publication: SeenPublication::default(),
            distrusted: Vec::new(),
        }
    }

    /// The stream was seen to have lost something that the record may say of it. Until the next claim only a witness that is there speaks
    /// for it: what has taken the place of a lost one may be gone by then.
    pub fn distrust(&mut self, stream: &str) {
        self.distrusted.push(stream.to_string());
    }

    /// The streams that are distrusted.
    pub fn distrusted(&self) -> &[String] {
        &self.distrusted
    }

    /// The bucket's name.
    pub fn bucket(&self) -> &str {
        &self.identity.bucket
    }

    /// The key's subject. Two services with the same slot name in one account have a key each.
    pub fn subject(&self, system_id: u64) -> String {
        key_subject(&self.identity.bucket, &self.identity.slot, system_id)
    }

    /// The same of the key of the first version, which had no system id.
    pub fn old_subject(&self) -> String {
        let Identity { bucket, slot, .. } = &self.identity;
        format!("$KV.{bucket}.{slot}")
    }

    /// What the publication was last seen to publish.
    pub fn publication(&self) -> SeenPublication {
        self.publication.clone()
    }

    /// What the key holds, as far as we know.
    pub fn held(&self) -> Option<&Record> {
        self.held.as_ref()
    }

    /// The slot stands at `confirmed_lsn`, whoever has moved it there.
    pub fn accept_slot(&mut self, confirmed_lsn: Lsn) {
        let held = self.held.as_mut();
        if let Some(record) = held.filter(|record| record.is_exceeded(confirmed_lsn)) {
            record.move_to(confirmed_lsn);
        }
    }

    /// The record is of another WAL, which is accepted: neither its cuts nor what Postgres was told count for this one. Returns
    /// the streams that it names: what they hold is evidence as before, also where it captures nothing of ours any more.
    pub fn disown(&mut self) -> Vec<String> {
        let held = self.held.take();
        let cuts = held.iter().flat_map(Record::cuts);
        let names = cuts.flat_map(|cut| cut.streams.iter().map(|stream| stream.name.clone()));
        names.collect()
    }

    /// The key was never written.
    pub fn is_new(&self) -> bool {
        self.held.is_none() && self.revision == 0
    }

    /// The cuts of the record, the youngest first; and whether Postgres may have been told the oldest.
    pub fn cuts(&self, now: Instant) -> (Vec<Cut>, bool) {
        let (ripening, matured) = self.ripened(now);
        let is_told = matured.is_some();
        let young = self.held.as_ref().map(|held| held.young.clone());
        let ripening = ripening.map(|ripening| ripening.cut);
        (
            young.into_iter().chain(ripening).chain(matured).collect(),
            is_told,
        )
    }

    /// The key was read over a new connection. `Err`: another relay has written it since this process did, whose record
    /// is the one that counts now.
    pub fn on_read(
        &mut self,
        value: Value,
        lineage: &Lineage,
        now: Instant,
    ) -> Result<Result<(), Overtaken>, Conflict> {
        let record = value
            .record
            .map(|record| record.rebase(lineage))
            .transpose()?;
        let record = record.map(|mut record| {
            if let Some(ripening) = &mut record.ripening {
                ripening.since_ms.get_or_insert(value.stored_ms);
            }
            record
        });
        let is_ours = record
            .as_ref()
            .is_none_or(|record| record.writer == self.identity.writer);
        if self.publication.get().is_none() {
            let seen = record
                .as_ref()
                .and_then(|record| record.publication.clone());
            self.publication.set(seen);
        }
        let mut record = record;
        if let Some(record) = record.as_mut().filter(|record| !self.follow(record)) {
            // put back: what came after it may have found that its older cuts are no longer true
            record.ripening = None;
            record.matured = None;
        }
        self.timeline = lineage.source.timeline;
        self.held = record;
        self.revision = value.revision;
        self.clock = Some((value.time_ms, now));
        self.pending = None;
        self.seen = now;
        self.next = now;
        Ok(match self.has_written && !is_ours {
            true => Err(Overtaken),
            false => Ok(()),
        })
    }

    /// Remembers that the key holds this; `false`: it was put back, as it had held a later one. Of a writer that another has followed
    /// a higher number counts as later: the two take turns.
    fn follow(&mut self, record: &Record) -> bool {
        let mut writers = self.writers.iter();
        let known = writers.position(|(writer, _)| *writer == record.writer);
        let last = self.writers.last();
        let is_again = last == Some(&(record.writer.clone(), record.writes));
        let known =
            known.and_then(|index| self.writers.get(index).map(|(_, writes)| (index, *writes)));
        match known {
            Some((_, writes)) if record.writes <= writes => return is_again,
            Some((index, _)) => drop(self.writers.remove(index)),
            None if self.writers.len() == MOST_WRITERS => drop(self.writers.remove(0)),
            None => {}
        }
        self.writers.push((record.writer.clone(), record.writes));
        true
    }

    /// The connection is gone: no answer will come.
    pub fn on_disconnect(&mut self) {
        self.pending = None;
    }

    /// Another record counts now: this process begins again as a new one would.
    pub fn start_over(&mut self) {
        self.has_written = false;
    }

    /// R13: the record of a start or a new connection, to be written before anything is published: the cut that was resumed
    /// with. `fell_back`: it is not the young one, so that what ripens has to ripen again. In each stream the cuts know of no
    /// more than `end` of it. `confirmed_lsn`: what Postgres has been told.
    pub fn claim(
        &mut self,
        cut: Cut,
        fell_back: bool,
        end: impl Fn(&str) -> Option<u64>,
        confirmed_lsn: Lsn,
        now: Instant,
    ) -> Write {
        self.distrusted.clear();
        let (mut ripening, mut matured) = self.ripened(now);
        if fell_back {
            ripening = None;
            // what has ripened since the cut was chosen may be what the streams do not agree with
            let fits = |older: &Cut| {
                older.anchor.position <= cut.anchor.position && older.stored_lsn <= cut.stored_lsn
            };
            let held = self.held.as_ref().and_then(|held| held.matured.clone());
            matured = matured.filter(fits).or(held.filter(fits));
        }
        let agreed = self.held.as_ref().map(|held| &held.young);
        let agreed = agreed.filter(|_| !fell_back);
        let older = ripening.iter_mut().map(|it| &mut it.cut);
        for older in older.chain(&mut matured) {
            older.flags = older.flags.and(&self.identity.flags);
            for stream in &mut older.streams {
                let end = end(&stream.name).unwrap_or(u64::MAX);
                stream.read_after = stream.read_after.min(end);
                // a stream that was seen to be the same by its witness, and has another `created` now
                let was = agreed.and_then(|young| young.stream(&stream.name));
                let was = was.filter(|it| it.witness.is_some() && it.created == stream.created);
                let now = cut.stream(&stream.name).filter(|it| it.witness.is_some());
                if let Some(now) = now.filter(|_| was.is_some()) {
                    stream.created.clone_from(&now.created);
                }
            }
        }
        self.confirmed_lsn = self.confirmed_lsn.max(confirmed_lsn);
        self.send(cut, ripening, matured, now)
    }

    /// It is time for a write, and none is on its way.
    pub fn may_write(&self, now: Instant, urgent: bool) -> bool {
        let patience = if urgent { URGENT_PATIENCE } else { PATIENCE };
        let waits = |pending: &Pending| now < pending.sent + patience;
        (urgent || now >= self.next) && !self.pending.as_ref().is_some_and(waits)
    }

    /// What to write if `cut` is news and it is time, or at once if it is `urgent`.
    pub fn write(
        &mut self,
        cut: impl FnOnce() -> Cut,
        now: Instant,
        urgent: bool,
    ) -> Option<Write> {
        if !self.may_write(now, urgent) {
            return None;
        }
        if self.pending.is_some() {
            self.fails(AckError::NoAnswer, now);
        }
        let bucket = &self.identity.bucket;
        if let Some((warn, cause)) = &mut self.failing
            && now >= *warn
        {
            *warn = now + WARN_AFTER;
            log::warn!(
                bucket = bucket.as_str(), cause:% = cause;
                "the checkpoint cannot be written: nothing is confirmed, so Postgres keeps its WAL, and soon nothing is published; \
                 check the bucket (jetstream-outbox check)"
            );
        }
        self.next = now + INTERVAL;
        let cut = cut();
        let (ripening, matured) = self.ripened(now);
        let is_news = self.held.as_ref().is_none_or(|held| {
            let ripens_on = ripening.is_none() && matured.as_ref() != Some(&cut);
            held.young != cut || ripens_on || held.publication != self.publication.get()
        });
        // a bucket may be put back under an idle relay: what ripens is written again, and would be refused
        let matured_lsn = matured.as_ref().map_or(Lsn::INVALID, |it| it.stored_lsn);
        let is_due = now >= self.seen + REFRESH && matured_lsn < cut.stored_lsn;
        (is_news || is_due).then(|| self.send(cut, ripening, matured, now))
    }

    fn send(
        &mut self,
        cut: Cut,
        ripening: Option<Ripening>,
        matured: Option<Cut>,
        now: Instant,
    ) -> Write {
        self.writes += 1;
        self.has_written = true;
        let held = self.held.as_ref().map(|held| held.told_lsn);
        let told_lsn = match self.identity.delivery {
            Delivery::AtLeastOnce => ANYTHING,
            Delivery::ExactlyOnce => held
                .filter(|told_lsn| *told_lsn != ANYTHING)
                .unwrap_or_default()
                .max(cut.stored_lsn)
                .max(self.confirmed_lsn),
        };
        let ripening = ripening.unwrap_or_else(|| Ripening {
            cut: cut.clone(),
            since_ms: None,
        });
        let record = Record {
            timeline: self.timeline,
            told_lsn,
            young: cut,
            ripening: Some(ripening),
            matured,
            publication: self.publication.get(),
            writer: self.identity.writer.clone(),
            writes: self.writes,
        };
        let write = Write {
            number: self.writes,
            // R15
            revision: self.revision,
            body: record.body(),
        };
        self.pending = Some(Pending { sent: now, record });
        write
    }

    /// The answer to a write, and what the key holds by it. `Err`: it was written by another, or holds what is not known here.
    ///
    /// An answer that comes after another write was sent says nothing of that one. Had the earlier write been stored,
    /// the later one is refused, and the key is read again.
    pub fn on_written(
        &mut self,
        number: u64,
        answer: Result<PubAck, AckError>,
        now: Instant,
    ) -> Result<bool, Overtaken> {
        let is_it = |pending: &mut Pending| pending.record.writes == number;
        let Some(Pending { sent, mut record }) = self.pending.take_if(is_it) else {
            return Ok(false);
        };
        match answer {
            Ok(ack) => {
                self.revision = ack.seq;
                let time_ms = self.time_ms(now);
                if let Some(ripening) = &mut record.ripening {
                    ripening.since_ms = ripening.since_ms.or(time_ms);
                }
                self.failing = None;
                self.seen = sent;
                self.follow(&record);
                self.held = Some(record);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), AckErrorKind::WrongLastSequence(_)) => {
                Err(Overtaken)
            }
            Err(error) => {
                log::debug!(cause:% = error; "the checkpoint was not written; it is tried again");
                self.fails(error, now);
                Ok(false)
            }
        }
    }

    fn fails(&mut self, cause: AckError, now: Instant) {
        let warn = self.failing.take().map(|(warn, _)| warn);
        self.failing = Some((warn.unwrap_or(now + WARN_AFTER), cause));
    }

    /// What the last write was answered with, while they fail.
    pub fn failure(&self) -> Option<&AckError> {
        self.failing.as_ref().map(|(_, cause)| cause)
    }

    /// The key holds `cut`.
    pub fn holds(&self, cut: &Cut) -> bool {
        let is_it =
            |held: &Record| held.young == *cut && held.publication == self.publication.get();
        self.held.as_ref().is_some_and(is_it)
    }

    /// R21: what may be told to Postgres, as far as time goes: the key has held a cut with this `stored_lsn` for the hold-back, and
    /// was seen to do so not long ago.
    pub fn matured_lsn(&self, now: Instant) -> Lsn {
        if now >= self.seen + LONGEST_UNSEEN {
            return Lsn::INVALID;
        }
        let Some(held) = &self.held else {
            return Lsn::INVALID;
        };
        let ripe = held.ripening.as_ref().filter(|it| self.is_ripe(it, now));
        let matured = ripe.map(|it| &it.cut).or(held.matured.as_ref());
        let lsn = matured.map_or(Lsn::INVALID, |cut| cut.stored_lsn);
        assert!(
            lsn <= held.told_lsn,
            "{lsn} matured, but {} was the most to be told",
            held.told_lsn
        );
        lsn
    }

    /// The key lacks what is stored up to here, or has not held it for the hold-back.
    pub fn is_behind(&self, stored_lsn: Lsn, now: Instant) -> bool {
        self.matured_lsn(now) < stored_lsn
    }

    /// What ripens and what has matured at `now`.
    fn ripened(&self, now: Instant) -> (Option<Ripening>, Option<Cut>) {
        let Some(held) = &self.held else {
            return (None, None);
        };
        match &held.ripening {
            Some(ripening) if self.is_ripe(ripening, now) => (None, Some(ripening.cut.clone())),
            ripening => (ripening.clone(), held.matured.clone()),
        }
    }

    fn is_ripe(&self, ripening: &Ripening, now: Instant) -> bool {
        let age_ms = || self.time_ms(now)?.checked_sub(ripening.since_ms?);
        age_ms().is_some_and(|age_ms| {
            u128::try_from(age_ms).is_ok_and(|age_ms| age_ms >= self.hold_back.as_millis())
        })
    }

    /// The server's clock.
    fn time_ms(&self, now: Instant) -> Option<i64> {
        let (time_ms, at) = self.clock?;
        time_ms.checked_add_unsigned(now.saturating_duration_since(at).as_millis() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Anchor;
    use super::super::record::tests::{cut, flags, record};
    use super::*;
    use crate::jetstream::ack::ApiError;
    use crate::outbox::position::Source;

    const HOLD_BACK: Duration = Duration::from_secs(150);

    fn lineage() -> Lineage {
        Lineage {
            source: Source {
                slot: "s".into(),
                system_id: 1,
                timeline: 2,
            },
            switch_points: Vec::new(),
        }
    }

    /// A store that has read this record, which was stored at second 1000 and is read at second 1010.
    fn store(record: Option<Record>, now: Instant) -> Store {
        let identity = Identity {
            bucket: "bucket".into(),
            slot: "s".into(),
            writer: "we".into(),
            flags: flags(),
            delivery: Delivery::ExactlyOnce,
        };
        let mut store = Store::new(identity, HOLD_BACK, now);
        let read = store.on_read(value(record), &lineage(), now);
        assert_eq!(read, Ok(Ok(())));
        store
    }

    fn value(record: Option<Record>) -> Value {
        Value {
            revision: 4,
            record,
            stored_ms: 1_000_000,
            time_ms: 1_010_000,
        }
    }

    fn stored(seq: u64) -> Result<PubAck, AckError> {
        Ok(PubAck {
            seq,
            duplicate: false,
        })
    }

    /// Writes `young`, which must be due, `seconds` after the start.
    #[track_caller]
    fn write(store: &mut Store, young: u64, start: Instant, seconds: u64) -> Record {
        let now = start + Duration::from_secs(seconds);
        let write = store.write(|| cut(young), now, true).expect("it is news");
        let body = serde_json::from_slice(&write.body).expect("a record");
        assert_eq!(store.on_written(write.number, stored(5), now), Ok(true));
        body
    }

    #[test]
    fn a_cut_matures_when_the_key_has_held_it_for_the_hold_back_over_runs_too() {
        let start = Instant::now();
        let mut first = store(None, start);
        let after = |seconds| start + Duration::from_secs(seconds);
        write(&mut first, 0x10, start, 0);
        let record = write(&mut first, 0x20, start, 100);
        assert_eq!(first.matured_lsn(after(149)), Lsn::INVALID);
        assert_eq!(first.matured_lsn(after(150)), cut(0x10).stored_lsn);
        // another process reads it: it ripened since second 1010, and it is second 1120 now
        let mut second = store(None, start);
        let value = Value {
            time_ms: 1_010_000 + 120_000,
            ..value(Some(record))
        };
        second.on_read(value, &lineage(), start).unwrap().unwrap();
        assert_eq!(second.matured_lsn(after(29)), Lsn::INVALID);
        assert_eq!(second.matured_lsn(after(30)), cut(0x10).stored_lsn);
        // then the young one ripens, from when it is written so
        let record = write(&mut second, 0x30, start, 30);
        assert_eq!(record.matured, Some(cut(0x10)));
        assert_eq!(record.ripening.map(|it| it.cut), Some(cut(0x30)));
        // the key was seen to hold it not long ago
        assert_eq!(second.matured_lsn(after(90)), Lsn::INVALID);
        write(&mut second, 0x40, start, 130);
        assert_eq!(second.matured_lsn(after(179)), cut(0x10).stored_lsn);
        assert_eq!(second.matured_lsn(after(180)), cut(0x30).stored_lsn);
    }

    #[test]
    fn what_may_be_told_is_in_the_key_before() {
        let start = Instant::now();
        let mut store = store(Some(record(0x30, 0x20, 0x10)), start);
        assert_eq!(write(&mut store, 0x50, start, 1).told_lsn, Lsn(0x55));
        // it never becomes less
        assert_eq!(write(&mut store, 0x40, start, 2).told_lsn, Lsn(0x55));
        let claim = store.claim(cut(0x40), false, |_| None, Lsn(0x99), start);
        let claim: Record = serde_json::from_slice(&claim.body).unwrap();
        assert_eq!(claim.told_lsn, Lsn(0x99), "what Postgres was told before");
    }

    #[test]
    fn a_claim_that_fell_back_begins_the_ripening_again() {
        let start = Instant::now();
        let mut store = store(Some(record(0x30, 0x20, 0x10)), start);
        let write = store.claim(cut(0x18), true, |_| Some(0x9), Lsn::INVALID, start);
        let claim: Record = serde_json::from_slice(&write.body).unwrap();
        let ripening = claim.ripening.expect("the young one ripens");
        assert_eq!((ripening.cut, ripening.since_ms), (cut(0x18), None));
        // the older cut has read no more of a stream than there is, and what it has seen there it has seen
        let matured = claim.matured.expect("it stays");
        assert_eq!(matured.streams[0].read_after, 0x9);
        assert_eq!(matured.streams[0].witness, cut(0x10).streams[0].witness);
    }

    #[test]
    fn a_moved_slot_that_is_accepted_moves_every_cut() {
        let start = Instant::now();
        let mut store = store(Some(record(0x30, 0x20, 0x10)), start);
        let told = Lsn(0x35);
        store.accept_slot(told);
        assert_eq!(store.held(), Some(&record(0x30, 0x20, 0x10)));
        let moved = Lsn(0x40);
        store.accept_slot(moved);
        let held = store.held().expect("it was read");
        assert!(!held.is_exceeded(moved));
        for cut in held.cuts() {
            assert_eq!((&cut.anchor, cut.stored_lsn), (&Anchor::bare(moved), moved));
        }
        // and so it is written
        let young = held.young.clone();
        let claim = store.claim(young, false, |_| Some(9), moved, start);
        let claim: Record = serde_json::from_slice(&claim.body).unwrap();
        let anchors: Vec<_> = claim.cuts().map(|cut| cut.anchor.clone()).collect();
        assert_eq!(anchors, [(); 3].map(|()| Anchor::bare(moved)));
    }

    #[test]
    fn what_was_put_back_keeps_no_older_cuts_however_often_it_is_read() {
        let start = Instant::now();
        let theirs = Record {
            writer: "they".into(),
            ..record(0x30, 0x20, 0x10)
        };
        let mut store = store(Some(theirs.clone()), start);
        assert!(store.held().is_some_and(|it| it.matured.is_some()));
        let older = write(&mut store, 0x40, start, 0);
        write(&mut store, 0x50, start, 2);
        for put_back in [older, theirs] {
            for _ in 0..2 {
                let _ = store.on_read(value(Some(put_back.clone())), &lineage(), start);
                let held = store.held().expect("it was read");
                assert_eq!((&held.young, &held.ripening), (&put_back.young, &None));
                assert_eq!(held.matured, None);
            }
        }
    }

    #[test]
    fn who_begins_again_or_takes_turns_with_another_has_not_been_put_back() {
        let start = Instant::now();
        let mut store = store(None, start);
        let read = |store: &mut Store, record: &Record| {
            let _ = store.on_read(value(Some(record.clone())), &lineage(), start);
            assert!(store.held().is_some_and(|held| held.ripening.is_some()));
            store.start_over();
        };
        for lsn in [0x10, 0x20, 0x30] {
            write(&mut store, lsn, start, lsn);
        }
        store.start_over();
        let mut theirs = Record {
            writer: "they".into(),
            ..record(0x30, 0x20, 0x10)
        };
        for lsn in [0x40, 0x50] {
            let ours = write(&mut store, lsn, start, lsn);
            read(&mut store, &ours);
            theirs.writes += 1;
            theirs.ripening.as_mut().unwrap().since_ms = Some(1_000_000);
            read(&mut store, &theirs);
        }
    }

    #[test]
    fn older_cuts_learn_of_other_flags_and_of_another_name_for_the_same_stream() {
        let start = Instant::now();
        let mut held = record(0x30, 0x20, 0x10);
        let ripening = held.ripening.as_mut().unwrap();
        (ripening.cut.flags, ripening.since_ms) = (Flags::new("q", true, "m"), Some(1_000_000));
        let mut store = store(Some(held), start);
        let mut now = cut(0x30);
        now.streams[0].created = "later".into();
        let mut claim = |fell_back| -> Record {
            let claim = store.claim(now.clone(), fell_back, |_| None, Lsn::INVALID, start);
            serde_json::from_slice(&claim.body).unwrap()
        };
        let claimed = claim(false);
        let ripening = claimed.ripening.unwrap().cut;
        assert!(ripening.flags.are_several(), "{ripening:?}");
        assert_eq!(ripening.streams[0].created, "later");
        let matured = claimed.matured.unwrap();
        assert_eq!(
            (&matured.flags, &*matured.streams[0].created),
            (&flags(), "later")
        );
        // which stream it is is not known
        let matured = claim(true).matured.unwrap();
        assert_eq!(matured.streams[0].created, cut(0x10).streams[0].created);
    }

    #[test]
    fn an_answer_says_nothing_of_a_later_write() {
        let start = Instant::now();
        let mut store = store(None, start);
        let first = store.write(|| cut(0x10), start, false).unwrap();
        let soon = start + PATIENCE - Duration::from_millis(1);
        assert!(store.write(|| cut(0x20), soon, false).is_none());
        let late = start + PATIENCE;
        let second = store.write(|| cut(0x20), late, false).unwrap();
        assert_eq!((first.revision, second.revision), (4, 4));
        assert_eq!(store.on_written(first.number, stored(5), late), Ok(false));
        assert!(!store.holds(&cut(0x20)) && !store.holds(&cut(0x10)));
        let refused = AckError::Api(ApiError {
            code: 400,
            err_code: 10071,
            description: "wrong last sequence: 5".into(),
        });
        let answer = store.on_written(second.number, Err(refused), late);
        assert_eq!(answer, Err(Overtaken));
    }

    #[test]
    fn a_key_has_slot_and_system_in_its_subject() {
        let store = store(None, Instant::now());
        assert_eq!(store.bucket(), "bucket");
        assert_eq!(store.subject(7), "$KV.bucket.s-7");
        assert_eq!(store.old_subject(), "$KV.bucket.s");
    }

    #[test]
    fn a_key_is_new_until_it_has_a_value_or_had_one() {
        let start = Instant::now();
        let of = |revision, record| {
            let mut store = store(None, start);
            let value = Value {
                revision,
                ..value(record)
            };
            assert_eq!(store.on_read(value, &lineage(), start), Ok(Ok(())));
            store.is_new()
        };
        assert!(of(0, None));
        assert!(!of(4, None), "its value is gone");
        assert!(!of(4, Some(record(0x30, 0x20, 0x10))));
    }

    #[test]
    fn a_record_that_is_disowned_leaves_the_names_of_its_streams() {
        let start = Instant::now();
        let mut store = store(Some(record(0x30, 0x20, 0x10)), start);
        assert_eq!(store.disown(), ["EV", "EV", "EV"]);
        assert!(store.held().is_none() && store.disown().is_empty());
    }

    #[test]
    fn what_is_stored_is_behind_until_the_key_has_held_it_for_the_hold_back() {
        let start = Instant::now();
        let store = store(Some(record(0x30, 0x20, 0x10)), start);
        // of the ripening cut, which the record has had since second 4
        let stored_lsn = Lsn(0x25);
        assert!(!store.is_behind(stored_lsn, start));
        assert!(store.is_behind(Lsn(0x26), start));
        assert!(store.holds(&cut(0x30)) && !store.holds(&cut(0x20)));
        store.publication().set(Some("less".into()));
        assert!(!store.holds(&cut(0x30)), "the publication has changed");
    }

    #[test]
    fn no_answer_comes_once_the_connection_is_gone() {
        let start = Instant::now();
        let mut store = store(None, start);
        let first = store.write(|| cut(0x10), start, false).unwrap();
        store.on_disconnect();
        let answer = store.on_written(first.number, stored(5), start);
        assert_eq!(answer, Ok(false));
        // and nothing waits for one
        assert!(store.write(|| cut(0x10), start, true).is_some());
    }

    #[test]
    fn a_record_of_another_writer_overtakes_one_who_has_written() {
        let start = Instant::now();
        let mut store = store(None, start);
        let theirs = || {
            let record = record(0x30, 0x20, 0x10);
            value(Some(Record {
                writer: "they".into(),
                ..record
            }))
        };
        // a start takes over what it finds
        assert_eq!(store.on_read(theirs(), &lineage(), start), Ok(Ok(())));
        write(&mut store, 0x40, start, 0);
        let read = store.on_read(theirs(), &lineage(), start);
        assert_eq!(read, Ok(Err(Overtaken)));
        store.start_over();
        assert_eq!(store.on_read(theirs(), &lineage(), start), Ok(Ok(())));
    }

    #[test]
    fn the_same_is_written_once_a_second_at_most_and_not_again() {
        let start = Instant::now();
        let mut store = store(None, start);
        write(&mut store, 0x10, start, 0);
        let half = start + Duration::from_millis(500);
        assert!(store.write(|| cut(0x20), half, false).is_none(), "too soon");
        let later = start + Duration::from_secs(2);
        assert!(store.write(|| cut(0x10), later, true).is_none(), "no news");
        store.publication().set(Some("less".into()));
        assert!(store.write(|| cut(0x10), later, true).is_some());
    }
}
