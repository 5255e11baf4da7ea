//! From the rows of an outbox table to the events of a [`Batch`].
//!
//! Takes what pgoutput tells of tables and inserted rows (`postgres::pgoutput` decodes it) and decides which
//! tables are outboxes ([`Mapping`] says so), and what becomes of a row or a message that cannot be an event. What
//! its columns become is for [`super::plan`]:
//!
//! | column | becomes | when NULL |
//! | --- | --- | --- |
//! | `id`, of any type | the message id, its text by the rule of [`super::message_id`] | an error, as when empty |
//! | those that the template names | the subject, by the rule of [`super::subject`] | an error |
//! | `payload`, `json` or `jsonb` | the body, compacted by [`super::json`] | `null` |
//! | `payload`, `bytea` | the body, the raw bytes | an empty body |
//! | `payload`, any other type | the body, its text as it is | an empty body |
//! | those of `-header`, `traceparent`, `tracestate` | a header each, by the rule of [`super::header`] | no header |
//! | `headers`, `json` or `jsonb` | a header a member | no header |
//!
//! A table with a column of the template's is meant as an outbox: it has all columns that are needed or is an
//! error, so that a renamed column cannot make events vanish. A domain over `json`, `jsonb` or `bytea` counts
//! as "any other type": pgoutput tells the domain's own oid and not what it is over.
//!
//! What the writer wrote and cannot be published is parked, given up or an error, as [`Policy`](super::park::Policy)
//! says. Whatever else fails here is a row or a table that the relay must not skip; none of it passes by trying again.

use super::batch::{Batch, Draft, Fate};
use super::large::LargeRow;
use super::mapping::{Mapping, TableMapping, TableName};
use super::message;
use super::park::{self, OnBad, OnPoison};
use super::plan::{
    FEW_COLUMNS, Flaw, HEADERS, JSON_OID, MAX_COLUMNS, Part, Place, Plan, Shape, Value,
};
use super::position::Position;
use super::problem::{EventSource, MapError, ValueProblem};
use crate::postgres::Lsn;
use crate::postgres::encoding::Encoding;
use crate::postgres::pgoutput::{self, Text};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

/// A column of a relation message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type's object id.
    pub type_id: u32,
}

/// Knows the tables of the publication and writes their rows into batches.
#[derive(Debug)]
pub struct Mapper {
    mapping: Mapping,
    /// Of every table that was described: a database may have them by the hundred thousand.
    relations: BTreeMap<u32, Relation>,
    messages: Option<Plan>,
    encoding: Encoding,
    /// Tables of which a warning says that they are ignored.
    ignored: u32,
    /// Of the outbox that was described last.
    last_shape: Option<Arc<Shape>>,
    /// See [`Mapper::quiet`].
    is_quiet: bool,
}

#[derive(Debug)]
enum Relation {
    Outbox(Box<Plan>),
    Other,
}

/// So many tables that are ignored are named in warnings; a database may have any number.
const MAX_IGNORED: u32 = 20;

impl Mapper {
    /// A mapper that knows no relation yet.
    pub fn new(mapping: &Mapping) -> Mapper {
        let messages = mapping.message_prefix.as_ref().map(|prefix| {
            let source = EventSource::Message(prefix.clone());
            let label = format!("message {prefix}");
            let object = Some(HEADERS.to_string());
            let table = TableMapping {
                headers_column: object,
                ..mapping.of_messages()
            };
            // whatever is named is looked for in each message
            let (plan, _) = Plan::new(mapping, &table, source, label, &|_| true, |_| JSON_OID);
            plan
        });
        Mapper {
            mapping: mapping.clone(),
            relations: BTreeMap::new(),
            messages,
            encoding: Encoding::Utf8,
            ignored: 0,
            last_shape: None,
            is_quiet: false,
        }
    }

    /// One that does not warn of the events it gives up: they are the relay's to give up.
    pub fn quiet(mapping: &Mapping) -> Mapper {
        Mapper {
            is_quiet: true,
            ..Mapper::new(mapping)
        }
    }

    /// The encoding in which the rows of the next session come.
    pub fn set_encoding(&mut self, encoding: Encoding) {
        self.encoding = encoding;
    }

    /// Takes a relation message, whose names are in the database's encoding. See [`Mapper::relation`].
    ///
    /// # Errors
    /// As there.
    pub fn describe(&mut self, relation: &pgoutput::Relation<'_>, at: Lsn) -> Result<(), MapError> {
        let encoding = self.encoding.clone();
        let name = |name: Text<'_>| encoding.decode_name(name.0).into_owned();
        let columns: Vec<(String, u32)> = relation
            .columns()
            .map(|column| (name(column.name), column.type_id))
            .collect();
        let columns = columns.iter().map(|(name, type_id)| ColumnInfo {
            name,
            type_id: *type_id,
        });
        let (schema, table) = (name(relation.namespace), name(relation.name));
        self.relation(relation.id, &schema, &table, columns, at)
    }

