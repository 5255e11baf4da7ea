//! The oldest event that waits, found by decoding a temporary copy of the slot.
//!
//! With one stream, whatever lies behind its end waits, and the server need send no more than which rows there are. Of
//! several streams one may have refused what others have gone beyond, so that each event is mapped as the relay maps it,
//! and looked for in the stream that captures its subject.

use super::{Published, Slot, Waiting};
use crate::admin::Error;
use crate::admin::database::Database;
use crate::config::Config;
use crate::jetstream::streams::Routes;
use crate::outbox::batch::{Batch, Change, Fate};
use crate::outbox::mapper::Mapper;
use crate::outbox::mapping::Mapping;
use crate::outbox::park::OnPoison;
use crate::outbox::plan::{Place, Value};
use crate::outbox::position::Position;
use crate::outbox::problem::MapError;
use crate::postgres::Lsn;
use crate::postgres::connection::{quote_identifier, quote_literal};
use crate::postgres::pgoutput::{self, Message};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How many changes are decoded at a time.
const CHANGES: i32 = 1000;
/// How long that may take; a slot whose log is long tells no seconds then.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same for somebody who waits no longer for an answer.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);
/// `timestamp` counts from 2000-01-01, this many seconds after 1970.
const POSTGRES_EPOCH_S: i64 = 946_684_800;
/// Transactional messages (`messages` of pgoutput) came with it.
const MESSAGES: u32 = 140_000;
const DOING: &str = "decode a copy of the slot";

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
    // this session's own number: programs in two containers may well have the same one
    let session = database.row(
        "ask for the session's number",
        "SELECT pg_catalog.pg_backend_pid()",
        &[],
    )?;
    let session = session.map_or(0, |row| row.get::<_, i32>(0));
    let copy = format!("outbox_status_{session}");
    // before the session is given up
    let patience = match database.answer_limit <= PATIENCE {
        true => SHORT_PATIENCE,
        false => PATIENCE,
    };
    let limit = patience.as_millis();
    database.run(
        "copy the slot",
        &format!(
            "SET statement_timeout = {limit}; SELECT pg_catalog.pg_copy_logical_replication_slot({}, {}, true)",
            quote_literal(&config.slot),
            quote_literal(&copy)
        ),
    )?;
    let found = first_event(database, config, published, routes, (&copy, patience));
    // the session's end would drop it as well
    let dropped = database.run(
        "drop the copy of the slot",
        &format!(
            "SET statement_timeout = '30s'; SELECT pg_catalog.pg_drop_replication_slot({})",
            quote_literal(&copy)
        ),
    );
    found.and_then(|found| dropped.map(|()| found))
}

fn first_event(
    database: &mut Database,
    config: &Config,
    published: &Published,
    routes: &Routes,
    (copy, patience): (&str, Duration),
) -> Result<Waiting, Error> {
    // Postgres 18 sends nothing for a publication that does not exist, and no error
    let exists = database.row(
        DOING,
        "SELECT true FROM pg_catalog.pg_publication WHERE pubname = $1",
        &[&config.publication],
    )?;
    if exists.is_none() {
        return Ok(Waiting::Unknown);
    }
    let prefix = match &config.mapping.message_prefix {
        Some(prefix) if database.version >= MESSAGES => Some(prefix),
        _ => None,
    };
    let copy = Copy {
        name: copy,
        publication: quote_identifier(&config.publication),
        outboxes: outboxes(database, config)?,
        // a string of the protocol ends in a zero
        prefix: prefix.map(|prefix| [prefix.as_bytes(), b"\0"].concat()),
        patience,
    };
    if published.tails.len() > 1 {
        let mapping = &config.mapping;
        match copy.first_of_several(database, mapping, published, routes) {
            // a long way from the least of the ends: what lies behind the greatest of them is better than nothing
            Ok(Waiting::Unknown) | Err(Error::Sql { .. }) => {}
            found => return found,
        }
    }
    copy.first_behind(database, published.greatest().unwrap_or_default())
}

/// The copy of the slot, and what of it are events.
struct Copy<'a> {
    name: &'a str,
    publication: String,
    outboxes: Vec<i64>,
    prefix: Option<Vec<u8>>,
    patience: Duration,
}

