//! What the streams have: of each message its id and body, hashed, and where it is. What is there twice or out of order is found while
//! they are read.

use super::report::{Finding, Report};
use crate::admin::Error;
use crate::admin::sides::{Scanned, Sides};
use crate::config::Config;
use crate::jetstream::streams::{StoredMessage, StreamInfo, matches};
use crate::outbox::park::PARKED;
use crate::outbox::position::Position;
use crate::relay::connect::message_of;
use ring::digest::SHA256;

/// An id, hashed: two ids have the same one never.
pub type Key = u128;

/// The hash of an id.
pub fn key(id: &str) -> Key {
    first(id.as_bytes()).unwrap_or_default()
}

/// The hash of a body.
pub fn digest(body: &[u8]) -> u64 {
    // the lower half
    key_of(body) as u64
}

fn key_of(bytes: &[u8]) -> u128 {
    first(bytes).unwrap_or_default()
}

fn first(bytes: &[u8]) -> Option<u128> {
    let hash = ring::digest::digest(&SHA256, bytes);
    let (head, _) = hash.as_ref().split_first_chunk()?;
    Some(u128::from_be_bytes(*head))
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    key: Key,
    /// Its stream, as [`Sides`] counts them.
    pub stream: u16,
    /// Its sequence there.
    pub seq: u64,
    /// The hash of its body.
    pub body: u64,
    /// It is a parked event.
    pub is_parked: bool,
    /// This slot's relay published it there.
    pub is_ours: bool,
}

/// What a message is read for.
struct Head {
    entry: Entry,
    id: String,
    /// Where it is in Postgres, if the relay published it there with a fence.
    position: Option<Position>,
    is_late: bool,
}

/// See the module.
pub struct Stored {
    /// In the order of their keys.
    entries: Vec<Entry>,
    gone: Gone,
}

#[cfg(test)]
impl Stored {
    /// Of streams that never had a message.
    pub fn nothing() -> Stored {
        Stored {
            entries: Vec::new(),
            gone: Gone::Nothing,
        }
    }
}

/// What the streams do not have any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// They have all that they have stored.
    Nothing,
    /// They dropped their oldest messages, and none that has a later position than this.
    Upto(Position),
    /// Anything may be gone.
    Anything,
}

impl Stored {
    /// Reads the streams, of which the ids that are `mine` are kept.
    pub fn read(
        sides: &mut Sides<'_>,
        config: &Config,
        mine: impl Fn(Key) -> bool,
        is_first: bool,
        report: &mut Report,
    ) -> Result<Stored, Error> {
        let (prefix, park) = (
            format!("{}.>", config.prefix),
            config.mapping.policy.park_subject.clone(),
        );
        let lineage = sides.lineage.clone();
        let mut entries = Vec::with_capacity(sides.messages().min(super::AT_ONCE) as usize);
        let mut gone = Gone::Nothing;
        for stream in 0..sides.streams.len() {
            let name = sides.name(stream).to_string();
            let number = u16::try_from(stream).unwrap_or(u16::MAX);
            let read = |message: StoredMessage| {
                let is_event = matches(&prefix, &message.subject);
                if !is_event && !matches(&park, &message.subject) {
                    return None;
                }
                let facts = message_of(&message);
                let position = facts.ours(&lineage);
                let id = facts.id.clone()?;
                Some(Head {
                    entry: Entry {
                        key: key(&id),
                        stream: number,
                        seq: message.seq,
                        body: digest(&message.data),
                        is_parked: message.header(PARKED).is_some(),
                        is_ours: position.is_some() || facts.unfenced(&lineage).is_some(),
                    },
                    id,
                    position,
                    is_late: facts.is_late,
                })
            };
            let mut order = Order::default();
            let first = &mut None;
            let scanned = sides.scan(stream, read, |head| {
                if is_first {
                    report.read();
                }
                if let Some(at) = head.position {
                    if !head.is_late {
                        first.get_or_insert(at);
                    }
                    if let Some(before) = order.next(at, head.is_late)
                        && is_first
                    {
                        let place = (name.as_str(), head.entry.seq);
                        report.found(&Finding::Disordered(&head.id, at, before, place))?;
                    }
                }
                if mine(head.entry.key) {
                    entries.push(head.entry);
                }
                Ok(())
            })?;
            if let Some(info) = sides.streams.get(stream) {
                let of_stream = what_is_gone(info, scanned, *first);
                gone = gone.and(of_stream);
                if is_first && of_stream != Gone::Nothing {
                    report.drops(&name);
                }
            }
        }
        entries.sort_unstable();
        let stored = Stored { entries, gone };
        stored.find_doubled(sides, report)?;
        Ok(stored)
    }

    /// The messages with that id.
    pub fn find(&self, key: Key) -> &[Entry] {
        let start = self.entries.partition_point(|it| it.key < key);
        let rest = self.entries.get(start..).unwrap_or_default();
        let end = rest.partition_point(|it| it.key == key);
        rest.get(..end).unwrap_or_default()
    }

    /// An event that is in no stream may have been in one. `is_chosen`: the operator says that a row must still be there.
    pub fn may_be_gone(&self, at: Option<Position>, is_chosen: bool) -> bool {
        match (self.gone, at) {
            (Gone::Nothing, _) => false,
            (Gone::Upto(gone), Some(at)) => at <= gone,
            (Gone::Upto(_), None) => !is_chosen,
            (Gone::Anything, _) => true,
        }
    }

