//! How the rows of one table, or messages, become the parts of an event: which of their values take part, and
//! what each of these is on the wire. [`super::mapper`] knows which table has which plan.
//!
//! A *slot* is an index into the names of the columns that take part, and into the values that were picked for
//! them: each row is gone through once, and its other values are not looked at.

use super::header::{Full, LineError, Lines, ObjectError};
use super::large::Role;
use super::mapping::{Mapping, TableMapping};
use super::position::Position;
use super::problem::{EventSource, MapError, ValueProblem};
use super::template::Subject;
use super::{json, message_id};
use crate::postgres::pgoutput::TupleValue;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

// src/include/catalog/pg_type.dat
pub(super) const BYTEA_OID: u32 = 17;
pub(super) const JSON_OID: u32 = 114;
pub(super) const JSONB_OID: u32 = 3802;

/// Columns of one table that may take part in an event.
pub const MAX_COLUMNS: usize = 32;
/// So many take part in the default set-up; that path takes no more room than they need.
pub(super) const FEW_COLUMNS: usize = 4;
/// No column of the table's is this one.
const UNUSED: u8 = u8::MAX;

/// The trace context of <https://www.w3.org/TR/trace-context/>: columns of these names are passed on.
pub(super) const TRACE_CONTEXT: [&str; 2] = ["traceparent", "tracestate"];
/// The column that becomes `ce-type`.
pub(super) const TYPE: &str = "type";
/// The object whose members become headers, unless another is named.
pub(super) const HEADERS: &str = "headers";

/// The commit's time and the transaction's id, where the operator wants them.
const COMMIT_TIME: &str = "Outbox-Commit-Time";
const TRANSACTION: &str = "Outbox-Transaction";

/// Where an event stands, and what is told of its transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The event's position.
    pub position: Position,
    /// Microseconds since 2000-01-01 00:00 UTC, as Postgres counts.
    pub commit_time_us: i64,
    /// The transaction's id.
    pub xid: u32,
    /// It was resolved before, so whether it can be published matters no more.
    pub is_resolved: bool,
}

/// A value of an inserted row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL.
    Null,
    /// Stored out of line and not sent.
    UnchangedToast,
    /// The text form.
    Text(&'a [u8]),
    /// The binary form, which the relay does not ask for.
    Binary(&'a [u8]),
    /// The beginning of a text form that is too large to be taken.
    Cut {
        /// What there is of it.
        kept: &'a [u8],
        /// How long it was.
        len: usize,
    },
    /// A text form in the database's encoding, of which not all has an equivalent in UTF-8.
    Undecodable(&'a [u8]),
}

impl<'a> From<TupleValue<'a>> for Value<'a> {
    fn from(value: TupleValue<'a>) -> Value<'a> {
        match value {
            TupleValue::Null => Value::Null,
            TupleValue::UnchangedToast => Value::UnchangedToast,
            TupleValue::Text(text) => Value::Text(text),
            TupleValue::Binary(bytes) => Value::Binary(bytes),
        }
    }
}

impl fmt::Debug for Value<'_> {
    /// Tells the kind and the length; the content may be a payload.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("Null"),
            Value::UnchangedToast => f.write_str("UnchangedToast"),
            Value::Text(bytes) => write!(f, "Text({} bytes)", bytes.len()),
            Value::Binary(bytes) => write!(f, "Binary({} bytes)", bytes.len()),
            Value::Cut { len, .. } => write!(f, "Cut({len} bytes)"),
            Value::Undecodable(bytes) => write!(f, "Undecodable({} bytes)", bytes.len()),
        }
    }
}

/// What is known of one table, or of messages.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) source: EventSource,
    /// `schema.table`, as events bear it.
    pub(super) label: String,
    /// The same for all tables of one shape: an outbox may have partitions by the ten thousand.
    shape: Arc<Shape>,
}

impl Deref for Plan {
    type Target = Shape;

