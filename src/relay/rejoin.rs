//! Connects to JetStream and reads back what its streams hold: at the start and after each lost connection.

use super::core::StreamAtConnect;
use super::core::memory::Mark;
use super::error::Error;
use super::repeated::Repeated;
use crate::config::Config;
use crate::jetstream::Delivery;
use crate::jetstream::client::Link;
use crate::jetstream::preflight::preflight;
use crate::jetstream::resume::{
    Between, Checkpoint, Extent, LOOK_BACK, Lineage, OUTBOX_POSITION, Tail, find_tail,
};
use crate::jetstream::streams::{self, Request, Routes, StoredMessage, StreamInfo};
use crate::outbox::position::{Position, SourcePosition};
use crate::postgres::Lsn;
use std::thread;
use std::time::{Duration, Instant};

/// How long a new leader is given to apply what it has, and one that was cut off to notice that it no longer is one
/// (10 s in nats-server); what the stream still lacks then counts as lost.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(250);

/// So many messages of a replicated stream are read back one by one at most, which takes some seconds: what
/// is published between two writes of the checkpoint, with room to spare.
const READ_BETWEEN: u64 = 100_000;
/// So many of them, or of bytes, are on their way at a time: enough to hide the way, few for the server and in memory.
const READ_AT_ONCE: u64 = 64;
const READ_AT_ONCE_BYTES: u64 = 4 * 1024 * 1024;

/// A connection, and what was read over it.
pub struct Joined {
    /// The connection.
    pub link: Link,
    /// Which subject goes to which of `streams`.
    pub routes: Routes,
    /// The streams that capture the prefix.
    pub streams: Vec<StreamAtConnect>,
}

/// A connection, and the streams whose tails are still to be read.
pub struct Found {
    /// The connection.
    pub link: Link,
    infos: Vec<StreamInfo>,
    /// Of each stream, the subjects under which our events may stand in it.
    filters: Vec<Vec<String>>,
}

impl Joined {
    /// Warns of what is, or should be, between our last message and a stream's end, once a minute.
    pub fn tell_others(&self, said: &mut Repeated) {
        for stream in self.streams.iter().filter(|stream| stream.tail.foreign > 0) {
            if said.is_new(&format!("{} foreign", stream.name), Instant::now()) {
                log::warn!(
                    stream = stream.name.as_str(), messages = stream.tail.foreign;
                    "others write to this stream; going on after their messages"
                );
            }
        }
        for stream in self.streams.iter().filter(|stream| stream.tail.lost > 0) {
            if said.is_new(&format!("{} lost", stream.name), Instant::now()) {
                log::warn!(
                    stream = stream.name.as_str(), messages = stream.tail.lost;
                    "the last messages of this stream are gone, lost by the server or deleted by somebody; what the slot still has is published again"
                );
            }
        }
    }

    /// Sees that nothing is missing before the ends: a stream holds all up to its last event if that has a fence, and all
    /// before `settled` in any case.
    pub fn check_whole(&self, settled: Lsn) -> Result<(), Error> {
        let settled = Position {
            commit_lsn: settled,
            ordinal: 0,
        };
        let is_in_doubt = |tail: &Tail| {
            tail.unfenced && (tail.stored.as_ref()).is_some_and(|stored| stored.position > settled)
        };
        match self.streams.iter().find(|stream| is_in_doubt(&stream.tail)) {
            Some(stream) => Err(Error::Unfenced {
                stream: stream.name.clone(),
                settled: settled.commit_lsn,
            }),
            None => Ok(()),
        }
    }

    /// Where the copy stream may start: Postgres skips what every stream holds. `0/0`, the slot's own
    /// position, whenever there is doubt.
    pub fn start_position(&self) -> Lsn {
        let position = |stream: &StreamAtConnect| match &stream.tail {
            Tail {
                between: Some(between),
                ..
            } => between.from.commit_lsn,
            Tail {
                stored: Some(stored),
                ..
            } => stored.position.commit_lsn,
            _ => Lsn::INVALID,
        };
        self.streams
            .iter()
            .map(position)
            .min()
            .unwrap_or(Lsn::INVALID)
    }
}