    /// One event in two messages that a relay published.
    fn find_doubled(&self, sides: &mut Sides<'_>, report: &mut Report) -> Result<(), Error> {
        let mut before: Option<&Entry> = None;
        for entry in self.entries.iter().filter(|it| it.is_ours && !it.is_parked) {
            if let Some(first) = before.filter(|it| it.key == entry.key) {
                let message = sides.message(usize::from(entry.stream), entry.seq)?;
                let id = message.as_ref().and_then(|it| it.header("Nats-Msg-Id"));
                let place = |it: &Entry| (sides.name(usize::from(it.stream)).to_string(), it.seq);
                report.found(&Finding::Doubled(
                    id.unwrap_or_default(),
                    &place(first),
                    &place(entry),
                ))?;
            }
            before = Some(entry);
        }
        Ok(())
    }
}

/// The positions of a stream must grow.
#[derive(Debug, Default)]
struct Order {
    last: Option<Position>,
}

impl Order {
    /// The later position that came before this one. The same one again is the same event.
    fn next(&mut self, at: Position, is_late: bool) -> Option<Position> {
        let before = self.last.filter(|last| at < *last && !is_late);
        self.last = self.last.max(Some(at));
        before
    }
}

impl Gone {
    fn and(self, other: Gone) -> Gone {
        match (self, other) {
            (Gone::Anything, _) | (_, Gone::Anything) => Gone::Anything,
            (Gone::Upto(one), Gone::Upto(other)) => Gone::Upto(one.max(other)),
            (Gone::Nothing, other) => other,
            (one, Gone::Nothing) => one,
        }
    }
}

/// What of a stream was not there when it was read; `first` is the first position in it, of those that are not late.
fn what_is_gone(info: &StreamInfo, scanned: Scanned, first: Option<Position>) -> Gone {
    let last_seq = info.state.last_seq;
    if scanned.messages == last_seq {
        return Gone::Nothing;
    }
    let first_seq = scanned.first_seq.unwrap_or(u64::MAX);
    let has_no_holes = first_seq.checked_add(scanned.messages) == last_seq.checked_add(1);
    match first {
        Some(first) if has_no_holes && info.config.retention == "limits" => Gone::Upto(first),
        _ => Gone::Anything,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::streams::{StreamConfig, StreamState};
    use crate::postgres::Lsn;

    fn at(lsn: u64) -> Position {
        Position {
            commit_lsn: Lsn(lsn),
            ordinal: 1,
        }
    }

    #[test]
    fn what_a_stream_has_dropped_is_known_by_what_it_has() {
        let upto = Gone::Upto(at(7));
        for (retention, first_seq, last_seq, messages, first, expected) in [
            ("limits", 0, 0, 0, None, Gone::Nothing),
            ("limits", 1, 9, 9, Some(at(7)), Gone::Nothing),
            ("workqueue", 1, 9, 9, Some(at(7)), Gone::Nothing),
            ("limits", 4, 9, 6, Some(at(7)), upto),
            ("limits", 4, 9, 6, None, Gone::Anything),
            ("limits", 10, 9, 0, None, Gone::Anything),
            ("limits", 4, 9, 5, Some(at(7)), Gone::Anything),
            ("limits", 1, 9, 8, Some(at(7)), Gone::Anything),
            ("interest", 4, 9, 6, Some(at(7)), Gone::Anything),
        ] {
            let info = StreamInfo {
                config: StreamConfig {
                    retention: retention.into(),
                    ..StreamConfig::default()
                },
                state: StreamState {
                    last_seq,
                    // before it was read, nothing was gone
                    first_seq: 1,
                    messages: last_seq,
                    ..StreamState::default()
                },
                created: String::new(),
                ts: String::new(),
                domain: String::new(),
            };
            let scanned = Scanned {
                first_seq: Some(first_seq),
                messages,
            };
            assert_eq!(
                what_is_gone(&info, scanned, first),
                expected,
                "{info:?} {scanned:?}"
            );
        }
    }

    #[test]
    fn an_event_may_be_gone_where_a_stream_drops() {
        for (gone, position, is_chosen, expected) in [
            (Gone::Nothing, None, false, false),
            (Gone::Upto(at(7)), Some(at(7)), false, true),
            (Gone::Upto(at(7)), Some(at(8)), false, false),
            (Gone::Upto(at(7)), None, false, true),
            (Gone::Upto(at(7)), None, true, false),
            (Gone::Anything, None, true, true),
            (Gone::Anything, Some(at(8)), true, true),
            (
                Gone::Upto(at(7)).and(Gone::Upto(at(9))),
                Some(at(8)),
                false,
                true,
            ),
            (Gone::Nothing.and(Gone::Anything), Some(at(8)), false, true),
        ] {
            let stored = Stored {
                entries: Vec::new(),
                gone,
            };
            assert_eq!(
                stored.may_be_gone(position, is_chosen),
                expected,
                "{gone:?}"
            );
        }
    }

    #[test]
    fn positions_that_go_back_are_found_unless_they_are_late() {
        let mut order = Order::default();
        for (lsn, is_late, before) in [
            (1, false, None),
            (5, false, None),
            (3, true, None),
            (4, false, Some(at(5))),
            (5, false, None),
            (6, false, None),
        ] {
            assert_eq!(order.next(at(lsn), is_late), before, "{lsn}");
        }
    }
}
