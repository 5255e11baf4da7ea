//! Connects to JetStream and reads back what its streams hold: at the start and after each lost connection.

use super::core::StreamAtConnect;
use super::error::Error;
use crate::config::Config;
use crate::jetstream::client::Link;
use crate::jetstream::resume::{Checkpoint, Extent, Lineage, Tail, find_tail};
use crate::jetstream::streams::{self, Routes, StreamInfo};
use crate::jetstream::Delivery;
use crate::outbox::position::{Position, SourcePosition};
use crate::jetstream::resume::OUTBOX_POSITION;
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
            Tail { stored: Some(stored), switch_point: None, .. } => stored.position.commit_lsn,
            _ => Lsn::INVALID,
        };
        self.streams.iter().map(position).min().unwrap_or(Lsn::INVALID)
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
    let infos = streams::capturing(&link, &filter)?;
    if infos.is_empty() {
        return Err(Error::NoStream(filter));
    }
    let mut found = Vec::with_capacity(infos.len());
    for info in &infos {
        streams::preflight(info, link.server_info(), config.delivery).map_err(Error::Setup)?;
        found.push(match config.delivery {
            Delivery::ExactlyOnce => read_back(&link, lineage, &filter, info, last_known(&info.name), config.hold_back)?,
            Delivery::AtLeastOnce => {
                StreamAtConnect { name: info.name.clone(), last_seq: info.last_seq(), tail: Tail::default(), aged: None }
            }
        });
    }
    Ok(Joined { routes: Routes::new(&infos), streams: found, link })
}

fn read_back(
    link: &Link,
    lineage: &Lineage,
    filter: &str,
    info: &StreamInfo,
    checkpoint: Option<Checkpoint>,
    hold_back: Duration,
) -> Result<StreamAtConnect, Error> {
    let newest = streams::last_under(link, &info.name, filter)?;
    let extent = Extent { first_seq: info.first_seq(), last_seq: info.last_seq(), whole: info.is_whole() };
    let found = find_tail(&lineage.source, extent, newest.as_ref(), checkpoint.as_ref(), |seq| {
        streams::message(link, &info.name, seq)
    })?;
    let tail = lineage
        .judge(found, checkpoint.as_ref(), false)
        .map_err(|conflict| Error::Conflict { stream: info.name.clone(), conflict })?;
    if tail.foreign > 0 {
        log::warn!(stream = info.name.as_str(), messages = tail.foreign; "others write to this stream; the relay goes on after them");
    }
    let aged = aged(link, lineage, filter, info, &tail, hold_back)?;
    Ok(StreamAtConnect { name: info.name.clone(), last_seq: info.last_seq(), tail, aged })
}

/// The last event of ours that the stream has had for `hold_back`, by the server's own clock: a search
/// for the time among the sequences.
fn aged(
    link: &Link,
    lineage: &Lineage,
    filter: &str,
    info: &StreamInfo,
    tail: &Tail,
    hold_back: Duration,
) -> Result<Option<Position>, Error> {
    let Some(stored) = &tail.stored else { return Ok(None) };
    let limit_ns = info.now_ns().saturating_sub(hold_back.as_nanos() as i64);
    // the smallest sequence that is too young lies in (old, young]
    let (mut old, mut young) = (info.first_seq().saturating_sub(1), stored.seq + 1);
    let mut aged = None;
    while young - old > 1 {
        let middle = old + (young - old) / 2;
        match streams::first_from(link, &info.name, filter, middle)? {
            Some(message) if message.time_ns <= limit_ns => {
                let position = message.header(OUTBOX_POSITION).and_then(|text| text.parse::<SourcePosition>().ok());
                if let Some(position) = position.filter(|position| position.source == lineage.source) {
                    aged = Some(position.position);
                }
                old = message.seq.max(middle);
            }
            _ => young = middle,
        }
    }
    Ok(aged)
}
