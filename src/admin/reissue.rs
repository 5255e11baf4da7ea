//! Events that go to the streams once more, as messages of the prefix that Postgres writes into its WAL: so the relay publishes them, and fence,
//! order and promises stay one. They have another position, that of the new transaction.
//!
//! The message is made of the event (subject, id, headers and body), and mapped as the relay will map it: what does not
//! come out as it was is not written.

use super::Error;
use super::database::{Access, Database};
use super::sides;
use super::slot_copy::MESSAGES;
use crate::config::Config;
use crate::exit::Exit;
use crate::outbox::batch::{Batch, Change, Fate, OutboxEvent};
use crate::outbox::header::ENCODED;
use crate::outbox::mapper::Mapper;
use crate::outbox::mapping::{Mapping, TableMapping};
use crate::outbox::plan::{Place, Value};
use crate::outbox::{park, percent};
use crate::postgres::connection::quote_literal;
use serde_json::value::RawValue;
use serde_json::{Value as Json, json};
use std::fmt::Write;

/// So many events, or bytes of them, go in one transaction.
const AT_ONCE: usize = 200;
const AT_ONCE_BYTES: usize = 1024 * 1024;

/// What every event gets anew: from its transaction, or from how it was parked and found.
const ANEW: [&str; 4] = [
    "Outbox-Commit-Time",
    "Outbox-Transaction",
    ENCODED,
    "ce-time",
];

/// An event as a message.
pub struct Carried {
    /// Its id.
    pub id: String,
    /// Its subject.
    pub subject: String,
    /// The message.
    pub content: String,
}

/// Makes messages of events.
pub struct Carrier {
    mapping: Mapping,
    members: TableMapping,
    mapper: Mapper,
    prefix: String,
}

/// Writes them.
pub struct Reissue {
    carrier: Carrier,
    database: Database,
    waiting: Vec<Carried>,
}

impl Carrier {
    /// By the relay's flags.
    pub fn new(config: &Config) -> Result<Carrier, Error> {
        let Some(prefix) = config.mapping.message_prefix.clone() else {
            return Err(refused(
                "the relay takes no messages (-no-messages)",
                "run relay and command without -no-messages, or publish by hand",
            ));
        };
        Ok(Carrier {
            mapper: Mapper::new(&config.mapping),
            members: config.mapping.of_messages(),
            mapping: config.mapping.clone(),
            prefix,
        })
    }

    /// The statement that writes it.
    pub fn sql(&self, content: &str) -> String {
        format!(
            "SELECT pg_catalog.pg_logical_emit_message(true, {}, {});",
            quote_literal(&self.prefix),
            quote_literal(content)
        )
    }

    /// The message that becomes this event, or why there is none. `headers` are lines, each after `\r\n`.
    pub fn content(
        &self,
        subject: &str,
        id: &str,
        headers: &str,
        body: &[u8],
    ) -> Result<String, String> {
        let payload: &RawValue = serde_json::from_slice(body)
            .map_err(|_| "its body is not JSON, as that of a message is")?;
        let id_text = percent::decode(id).ok_or("its id was shortened")?;
        let parts = self.members.subject.values(&self.mapping.prefix, subject);
        let parts = parts.ok_or("its subject is not one that the template makes of a message")?;
        let mut members = vec![("id".to_string(), json!(id_text))];
        for (name, value) in parts {
            if !matches!(name, "id" | "payload") {
                members.push((self.members.column(name).to_string(), json!(value)));
            }
        }
        members.extend(self.headers(headers)?);
        let mut content = String::from("{");
        for (name, value) in &members {
            // a string of JSON is one of the message's
            let _ = write!(content, "{}:{value},", json!(name));
        }
        let _ = write!(content, "\"payload\":{}}}", payload.get());
        self.compare(&content, (subject, id, headers, body))?;
        Ok(content)
    }

    /// The members that become these headers.
    fn headers(&self, lines: &str) -> Result<Vec<(String, Json)>, String> {
        let lines: Vec<(&str, &str)> = pairs(lines).collect();
        let encoded: Vec<&str> = lines
            .iter()
            .filter(|(name, _)| *name == ENCODED)
            .flat_map(|(_, names)| names.split(", "))
            .collect();
        let mut members = Vec::new();
        let mut object: Vec<(String, Vec<String>)> = Vec::new();
        for (name, value) in lines {
            if ANEW.contains(&name) {
                continue;
            }
            let shortened = || format!("header {name} cannot be read back");
            let value = match encoded.contains(&name) && !value.is_empty() {
                true => percent::decode(value).ok_or_else(shortened)?,
                false => value.to_string(),
            };
            let mapped = self.members.headers.iter().find(|it| it.name == name);
            match (mapped, name) {
                (Some(header), _) => members.push((header.column.clone(), json!(value))),
                (None, "traceparent" | "tracestate") => {
                    members.push((name.to_string(), json!(value)));
                }
                (None, "ce-type") if self.mapping.cloudevents.is_some() => {
                    let value = percent::decode(&value).ok_or_else(shortened)?;
                    members.push(("type".to_string(), json!(value)));
                }
                // made of the flags and the rest
                (None, "ce-specversion" | "ce-id" | "ce-source" | "ce-datacontenttype")
                    if self.mapping.cloudevents.is_some() => {}
                _ => {
                    let name = percent::decode(name).ok_or_else(shortened)?;
                    match object.iter_mut().find(|(known, _)| *known == name) {
                        Some((_, values)) => values.push(value),
                        None => object.push((name, vec![value])),
                    }
                }
            }
        }
        let object = object
            .into_iter()
            .map(|(name, mut values)| match values.len() {
                1 => (name, json!(values.pop())),
                _ => (name, json!(values)),
            });
        let object: serde_json::Map<String, Json> = object.collect();
        if !object.is_empty() {
            members.push(("headers".to_string(), Json::Object(object)));
        }
        Ok(members)
    }

