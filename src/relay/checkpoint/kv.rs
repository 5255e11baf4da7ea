//! The checkpoint's key-value bucket over a connection: creates it, reads the key and writes it. What is written when,
//! and what an answer means, [`store`](super::store) decides.

use super::record::{Anchor, Cut, Record};
use super::store::{Store, Value, Write};
use crate::jetstream::ack::{AckError, AckErrorKind, ApiError, PubAck, parse_ack};
use crate::jetstream::client::{Api, Link};
use crate::jetstream::{self, bucket, streams};
use crate::nats;
use crate::outbox::flags::Flags;
use crate::outbox::lineage::{Lineage, NotInHistory};
use crate::outbox::position::SourcePosition;
use crate::postgres::Lsn;
use serde::Deserialize;
use std::time::Duration;

/// Why the bucket cannot be used.
#[derive(Debug)]
pub enum Error {
    /// Another try may go better: no answer, no leader, what was read was not the newest.
    Passing(jetstream::Error),
    /// Another try goes better once somebody has made room.
    NoRoom(ApiError),
    /// It will not: no permission, or the bucket's subjects lead nowhere.
    Lasting(String),
    /// The key holds what no relay has written.
    Unreadable(String),
}

/// Answers to writes of the checkpoint bear its number above this; those to looks at the streams lie below.
const TOKENS: u64 = 1 << 32;

/// Sends what is to be written; the answer comes under [`answers_to`].
pub fn send(link: &Link, subject: &str, write: &Write) {
    let subject = bucket::key_write_subject(link.api_prefix(), subject);
    link.put(TOKENS + write.number, &subject, write.revision, &write.body);
}

/// The number of the write that an answer with this token is about.
pub fn answers_to(token: u64) -> Option<u64> {
    token.checked_sub(TOKENS)
}

/// A record can only be sent if NATS takes it.
///
/// # Errors
/// [`Error::Lasting`].
pub fn fits(link: &Link, write: &Write) -> Result<(), Error> {
    /// Of the header that it is sent with.
    const HEADER_BYTES: usize = 100;
    let (has, takes) = (write.body.len() + HEADER_BYTES, link.max_payload());
    match has <= takes {
        true => Ok(()),
        false => Err(Error::Lasting(format!(
            "its record, which names every stream of the prefix, has {has} bytes, and NATS takes {takes} (max_payload): raise \
             that, or have fewer streams"
        ))),
    }
}

/// Writes the key, and waits for the answer.
pub fn write(
    link: &Link,
    subject: &str,
    write: &Write,
    timeout: Duration,
) -> Result<PubAck, Error> {
    fits(link, write)?;
    put(link, subject, write.revision, &write.body, timeout).map_err(|error| match error {
        jetstream::Error::Api { source, .. }
            if source == AckError::NoResponders && write.revision == 0 =>
        {
            Error::Lasting(format!("nobody answers on {subject}"))
        }
        error if lacks_room(&error).is_some() => sort_write(error),
        // a write that is refused shows that the key holds something else: it is read again
        error @ jetstream::Error::Api { .. } => Error::Passing(error),
        error => sort(error),
    })
}

fn put(
    link: &Link,
    subject: &str,
    revision: u64,
    body: &[u8],
    timeout: Duration,
) -> Result<PubAck, jetstream::Error> {
    let subject = bucket::key_write_subject(link.api_prefix(), subject);
    let answer = link.put_now(&subject, revision, body, timeout)?;
    parse_ack(&answer, None).map_err(|source| jetstream::Error::Api {
        api: subject,
        source,
    })
}

/// Creates the bucket if it is missing, with so many replicas, and reads the key of the slot on this system; without a value,
/// that of the first version.
pub fn read(
    store: &Store,
    link: &Link,
    lineage: &Lineage,
    replicas: u32,
    timeout: Duration,
) -> Result<Value, Error> {
    let stream = format!("KV_{}", store.bucket());
    let info = open(link, store.bucket(), replicas, timeout)?;
    let mut value = Value {
        time_ms: info
            .as_ref()
            .and_then(|info| milliseconds(&info.ts))
            .unwrap_or_else(local_ms),
        ..Value::default()
    };
    let subject = store.subject(lineage.source.system_id);
    let get = |subject: &str| {
        let last = streams::last_message_request(&stream, subject);
        streams::message(link, last, timeout).map_err(sort)
    };
    let Some(message) = get(&subject)? else {
        let fault = info.and_then(|info| bucket::lacks_room(&info, false));
        if let Some(fault) = fault.filter(|fault| fault.is_fatal) {
            return Err(at_fault(store.bucket(), fault));
        }
        if let Some(old) = get(&store.old_subject())? {
            value.record = of_first_version(&old.data, lineage);
            value.stored_ms = value.time_ms;
        }
        return Ok(value);
    };
    value.stored_ms = milliseconds(&message.time).unwrap_or(value.time_ms);
    if message.data.is_empty() {
        // deleted or purged, or aged out: a marker stands for it
        value.revision = message.seq;
        return Ok(value);
    }
    let mut record: Record = serde_json::from_slice(&message.data).map_err(|error| {
        Error::Unreadable(format!(
            "the key {subject} holds no record of a relay ({error}); if nothing else uses it, delete it (nats kv del)"
        ))
    })?;
    if let Some(ripening) = &mut record.ripening {
        ripening.since_ms.get_or_insert(value.stored_ms);
    }
    value.revision = message.seq;
    if info.is_some_and(|info| info.config.num_replicas > 1) {
        // a leader that does not know yet that it no longer is one answers with what it has; but it can write nothing
        let again = put(link, &subject, value.revision, &record.body(), timeout);
        value.revision = again.map_err(sort_write)?.seq;
    }
    value.record = Some(record);
    Ok(value)
}

