//! Connects to JetStream and finds out where to go on: at a session's start, and after each lost connection.
//!
//! In this order: the checkpoint's key; the routes; the ends of every stream under the prefix or named in a cut; and
//! what the [`Resume`] asks for. Its caller claims the result, by writing the record, before anything is published.

use super::checkpoint::kv;
use super::checkpoint::record::StreamCut;
use super::checkpoint::store::{Overtaken, Store};
use super::core::capacity::Capacity;
use super::core::evidence::Message;
use super::core::exactly_once::{Connection, ExactlyOnce};
use super::core::resume::facts::{Facts, Known, StreamFacts};
use super::core::resume::{Answer, Read, Resume, Resumed};
use super::error::Error;
use super::repeated::Repeated;
use super::stop::Stop;
use crate::config::Config;
use crate::jetstream::ack::{AckError, parse_refusal};
use crate::jetstream::client::{self, Link};
use crate::jetstream::preflight::preflight;
use crate::jetstream::streams::{self, Routes, StoredMessage, StreamInfo};
use crate::jetstream::{
    self, Delivery, EXPECTED_LAST_SEQUENCE, MSG_ID, OUTBOX_LATE, OUTBOX_POSITION, STREAM_SOURCE,
};
use crate::outbox::lineage::{Conflict, Lineage};
use crate::outbox::park::{OnPoison, PARKED};
use crate::outbox::position::SourcePosition;
use crate::postgres::Lsn;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// How long a new leader is given to apply what it has, and one that was cut off to notice that it no longer is one
/// (10 s in nats-server); what the stream still lacks then counts as lost.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(250);
/// So many messages are asked for in a row, and so many of them, or of bytes, are on their way at a time: enough to hide
/// the way, few for the server and in memory.
const READ_IN_A_ROW: usize = 512;
const READ_AT_ONCE: u64 = 64;
const READ_AT_ONCE_BYTES: u64 = 4 * 1024 * 1024;
/// A resume that takes longer is reported this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// What both of a session's parts connect with.
pub struct Connector<'a> {
    /// The operator's wishes.
    pub config: &'a Config,
    /// The server that the copy stream comes from.
    pub lineage: &'a Lineage,
    /// Ends a resume that takes long.
    pub stop: &'a Stop,
    /// What was lost is lost (`-resume-anyway`).
    pub accept_loss: bool,
    /// So often reading the streams back has failed: fewer messages are asked for at a time.
    pub failed_reads: u32,
}

/// A connection, and the streams that were found over it.
pub struct Found {
    /// The connection.
    pub link: Link,
    infos: Vec<StreamInfo>,
    /// Of these the first so many capture something of the prefix, or the park subject.
    routed: usize,
}