/// Connects and finds the streams that capture the prefix and the park subject. `tries`: how often that, and what follows,
/// failed before.
pub fn find(config: &Config, tries: usize, said: &mut Repeated) -> Result<Found, Error> {
    let link = Link::connect_from(&config.nats, tries)?;
    let mut infos: Vec<StreamInfo> = Vec::new();
    let mut filters_of: Vec<Vec<String>> = Vec::new();
    let policy = &config.mapping.policy;
    let mut filters = vec![format!("{}.>", config.prefix)];
    if policy.parks() {
        filters.push(policy.park_subject.clone());
    }
    for filter in filters {
        let found = streams::list(&link, &filter, config.nats.request_timeout)?;
        if found.is_empty() {
            return Err(Error::NoStream(filter));
        }
        for info in found {
            let known = infos.iter().position(|i| i.config.name == info.config.name);
            match known.and_then(|index| filters_of.get_mut(index)) {
                Some(filters) => filters.push(filter.clone()),
                None => {
                    infos.push(info);
                    filters_of.push(vec![filter.clone()]);
                }
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
        infos,
        filters: filters_of,
    })
}

impl Found {
    /// The most copies that one of the streams has: the checkpoint is to last as long.
    pub fn replicas(&self) -> u32 {
        self.infos
            .iter()
            .map(|info| info.config.num_replicas)
            .max()
            .unwrap_or(1)
    }

    /// The stream is the one that the mark was made of, and has lost nothing since.
    pub fn has_kept(&self, mark: &Mark) -> bool {
        let mut infos = self.infos.iter();
        infos
            .find(|info| info.config.name == mark.name)
            .is_none_or(|info| {
                let seq = mark.last.as_ref().map_or(0, |(seq, _)| *seq);
                let lost_some = info.config.keeps_its_end() && info.state.num_deleted > 0;
                let last_seq = info.state.last_seq;
                info.created == mark.created
                    && !lost_some
                    && last_seq >= seq.max(mark.confirmed_seq)
            })
    }

    /// Reads the tails, from the last known event of each stream, which acknowledged up to `acked_seq`.
    pub fn join<'c>(
        mut self,
        config: &Config,
        lineage: &Lineage,
        last_known: impl Fn(&str) -> Option<&'c Checkpoint>,
        acked_seq: impl Fn(&str) -> u64,
    ) -> Result<Joined, Error> {
        let timeout = config.nats.request_timeout;
        let mut found = Vec::with_capacity(self.infos.len());
        for (info, filters) in self.infos.iter_mut().zip(&self.filters) {
            let known = last_known(&info.config.name);
            catch_up(&self.link, info, acked_seq(&info.config.name), timeout)?;
            let stream = Stream {
                link: &self.link,
                info,
                filters,
                timeout,
            };
            let (tail, age) = match config.delivery {
                Delivery::ExactlyOnce => stream.read_back(config, lineage, known)?,
                Delivery::AtLeastOnce => (Tail::default(), Age::default()),
            };
            let keeps = info.config.keeps_its_order();
            found.push(StreamAtConnect {
                name: info.config.name.clone(),
                created: info.created.clone(),
                replicas: match config.delivery {
                    Delivery::ExactlyOnce => info.config.num_replicas,
                    Delivery::AtLeastOnce => 0,
                },
                last_seq: info.state.last_seq,
                tail,
                aged: age.aged,
                has_young: age.has_young,
                keeps_from: keeps.then_some(info.state.first_seq),
            });
        }
        Ok(Joined {
            routes: Routes::new(&self.infos),
            streams: found,
            link: self.link,
        })
    }
}

/// An end before what was acknowledged is looked at again before it is believed: another relay may have
/// written, and its checkpoint be newer than what was read of the stream; and a new leader of a replicated
/// stream tells an older end until it has applied what its followers agreed on.
fn catch_up(
    link: &Link,
    info: &mut StreamInfo,
    acked_seq: u64,
    timeout: Duration,
) -> Result<(), Error> {
    let deadline = Instant::now() + CATCH_UP_LIMIT;
    while info.state.last_seq < acked_seq && Instant::now() < deadline {
        if let Some(newer) = streams::info(link, &info.config.name, timeout)? {
            *info = newer;
        }
        if info.config.num_replicas <= 1 {
            break;
        }
        thread::sleep(CATCH_UP_PAUSE);
    }
    Ok(())
}

/// How old the events of ours in a stream are: see [`StreamAtConnect`].
#[derive(Debug, Default)]
struct Age {
    aged: Option<Position>,
    has_young: bool,
}

/// A stream that is being read back.
struct Stream<'a> {
    link: &'a Link,
    info: &'a StreamInfo,
    /// The subjects of ours, with wildcards.
    filters: &'a [String],
    timeout: Duration,
}

