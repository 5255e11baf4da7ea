//! The checkpoint: how far each stream was, kept in a JetStream key-value bucket (ADR-8).
//!
//! It is for streams whose tail does not stay: work-queue and interest retention, purges, max_age. What it
//! says is true whenever it is read (an event that was acknowledged at a sequence stays so), so it is
//! written lazily, and an old one is as good as a new one followed by what the stream itself tells.
//!
//! Each write expects the revision that was read or written before it. A relay that was frozen and revived
//! is refused here, as it is by the fence.

use super::core::Mark;
use crate::jetstream::ack::{AckError, AckErrorKind, parse_ack};
use crate::jetstream::client::Link;
use crate::jetstream::streams;
use crate::jetstream::{self};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How often it is written while events flow.
const INTERVAL: Duration = Duration::from_secs(1);
/// A write without an answer is forgotten after this; the next one tells more anyway.
const PATIENCE: Duration = Duration::from_secs(10);

/// The value of the key.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    streams: Vec<Entry>,
}

/// A [`Mark`] as it is written: positions as the `Outbox-Position` header has them.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    name: String,
    created: String,
    #[serde(flatten)]
    last: Option<Last>,
    #[serde(default)]
    shared: bool,
    confirmed_seq: u64,
}

/// An event, and the sequence that it stands at.
#[derive(Debug, Serialize, Deserialize)]
struct Last {
    seq: u64,
    position: String,
}

/// The key of one slot, and what was last read from or written to it.
#[derive(Debug)]
pub struct CheckpointStore {
    bucket: String,
    slot: String,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The bucket can be written.
    On {
        /// The sequence of the key's last value in the bucket's stream; 0: there is none.
        revision: u64,
        /// What was written last.
        written: Vec<Mark>,
        /// When the write that has no answer yet was sent.
        pending: Option<(Instant, Vec<Mark>)>,
        next: Instant,
    },
    /// Not looked at yet on this connection, or unusable.
    Off,
    /// The server's permissions do not let us: it is not tried again.
    Forbidden,
}

impl CheckpointStore {
    /// The key of `slot` in `bucket`; an empty bucket's name turns it off.
    pub fn new(bucket: &str, slot: &str) -> CheckpointStore {
        let state = if bucket.is_empty() {
            State::Forbidden
        } else {
            State::Off
        };
        CheckpointStore {
            bucket: bucket.to_string(),
            slot: slot.to_string(),
            state,
        }
    }

    /// On a new connection: creates the bucket if it is missing and reads the key. What keeps it from being
    /// used is warned of, and no error, unless the connection was lost by it.
    pub fn open(
        &mut self,
        link: &Link,
        replicas: u32,
        timeout: Duration,
    ) -> Result<Vec<Mark>, jetstream::Error> {
        if matches!(self.state, State::Forbidden) {
            return Ok(Vec::new());
        }
        self.state = State::Off;
        match self.read(link, replicas, timeout) {
            Ok((revision, marks)) => {
                self.state = State::On {
                    revision,
                    written: marks.clone(),
                    pending: None,
                    next: Instant::now(),
                };
                Ok(marks)
            }
            Err(error @ (jetstream::Error::Lost { .. } | jetstream::Error::Permission { .. })) => {
                self.lost(&error);
                Err(error)
            }
            Err(error) => {
                log::warn!(
                    bucket = self.bucket.as_str(), cause:% = error;
                    "going on without the checkpoint: a stream whose messages are consumed away can get repeats after a restart"
                );
                self.state = State::Forbidden;
                Ok(Vec::new())
            }
        }
    }

    /// The connection was lost; if it was by what the checkpoint may not do, it is not tried again.
    pub fn lost(&mut self, error: &jetstream::Error) {
        let ours = |reason: &str| {
            reason.contains("$KV.") || reason.contains(&format!("KV_{}", self.bucket))
        };
        match error {
            jetstream::Error::Permission { reason } if ours(reason) => {
                log::warn!(
                    cause = reason.as_str();
                    "going on without the checkpoint: a stream whose messages are consumed away can get repeats after a restart"
                );
                self.state = State::Forbidden;
            }
            _ if matches!(self.state, State::On { .. }) => self.state = State::Off,
            _ => {}
        }
    }

    fn read(
        &self,
        link: &Link,
        replicas: u32,
        timeout: Duration,
    ) -> Result<(u64, Vec<Mark>), jetstream::Error> {
        let stream = format!("KV_{}", self.bucket);
        if streams::info(link, &stream, timeout)?.is_none() {
            let (api, body) = streams::create_bucket_request(&self.bucket, replicas);
            let answer = link.call(&api, body, timeout)?;
            streams::parse_info(&answer).map_err(|source| jetstream::Error::Api { api, source })?;
        }
        let found = streams::message(
            link,
            streams::last_message_request(&stream, &self.subject()),
            timeout,
        )?;
        let Some(message) = found else {
            return Ok((0, Vec::new()));
        };
        let record: Record = serde_json::from_slice(&message.data).unwrap_or_default();
        Ok((
            message.seq,
            record.streams.into_iter().filter_map(Entry::mark).collect(),
        ))
    }