impl Connector<'_> {
    /// Connects, and finds the streams that capture the prefix and the park subject. `tries`: how often that, and what follows,
    /// failed before.
    pub fn find(&self, tries: usize, said: &mut Repeated) -> Result<Found, Error> {
        let config = self.config;
        let link = Link::connect_from(&config.nats, tries)?;
        let mut infos: Vec<StreamInfo> = Vec::new();
        for filter in self.filters() {
            let found = streams::list(&link, &filter, config.nats.request_timeout)?;
            if found.is_empty() {
                let subject = filter.replace('>', "outbox-check.outbox-check");
                self.check_home(&link, &subject)?;
                return Err(Error::NoStream(filter));
            }
            for info in found {
                if infos
                    .iter()
                    .all(|known| known.config.name != info.config.name)
                {
                    infos.push(info);
                }
            }
        }
        for info in &infos {
            let judged = preflight(info, &link.server_info(), config.wanted());
            if let Some(why) = judged.refused {
                return Err(Error::Setup(why));
            }
            for warning in judged.warnings {
                if said.is_new(&format!("{}{warning}", info.config.name), Instant::now()) {
                    log::warn!(stream = info.config.name.as_str(); "{warning}");
                }
            }
        }
        Ok(Found {
            link,
            routed: infos.len(),
            infos,
        })
    }

    /// No stream captures `subject`, for all that the API reports: sees that no other answers there.
    pub fn check_home(&self, link: &Link, subject: &str) -> Result<(), Error> {
        let timeout = self.config.nats.request_timeout;
        let answer = match streams::probe(link, subject, timeout) {
            Err(jetstream::Error::Api {
                source: AckError::NoResponders,
                ..
            }) => return Ok(()),
            answer => answer?,
        };
        let Some((stream, _)) = parse_refusal(&answer) else {
            return Ok(());
        };
        // one may have been created just now
        if !streams::list(link, subject, timeout)?.is_empty() {
            return Ok(());
        }
        Err(Error::Setup(format!(
            "find the stream of {subject}: no stream captures it, but {stream} stores what is published there: a mapping of the \
             account (mappings, partitions) or an import changes the subject on its way, and then it cannot be told which stream \
             an event goes to; take the mapping out, or have the stream capture the subject as it is published, or name with \
             -prefix what the stream captures"
        )))
    }

    fn filters(&self) -> Vec<String> {
        let policy = &self.config.mapping.policy;
        let mut filters = vec![format!("{}.>", self.config.prefix)];
        if policy.parks() {
            filters.push(policy.park_subject.clone());
        }
        filters
    }

    /// What may go over the connection.
    pub fn capacity(&self, found: &Found) -> Capacity {
        let routed = found.infos.get(..found.routed).unwrap_or_default();
        Capacity {
            routes: Routes::new(routed),
            max_payload: found.link.max_payload(),
            position_source_len: self.lineage.source.to_string().len(),
            marks_ends: self.config.transaction_headers,
            puts_aside: self.config.mapping.policy.on_poison != OnPoison::Stop,
        }
    }

    /// Reads the checkpoint's key. `Ok(Err(_))`: another relay has written it since this process did.
    pub fn read_key(
        &self,
        found: &Found,
        store: &mut Store,
    ) -> Result<Result<(), Overtaken>, Error> {
        let timeout = self.config.nats.request_timeout;
        let replicas = found.infos.iter().map(|info| info.config.num_replicas);
        let replicas = replicas.max().unwrap_or(1);
        let value = kv::read(store, &found.link, self.lineage, replicas, timeout);
        let value = value.map_err(|error| no_checkpoint(store.bucket(), error))?;
        let read = store.on_read(value, self.lineage, Instant::now());
        read.map_err(|conflict| Error::Conflict {
            of: "the checkpoint".into(),
            conflict,
        })
    }

    /// Finds out where to go on.
    pub fn resume(
        &self,
        mut found: Found,
        store: &Store,
        known: Known,
    ) -> Result<(Link, Connection), Error> {
        if !known.goes_on && store.is_new() {
            self.check_system(&found)?;
        }
        let mut missing = self.find_named(&mut found, &known)?;
        let mut facts = Facts {
            lineage: self.lineage.clone(),
            streams: self.facts(&found),
            known,
            accept_loss: self.accept_loss,
        };
        facts.forget_left(&mut missing);
        let streams = facts.streams.clone();
        let is_known = |name: &str| streams.iter().any(|it| it.name == name);
        found.infos.retain(|info| is_known(&info.config.name));
        let resumed = self.read(&found, Resume::new(facts))?;
        if let Some((stream, at)) = resumed.unfenced.filter(|_| !self.accept_loss) {
            let name = streams.get(stream).map(|it| it.name.clone());
            return Err(Error::Unfenced {
                stream: name.unwrap_or_default(),
                at,
                stored: resumed.anchor.position,
            });
        }
        for (stream, deleted) in streams.iter().zip(&resumed.deleted) {
            if *deleted > 0 {
                log::warn!(
                    stream = stream.name.as_str(), messages = *deleted;
                    "the last messages of this stream are gone, lost by the server or deleted by somebody; what Postgres still has is \
                     published again"
                );
            }
        }
        let connection = Connection {
            resumed,
            capacity: self.capacity(&found),
            streams,
            missing,
        };
        Ok((found.link, connection))
    }

    /// Looks for a stream that may capture nothing of ours; whether it is there.
    fn add_named(&self, found: &mut Found, name: &str) -> Result<bool, Error> {
        if found.infos.iter().any(|it| it.config.name == name) {
            return Ok(true);
        }
        let info = streams::info(&found.link, name, self.config.nats.request_timeout)?;
        let is_there = info.is_some();
        found.infos.extend(info);
        Ok(is_there)
    }

    /// The streams that are named beside those that capture something of ours; and what is known of those that are gone.
    fn find_named(&self, found: &mut Found, known: &Known) -> Result<Vec<StreamCut>, Error> {
        let mut missing: Vec<StreamCut> = Vec::new();
        for (name, cut) in known.named() {
            if !self.add_named(found, &name)? {
                missing.extend(cut);
            }
        }
        for info in &mut found.infos {
            let marks = known
                .cuts
                .iter()
                .filter_map(|cut| cut.stream(&info.config.name));
            let acked_seq = marks.map(|mark| {
                let witness_seq = mark.witness.as_ref().map_or(0, |witness| witness.seq);
                mark.read_after.max(witness_seq)
            });
            self.catch_up(&found.link, info, acked_seq.max().unwrap_or(0))?;
        }
        Ok(missing)
    }

    /// An end before what was acknowledged is looked at again before it is believed: a new leader of a replicated
    /// stream reports an older end until it has applied what its followers agreed on.
    fn catch_up(&self, link: &Link, info: &mut StreamInfo, acked_seq: u64) -> Result<(), Error> {
        let timeout = self.config.nats.request_timeout;
        let deadline = Instant::now() + CATCH_UP_LIMIT;
        let lags =
            |info: &StreamInfo| info.state.last_seq < acked_seq && info.config.num_replicas > 1;
        if lags(info) {
            log::info!(
                stream = info.config.name.as_str(), last_seq = info.state.last_seq, acknowledged = acked_seq;
                "the stream ends before what it had acknowledged: waiting for its leader to catch up, for {} s at most",
                CATCH_UP_LIMIT.as_secs()
            );
        }
        while lags(info) && Instant::now() < deadline {
            self.stop.wait(CATCH_UP_PAUSE);
            if self.stop.is_stopping() {
                return Err(Error::Stopped);
            }
            if let Some(newer) = streams::info(link, &info.config.name, timeout)? {
                *info = newer;
            }
        }
        Ok(())
    }

    fn facts(&self, found: &Found) -> Vec<StreamFacts> {
        let infos = found.infos.iter().enumerate();
        let facts = infos.map(|(index, info)| StreamFacts {
            name: info.config.name.clone(),
            domain: info.domain.clone(),
            created: info.created.clone(),
            is_replicated: info.config.num_replicas > 1,
            is_log: info.config.is_log(),
            first_seq: info.state.first_seq,
            last_seq: info.state.last_seq,
            is_routed: index < found.routed,
            keeps_its_end: info.config.keeps_its_end(),
            keeps_its_order: info.config.keeps_its_order(),
        });
        facts.collect()
    }

    /// Reads what the resume asks for.
    fn read(&self, found: &Found, mut resume: Resume) -> Result<Resumed, Error> {
        let timeout = self.config.nats.request_timeout;
        let average = found
            .infos
            .iter()
            .map(|info| info.state.bytes / info.state.messages.max(1));
        let average = average.max().unwrap_or(0).max(1);
        // a server that has dropped requests, or the connection over the answers, may manage fewer
        let most = READ_AT_ONCE
            .checked_shr(self.failed_reads)
            .unwrap_or(0)
            .max(1);
        let at_once = (READ_AT_ONCE_BYTES / average).clamp(1, most) as usize;
        let name = |stream: usize| {
            let info = found.infos.get(stream);
            info.map_or("", |info| info.config.name.as_str())
        };
        let (mut count, mut reported) = (0, Instant::now());
        loop {
            let mut reads = Vec::new();
            while reads.len() < READ_IN_A_ROW
                && let Some(read) = resume.next_read().map_err(Error::Lost)?
            {
                reads.push(read);
            }
            if reads.is_empty() {
                return Ok(resume.finish());
            }
            let request = |nth: usize| match reads.get(nth) {
                Some(Read::Message(stream, seq)) => streams::message_request(name(*stream), *seq),
                Some(Read::Exists(name)) => streams::info_request(name),
                None => Default::default(),
            };
            let mut answers = Vec::with_capacity(reads.len());
            let link = &found.link;
            link.call_each(
                reads.len(),
                request,
                at_once,
                timeout,
                |nth, body| {
                    if let Some(read) = reads.get(nth) {
                        answers.push((nth, answer(read, body)?));
                    }
                    Ok(())
                },
                |_| (),
            )
            .map_err(Error::ReadBack)?;
            count += answers.len();
            for (nth, answer) in answers {
                if let Some(read) = reads.get(nth) {
                    resume.on_read(read, answer);
                }
            }
            if self.stop.is_stopping() {
                return Err(Error::Stopped);
            }
            if reported.elapsed() >= REPORT_INTERVAL {
                reported = Instant::now();
                log::info!(messages = count; "reading the streams back to find what is stored");
            }
        }
    }

    /// Writes the record of what was resumed: before that nothing is published.
    pub fn claim(
        &self,
        link: &Link,
        core: &mut ExactlyOnce,
        store: &mut Store,
        fell_back: bool,
        confirmed_lsn: Lsn,
    ) -> Result<(), Error> {
        let timeout = self.config.nats.request_timeout;
        let now = Instant::now();
        let cut = core.cut_to_record();
        let end = |name: &str| core.end_of(name);
        let write = store.claim(cut, fell_back, end, confirmed_lsn, now);
        let subject = store.subject(self.lineage.source.system_id);
        let ack = kv::write(link, &subject, &write, timeout)
            .map_err(|error| no_checkpoint(store.bucket(), error))?;
        match store.on_written(write.number, Ok(ack), Instant::now()) {
            Ok(_) => core.on_recorded(Instant::now()),
            Err(Overtaken) => return Err(Error::Overtaken),
        }
        Ok(())
    }

    /// Without a record, the last message under our subjects tells whether another Postgres system wrote here before.
    fn check_system(&self, found: &Found) -> Result<(), Error> {
        if self.config.accept_new_system || self.config.delivery == Delivery::AtLeastOnce {
            return Ok(());
        }
        let timeout = self.config.nats.request_timeout;
        for info in found.infos.iter().take(found.routed) {
            let name = &info.config.name;
            for filter in self.filters() {
                let last = streams::last_message_request(name, &filter);
                let last = streams::message(&found.link, last, timeout);
                let last = last.map_err(Error::ReadBack)?;
                let at = last.and_then(|message| {
                    message
                        .header(OUTBOX_POSITION)?
                        .parse::<SourcePosition>()
                        .ok()
                });
                let source = &self.lineage.source;
                if let Some(at) = at
                    && at.source.slot == source.slot
                    && at.source.system_id != source.system_id
                {
                    return Err(Error::Conflict {
                        of: format!("stream {name}"),
                        conflict: Conflict::OtherSystem(at),
                    });
                }
            }
        }
        Ok(())
    }
}

