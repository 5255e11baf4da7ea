//! `compare`: is anything missing? What is committed is looked for in the streams: the rows that the outboxes still have, by
//! their ids, and what the WAL of the slot still has.
//!
//! Rows are read in one snapshot, which is begun before the streams are read and stays open until the rows were looked for
//! ([`Sides`] tells why nothing that is on its way is found missing). Of a message some 50 bytes are held, and of `AT_ONCE`
//! messages at a time: of more all is read several times, each time for another part of the ids.

mod report;
mod rows;
mod stored;

use super::Error;
use super::database::Access;
use super::reissue::{Carried, Reissue};
use super::sides::{self, Sides, is_resolved, judging};
use super::slot_copy::Mapped;
use crate::config::Config;
use crate::config::operation;
use crate::exit::Exit;
use crate::outbox::batch::{Batch, Change, Fate, OutboxEvent};
use crate::outbox::mapper::Mapper;
use crate::outbox::park;
use crate::outbox::position::Position;
use report::{Finding, Report};
use std::collections::HashSet;
use stored::{Key, Stored, key};

pub use stored::digest;

/// So many messages are compared at a time, and so many events may wait for the relay.
const AT_ONCE: u64 = 4_000_000;
/// Of what is missing of the WAL so many bytes are held, until all of it was seen; and so many an event beside its own.
const HELD_BYTES: usize = 64 * 1024 * 1024;
const EVENT_BYTES: usize = 512;

/// Compares, says what was found, and publishes what is missing if that is wanted.
pub fn run(config: &Config, how: &operation::Compare) -> Result<Exit, Error> {
    // before all else: what another one publishes meanwhile is not seen
    let mut reissue = match how.publish {
        true => Some(Reissue::open(config)?),
        false => None,
    };
    let mut report = Report::new(how.json);
    let (mut part, mut parts) = (0, 1);
    while part < parts {
        let mut table = sides::connect(config, Access::Read)?;
        let mut sides = Sides::open(config, || {
            table.run(
                "begin a snapshot",
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1",
            )
        })?;
        if part == 0 {
            parts = sides.messages().div_ceil(AT_ONCE).max(1);
            for note in std::mem::take(&mut sides.notes) {
                report.note(&note)?;
            }
            if how.publish && !sides.has_slot() {
                return Err(Error::Wrong {
                    what: "publish what is missing: there is no slot that would send it to a relay".into(),
                    remedy: "run setup, start the relay, with -resume-anyway if it asks for that, then compare again".into(),
                    exit: Exit::Configuration,
                });
            }
        }
        let is_first = part == 0;
        let mine = move |key: Key| key % u128::from(parts) == u128::from(part);
        let stored = Stored::read(&mut sides, config, mine, is_first, &mut report)?;
        let mut pass = Pass {
            how,
            stored,
            names: sides
                .streams
                .iter()
                .map(|it| it.config.name.clone())
                .collect(),
            resolved: sides.resolved,
            seen: HashSet::new(),
            missing: HashSet::new(),
            held: Held::default(),
            report: &mut report,
            reissue: reissue.as_mut(),
        };
        sides.decode(config, |mapped| pass.on_wal(mapped, mine))?;
        let mut mapper = Mapper::quiet(&judging(&config.mapping));
        pass.decoded()?;
        let outboxes = rows::each(
            &mut table,
            config,
            how.rows.as_deref(),
            &mut mapper,
            |event| {
                let key = key(event.id);
                match mine(key) {
                    true => pass.on_event(key, &event, None),
                    false => Ok(()),
                }
            },
        )?;
        pass.report.outboxes(outboxes);
        pass.publish()?;
        part += 1;
    }
    report.finish()
}

/// One look at a part of the ids.
struct Pass<'a> {
    how: &'a operation::Compare,
    stored: Stored,
    names: Vec<String>,
    resolved: crate::postgres::Lsn,
    /// What the WAL has and was reported, or waits for the relay: the same event's row is passed over.
    seen: HashSet<Key>,
    /// What the WAL has and no stream, unless it comes later in the WAL once more and waits there: published again, and on its way.
    missing: HashSet<Key>,
    /// Of those the events, as far as they are held.
    held: Held,
    report: &'a mut Report,
    reissue: Option<&'a mut Reissue>,
}

