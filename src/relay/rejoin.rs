//! Connects to JetStream and reads back what its streams hold: at the start and after each lost connection.

use super::core::StreamAtConnect;
use super::error::Error;
use crate::config::Config;
use crate::jetstream::Delivery;
use crate::jetstream::client::Link;
use crate::jetstream::preflight::preflight;
use crate::jetstream::resume::{Checkpoint, Extent, Lineage, OUTBOX_POSITION, Tail, find_tail};
use crate::jetstream::streams::{self, Request, Routes, StoredMessage, StreamInfo};
use crate::outbox::position::{Position, SourcePosition};
use crate::postgres::Lsn;
use std::time::Duration;

/// A connection, and what was read over it.
pub struct Joined {
    /// The connection.
    pub link: Link,
    /// Which subject goes to which of `streams`.
    pub routes: Routes,
    /// The streams that capture the prefix.
    pub streams: Vec<StreamAtConnect>,
}

impl Joined {
    /// Where the copy stream may start: Postgres skips what every stream holds. `0/0`, the slot's own
    /// position, whenever there is doubt.
    pub fn start_position(&self) -> Lsn {
        let position = |stream: &StreamAtConnect| match &stream.tail {
            Tail {
                stored: Some(stored),
                switch_point: None,
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

/// Connects, finds the streams that capture the prefix, and reads the tail of each.
pub fn join(
    config: &Config,
    lineage: &Lineage,
    last_known: impl Fn(&str) -> Option<Checkpoint>,
) -> Result<Joined, Error> {
    let link = Link::connect(&config.nats)?;
    let filter = format!("{}.>", config.prefix);
    let timeout = config.nats.request_timeout;
    let infos = streams::list(&link, &filter, timeout)?;
    if infos.is_empty() {
        return Err(Error::NoStream(filter));
    }
    let mut found = Vec::with_capacity(infos.len());
    for info in &infos {
        if let Some(why) = preflight(info, &link.server_info().version, config.delivery).refused {
            return Err(Error::Setup(why));
        }
        let last_seq = info.state.last_seq;
        let (tail, aged) = match config.delivery {
            Delivery::ExactlyOnce => {
                let stream = Stream {
                    link: &link,
                    info,
                    filter: &filter,
                    timeout,
                };
                stream.read_back(lineage, last_known(&info.config.name), config.hold_back)?
            }
            Delivery::AtLeastOnce => (Tail::default(), None),
        };
        found.push(StreamAtConnect {
            name: info.config.name.clone(),
            last_seq,
            tail,
            aged,
        });
    }
    Ok(Joined {
        routes: Routes::new(&infos),
        streams: found,
        link,
    })
}

/// A stream that is being read back.
struct Stream<'a> {
    link: &'a Link,
    info: &'a StreamInfo,
    /// The prefix with a wildcard.
    filter: &'a str,
    timeout: Duration,
}

impl Stream<'_> {
    fn get(&self, request: Request) -> Result<Option<StoredMessage>, Error> {
        Ok(streams::message(self.link, request, self.timeout)?)
    }

    fn read_back(
        &self,
        lineage: &Lineage,
        checkpoint: Option<Checkpoint>,
        hold_back: Duration,
    ) -> Result<(Tail, Option<Position>), Error> {
        let name = &self.info.config.name;
        let state = &self.info.state;
        let newest = self.get(streams::last_message_request(name, self.filter))?;
        let extent = Extent {
            first_seq: state.first_seq,
            last_seq: state.last_seq,
            whole: state.num_deleted == 0,
        };
        let found = find_tail(
            &lineage.source,
            extent,
            newest.as_ref(),
            checkpoint.as_ref(),
            |seq| self.get(streams::message_request(name, seq)),
        )?;
        let tail = lineage
            .judge(found, checkpoint.as_ref(), false)
            .map_err(|conflict| Error::Conflict {
                stream: name.clone(),
                conflict,
            })?;
        let aged = self.aged(lineage, &tail, hold_back)?;
        Ok((tail, aged))
    }

    /// The last event of ours that the stream has had for `hold_back`, by the server's own clock: a search
    /// for that time among the sequences.
    fn aged(
        &self,
        lineage: &Lineage,
        tail: &Tail,
        hold_back: Duration,
    ) -> Result<Option<Position>, Error> {
        let (Some(stored), Some(now)) = (&tail.stored, time(&self.info.ts)) else {
            return Ok(None);
        };
        // what is not older than this is too young
        let Ok(limit) = now.checked_sub(hold_back) else {
            return Ok(None);
        };
        let (mut old, mut young) = (self.info.state.first_seq.saturating_sub(1), stored.seq + 1);
        let mut aged = None;
        while old + 1 < young {
            let middle = old + (young - old) / 2;
            let next = self.get(streams::next_message_request(
                &self.info.config.name,
                middle,
                self.filter,
            ))?;
            match next.filter(|message| time(&message.time).is_some_and(|time| time <= limit)) {
                Some(message) => {
                    let position = message
                        .header(OUTBOX_POSITION)
                        .and_then(|text| text.parse::<SourcePosition>().ok());
                    if let Some(position) =
                        position.filter(|position| position.source == lineage.source)
                    {
                        aged = Some(position.position);
                    }
                    old = message.seq.max(middle);
                }
                None => young = middle,
            }
        }
        Ok(aged)
    }
}

fn time(rfc3339: &str) -> Option<jiff::Timestamp> {
    rfc3339.parse().ok()
}