    /// Takes a relation message, the first or another one of its table: `columns` in the order of the values
    /// in its rows, `at` its place in the log.
    ///
    /// A table that is no outbox is ignored; unless `-table` leaves it out, one warning says so. So it does of an
    /// outbox that is left out.
    ///
    /// # Errors
    /// [`MapError::MissingColumns`] when the table is an outbox by name, by one of its columns, or was one
    /// before, and lacks columns; [`MapError::Renamed`] when it was one, and is left out by the name it has now.
    /// The mapper still knows the table as it was: rows must not follow.
    pub fn relation<'a>(
        &mut self,
        id: u32,
        namespace: &str,
        name: &str,
        columns: impl Iterator<Item = ColumnInfo<'a>>,
        at: Lsn,
    ) -> Result<(), MapError> {
        let columns: Vec<ColumnInfo<'a>> = columns.collect();
        let has = |name: &str| columns.iter().any(|column| column.name == name);
        let type_id = |name: &str| {
            let found = columns.iter().find(|column| column.name == name);
            found.map_or(0, |column| column.type_id)
        };
        let label = format!("{namespace}.{name}");
        let table = TableName {
            schema: Some(namespace.to_string()),
            name: name.to_string(),
            and_longer: false,
        };
        let before = self.relations.get(&id);
        let mapping = self.mapping.of_table(namespace, name);
        let source = EventSource::Row(table.clone());
        let (mut plan, wanted) = Plan::new(
            &self.mapping,
            mapping.unwrap_or(&self.mapping.default),
            source,
            label.clone(),
            &has,
            type_id,
        );
        if mapping.is_none() {
            if let Some(Relation::Outbox(plan)) = before
                && let EventSource::Row(was) = &plan.source
            {
                return Err(MapError::Renamed {
                    was: Box::new(was.clone()),
                    now: table,
                    at,
                });
            }
            if !wanted.missing.is_empty() {
                log::debug!(table = label.as_str(); "not named by -table, ignored");
            } else if before.is_none() {
                let what = "has the columns of an outbox and is not named by -table, ignored";
                ignore(&mut self.ignored, &label, what);
            }
            self.relations.insert(id, Relation::Other);
            return Ok(());
        }

        if wanted.missing.is_empty() {
            if plan.names.len() > MAX_COLUMNS {
                return Err(MapError::TooManyColumns { table });
            }
            plan.find_columns(columns.iter().map(|column| column.name));
            plan.share(&mut self.last_shape);
            self.relations.insert(id, Relation::Outbox(Box::new(plan)));
            return Ok(());
        }
        if !self.mapping.tables.is_empty()
            || mapping.is_some_and(|mapping| mapping.own_columns().into_iter().any(has))
            || matches!(before, Some(Relation::Outbox(_)))
        {
            return Err(MapError::MissingColumns {
                table,
                columns: wanted.missing,
                needed: wanted.needed,
                at,
            });
        }
        if before.is_none() {
            let what = "in the publication without the columns of an outbox, ignored";
            ignore(&mut self.ignored, &label, what);
        }
        self.relations.insert(id, Relation::Other);
        Ok(())
    }

    fn plan(&self, relation_id: u32) -> Result<Option<&Plan>, MapError> {
        match self.relations.get(&relation_id) {
            Some(Relation::Outbox(plan)) => Ok(Some(plan)),
            Some(Relation::Other) => Ok(None),
            None => Err(MapError::UnknownRelation { relation_id }),
        }
    }

    /// Adds an inserted row to `batch`, as the event at `place`; `false` when its table is no outbox.
    ///
    /// # Errors
    /// Every [`MapError`] but those of [`Mapper::relation`]; `batch` is then as it was.
    pub fn insert<'a>(
        &self,
        relation_id: u32,
        values: impl Iterator<Item = Value<'a>>,
        place: Place,
        batch: &mut Batch,
    ) -> Result<bool, MapError> {
        let Some(plan) = self.plan(relation_id)? else {
            return Ok(false);
        };
        if plan.names.len() <= FEW_COLUMNS {
            let picked = plan.pick::<FEW_COLUMNS>(values, place)?;
            self.read(plan, &picked, place, batch)?;
        } else {
            let picked = plan.pick::<MAX_COLUMNS>(values, place)?;
            self.read(plan, &picked, place, batch)?;
        }
        Ok(true)
    }

    /// What is kept of a row that is too large to be taken at once; `None` when its table is no outbox.
    ///
    /// # Errors
    /// [`MapError::UnknownRelation`].
    pub fn large_row(
        &self,
        relation_id: u32,
        max_payload: usize,
    ) -> Result<Option<LargeRow>, MapError> {
        let plan = self.plan(relation_id)?;
        Ok(plan.map(|plan| LargeRow::new(plan.roles(), max_payload)))
    }

    /// Writes the values that were picked, which come in the database's encoding.
    fn read(
        &self,
        plan: &Plan,
        picked: &[Value<'_>],
        place: Place,
        batch: &mut Batch,
    ) -> Result<(), MapError> {
        match self.encoding {
            Encoding::Utf8 => self.write(plan, picked, place, batch),
            _ => self.read_decoded(plan, picked, place, batch),
        }
    }

    #[cold]
    fn read_decoded(
        &self,
        plan: &Plan,
        picked: &[Value<'_>],
        place: Place,
        batch: &mut Batch,
    ) -> Result<(), MapError> {
        let decode = |value: &Value<'_>| match value {
            Value::Text(bytes) | Value::Cut { kept: bytes, .. } => {
                self.encoding.decode(bytes).map(Cow::into_owned)
            }
            _ => None,
        };
        let texts: Vec<Option<String>> = picked.iter().map(decode).collect();
        let mut decoded = Vec::with_capacity(picked.len());
        for (slot, (value, text)) in picked.iter().zip(&texts).enumerate() {
            decoded.push(match (*value, text) {
                (Value::Text(_), Some(text)) => Value::Text(text.as_bytes()),
                (Value::Cut { len, .. }, Some(text)) => Value::Cut {
                    kept: text.as_bytes(),
                    len,
                },
                // nobody says what such bytes mean, and a body may be any bytes unless it is JSON
                (Value::Text(bytes), None)
                    if slot == plan.payload
                        && self.encoding == Encoding::Unknown
                        && !plan.has_json_body() =>
                {
                    Value::Text(bytes)
                }
                (Value::Text(bytes), None) => Value::Undecodable(bytes),
                (value, _) => value,
            });
        }
        self.write(plan, &decoded, place, batch)
    }

    /// Whether messages with this prefix, in the database's encoding, are events.
    pub fn is_event_prefix(&self, prefix: &[u8]) -> bool {
        let own = self.messages.as_ref().map(|plan| &plan.source);
        matches!(own, Some(EventSource::Message(own)) if *own == self.encoding.decode_name(prefix))
    }

    /// Adds a transactional message, for whose prefix [`is_event_prefix`](Self::is_event_prefix) holds, to `batch`, as the event
    /// at `place`; or what there is of one that is too large.
    ///
    /// # Errors
    /// [`MapError::Value`]; `batch` is then as it was.
    pub fn message(
        &self,
        content: Value<'_>,
        place: Place,
        batch: &mut Batch,
    ) -> Result<(), MapError> {
        let Some(plan) = &self.messages else {
            return Ok(());
        };
        let raw = |slot| slot == plan.payload || plan.object() == Some(slot);
        let cut = match content {
            Value::Cut { len, .. } => Some(len),
            _ => None,
        };
        let (content, members) = match content {
            Value::Text(content) => (content, message::read(content, &plan.names, raw)),
            Value::Cut { kept, .. } => (kept, Err(ValueProblem::TooLarge)),
            _ => (&[][..], Err(ValueProblem::Malformed)),
        };
        match members {
            Ok(members) => {
                let texts = members.iter().map(|text| text.as_deref());
                let picked: Vec<Value<'_>> = texts
                    .map(|text| text.map_or(Value::Null, |text| Value::Text(text.as_bytes())))
                    .collect();
                self.write(plan, &picked, place, batch)?;
            }
            Err(problem) => {
                let flaw = Flaw {
                    part: Part::Content,
                    problem,
                };
                let body = |out: &mut Vec<u8>| out.extend_from_slice(content);
                self.unpublishable(plan, &[], flaw, (body, cut), place, batch)?;
            }
        }
        Ok(())
    }

    fn write(
        &self,
        plan: &Plan,
        picked: &[Value<'_>],
        place: Place,
        batch: &mut Batch,
    ) -> Result<(), MapError> {
        let written = batch.draft(&plan.label, place.position, Fate::Publish, |draft| {
            draft.id(|out| plan.write_id(picked, out))?;
            draft.subject(|out| {
                let plain = plan.write_subject(picked, out)?;
                if plain || self.mapping.policy.on_bad_subject == OnBad::Encode {
                    return Ok(());
                }
                Err(Flaw {
                    part: Part::Subject,
                    problem: ValueProblem::BadSubject,
                })
            })?;
            if let Some(extras) = &plan.extras {
                let encode = self.mapping.policy.on_bad_header == OnBad::Encode;
                draft.headers(|out| plan.write_headers(extras, picked, place, encode, out))?;
            }
            draft.body(|out| plan.write_body(picked, out))
        });
        match written {
            Ok(()) => Ok(()),
            Err(flaw) => {
                // what can be had of it
                let body = |out: &mut Vec<u8>| {
                    let _ = plan.write_body(picked, out);
                };
                let cut = plan.cut_payload_len(picked);
                self.unpublishable(plan, picked, flaw, (body, cut), place, batch)
            }
        }
    }

    /// Does with an event what the operator wants done with those that cannot be published. `body` writes what there is of
    /// it; where that is not all, it comes with the length that it had.
    fn unpublishable(
        &self,
        plan: &Plan,
        picked: &[Value<'_>],
        flaw: Flaw,
        (body, cut): (impl FnOnce(&mut Vec<u8>), Option<usize>),
        place: Place,
        batch: &mut Batch,
    ) -> Result<(), MapError> {
        let policy = &self.mapping.policy;
        let at = place.position.commit_lsn;
        let part = plan.name_of(flaw.part);
        let mut id = Vec::new();
        let has_id = plan.write_id(picked, &mut id).is_ok();
        if !has_id {
            let Position {
                commit_lsn,
                ordinal,
            } = place.position;
            id = format!("parked-{commit_lsn}-{ordinal}").into_bytes();
        }
        // of one that is resolved only position and id are compared: with what it was, whatever was done with it
        let lose = |batch: &mut Batch| {
            let Ok(()) = batch.draft(&plan.label, place.position, Fate::Lose, |draft| {
                draft.id(|out| append(&id, out))
            });
            Ok(())
        };
        if place.is_resolved {
            return lose(batch);
        }
        let todo = match flaw.problem {
            problem if !problem.is_the_writers() => OnPoison::Stop,
            ValueProblem::BadSubject => on_bad(policy.on_bad_subject),
            ValueProblem::BadHeader => on_bad(policy.on_bad_header),
            _ => policy.on_poison,
        };
        let cause = format!("{}: {part} {}", plan.source, flaw.problem);
        match todo {
            OnPoison::Stop => Err(MapError::Value {
                source: plan.source.clone(),
                id: has_id.then(|| String::from_utf8_lossy(&id).into_owned()),
                part,
                problem: flaw.problem,
                at,
            }),
            OnPoison::Skip => {
                if !self.is_quiet {
                    let id = String::from_utf8_lossy(&id);
                    log::warn!(id, position:% = place.position; "gave up an event that cannot be published: {cause}");
                }
                lose(batch)
            }
            OnPoison::Park => {
                self.park(plan, picked, (&id, &cause), (body, cut), place, batch);
                Ok(())
            }
        }
    }

    /// Writes the event that tells of one that cannot be published.
    fn park(
        &self,
        plan: &Plan,
        picked: &[Value<'_>],
        (id, cause): (&[u8], &str),
        (body, cut): (impl FnOnce(&mut Vec<u8>), Option<usize>),
        place: Place,
        batch: &mut Batch,
    ) {
        let (mut home, mut headers) = (Vec::new(), Vec::new());
        if plan.write_subject(picked, &mut home).is_err() {
            home.clear();
        }
        if let Some(extras) = &plan.extras
            && plan
                .write_headers(extras, picked, place, true, &mut headers)
                .is_err()
        {
            headers.clear();
        }
        // both were written from texts
        let home = String::from_utf8_lossy(&home);
        let headers = String::from_utf8_lossy(&headers);
        let write = |draft: &mut Draft<'_>| -> Result<(), Infallible> {
            draft.subject(|out| append(self.mapping.policy.park_subject.as_bytes(), out))?;
            draft.id(|out| append(id, out))?;
            draft.headers(|out| {
                park::write_headers(&headers, cause, &home, out);
                if let Some(len) = cut {
                    park::write_body_cut(len, out);
                }
                Ok::<(), Infallible>(())
            })?;
            draft.body(|out| {
                body(out);
                Ok(())
            })
        };
        let Ok(()) = batch.draft(&plan.label, place.position, Fate::Park, write);
    }
}

/// Says of a table that it is ignored, unless that was said of many.
fn ignore(ignored: &mut u32, table: &str, what: &str) {
    *ignored = ignored.saturating_add(1);
    match *ignored {
        ..MAX_IGNORED => log::warn!(table; "{what}"),
        MAX_IGNORED => log::warn!(table; "{what}; of further tables -logging debug says so"),
        _ => log::debug!(table; "{what}"),
    }
}

fn append(part: &[u8], out: &mut Vec<u8>) -> Result<(), Infallible> {
    out.extend_from_slice(part);
    Ok(())
}

fn on_bad(policy: OnBad) -> OnPoison {
    match policy {
        OnBad::Park => OnPoison::Park,
        OnBad::Stop | OnBad::Encode => OnPoison::Stop,
    }
}

#[cfg(test)]
mod tests;