fn open(
    link: &Link,
    bucket: &str,
    replicas: u32,
    timeout: Duration,
) -> Result<Option<streams::StreamInfo>, Error> {
    let stream = format!("KV_{bucket}");
    let info = streams::info(link, &stream, timeout).map_err(sort)?;
    if let Some(info) = info {
        let mut faults = bucket::faults(bucket, &info, replicas).into_iter();
        return match faults.find(|fault| fault.is_fatal) {
            None => Ok(Some(info)),
            Some(fault) => Err(at_fault(bucket, fault)),
        };
    }
    let create = |max_bytes| {
        let (api, body) = bucket::create_bucket_request(bucket, replicas, max_bytes);
        let answer = link.call(&api, &body, timeout)?;
        let info = streams::parse_info(&answer);
        info.map_err(|source| jetstream::Error::Api { api, source })
    };
    let made = match create(None) {
        Err(error)
            if error
                .api_error()
                .is_some_and(|it| it.err_code == bucket::MAX_BYTES_REQUIRED) =>
        {
            create(Some(bucket::BUCKET_BYTES))
        }
        made => made,
    };
    made.map_err(|error| {
        let code = error.api_error().map(|it| it.err_code);
        let subjects = bucket::bucket_subjects(bucket);
        let others = (code == Some(bucket::SUBJECTS_OVERLAP))
            .then(|| streams::list(link, &subjects, timeout).ok()?.into_iter().next());
        match others.flatten() {
            Some(other) => Error::Lasting(format!(
                "stream {} captures {subjects}, which are the bucket's subjects; take them out of that stream",
                other.config.name
            )),
            None => sort(error),
        }
    })
}

fn at_fault(bucket: &str, fault: bucket::Fault) -> Error {
    let remedy = match fault.edit {
        Some(edit) => format!("nats stream edit KV_{bucket} {edit}"),
        None => format!(
            "with every relay that uses it stopped, delete it (nats kv del {bucket}), and the relay makes it anew; or name another with -checkpoint"
        ),
    };
    Error::Lasting(format!(
        "it {}, so that {}; {remedy}",
        fault.what, fault.why
    ))
}

/// The limit that a write has met.
fn lacks_room(error: &jetstream::Error) -> Option<&ApiError> {
    /// JetStream not enabled, for the account or at all.
    const SWITCHED_OFF: [u32; 2] = [10039, 10076];
    let refused = error.api_error()?;
    let is_limit = refused.kind() == AckErrorKind::NoRoom;
    (is_limit && !SWITCHED_OFF.contains(&refused.err_code)).then_some(refused)
}

/// As [`sort`], of a write.
fn sort_write(error: jetstream::Error) -> Error {
    match lacks_room(&error) {
        Some(refused) => Error::NoRoom(refused.clone()),
        None => sort(error),
    }
}

/// Whether another try may go better.
fn sort(error: jetstream::Error) -> Error {
    let passes = match &error {
        jetstream::Error::ApiTimeout { .. } => true,
        jetstream::Error::Nats(error) => !matches!(error, nats::Error::Permission { .. }),
        jetstream::Error::Api { source, .. } => matches!(
            source.kind(),
            // without responders: where it was read before, its leader is being chosen
            AckErrorKind::WrongLastSequence(_) | AckErrorKind::Busy
        ),
    };
    match passes {
        true => Error::Passing(error),
        false => Error::Lasting(error.to_string()),
    }
}

/// What the first version wrote says how far it was: everything before `reached`.
fn of_first_version(body: &[u8], lineage: &Lineage) -> Option<Record> {
    #[derive(Deserialize)]
    struct Old {
        reached: Option<String>,
        publication: Option<String>,
    }
    let old: Old = serde_json::from_slice(body).ok()?;
    let reached: SourcePosition = old.reached?.parse().ok()?;
    let is_ours = reached.source.slot == lineage.source.slot
        && reached.source.system_id == lineage.source.system_id;
    let lsn: Lsn = match lineage.left_at(reached.source.timeline) {
        Ok(None) => reached.position.commit_lsn,
        Ok(Some(lsn)) => reached.position.commit_lsn.min(lsn),
        Err(NotInHistory) => return None,
    };
    is_ours.then(|| Record {
        timeline: lineage.source.timeline,
        young: Cut {
            anchor: Anchor::bare(lsn),
            stored_lsn: lsn,
            streams: Vec::new(),
            quiescent: false,
            lenient_upto: Lsn::INVALID,
            // it does not say
            flags: Flags::default(),
            is_empty: false,
        },
        ripening: None,
        matured: None,
        told_lsn: lsn,
        publication: old.publication,
        writer: String::new(),
        writes: 0,
    })
}

fn milliseconds(rfc3339: &str) -> Option<i64> {
    let time = rfc3339.parse::<jiff::Timestamp>().ok()?;
    Some(time.as_millisecond())
}

/// Servers before 2.10 do not report their time.
fn local_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