/// What the bucket's trouble means to exactly-once delivery.
pub fn no_checkpoint(bucket: &str, error: kv::Error) -> Error {
    match error {
        kv::Error::Passing(error) => Error::Nats(error),
        kv::Error::NoRoom(refused) => Error::NoRoom {
            bucket: bucket.into(),
            refused,
        },
        kv::Error::Lasting(reason) | kv::Error::Unreadable(reason) => Error::NoCheckpoint {
            bucket: bucket.into(),
            reason,
        },
    }
}

fn answer(read: &Read, body: &[u8]) -> Result<Answer, AckError> {
    Ok(match read {
        Read::Message(..) => Answer::Message(message(body)?),
        Read::Exists(_) => Answer::Exists(streams::parse_info(body)?.is_some()),
    })
}

/// Reads these sequences of a stream over a connection that is in use; what else comes meanwhile is handed on.
pub fn read_gap(
    link: &Link,
    stream: &str,
    sequences: RangeInclusive<u64>,
    timeout: Duration,
    other: impl FnMut(client::Answer),
) -> Result<Vec<(u64, Option<Message>)>, jetstream::Error> {
    let first = *sequences.start();
    let mut messages = Vec::new();
    let request = |nth: usize| streams::message_request(stream, first + nth as u64);
    let take = |nth: usize, body: &[u8]| {
        messages.push((first + nth as u64, message(body)?));
        Ok(())
    };
    let at_once = READ_AT_ONCE as usize;
    link.call_each(sequences.count(), request, at_once, timeout, take, other)?;
    messages.sort_unstable_by_key(|(seq, _)| *seq);
    Ok(messages)
}

/// Reads the answer to a request for a message.
pub fn message(body: &[u8]) -> Result<Option<Message>, AckError> {
    Ok(streams::parse_message_head(body)?.as_ref().map(message_of))
}

/// What the headers say of where the message is from.
pub fn message_of(stored: &StoredMessage) -> Message {
    Message {
        seq: stored.seq,
        position: stored
            .header(OUTBOX_POSITION)
            .and_then(|text| text.parse().ok()),
        id: stored.header(MSG_ID).map(str::to_string),
        expected_last_sequence: stored
            .header(EXPECTED_LAST_SEQUENCE)
            .and_then(|text| text.parse().ok()),
        // ADR-8: the stream's name, the sequence there, and more
        copied_from: stored
            .header(STREAM_SOURCE)
            .and_then(|text| text.split_ascii_whitespace().next())
            .map(str::to_string),
        is_late: stored.header(OUTBOX_LATE).is_some(),
        is_parked: stored.header(PARKED).is_some(),
    }
}
