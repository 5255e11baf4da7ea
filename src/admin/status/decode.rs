//! The oldest event that waits, found by decoding a temporary copy of the slot.
//!
//! With one stream, whatever lies behind its end waits, and the server need send no more than which rows there are. Of
//! several streams one may have refused what others have gone beyond, so that each event is mapped as the relay maps it,
//! and looked for in the stream that captures its subject.

use super::{Published, Slot, Waiting};
use crate::admin::Error;
use crate::admin::database::Database;
use crate::admin::slot_copy::{Decoder, Events, Mapped, Next, SlotCopy};
use crate::config::Config;
use crate::jetstream::streams::Routes;
use crate::outbox::batch::{Change, Fate};
use crate::outbox::mapping::Mapping;
use crate::outbox::plan::Place;
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How long that may take; a slot whose log is long tells no seconds then.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same for somebody who waits no longer for an answer.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);
/// `timestamp` counts from 2000-01-01, this many seconds after 1970.
const POSTGRES_EPOCH_S: i64 = 946_684_800;

/// Finds the oldest event that is not published. What keeps it from being found is no error, unless the server is gone:
/// the rest is still worth telling.
pub(super) fn waiting(
    database: &mut Database,
    config: &Config,
    slot: &Slot,
    published: &Published,
    routes: &Routes,
) -> Result<Waiting, Error> {
    let upto = published.least();
    if upto.is_some_and(|upto| upto.commit_lsn >= slot.current) {
        return Ok(Waiting::Nothing);
    }
    match decode(database, config, published, routes) {
        Err(error @ Error::Postgres(_)) => Err(error),
        Err(error) => {
            log::info!(cause:% = error; "how long events have been waiting is not known");
            Ok(Waiting::Unknown)
        }
        found => found,
    }
}

fn decode(
    database: &mut Database,
    config: &Config,
    published: &Published,
    routes: &Routes,
) -> Result<Waiting, Error> {
    // before the session is given up
    let patience = match database.answer_limit <= PATIENCE {
        true => SHORT_PATIENCE,
        false => PATIENCE,
    };
    let Some(copy) = SlotCopy::create(database, config, "status", patience)? else {
        return Ok(Waiting::Unknown);
    };
    let found = first_event(database, config, published, routes, (&copy, patience));
    let dropped = copy.drop(database);
    found.and_then(|found| dropped.map(|()| found))
}

fn first_event(
    database: &mut Database,
    config: &Config,
    published: &Published,
    routes: &Routes,
    (copy, patience): (&SlotCopy, Duration),
) -> Result<Waiting, Error> {
    let patient = Patient { copy, patience };
    if published.tails.len() > 1 {
        let mapping = &config.mapping;
        match patient.first_of_several(database, mapping, published, routes) {
            // a long way from the least of the ends: what lies behind the greatest of them is better than nothing
            Ok(Waiting::Unknown) | Err(Error::Sql { .. }) => {}
            found => return found,
        }
    }
    patient.first_behind(database, published.greatest().unwrap_or_default())
}

/// The copy of the slot, and how long it may be decoded.
struct Patient<'a> {
    copy: &'a SlotCopy,
    patience: Duration,
}

impl Patient<'_> {
    /// Feeds the changes to `take`, until it finds something, there are no more, or it has taken too long.
    fn each(
        &self,
        database: &mut Database,
        sql: &str,
        mut take: impl FnMut(&postgres::Row) -> ControlFlow<Waiting>,
    ) -> Result<Waiting, Error> {
        let end = Instant::now() + self.patience;
        while Instant::now() < end {
            match self.copy.next(database, sql, &mut take)? {
                Next::Found(waiting) => return Ok(waiting),
                Next::End => return Ok(Waiting::Nothing),
                Next::More => {}
            }
        }
        Ok(Waiting::Unknown)
    }

    /// With one stream: the first event behind its end.
    fn first_behind(&self, database: &mut Database, end: Position) -> Result<Waiting, Error> {
        self.copy.advance(database, end)?;
        let sql = self.copy.changes("substr(data, 2, 16)");
        let mut events = Events::default();
        self.each(database, &sql, |row| {
            match (row.get::<_, i32>(0), row.get::<_, Option<&[u8]>>(1)) {
                (66, begin) => events.begin(begin),
                (82, _) => {}
                (_, data) => {
                    let place = events.next_place();
                    events.count();
                    if data.is_some() && !is_before(place, |at| at <= end) {
                        return ControlFlow::Break(waits(place, None));
                    }
                }
            }
            ControlFlow::Continue(())
        })
    }

    /// With several: the first event that is not in its own.
    fn first_of_several(
        &self,
        database: &mut Database,
        mapping: &Mapping,
        published: &Published,
        routes: &Routes,
    ) -> Result<Waiting, Error> {
        self.copy
            .advance(database, published.least().unwrap_or_default())?;
        let sql = self.copy.changes("data");
        let mut decoder = Decoder::new(mapping);
        self.each(database, &sql, |row| {
            let Ok(mapped) = decoder.take(row.get(1)) else {
                return ControlFlow::Break(Waiting::Unknown);
            };
            match mapped {
                Some(mapped) => look(&mapped, published, routes),
                None => ControlFlow::Continue(()),
            }
        })
    }
}

/// Whether what became of a row or message is published.
fn look(mapped: &Mapped, published: &Published, routes: &Routes) -> ControlFlow<Waiting> {
    let stream = match &mapped.event {
        None => return ControlFlow::Continue(()),
        Some(Ok(batch)) => match batch.changes() {
            [Change::Event(spans)] if spans.fate == Fate::Publish => {
                let stream = routes.route(batch.event(spans).subject);
                // one that none captures is in none
                Some(stream.unwrap_or(usize::MAX))
            }
            // elsewhere, once the relay has passed it
            _ => None,
        },
        // the relay halts at it, unless it was let pass once
        Some(Err(_)) => None,
    };
    match is_before(mapped.place, |at| published.has(at, stream)) {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(waits(mapped.place, stream)),
    }
}

/// Whether it is published; of a place that is not known nobody knows.
fn is_before(place: Place, published: impl FnOnce(Position) -> bool) -> bool {
    place.position.commit_lsn != Lsn::INVALID && published(place.position)
}

/// The event there waits.
fn waits(place: Place, stream: Option<usize>) -> Waiting {
    match place.position.commit_lsn {
        Lsn::INVALID => Waiting::Unknown,
        _ => Waiting::Event {
            at: place.position,
            stream,
            time_s: place.commit_time_us.div_euclid(1_000_000) + POSTGRES_EPOCH_S,
        },
    }
}