    /// The relay makes the same event of the message.
    fn compare(
        &self,
        content: &str,
        (subject, id, headers, body): (&str, &str, &str, &[u8]),
    ) -> Result<(), String> {
        let mut batch = Batch::default();
        let content = Value::Text(content.as_bytes());
        let place = Place::default();
        let mapped = self.mapper.message(content, place, &mut batch);
        mapped.map_err(|error| format!("the relay would halt at it again: {error}"))?;
        let [Change::Event(spans)] = batch.changes() else {
            return Err("nothing would become of it".into());
        };
        let OutboxEvent {
            fate,
            subject: new_subject,
            id: new_id,
            headers: new_headers,
            body: new_body,
            ..
        } = batch.event(spans);
        if fate != Fate::Publish {
            let cause = park::cause(new_headers);
            return Err(format!("the relay would not publish it: {cause}"));
        }
        let sorted = |lines: &str| {
            let mut lines: Vec<String> = pairs(lines)
                .filter(|(name, _)| !ANEW.contains(name) || *name == ENCODED)
                .map(|(name, value)| format!("{name}: {value}"))
                .collect();
            lines.sort_unstable();
            lines
        };
        let other = match () {
            () if new_subject != subject => "another subject",
            () if new_id != id => "another id",
            () if new_body != body => "another body",
            () if sorted(new_headers) != sorted(headers) => "other headers",
            () => return Ok(()),
        };
        Err(format!("as a message it would have {other}"))
    }
}

/// Name and value of header lines, each after `\r\n`.
fn pairs(lines: &str) -> impl Iterator<Item = (&str, &str)> {
    lines.split("\r\n").filter_map(|line| line.split_once(": "))
}

impl Reissue {
    /// Connects, and keeps others from doing the same until it ends: what one writes the other could not see yet.
    pub fn open(config: &Config) -> Result<Reissue, Error> {
        let carrier = Carrier::new(config)?;
        let mut database = sides::connect(config, Access::Write)?;
        if database.version < MESSAGES {
            return Err(refused(
                "this server sends no messages, which came with Postgres 14",
                "publish by hand",
            ));
        }
        let row = database.row(
            "lock out others who publish again",
            "SELECT pg_catalog.current_setting('server_encoding'), \
             pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('jetstream-outbox ' || $1, 0))",
            &[&config.slot],
        )?;
        let (encoding, locked) = row.map_or((String::new(), false), |row| (row.get(0), row.get(1)));
        if encoding != "UTF8" {
            return Err(refused(
                &format!("the database's encoding is {encoding}, and a message must be UTF-8"),
                "publish by hand",
            ));
        }
        match locked {
            true => Ok(Reissue {
                carrier,
                database,
                waiting: Vec::new(),
            }),
            false => Err(Error::Wrong {
                what: format!(
                    "publish again: another compare or unpark does so for slot {}",
                    config.slot
                ),
                remedy: "wait until it has ended".into(),
                exit: Exit::SlotInUse,
            }),
        }
    }

    /// What makes the messages.
    pub fn carrier(&self) -> &Carrier {
        &self.carrier
    }

    /// Writes it with others; `told` learns of each that is committed.
    pub fn add(
        &mut self,
        event: Carried,
        told: impl FnMut(&Carried) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.waiting.push(event);
        let bytes: usize = self.waiting.iter().map(|it| it.content.len()).sum();
        match self.waiting.len() >= AT_ONCE || bytes >= AT_ONCE_BYTES {
            true => self.flush(told),
            false => Ok(()),
        }
    }

    /// Writes what there is.
    pub fn flush(
        &mut self,
        mut told: impl FnMut(&Carried) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let events = std::mem::take(&mut self.waiting);
        if events.is_empty() {
            return Ok(());
        }
        let contents: Vec<&str> = events.iter().map(|it| it.content.as_str()).collect();
        self.database.rows(
            "write messages",
            "SELECT pg_catalog.pg_logical_emit_message(true, $1::text, content)::text \
             FROM unnest($2::text[]) AS content",
            &[&self.carrier.prefix, &contents],
        )?;
        events.iter().try_for_each(&mut told)
    }
}