    fn deref(&self) -> &Shape {
        &self.shape
    }
}

/// What becomes of the columns of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// For each column of a row its slot, or [`UNUSED`].
    pub(super) slots: Vec<u8>,
    /// The columns that take part.
    pub(super) names: Vec<String>,
    pub(super) id: usize,
    pub(super) payload: usize,
    pub(super) subject: Subject,
    pub(super) body: Body,
    pub(super) extras: Option<Box<Extras>>,
}

/// The headers beside the relay's own.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Extras {
    /// Header and slot.
    columns: Vec<(String, usize)>,
    /// The slot of the object whose members are headers.
    object: Option<usize>,
    cloud_event: Option<CloudEvent>,
    position: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct CloudEvent {
    source: String,
    /// The slots of the type, and of what stands for it where there is none.
    types: [Option<usize>; 2],
}

/// How a payload becomes a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    CompactJson,
    RawBytes,
    Text,
}

impl Body {
    fn of_type(type_id: u32) -> Body {
        match type_id {
            JSON_OID | JSONB_OID => Body::CompactJson,
            BYTEA_OID => Body::RawBytes,
            _ => Body::Text,
        }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Body::CompactJson => "application/json",
            Body::RawBytes => "application/octet-stream",
            Body::Text => "text/plain",
        }
    }
}

/// The columns of a table, and which of them take part: found by name.
pub(super) struct Wanted<'a> {
    pub(super) has: &'a dyn Fn(&str) -> bool,
    pub(super) names: Vec<String>,
    pub(super) missing: Vec<String>,
    pub(super) needed: Vec<String>,
}

impl Wanted<'_> {
    /// The slot of a column that there must be.
    pub(super) fn need(&mut self, name: &str) -> usize {
        if !self.needed.iter().any(|known| known == name) {
            self.needed.push(name.to_string());
            if !(self.has)(name) {
                self.missing.push(name.to_string());
            }
        }
        self.slot(name)
    }

    /// The slot of a column, if the table has it.
    pub(super) fn find(&mut self, name: &str) -> Option<usize> {
        (self.has)(name).then(|| self.slot(name))
    }

    pub(super) fn slot(&mut self, name: &str) -> usize {
        let known = self.names.iter().position(|known| known == name);
        known.unwrap_or_else(|| {
            self.names.push(name.to_string());
            self.names.len() - 1
        })
    }
}

/// Why a row cannot be an event.
pub(super) struct Flaw {
    pub(super) part: Part,
    pub(super) problem: ValueProblem,
}

pub(super) enum Part {
    Slot(usize),
    Subject,
    Header(String),
    Headers,
    Content,
}

