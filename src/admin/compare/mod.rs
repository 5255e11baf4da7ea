//! `compare`: is anything missing? What is committed is looked for in the streams: the rows that the outboxes still have, by
//! their ids, and what the WAL of the slot still has.
//!
//! Rows are read in one snapshot, which is begun before the streams are read and stays open until the rows were looked for
//! ([`Sides`] tells why nothing that is on its way is found missing). Of a message some 50 bytes are held, and of [`AT_ONCE`]
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
use crate::outbox::batch::{Change, Fate, OutboxEvent};
use crate::outbox::mapper::Mapper;
use crate::outbox::park::{self, OnPoison};
use crate::outbox::position::Position;
use report::{Finding, Report};
use std::collections::HashSet;
use stored::{Key, Stored, digest, key};

/// So many messages are compared at a time, and so many events may wait for the relay.
const AT_ONCE: u64 = 4_000_000;

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
            let messages: u64 = sides.streams.iter().map(|it| it.state.messages).sum();
            parts = messages.div_ceil(AT_ONCE).max(1);
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
            config,
            how,
            stored,
            names: sides
                .streams
                .iter()
                .map(|it| it.config.name.clone())
                .collect(),
            resolved: sides.resolved,
            seen: HashSet::new(),
            report: &mut report,
            reissue: reissue.as_mut(),
        };
        sides.decode(config, |mapped| pass.on_wal(mapped, mine))?;
        let mut mapper = Mapper::new(&judging(&config.mapping));
        rows::each(
            &mut table,
            config,
            how.rows.as_deref(),
            &mut mapper,
            |event| pass.on_event(&event, None, mine),
        )?;
        pass.publish()?;
        part += 1;
    }
    report.finish()
}

/// One look at a part of the ids.
struct Pass<'a> {
    config: &'a Config,
    how: &'a operation::Compare,
    stored: Stored,
    names: Vec<String>,
    resolved: crate::postgres::Lsn,
    /// What the WAL has and was reported, or waits for the relay: the same event's row is passed over.
    seen: HashSet<Key>,
    report: &'a mut Report,
    reissue: Option<&'a mut Reissue>,
}

impl Pass<'_> {
    fn on_wal(&mut self, mapped: Mapped, mine: impl Fn(Key) -> bool) -> Result<(), Error> {
        let at = mapped.place.position;
        match mapped.event {
            None => Ok(()),
            Some(Ok(batch)) => match batch.changes() {
                [Change::Event(spans)] => self.on_event(&batch.event(spans), Some(at), mine),
                _ => Ok(()),
            },
            // the relay halts there, and nothing is known of the event
            Some(Err(error)) => self.report.note(&error.to_string()),
        }
    }

    /// An event of the WAL, or one that a row makes.
    fn on_event(
        &mut self,
        event: &OutboxEvent<'_>,
        at: Option<Position>,
        mine: impl Fn(Key) -> bool,
    ) -> Result<(), Error> {
        let key = key(event.id);
        if !mine(key) {
            return Ok(());
        }
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
        if let Some(parked) = found.first() {
            let stream = self.names.get(usize::from(parked.stream));
            let stream = stream.map_or("", String::as_str);
            self.report
                .found(&Finding::Parked(event, at, (stream, parked.seq)))?;
            return self.see(key, at);
        }
        match at {
            Some(at) if !is_resolved(at, self.resolved) => self.report.waits(),
            _ => self.on_missing(event, at)?,
        }
        self.see(key, at)
    }

    /// It is resolved and in no stream.
    fn on_missing(&mut self, event: &OutboxEvent<'_>, at: Option<Position>) -> Result<(), Error> {
        let is_chosen = self.how.rows.is_some();
        if event.fate == Fate::Park && self.config.mapping.policy.on_poison == OnPoison::Skip {
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
                match reissue.content(event.subject, event.id, event.headers, event.body) {
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