fn refused(why: &str, remedy: &str) -> Error {
    Error::Wrong {
        what: format!("publish again by way of Postgres: {why}"),
        remedy: remedy.into(),
        exit: Exit::Configuration,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};
    use crate::postgres::Lsn;

    fn config(args: &[&str]) -> Config {
        let args = [&["-db", "host=h"], args].concat();
        match cli::parse(args.iter().map(std::ffi::OsString::from)) {
            Ok(Invocation::Relay(cli)) => Config::load(&cli, &|_| None).unwrap(),
            _ => panic!("{args:?} does not start the relay"),
        }
    }

    /// The event that a row of these columns makes goes through a message unchanged, or does not for this reason.
    #[track_caller]
    fn check(args: &[&str], row: &[(&str, &str)], reason: Option<&str>) {
        let config = config(args);
        let carrier = Carrier::new(&config).unwrap();
        let mut mapper = Mapper::new(&config.mapping);
        let columns = row
            .iter()
            .map(|(name, _)| crate::outbox::mapper::ColumnInfo {
                name,
                type_id: match *name {
                    "payload" | "headers" => 3802,
                    _ => 25,
                },
            });
        mapper
            .relation(1, "public", "outbox", columns, Lsn::INVALID)
            .unwrap();
        let mut batch = Batch::default();
        let values = row.iter().map(|(_, value)| Value::Text(value.as_bytes()));
        mapper
            .insert(1, values, Place::default(), &mut batch)
            .unwrap();
        let [Change::Event(spans)] = batch.changes() else {
            panic!("an event");
        };
        let event = batch.event(spans);
        let made = carrier.content(event.subject, event.id, event.headers, event.body);
        match (made, reason) {
            (Ok(_), None) => {}
            (Err(why), Some(part)) => assert!(why.contains(part), "{why}"),
            other => panic!("{args:?} {row:?}: {other:?}"),
        }
    }

    const ID: (&str, &str) = ("id", "id %1\n");
    const TYPE: (&str, &str) = ("aggregatetype", "a.b *");
    const AGGREGATE: (&str, &str) = ("aggregateid", "c.d");
    const PAYLOAD: (&str, &str) = ("payload", "{\"n\": [1.00,  \"\\u00e9\"]}");

    #[test]
    fn an_event_goes_through_a_message_unchanged() {
        let headers = (
            "headers",
            r#"{"k": "v", "n": [1, "x\ny"], "Nats-Msg-Id": "no", "empty": "", "q%": "%"}"#,
        );
        let rest = [
            ("traceparent", "00-1"),
            ("tenant", "t 1 "),
            ("ttl", "5m"),
            ("type", "created"),
        ];
        for args in [
            &[][..],
            &["-header", "tenant=X-Tenant,ttl=Nats-TTL"],
            &["-cloudevents", "/shop", "-header", "tenant=X-Tenant"],
            &["-position-headers"],
            &["-subject", "{prefix}.x.{tenant:lower}-v2.{aggregatetype}"],
        ] {
            let row = [&[ID, TYPE, AGGREGATE, PAYLOAD, headers][..], &rest].concat();
            check(args, &row, None);
        }
    }

    #[test]
    fn what_a_message_cannot_carry_is_said() {
        let long = "x".repeat(2000);
        for (args, row, reason) in [
            (
                &[][..],
                [("id", long.as_str()), TYPE, AGGREGATE, PAYLOAD],
                "id was shortened",
            ),
            (
                &[],
                [ID, TYPE, ("aggregateid", &long), PAYLOAD],
                "subject is not one",
            ),
            (
                &["-table", "outbox:subject={prefix}.{id}"],
                [ID, TYPE, AGGREGATE, PAYLOAD],
                "subject",
            ),
        ] {
            check(args, &row, Some(reason));
        }
        let carrier = Carrier::new(&config(&["-on-bad-subject", "park"])).unwrap();
        let found = carrier.content("events.a.b%20c", "1", "", b"{}");
        assert!(
            found.unwrap_err().contains("would not publish it"),
            "parked again"
        );
        for body in [&b""[..], b"x", b"\xff", b"{} {}"] {
            let found = carrier.content("events.a.b", "1", "", body);
            assert!(found.unwrap_err().contains("not JSON"), "{body:?}");
        }
        // a text, which is not compacted
        let found = carrier.content("events.a.b", "1", "", b"{ }");
        assert!(found.unwrap_err().contains("another body"));
        assert!(Carrier::new(&config(&["-no-messages"])).is_err());
    }

    #[test]
    fn the_statement_is_quoted() {
        let carrier = Carrier::new(&config(&["-message-prefix", "o'clock"])).unwrap();
        assert_eq!(
            carrier.sql(r#"{"a":"it's"}"#),
            r#"SELECT pg_catalog.pg_logical_emit_message(true, 'o''clock', '{"a":"it''s"}');"#
        );
    }
}