impl Plan {
    /// The plan for a table with the columns for which `has` holds, and which of them were looked for. Of no use when
    /// some are missing.
    pub(super) fn new<'a>(
        mapping: &Mapping,
        table: &TableMapping,
        source: EventSource,
        label: String,
        has: &'a dyn Fn(&str) -> bool,
        type_id: impl Fn(&str) -> u32,
    ) -> (Plan, Wanted<'a>) {
        let mut wanted = Wanted {
            has,
            names: Vec::new(),
            missing: Vec::new(),
            needed: Vec::new(),
        };
        let id = wanted.need(&table.id);
        let subject = table
            .subject
            .compile(&mapping.prefix, |name| wanted.need(table.column(name)));
        let payload = wanted.need(&table.payload);

        let mut columns: Vec<(String, usize)> = Vec::new();
        for header in &table.headers {
            columns.push((header.name.clone(), wanted.need(&header.column)));
        }
        for name in TRACE_CONTEXT {
            let mapped = table.headers.iter().any(|header| header.column == name);
            if let Some(slot) = wanted.find(name).filter(|_| !mapped) {
                columns.push((name.to_string(), slot));
            }
        }
        let is_json = |name: &str| matches!(type_id(name), JSON_OID | JSONB_OID);
        let object = match &table.headers_column {
            Some(name) => Some(wanted.need(name)),
            None if is_json(HEADERS) => wanted.find(HEADERS),
            None => None,
        };
        let cloud_event = mapping.cloudevents.as_ref().map(|source| {
            let types = [wanted.find(TYPE), wanted.find(&table.aggregatetype)];
            if types == [None, None] {
                wanted.need(TYPE);
            }
            CloudEvent {
                source: source.clone(),
                types,
            }
        });
        let extras = Extras {
            columns,
            object,
            cloud_event,
            position: mapping.position_headers,
        };
        let any = !extras.columns.is_empty()
            || extras.object.is_some()
            || extras.cloud_event.is_some()
            || extras.position;
        let shape = Shape {
            slots: Vec::new(),
            names: wanted.names.clone(),
            id,
            payload,
            subject,
            body: Body::of_type(type_id(&table.payload)),
            extras: any.then(|| Box::new(extras)),
        };
        let plan = Plan {
            source,
            label,
            shape: Arc::new(shape),
        };
        (plan, wanted)
    }

    /// Says where in a row the columns stand.
    pub(super) fn find_columns<'a>(&mut self, columns: impl Iterator<Item = &'a str>) {
        let slot = |name: &str| {
            let found = self.names.iter().position(|wanted| wanted == name);
            found.and_then(|slot| u8::try_from(slot).ok())
        };
        let slots = columns.map(|name| slot(name).unwrap_or(UNUSED)).collect();
        // nobody shares it before its columns are known
        if let Some(shape) = Arc::get_mut(&mut self.shape) {
            shape.slots = slots;
        }
    }

    /// Shares the shape of the table before it, where that is the same.
    pub(super) fn share(&mut self, last: &mut Option<Arc<Shape>>) {
        match last {
            Some(last) if *last == self.shape => self.shape = Arc::clone(last),
            other => *other = Some(Arc::clone(&self.shape)),
        }
    }

    /// The values that take part, of a row that has one for each column.
    pub(super) fn pick<'a, const N: usize>(
        &self,
        values: impl Iterator<Item = Value<'a>>,
        place: Place,
    ) -> Result<[Value<'a>; N], MapError> {
        let mut picked = [Value::Null; N];
        let mut slots = self.slots.iter();
        let mut count = 0;
        for value in values {
            let slot = slots.next().copied().unwrap_or(UNUSED);
            if let Some(place) = picked.get_mut(usize::from(slot)) {
                *place = value;
            }
            count += 1;
        }
        match (&self.source, count == self.slots.len()) {
            (EventSource::Row(table), false) => Err(MapError::ValueCount {
                table: table.clone(),
                columns: self.slots.len(),
                values: count,
                at: place.position.commit_lsn,
            }),
            _ => Ok(picked),
        }
    }

    /// What each column of a row is to the event.
    pub(super) fn roles(&self) -> Vec<Role> {
        let role = |&slot: &u8| match usize::from(slot) {
            slot if slot == self.payload => Role::Payload,
            slot if slot < self.names.len() => Role::Part,
            _ => Role::Unused,
        };
        self.slots.iter().map(role).collect()
    }

    /// How long the payload was, where it was cut.
    pub(super) fn cut_payload_len(&self, picked: &[Value<'_>]) -> Option<usize> {
        match value_at(picked, self.payload) {
            Value::Cut { len, .. } => Some(len),
            _ => None,
        }
    }

    /// The body is JSON, which is UTF-8 by its standard.
    pub(super) fn has_json_body(&self) -> bool {
        self.body == Body::CompactJson
    }

    pub(super) fn object(&self) -> Option<usize> {
        self.extras.as_ref()?.object
    }

    /// What a person calls a part of the event.
    pub(super) fn name_of(&self, part: Part) -> String {
        let kind = match self.source {
            EventSource::Row(_) => "column",
            EventSource::Message(_) => "member",
        };
        match part {
            Part::Slot(slot) => {
                let name = self.names.get(slot).map_or("", String::as_str);
                format!("{kind} {name}")
            }
            Part::Subject => "its subject".to_string(),
            Part::Header(name) => format!("header {name:?}"),
            Part::Headers => "its headers".to_string(),
            Part::Content => "its content".to_string(),
        }
    }

    pub(super) fn write_id(&self, picked: &[Value<'_>], out: &mut Vec<u8>) -> Result<(), Flaw> {
        let id = text_at(picked, self.id)?;
        if id.is_empty() {
            return Err(Flaw {
                part: Part::Slot(self.id),
                problem: ValueProblem::Empty,
            });
        }
        message_id::write_message_id(id, out);
        Ok(())
    }

    pub(super) fn write_subject(
        &self,
        picked: &[Value<'_>],
        out: &mut Vec<u8>,
    ) -> Result<bool, Flaw> {
        self.subject.write(|slot| text_at(picked, slot), out)
    }

    pub(super) fn write_body(&self, picked: &[Value<'_>], out: &mut Vec<u8>) -> Result<(), Flaw> {
        let payload = value_at(picked, self.payload);
        write_body(payload, self.body, out).map_err(|problem| Flaw {
            part: Part::Slot(self.payload),
            problem,
        })
    }

    pub(super) fn write_headers(
        &self,
        extras: &Extras,
        picked: &[Value<'_>],
        place: Place,
        encode: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Flaw> {
        let many = |_| Flaw {
            part: Part::Headers,
            problem: ValueProblem::ManyHeaders,
        };
        let mut lines = Lines::new(out, encode, extras.cloud_event.is_some());
        if let Some(event) = &extras.cloud_event {
            lines.add_attribute("ce-specversion", "1.0");
            lines.add_attribute("ce-id", text_at(picked, self.id)?);
            lines.add_attribute("ce-source", &event.source);
            let given = event.types.iter().flatten();
            let first = given
                .copied()
                .find(|&slot| value_at(picked, slot) != Value::Null);
            match (first, event.types) {
                (Some(slot), _) => lines.add_attribute("ce-type", text_at(picked, slot)?),
                (None, [Some(slot), _] | [None, Some(slot)]) => {
                    text_at(picked, slot)?;
                }
                (None, [None, None]) => {}
            }
            lines.add_plain("ce-time", format_args!("{}", time(place.commit_time_us)));
            lines.add_attribute("ce-datacontenttype", self.body.content_type());
        }
        if extras.position {
            lines.add_plain(COMMIT_TIME, format_args!("{}", time(place.commit_time_us)));
            lines.add_plain(TRANSACTION, format_args!("{}", place.xid));
        }
        let bad = |error| match error {
            LineError::NotPlain { name } => Flaw {
                part: Part::Header(name),
                problem: ValueProblem::BadHeader,
            },
            LineError::Full => many(Full),
        };
        for (name, slot) in &extras.columns {
            if value_at(picked, *slot) != Value::Null {
                lines.add(name, text_at(picked, *slot)?).map_err(bad)?;
            }
        }
        if let Some(slot) = extras.object
            && value_at(picked, slot) != Value::Null
        {
            let object = text_at(picked, slot)?;
            lines
                .add_object(object, |name| extras.gives(name))
                .map_err(|error| match error {
                    ObjectError::Line(error) => bad(error),
                    ObjectError::NoObject => Flaw {
                        part: Part::Slot(slot),
                        problem: ValueProblem::NoObject,
                    },
                })?;
        }
        lines.finish().map_err(many)
    }
}

impl Extras {
    /// Whether there is a header of this name beside those of the object.
    pub(super) fn gives(&self, name: &str) -> bool {
        const OF_CLOUD_EVENT: [&str; 6] = [
            "ce-specversion",
            "ce-id",
            "ce-source",
            "ce-type",
            "ce-time",
            "ce-datacontenttype",
        ];
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        self.columns.iter().any(|(own, _)| is(own))
            || self.cloud_event.is_some() && OF_CLOUD_EVENT.into_iter().any(is)
    }
}

/// A time of Postgres as RFC 3339 has it, in UTC.
fn time(since_2000_us: i64) -> jiff::Timestamp {
    const UNIX_TO_2000_US: i64 = 946_684_800_000_000;
    let since_1970_us = since_2000_us.saturating_add(UNIX_TO_2000_US);
    jiff::Timestamp::from_microsecond(since_1970_us).unwrap_or_default()
}

fn value_at<'a>(picked: &[Value<'a>], slot: usize) -> Value<'a> {
    picked.get(slot).copied().unwrap_or(Value::Null)
}

fn text_at<'a>(picked: &[Value<'a>], slot: usize) -> Result<&'a str, Flaw> {
    text(value_at(picked, slot)).map_err(|problem| Flaw {
        part: Part::Slot(slot),
        problem,
    })
}