impl Copy<'_> {
    /// Passes over what was committed before.
    fn advance(&self, database: &mut Database, upto: Position) -> Result<(), Error> {
        // a transaction is passed over whose commit record begins before the slot's position: all but this one
        let (name, lsn) = (self.name, upto.commit_lsn);
        database.run(
            DOING,
            &format!(
                "SELECT pg_catalog.pg_replication_slot_advance(slot_name, '{lsn}') FROM pg_catalog.pg_replication_slots \
                 WHERE slot_name = '{name}' AND confirmed_flush_lsn < '{lsn}'"
            ),
        )
    }

    /// The statement for the next changes: of the begins, of the rows and messages, which all count, and of the descriptions of
    /// outboxes their tag, and `column` of those that may be events. Its parameters are [`Copy::name`], [`CHANGES`] and the rest.
    fn changes(&self, column: &str) -> String {
        let messages = match self.prefix {
            Some(_) => ", 'messages', 'true'",
            None => "",
        };
        // 66: Begin; 73 and 82: Insert and Relation, with the table's object id; 77: Message, of which only transactional ones count
        format!(
            "SELECT tag, CASE WHEN tag = 66 OR tag IN (73, 82) AND is_outbox \
             OR tag = 77 AND substr(data, 11, length($5::bytea)) = $5 THEN {column} END \
             FROM pg_catalog.pg_logical_slot_get_binary_changes($1, NULL, $2, \
             'proto_version', '1', 'publication_names', $3{messages}), LATERAL (SELECT get_byte(data, 0) AS tag, \
             ('x' || encode(substr(data, 2, 4), 'hex'))::bit(32)::bigint = ANY ($4) AS is_outbox) AS head \
             WHERE tag IN (66, 73) OR tag = 82 AND is_outbox OR tag = 77 AND get_byte(data, 1) = 1"
        )
    }

    /// Feeds the changes to `take`, until it finds something, there are no more, or it has taken too long.
    fn each(
        &self,
        database: &mut Database,
        sql: &str,
        mut take: impl FnMut(&postgres::Row) -> ControlFlow<Waiting>,
    ) -> Result<Waiting, Error> {
        let end = Instant::now() + self.patience;
        while Instant::now() < end {
            let mut any = false;
            let found = database.each(
                DOING,
                sql,
                &[
                    &self.name,
                    &CHANGES,
                    &self.publication,
                    &self.outboxes,
                    &self.prefix,
                ],
                |row| {
                    any = true;
                    take(row)
                },
            )?;
            match found {
                Some(waiting) => return Ok(waiting),
                None if !any => return Ok(Waiting::Nothing),
                None => {}
            }
        }
        Ok(Waiting::Unknown)
    }

    /// With one stream: the first event behind its end.
    fn first_behind(&self, database: &mut Database, end: Position) -> Result<Waiting, Error> {
        self.advance(database, end)?;
        let sql = self.changes("substr(data, 2, 16)");
        let mut events = Events::default();
        self.each(database, &sql, |row| {
            match (row.get::<_, i32>(0), row.get::<_, Option<&[u8]>>(1)) {
                (66, begin) => events.begin(begin),
                (82, _) => {}
                (_, None) => {
                    events.next();
                }
                (_, Some(_)) => match events.next() {
                    Waiting::Event { at, .. } if at <= end => {}
                    waiting => return ControlFlow::Break(waiting),
                },
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
        self.advance(database, published.least().unwrap_or_default())?;
        let sql = self.changes("data");
        let mut search = Search::new(mapping, published, routes);
        self.each(database, &sql, |row| match row.get::<_, Option<&[u8]>>(1) {
            Some(data) => search.take(data),
            None => {
                search.events.next();
                ControlFlow::Continue(())
            }
        })
    }
}

/// The object ids of the tables whose rows are events: what the reader finds out from the relation messages.
fn outboxes(database: &mut Database, config: &Config) -> Result<Vec<i64>, Error> {
    let tables = database.rows(
        "look for the outboxes",
        "SELECT c.oid::bigint, n.nspname::text, c.relname::text, array_agg(a.attname::text) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
         WHERE c.relkind IN ('r', 'p') GROUP BY 1, 2, 3",
        &[],
    )?;
    let is_outbox = |table: &&postgres::Row| {
        let (schema, name): (&str, &str) = (table.get(1), table.get(2));
        let columns: Vec<&str> = table.get(3);
        let mapping = config.mapping.of_table(schema, name);
        mapping.is_some_and(|mapping| {
            let mut needed = mapping.needed_columns().into_iter();
            needed.all(|column| columns.contains(&column))
        })
    };
    let outboxes = tables.iter().filter(is_outbox);
    Ok(outboxes.map(|table| table.get(0)).collect())
}

/// Looks for each event in its stream.
struct Search<'a> {
    mapper: Mapper,
    published: &'a Published,
    routes: &'a Routes,
    /// The transaction that is being read.
    events: Events,
}

impl<'a> Search<'a> {
    fn new(mapping: &Mapping, published: &'a Published, routes: &'a Routes) -> Search<'a> {
        let mut mapping = mapping.clone();
        if mapping.policy.on_poison == OnPoison::Skip {
            // the mapper would say that it gives an event up, which is the relay's to do
            mapping.policy.on_poison = OnPoison::Park;
        }
        Search {
            mapper: Mapper::new(&mapping),
            published,
            routes,
            events: Events::default(),
        }
    }

    /// Takes a message of pgoutput, and ends with the event that waits.
    fn take(&mut self, data: &[u8]) -> ControlFlow<Waiting> {
        let Ok(message) = pgoutput::decode(data) else {
            return ControlFlow::Break(Waiting::Unknown);
        };
        let mut batch = Batch::default();
        let mapped = match message {
            Message::Begin { .. } => {
                self.events.begin(data.get(1..));
                return ControlFlow::Continue(());
            }
            Message::Relation(relation) => {
                // one that it does not take has rows that it does not take either
                let _ = self.mapper.describe(&relation, Lsn::INVALID);
                return ControlFlow::Continue(());
            }
            Message::Insert { relation_id, tuple } => {
                let values = tuple.iter().map(Value::from);
                let place = self.events.next_place();
                self.mapper.insert(relation_id, values, place, &mut batch)
            }
            Message::Message {
                prefix, content, ..
            } if self.mapper.is_event_prefix(prefix.0) => {
                let place = self.events.next_place();
                let content = Value::Text(content.0);
                let mapped = self.mapper.message(content, place, &mut batch);
                mapped.map(|()| true)
            }
            _ => Ok(false),
        };
        self.look(mapped, &batch)
    }

    /// Whether what became of a row or message is published.
    fn look(&mut self, mapped: Result<bool, MapError>, batch: &Batch) -> ControlFlow<Waiting> {
        let stream = match (mapped, batch.changes()) {
            (Ok(true), [Change::Event(spans)]) => match spans.fate {
                Fate::Publish => {
                    let stream = self.routes.route(batch.event(spans).subject);
                    // one that none captures is in none
                    Some(stream.unwrap_or(usize::MAX))
                }
                // elsewhere, once the relay has passed it
                Fate::Park | Fate::Lose | Fate::Ignore => None,
            },
            (Ok(_), _) => {
                self.events.next();
                return ControlFlow::Continue(());
            }
            // the relay halts at it, unless it was let pass once
            (Err(_), _) => None,
        };
        match self.events.next() {
            Waiting::Event { at, .. } if self.published.has(at, stream) => {
                ControlFlow::Continue(())
            }
            Waiting::Event { at, time_s, .. } => {
                ControlFlow::Break(Waiting::Event { at, time_s, stream })
            }
            other => ControlFlow::Break(other),
        }
    }
}