impl Stream<'_> {
    fn get(&self, request: Request) -> Result<Option<StoredMessage>, Error> {
        Ok(streams::message(self.link, request, self.timeout)?)
    }

    fn read_back(
        &self,
        config: &Config,
        lineage: &Lineage,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<(Tail, Age), Error> {
        let name = &self.info.config.name;
        let state = &self.info.state;
        let mut newest: Option<StoredMessage> = None;
        for filter in self.filters {
            let last = self.get(streams::last_message_request(name, filter))?;
            newest = newest.into_iter().chain(last).max_by_key(|m| m.seq);
        }
        let keeps_its_end = self.info.config.keeps_its_end();
        let mut first_seq = state.first_seq;
        if let Some(known) = checkpoint
            && !keeps_its_end
            && state.last_seq > known.seq.max(first_seq) + LOOK_BACK
        {
            // more than can be looked at one by one; where all is gone from there, it need not be
            let next = self.get(streams::next_message_request(name, known.seq + 1, ">"))?;
            first_seq = next.map_or(state.last_seq + 1, |next| next.seq);
        }
        let extent = Extent {
            first_seq,
            last_seq: state.last_seq,
            whole: state.num_deleted == 0,
            keeps_its_end,
        };
        let found = find_tail(
            &lineage.source,
            extent,
            newest.as_ref(),
            checkpoint,
            |seq| self.get(streams::message_request(name, seq)),
        )?;
        let mut tail = lineage
            .judge(found, checkpoint, config.accept_new_system)
            .map_err(|conflict| Error::Conflict {
                stream: name.clone(),
                conflict,
            })?;
        let mut age = self.age(lineage, &tail, config.hold_back)?;
        if let Some(between) = self.between(lineage, &tail, checkpoint)? {
            age.aged = age.aged.filter(|aged| *aged <= between.from);
            tail.look_between(between);
        }
        Ok((tail, age))
    }

    /// On a replicated stream, what stands between the last event known to be whole and the tail.
    fn between(
        &self,
        lineage: &Lineage,
        tail: &Tail,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<Option<Between>, Error> {
        let (Some(stored), Some(known)) = (&tail.stored, checkpoint) else {
            return Ok(None);
        };
        let name = &self.info.config.name;
        let stretch = self.info.state.first_seq.max(known.seq + 1)..=stored.seq;
        if self.info.config.num_replicas <= 1 || stretch.is_empty() {
            return Ok(None);
        }
        if stored.seq - known.seq > READ_BETWEEN {
            log::warn!(
                stream = name.as_str(), messages = stored.seq - known.seq;
                "too many events since the last checkpoint to read them back: if others write to this stream, compare it with the outbox"
            );
            return Ok(None);
        }
        let state = &self.info.state;
        let average = state.bytes / state.messages.max(1);
        let at_once = (READ_AT_ONCE_BYTES / average.max(1)).clamp(1, READ_AT_ONCE) as usize;
        let mut between = Between::after(known.position);
        let take = |message: &StoredMessage| between.take(lineage, message);
        streams::messages(self.link, name, stretch, self.timeout, at_once, take)?;
        Ok(Some(between))
    }

    /// How old the events are, by the server's own clock: a search for the time `hold_back` ago among the sequences.
    fn age(&self, lineage: &Lineage, tail: &Tail, hold_back: Duration) -> Result<Age, Error> {
        let (Some(stored), Some(now)) = (&tail.stored, time(&self.info.ts)) else {
            return Ok(Age::default());
        };
        // what is not older than this is too young
        let Ok(limit) = now.checked_sub(hold_back) else {
            return Ok(Age::default());
        };
        let (mut old, mut young) = (self.info.state.first_seq.saturating_sub(1), stored.seq + 1);
        let mut age = Age::default();
        while old + 1 < young {
            let middle = old + (young - old) / 2;
            let mut next: Option<StoredMessage> = None;
            for filter in self.filters {
                let name = &self.info.config.name;
                let found = self.get(streams::next_message_request(name, middle, filter))?;
                next = next.into_iter().chain(found).min_by_key(|m| m.seq);
            }
            let is_old =
                |message: &StoredMessage| time(&message.time).is_some_and(|time| time <= limit);
            match next {
                Some(message) if is_old(&message) => {
                    let position = message
                        .header(OUTBOX_POSITION)
                        .and_then(|text| text.parse::<SourcePosition>().ok());
                    if let Some(position) =
                        position.filter(|position| position.source == lineage.source)
                    {
                        age.aged = Some(position.position);
                    }
                    old = message.seq.max(middle);
                }
                next => {
                    age.has_young |= next.is_some();
                    young = middle;
                }
            }
        }
        Ok(age)
    }
}

fn time(rfc3339: &str) -> Option<jiff::Timestamp> {
    rfc3339.parse().ok()
}