fn text(value: Value<'_>) -> Result<&str, ValueProblem> {
    match value {
        Value::Text(bytes) => std::str::from_utf8(bytes).map_err(|_| ValueProblem::NotUtf8),
        Value::Null => Err(ValueProblem::Null),
        Value::UnchangedToast => Err(ValueProblem::UnchangedToast),
        Value::Binary(_) => Err(ValueProblem::Binary),
        Value::Cut { .. } => Err(ValueProblem::TooLarge),
        Value::Undecodable(_) => Err(ValueProblem::NoEquivalent),
    }
}

fn write_body(payload: Value<'_>, body: Body, out: &mut Vec<u8>) -> Result<(), ValueProblem> {
    match payload {
        Value::Text(bytes) => write_text(bytes, body, out),
        Value::Null if body == Body::CompactJson => {
            out.extend_from_slice(b"null");
            Ok(())
        }
        Value::Null => Ok(()),
        Value::UnchangedToast => Err(ValueProblem::UnchangedToast),
        Value::Binary(_) => Err(ValueProblem::Binary),
        // where it is parked, what there is of it goes with it
        Value::Cut { kept, .. } => {
            let _ = write_text(kept, body, out);
            Err(ValueProblem::TooLarge)
        }
        Value::Undecodable(bytes) => {
            out.extend_from_slice(bytes);
            Err(ValueProblem::NoEquivalent)
        }
    }
}