/// Events of the WAL that are held until all of it was seen.
#[derive(Default)]
struct Held {
    events: Vec<(Key, Batch)>,
    bytes: usize,
}

impl Held {
    /// Holds the only event of the batch, if there is room.
    fn hold(&mut self, key: Key, batch: Batch) {
        let bytes = batch.len_bytes().saturating_add(EVENT_BYTES);
        if self.bytes.saturating_add(bytes) <= HELD_BYTES {
            self.bytes += bytes;
            self.events.push((key, batch));
        }
    }
}

impl Pass<'_> {
    fn on_wal(&mut self, mapped: Mapped, mine: impl Fn(Key) -> bool) -> Result<(), Error> {
        let at = mapped.place.position;
        match mapped.event {
            None => Ok(()),
            Some(Ok(batch)) => {
                let [Change::Event(spans)] = batch.changes() else {
                    return Ok(());
                };
                let event = batch.event(spans);
                let key = key(event.id);
                if mine(key) {
                    self.on_event(key, &event, Some(at))?;
                    if self.missing.contains(&key) {
                        self.held.hold(key, batch);
                    }
                }
                Ok(())
            }
            // the relay halts there, and nothing is known of the event
            Some(Err(error)) => self
                .report
                .unmapped(is_resolved(at, self.resolved), &error.to_string()),
        }
    }

    /// An event of the WAL, or one that a row makes.
    fn on_event(
        &mut self,
        key: Key,
        event: &OutboxEvent<'_>,
        at: Option<Position>,
    ) -> Result<(), Error> {
        self.report.compared(at.is_some());
        if at.is_none() && self.seen.contains(&key) {
            return Ok(());
        }
        let found = self.stored.find(key);
        let published = || found.iter().filter(|it| !it.is_parked);
        let body = digest(event.body);
        if let Some(other) = published().next() {
            if event.fate == Fate::Publish && published().all(|it| it.body != body) {
                let stream = self.names.get(usize::from(other.stream));
                let stream = stream.map_or("", String::as_str);
                self.report
                    .found(&Finding::Altered(event, at, (stream, other.seq)))?;
                self.see(key, at)?;
            }
            return Ok(());
        }
        // another relay's event may have the same id
        if let Some(parked) = found.iter().find(|it| it.is_ours) {
            let stream = self.names.get(usize::from(parked.stream));
            let stream = stream.map_or("", String::as_str);
            self.report
                .found(&Finding::Parked(event, at, (stream, parked.seq)))?;
            return self.see(key, at);
        }
        match at {
            Some(at) if !is_resolved(at, self.resolved) => {
                self.missing.remove(&key);
                self.report.waits();
            }
            Some(_) => {
                self.missing.insert(key);
            }
            None => self.on_missing(event, None)?,
        }
        self.see(key, at)
    }

    /// All of the WAL was seen: what is missing of it is.
    fn decoded(&mut self) -> Result<(), Error> {
        for (key, batch) in std::mem::take(&mut self.held).events {
            // once, however often the WAL has it
            if let [Change::Event(spans)] = batch.changes()
                && self.missing.remove(&key)
            {
                let event = batch.event(spans);
                self.on_missing(&event, Some(event.position))?;
            }
        }
        let rest = std::mem::take(&mut self.missing).len();
        self.report.more_missing(rest as u64)
    }

    /// It is resolved and in no stream.
    fn on_missing(&mut self, event: &OutboxEvent<'_>, at: Option<Position>) -> Result<(), Error> {
        let is_chosen = self.how.rows.is_some();
        if event.fate == Fate::Lose {
            self.report.given_up();
            return Ok(());
        }
        // a row that has no id makes one of its position, which a row does not tell
        let has_no_id = at.is_none() && event.fate == Fate::Park && event.id == "parked-0/0-0";
        if has_no_id || self.stored.may_be_gone(at, is_chosen) {
            return self.report.found(&Finding::Unknown(event, at));
        }
        self.report.found(&Finding::Missing(event, at))?;
        let Some(reissue) = &mut self.reissue else {
            return Ok(());
        };
        let report = &mut *self.report;
        let why = match event.fate {
            Fate::Publish => {
                match reissue
                    .carrier()
                    .content(event.subject, event.id, event.headers, event.body)
                {
                    Ok(content) => {
                        let carried = Carried {
                            id: event.id.to_string(),
                            subject: event.subject.to_string(),
                            content,
                        };
                        return reissue.add(carried, |it| report.published(it));
                    }
                    Err(why) => why,
                }
            }
            _ => park::cause(event.headers).to_string(),
        };
        report.left(event.id, &why)
    }

    fn see(&mut self, key: Key, at: Option<Position>) -> Result<(), Error> {
        if at.is_some() {
            self.seen.insert(key);
        }
        match self.seen.len() as u64 > AT_ONCE {
            false => Ok(()),
            true => Err(Error::Wrong {
                what: format!(
                    "compare the WAL: more than {AT_ONCE} events of it wait for the relay"
                ),
                remedy: "let the relay publish them first".into(),
                exit: Exit::Unavailable,
            }),
        }
    }

    /// What is left to publish.
    fn publish(self) -> Result<(), Error> {
        let report = self.report;
        match self.reissue {
            Some(reissue) => reissue.flush(|it| report.published(it)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::plan::Place;
    use crate::outbox::problem::MapError;
    use crate::postgres::Lsn;

    fn mapped(lsn: u64, event: Result<&str, MapError>) -> Mapped {
        let position = Position {
            commit_lsn: Lsn(lsn),
            ordinal: 1,
        };
        let event = event.map(|id| {
            let mut batch = Batch::default();
            let drafted = batch.draft("t", position, Fate::Publish, |draft| {
                draft.id(|out| {
                    out.extend_from_slice(id.as_bytes());
                    Ok::<(), std::convert::Infallible>(())
                })
            });
            drafted.expect("it is written");
            batch
        });
        Mapped {
            place: Place {
                position,
                ..Place::default()
            },
            event: Some(event),
        }
    }

    /// The counts of what the WAL has, of which everything before LSN 10 is resolved, and that is in no stream.
    fn counts(wal: Vec<Mapped>, room: usize) -> [u64; 3] {
        let mut report = Report::new(true);
        let mut pass = Pass {
            how: &operation::Compare {
                json: true,
                rows: None,
                publish: false,
            },
            stored: Stored::nothing(),
            names: Vec::new(),
            resolved: Lsn(10),
            seen: HashSet::new(),
            missing: HashSet::new(),
            held: Held {
                bytes: HELD_BYTES - room,
                ..Held::default()
            },
            report: &mut report,
            reissue: None,
        };
        for mapped in wal {
            pass.on_wal(mapped, |_| true).expect("it is printed");
        }
        pass.decoded().expect("it is printed");
        report.missing_unknown_waiting()
    }

    #[test]
    fn what_waits_later_in_the_wal_is_not_missing() {
        let wal = || vec![mapped(1, Ok("a")), mapped(2, Ok("b")), mapped(11, Ok("a"))];
        assert_eq!(counts(wal(), HELD_BYTES), [1, 0, 1]);
        // what is not held is counted
        assert_eq!(counts(wal(), 0), [1, 0, 1]);
        // resolved twice
        let wal = vec![mapped(1, Ok("a")), mapped(2, Ok("a"))];
        assert_eq!(counts(wal, HELD_BYTES), [1, 0, 0]);
    }

    #[test]
    fn of_what_cannot_be_mapped_and_was_resolved_it_cannot_be_told() {
        let unknown = |lsn| mapped(lsn, Err(MapError::UnknownRelation { relation_id: 1 }));
        let wal = vec![unknown(9), unknown(10)];
        assert_eq!(counts(wal, HELD_BYTES), [0, 1, 1]);
    }
}