    fn subject(&self) -> String {
        format!("$KV.{}.{}", self.bucket, self.slot)
    }

    /// Writes `marks` if they are news and it is time. `token` names the answer.
    pub fn write(
        &mut self,
        link: &Link,
        marks: impl FnOnce() -> Vec<Mark>,
        token: u64,
        now: Instant,
    ) {
        let subject = self.subject();
        let State::On {
            revision,
            written,
            pending,
            next,
        } = &mut self.state
        else {
            return;
        };
        if now < *next
            || pending
                .as_ref()
                .is_some_and(|(sent, _)| now < *sent + PATIENCE)
        {
            return;
        }
        *next = now + INTERVAL;
        let marks = marks();
        if marks == *written {
            return;
        }
        link.put(token, subject, *revision, body(&marks));
        *pending = Some((now, marks));
    }

    /// Before anything is published to a stream there is a first mark of it, and it says whether others write there:
    /// whatever is consumed away later is counted from there.
    pub fn begin(
        &mut self,
        link: &Link,
        marks: Vec<Mark>,
        timeout: Duration,
    ) -> Result<(), jetstream::Error> {
        let subject = self.subject();
        let State::On {
            revision, written, ..
        } = &mut self.state
        else {
            return Ok(());
        };
        let is_known = |mark: &Mark| {
            let old = written.iter().find(|old| old.name == mark.name);
            old.is_some_and(|old| old.shared == mark.shared)
        };
        if marks.iter().all(is_known) {
            return Ok(());
        }
        let answer = link
            .put_now(&subject, *revision, body(&marks), timeout)
            .and_then(|body| {
                parse_ack(&body, None).map_err(|source| jetstream::Error::Api {
                    api: subject,
                    source,
                })
            });
        match answer {
            Ok(ack) => {
                *revision = ack.seq;
                *written = marks;
                Ok(())
            }
            Err(error) => {
                self.lost(&error);
                Err(error)
            }
        }
    }

    /// The answer to a write. `Err`: somebody else has written the key.
    pub fn written(&mut self, answer: Result<Vec<u8>, AckError>) -> Result<(), Overtaken> {
        let State::On {
            revision,
            written,
            pending,
            ..
        } = &mut self.state
        else {
            return Ok(());
        };
        let Some((_, marks)) = pending.take() else {
            return Ok(());
        };
        match answer.and_then(|body| parse_ack(&body, None)) {
            Ok(ack) => {
                *revision = ack.seq;
                *written = marks;
                Ok(())
            }
            Err(error) if matches!(error.kind(), AckErrorKind::WrongLastSequence(_)) => {
                Err(Overtaken)
            }
            Err(error) => {
                log::debug!(cause:% = error; "the checkpoint was not written; it is tried again");
                Ok(())
            }
        }
    }
}

fn body(marks: &[Mark]) -> Vec<u8> {
    let record = Record {
        streams: marks.iter().map(Entry::of).collect(),
    };
    serde_json::to_vec(&record).expect("strings and numbers have a JSON form")
}

/// Another relay has written the checkpoint of this slot.
#[derive(Debug, PartialEq, Eq)]
pub struct Overtaken;

impl Entry {
    fn of(mark: &Mark) -> Entry {
        Entry {
            name: mark.name.clone(),
            created: mark.created.clone(),
            last: mark.last.as_ref().map(|(seq, at)| Last {
                seq: *seq,
                position: at.to_string(),
            }),
            shared: mark.shared,
            confirmed_seq: mark.confirmed_seq,
        }
    }

    fn mark(self) -> Option<Mark> {
        let last = match self.last {
            Some(last) => Some((last.seq, last.position.parse().ok()?)),
            None => None,
        };
        Some(Mark {
            last,
            name: self.name,
            created: self.created,
            shared: self.shared,
            confirmed_seq: self.confirmed_seq,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_what_is_none_is_passed_over() {
        let mark = Mark {
            name: "EV".into(),
            created: "2026-11-23T09:26:06Z".into(),
            last: Some((7, "s 1 2 0/16B3748 3".parse().unwrap())),
            shared: true,
            confirmed_seq: 5,
        };
        let text = serde_json::to_string(&Record {
            streams: vec![Entry::of(&mark)],
        })
        .unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(
            read.streams
                .into_iter()
                .filter_map(Entry::mark)
                .collect::<Vec<_>>(),
            [mark]
        );
        let broken: Record = serde_json::from_str(&text.replace("0/16B3748", "x")).unwrap();
        assert_eq!(
            broken.streams.into_iter().filter_map(Entry::mark).count(),
            0
        );
    }
}
