//! What the WAL of the slot still has: decoded on a temporary copy of it (`pg_copy_logical_replication_slot`, Postgres 12 on),
//! so that neither a relay that runs nor one that starts meanwhile is in the way. Rows and messages are counted as the
//! reader counts them, and mapped as the relay maps them.

use super::Error;
use super::database::Database;
use crate::config::Config;
use crate::outbox::batch::Batch;
use crate::outbox::mapper::Mapper;
use crate::outbox::mapping::Mapping;
use crate::outbox::plan::{Place, Value};
use crate::outbox::position::Position;
use crate::outbox::problem::MapError;
use crate::postgres::Lsn;
use crate::postgres::connection::{quote_identifier, quote_literal};
use crate::postgres::pgoutput::{self, DecodeError, Message};
use std::ops::ControlFlow;
use std::time::Duration;

/// How many changes are decoded at a time.
const CHANGES: i32 = 1000;
/// Transactional messages (`messages` of pgoutput) came with it.
pub const MESSAGES: u32 = 140_000;
const DOING: &str = "decode a copy of the slot";
/// In place of its tag: a message that is not transactional. It is no event, but it is among the changes, so that it is not the end.
const NO_EVENT: i32 = 0;

/// The copy of the slot, and what of it are events. It goes with the session.
pub struct SlotCopy {
    name: String,
    publication: String,
    outboxes: Vec<i64>,
    prefix: Option<Vec<u8>>,
}

impl SlotCopy {
    /// Copies the slot; from now on a statement of the session may take so long. `None`: there is no publication of the name,
    /// for which Postgres 18 sends nothing, and no error.
    pub fn create(
        database: &mut Database,
        config: &Config,
        command: &str,
        limit: Duration,
    ) -> Result<Option<SlotCopy>, Error> {
        let exists = database.row(
            DOING,
            "SELECT true FROM pg_catalog.pg_publication WHERE pubname = $1",
            &[&config.publication],
        )?;
        if exists.is_none() {
            return Ok(None);
        }
        // this session's own number: programs in two containers may well have the same one
        let session = database.row(
            "ask for the session's number",
            "SELECT pg_catalog.pg_backend_pid()",
            &[],
        )?;
        let session = session.map_or(0, |row| row.get::<_, i32>(0));
        let name = format!("outbox_{command}_{session}");
        let limit = limit.as_millis();
        database.run(
            "copy the slot",
            &format!(
                "SET statement_timeout = {limit}; SELECT pg_catalog.pg_copy_logical_replication_slot({}, {}, true)",
                quote_literal(&config.slot),
                quote_literal(&name)
            ),
        )?;
        let prefix = match &config.mapping.message_prefix {
            Some(prefix) if database.version >= MESSAGES => Some(prefix),
            _ => None,
        };
        Ok(Some(SlotCopy {
            name,
            publication: quote_identifier(&config.publication),
            outboxes: outboxes(database, config)?,
            // a string of the protocol ends in a zero
            prefix: prefix.map(|prefix| [prefix.as_bytes(), b"\0"].concat()),
        }))
    }

    /// Drops it; the session's end would do so as well.
    pub fn drop(self, database: &mut Database) -> Result<(), Error> {
        database.run(
            "drop the copy of the slot",
            &format!(
                "SET statement_timeout = '30s'; SELECT pg_catalog.pg_drop_replication_slot({})",
                quote_literal(&self.name)
            ),
        )
    }

    /// Passes over what was committed before.
    pub fn advance(&self, database: &mut Database, upto: Position) -> Result<(), Error> {
        // a transaction is passed over whose commit record begins before the slot's position: all but this one
        let (name, lsn) = (&self.name, upto.commit_lsn);
        database.run(
            DOING,
            &format!(
                "SELECT pg_catalog.pg_replication_slot_advance(slot_name, '{lsn}') FROM pg_catalog.pg_replication_slots \
                 WHERE slot_name = '{name}' AND confirmed_flush_lsn < '{lsn}'"
            ),
        )
    }

    /// The statement for the next changes: of the begins, of the rows and messages, which all count, and of the descriptions of
    /// outboxes their tag, and `column` of those that may be events; and what is no event. Its parameters are those of [`SlotCopy::next`].
    pub fn changes(&self, column: &str) -> String {
        let messages = match self.prefix {
            Some(_) => ", 'messages', 'true'",
            None => "",
        };
        // 66: Begin; 73 and 82: Insert and Relation, with the table's object id; 77: Message, of which only transactional ones count
        format!(
            "SELECT CASE WHEN tag = 77 AND get_byte(data, 1) = 0 THEN {NO_EVENT} ELSE tag END, CASE WHEN tag = 66 OR tag IN (73, 82) AND is_outbox \
             OR tag = 77 AND get_byte(data, 1) = 1 AND substr(data, 11, length($5::bytea)) = $5 THEN {column} END \
             FROM pg_catalog.pg_logical_slot_get_binary_changes($1, NULL, $2, \
             'proto_version', '1', 'publication_names', $3{messages}), LATERAL (SELECT get_byte(data, 0) AS tag, \
             ('x' || encode(substr(data, 2, 4), 'hex'))::bit(32)::bigint = ANY ($4) AS is_outbox) AS head \
             WHERE tag IN (66, 73) OR tag = 82 AND is_outbox OR tag = 77"
        )
    }

