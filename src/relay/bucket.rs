//! The checkpoint's key-value bucket over a connection: creates it, reads the key and writes it. What is written when,
//! and what an answer means, [`super::checkpoint`] decides.

use super::checkpoint::{CheckpointStore, Opened, Overtaken, Value, WITHOUT, Write};
use super::core::memory::Marks;
use super::error::Error;
use crate::jetstream;
use crate::jetstream::ack::{AckError, AckErrorKind, PubAck, parse_ack};
use crate::jetstream::client::{Api, Link};
use crate::jetstream::streams;
use crate::nats;
use std::time::{Duration, Instant};

/// Answers to writes of the checkpoint bear its number above this; those to looks at a stream bear the stream's index.
const TOKENS: u64 = 1 << 32;

/// On a new connection: creates the bucket if it is missing and reads the key. What keeps it from being
/// used is warned of, and no error, unless the connection was lost by it. `None`: there is no checkpoint.
pub fn open(
    store: &mut CheckpointStore,
    link: &Link,
    replicas: u32,
    timeout: Duration,
) -> Result<Option<Opened>, Error> {
    if store.is_forbidden() {
        return Ok(None);
    }
    store.closed();
    match read(store, link, replicas, timeout) {
        Ok(value) => Ok(Some(store.opened(value, Instant::now()))),
        Err(jetstream::Error::Nats(error)) => Err(lost(store, error)),
        Err(error) if is_passing(&error) => Err(Error::Nats(error)),
        Err(error) => {
            log::warn!(
                bucket = store.bucket(), cause:% = error;
                "going on without the checkpoint: {WITHOUT}"
            );
            store.forbid();
            Ok(None)
        }
    }
}

/// The connection was lost; if it was by what the checkpoint may not do, it is not tried again. Returns
/// what to say of it.
pub fn lost(store: &mut CheckpointStore, error: nats::Error) -> Error {
    let ours = |reason: &str| {
        reason.contains("$KV.") || reason.contains(&format!("KV_{}", store.bucket()))
    };
    match error {
        nats::Error::Permission { reason } if ours(&reason) => {
            store.forbid();
            Error::WithoutCheckpoint(reason)
        }
        error => {
            store.closed();
            error.into()
        }
    }
}

/// Before anything is published over this connection: see [`CheckpointStore::begin`]. Returns what was written, if
/// there was need to.
pub fn begin<'s>(
    store: &'s mut CheckpointStore,
    link: &Link,
    marks: Marks,
    timeout: Duration,
) -> Result<Option<&'s Marks>, Error> {
    let Some(write) = store.begin(marks, Instant::now()) else {
        return Ok(None);
    };
    let number = write.number;
    match put(store, link, write, timeout) {
        Ok(ack) => {
            let written = store.written(number, Ok(ack), Instant::now());
            Ok(written.unwrap_or_default())
        }
        // the bucket is there, over the API's prefix, but its subjects lead nowhere; where they have led somewhere before, its
        // leader is being chosen
        Err(jetstream::Error::Api { source, .. })
            if source.kind() == AckErrorKind::NoResponders && store.is_new() =>
        {
            let subject = store.subject();
            log::warn!(
                bucket = store.bucket(), subject;
                "going on without the checkpoint: nobody answers on its subject, which is outside of the API's prefix: {WITHOUT}"
            );
            store.forbid();
            Ok(None)
        }
        Err(jetstream::Error::Nats(error)) => Err(lost(store, error)),
        Err(error) => {
            store.closed();
            Err(error.into())
        }
    }
}

/// Sends what [`CheckpointStore::write`] wants written; the answer comes under [`answers_to`].
pub fn send(store: &CheckpointStore, link: &Link, write: Write) {
    let token = TOKENS + write.number;
    link.put(token, &store.subject(), write.revision, &write.body);
}

/// The number of the write that an answer with this token is about.
pub fn answers_to(token: u64) -> Option<u64> {
    token.checked_sub(TOKENS)
}

/// Takes the answer to a write.
pub fn answered(
    store: &mut CheckpointStore,
    number: u64,
    answer: Result<Vec<u8>, AckError>,
) -> Result<Option<&Marks>, Overtaken> {
    let answer = answer.and_then(|body| parse_ack(&body, None));
    store.written(number, answer, Instant::now())
}

fn read(
    store: &CheckpointStore,
    link: &Link,
    replicas: u32,
    timeout: Duration,
) -> Result<Value, jetstream::Error> {
    let stream = format!("KV_{}", store.bucket());
    let info = match streams::info(link, &stream, timeout)? {
        Some(info) => Some(info),
        None => {
            let (api, body) = streams::create_bucket_request(store.bucket(), replicas);
            let answer = link.call(&api, &body, timeout)?;
            streams::parse_info(&answer).map_err(|source| jetstream::Error::Api { api, source })?
        }
    };
    let is_replicated = info
        .as_ref()
        .is_some_and(|info| info.config.num_replicas > 1);
    let mut value = Value {
        time_ms: info.and_then(|info| milliseconds(&info.ts)),
        ..Value::default()
    };
    let last = streams::last_message_request(&stream, &store.subject());
    let Some(message) = streams::message(link, last, timeout)? else {
        return Ok(value);
    };
    (value.seq, value.revision, value.body) = (message.seq, message.seq, message.data);
    value.stored_ms = milliseconds(&message.time);
    if is_replicated {
        // a leader that does not know yet that it no longer is one answers with what it has; but it can write nothing
        let same = Write {
            number: 0,
            revision: value.revision,
            body: value.again(),
        };
        value.revision = match put(store, link, same, timeout) {
            Err(jetstream::Error::Api { api, source })
                if source.kind() == AckErrorKind::NoResponders =>
            {
                // its leader is being chosen: the same as no answer
                return Err(jetstream::Error::ApiTimeout {
                    api,
                    after: timeout,
                });
            }
            answer => answer?.seq,
        };
    }
    Ok(value)
}

fn milliseconds(rfc3339: &str) -> Option<i64> {
    let time = rfc3339.parse::<jiff::Timestamp>().ok()?;
    Some(time.as_millisecond())
}

/// Writes the key, and waits for the answer.
fn put(
    store: &CheckpointStore,
    link: &Link,
    write: Write,
    timeout: Duration,
) -> Result<PubAck, jetstream::Error> {
    let api = store.subject();
    let answer = link.put_now(&api, write.revision, &write.body, timeout)?;
    parse_ack(&answer, None).map_err(|source| jetstream::Error::Api { api, source })
}

/// Whether another try may go better: what was read was not the newest, nobody leads the bucket, or no answer came.
fn is_passing(error: &jetstream::Error) -> bool {
    match error {
        jetstream::Error::ApiTimeout { .. } => true,
        jetstream::Error::Api { source, .. } => matches!(
            source.kind(),
            AckErrorKind::WrongLastSequence(_) | AckErrorKind::Busy
        ),
        _ => false,
    }
}