fn write_text(bytes: &[u8], body: Body, out: &mut Vec<u8>) -> Result<(), ValueProblem> {
    match body {
        Body::CompactJson => json::compact_into(bytes, out),
        Body::RawBytes => decode_bytea(bytes, out).ok_or(ValueProblem::NotBytea)?,
        Body::Text => out.extend_from_slice(bytes),
    }
    Ok(())
}

/// Appends the bytes that a `bytea` in text form stands for, or `None` when it is not one.
///
/// `bytea_output` of the role or the database decides between `hex` and the older `escape`:
/// <https://www.postgresql.org/docs/current/datatype-binary.html>.
fn decode_bytea(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    if let Some(hex) = text.strip_prefix(br"\x") {
        let (pairs, odd) = hex.as_chunks::<2>();
        if !odd.is_empty() {
            return None;
        }
        out.reserve(pairs.len());
        for &[high, low] in pairs {
            out.push(digit(high, 16)? << 4 | digit(low, 16)?);
        }
        return Some(());
    }
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match *rest {
            [b'\\', ref after @ ..] => {
                out.push(b'\\');
                rest = after;
            }
            [high @ b'0'..=b'3', middle, low, ref after @ ..] => {
                out.push(digit(high, 8)? << 6 | digit(middle, 8)? << 3 | digit(low, 8)?);
                rest = after;
            }
            _ => return None,
        }
    }
    Some(())
}

fn digit(byte: u8, radix: u32) -> Option<u8> {
    u8::try_from(char::from(byte).to_digit(radix)?).ok()
}