    /// Feeds the next changes to `take`, until it breaks off.
    pub fn next<B>(
        &self,
        database: &mut Database,
        sql: &str,
        mut take: impl FnMut(&postgres::Row) -> ControlFlow<B>,
    ) -> Result<Next<B>, Error> {
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
                match row.get::<_, i32>(0) {
                    NO_EVENT => ControlFlow::Continue(()),
                    _ => take(row),
                }
            },
        )?;
        Ok(match found {
            Some(found) => Next::Found(found),
            None if any => Next::More,
            None => Next::End,
        })
    }
}

/// What became of some changes.
pub enum Next<B> {
    /// They were broken off with this.
    Found(B),
    /// There may be more of them.
    More,
    /// There were none.
    End,
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

/// Maps what was decoded, as the relay does.
pub struct Decoder {
    mapper: Mapper,
    /// The transaction that is being read.
    events: Events,
}

/// A row or message that counts, and what was made of it.
pub struct Mapped {
    /// Where it is.
    pub place: Place,
    /// `None`: it is no event. One event in a batch, or why the relay halts at it.
    pub event: Option<Result<Batch, MapError>>,
}

impl Decoder {
    /// For a transaction's beginning.
    pub fn new(mapping: &Mapping) -> Decoder {
        Decoder {
            mapper: Mapper::quiet(mapping),
            events: Events::default(),
        }
    }

    /// Takes a message of pgoutput, of which `None` is one that only counts.
    pub fn take(&mut self, data: Option<&[u8]>) -> Result<Option<Mapped>, DecodeError> {
        let mut batch = Batch::default();
        let message = data.map(pgoutput::decode).transpose()?;
        let place = self.events.next_place();
        let mapped = match message {
            Some(Message::Begin { .. }) => {
                self.events.begin(data.and_then(|data| data.get(1..)));
                return Ok(None);
            }
            Some(Message::Relation(relation)) => {
                // one that it does not take has rows that it does not take either
                let _ = self.mapper.describe(&relation, Lsn::INVALID);
                return Ok(None);
            }
            Some(Message::Insert { relation_id, tuple }) => {
                let values = tuple.iter().map(Value::from);
                self.mapper.insert(relation_id, values, place, &mut batch)
            }
            Some(Message::Message {
                prefix, content, ..
            }) if self.mapper.is_event_prefix(prefix.0) => {
                let content = Value::Text(content.0);
                let mapped = self.mapper.message(content, place, &mut batch);
                mapped.map(|()| true)
            }
            _ => Ok(false),
        };
        self.events.count();
        let event = match mapped {
            Ok(false) => None,
            Ok(true) => Some(Ok(batch)),
            Err(error) => Some(Err(error)),
        };
        Ok(Some(Mapped { place, event }))
    }
}

/// Counts the rows and messages of a transaction, as the reader does.
#[derive(Debug, Default)]
pub struct Events {
    /// Its commit's LSN, and its time in microseconds, as Postgres counts.
    began: Option<(Lsn, i64)>,
    count: u32,
}

impl Events {
    /// Takes what follows the tag of a Begin message.
    pub fn begin(&mut self, begin: Option<&[u8]>) {
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

    /// Where the next event of the transaction is; at LSN 0 where the transaction is not known.
    pub fn next_place(&self) -> Place {
        let (commit_lsn, commit_time_us) = self.began.unwrap_or_default();
        Place {
            position: Position {
                commit_lsn,
                ordinal: self.count.saturating_add(1),
            },
            commit_time_us,
            ..Place::default()
        }
    }

    /// One more has come.
    pub fn count(&mut self) {
        self.count = self.count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_begin_message_tells_where_and_when_its_events_are() {
        let mut begin = 0x1234_u64.to_be_bytes().to_vec();
        begin.extend_from_slice(&1_500_000_i64.to_be_bytes());
        let place = |lsn, ordinal, commit_time_us| Place {
            position: Position {
                commit_lsn: Lsn(lsn),
                ordinal,
            },
            commit_time_us,
            ..Place::default()
        };
        let mut events = Events::default();
        for _ in 0..2 {
            events.begin(Some(&begin));
            assert_eq!(events.next_place(), place(0x1234, 1, 1_500_000));
            events.count();
            assert_eq!(events.next_place(), place(0x1234, 2, 1_500_000));
        }
        events.begin(begin.get(..15));
        assert_eq!(events.next_place(), place(0, 1, 0));
        events.begin(None);
        assert_eq!(events.next_place(), place(0, 1, 0));
    }
}