/// Counts the rows and messages of a transaction, as the reader does.
#[derive(Debug, Default)]
struct Events {
    /// Its commit's LSN, and its time in microseconds, as Postgres counts.
    began: Option<(Lsn, i64)>,
    count: u32,
}

impl Events {
    /// Takes what follows the tag of a Begin message.
    fn begin(&mut self, begin: Option<&[u8]>) {
        let number = |bytes: &[u8]| <[u8; 8]>::try_from(bytes).ok();
        let began = || {
            let (lsn, rest) = begin?.split_at_checked(8)?;
            let time = rest.get(..8)?;
            Some((
                Lsn(u64::from_be_bytes(number(lsn)?)),
                i64::from_be_bytes(number(time)?),
            ))
        };
        *self = Events {
            began: began(),
            count: 0,
        };
    }

    /// Where the next event of the transaction stands.
    fn next_place(&self) -> Place {
        let (commit_lsn, commit_time_us) = self.began.unwrap_or_default();
        Place {
            position: Position {
                commit_lsn,
                ordinal: self.count + 1,
            },
            commit_time_us,
            ..Place::default()
        }
    }

    /// The next event of the transaction, as one that waits.
    fn next(&mut self) -> Waiting {
        let place = self.next_place();
        self.count += 1;
        match self.began {
            None => Waiting::Unknown,
            Some(_) => Waiting::Event {
                at: place.position,
                stream: None,
                time_s: place.commit_time_us.div_euclid(1_000_000) + POSTGRES_EPOCH_S,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_begin_message_tells_where_and_when_its_events_are() {
        let mut begin = 0x1234_u64.to_be_bytes().to_vec();
        begin.extend_from_slice(&1_500_000_i64.to_be_bytes());
        let event = |ordinal| Waiting::Event {
            at: Position {
                commit_lsn: Lsn(0x1234),
                ordinal,
            },
            stream: None,
            time_s: POSTGRES_EPOCH_S + 1,
        };
        let mut events = Events::default();
        for _ in 0..2 {
            events.begin(Some(&begin));
            assert_eq!([events.next(), events.next()], [event(1), event(2)]);
        }
        events.begin(begin.get(..15));
        assert_eq!(events.next(), Waiting::Unknown);
        events.begin(None);
        assert_eq!(events.next(), Waiting::Unknown);
    }
}
