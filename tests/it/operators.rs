//! What operators do to either server, while the relay runs or not: nothing is lost and nothing comes twice. Where the outcome is
//! a halt, the advice that it prints is followed, and then the same holds.
//!
//! This module has what those tests share: a writer, and the judgement over several streams.

use crate::rig::{DEADLINE, Rig, SLOT, uuid};
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::wait::{eventually, pause};
use jetstream_outbox::outbox::position::SourcePosition;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A writer that commits an `account` and an `order` event in each transaction, until it is stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    writer: Option<JoinHandle<()>>,
}

/// Between two transactions of a [`Load`]: some hundred events a second.
const PAUSE: Duration = Duration::from_millis(3);

impl Load {
    /// Commits the events 1, 2, 3 … by twos.
    pub fn start(pg: &Postgres) -> Load {
        let (stop, written) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let writer = thread::spawn({
            let (stop, written, mut client) = (stop.clone(), written.clone(), pg.client());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let first = written.load(Ordering::Relaxed) + 1;
                    let sql = format!(
                        "BEGIN; {} {} DELETE FROM outbox; COMMIT",
                        insert(first, "account"),
                        insert(first + 1, "order")
                    );
                    client.batch_execute(&sql).expect("commit events");
                    written.store(first + 1, Ordering::Relaxed);
                    pause(PAUSE);
                }
            }
        });
        Load {
            stop,
            written,
            writer: Some(writer),
        }
    }

    /// Waits until so many more events are committed.
    #[track_caller]
    pub fn wait_for_more(&self, events: u64) {
        let target = self.written.load(Ordering::Relaxed) + events;
        eventually("the writer to commit", DEADLINE, || {
            self.written.load(Ordering::Relaxed) >= target
        });
    }

    /// Ends it, and returns how many events it has committed.
    pub fn finish(mut self) -> u64 {
        self.end();
        self.written.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            // a panic of its own is reported by it
            let _ = writer.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

/// The statement that inserts the event of this number, under `events.<kind>.a`.
pub fn insert(number: u64, kind: &str) -> String {
    let id = uuid(number);
    format!("INSERT INTO outbox VALUES ('{id}', '{kind}', 'a', '{{\"n\": {number}}}');")
}

/// Changes fields of a stream's configuration.
#[track_caller]
pub fn edit(client: &mut NatsClient, stream: &str, fields: &Value) {
    let mut config = client.stream_info(stream)["config"].clone();
    let (Some(config_fields), Some(fields)) = (config.as_object_mut(), fields.as_object()) else {
        panic!("a stream has a configuration");
    };
    config_fields.extend(fields.clone());
    client.api(&format!("STREAM.UPDATE.{stream}"), &config);
}

/// Changes which subjects a stream captures.
#[track_caller]
pub fn capture(client: &mut NatsClient, stream: &str, subjects: &[&str]) {
    edit(client, stream, &json!({ "subjects": subjects }));
}

/// The events in a stream, without the messages of others.
#[track_caller]
pub fn events(client: &mut NatsClient, stream: &str) -> Vec<StreamMessage> {
    let mut messages = client.read_all(stream);
    messages.retain(is_event);
    messages
}

/// A copy lacks the fence.
fn is_event(message: &StreamMessage) -> bool {
    message.header("Outbox-Position").is_some()
        && message.header("Nats-Expected-Last-Sequence") == Some(&(message.seq - 1).to_string())
}

/// The ids of the events in a stream.
#[track_caller]
pub fn ids(client: &mut NatsClient, stream: &str) -> Vec<String> {
    let messages = events(client, stream).into_iter();
    messages.map(|message| message.id().to_string()).collect()
}

/// Waits until each of the events 1 to `count` is in one of the streams, sees that none is there twice, and that each stream
/// has its events in commit order, but for those that are marked as late.
#[track_caller]
pub fn assert_each_once(rig: &Rig, streams: &[&str], count: u64) {
    let mut client = rig.nats.client();
    let mut found = BTreeMap::new();
    let complete = || {
        found.clear();
        for stream in streams {
            found.insert(stream.to_string(), events(&mut client, stream));
        }
        let mut ids: Vec<&str> = (found.values().flatten()).map(StreamMessage::id).collect();
        ids.sort_unstable();
        ids.dedup();
        let missing: Vec<u64> = (1..=count)
            .filter(|number| ids.binary_search(&uuid(*number).as_str()).is_err())
            .collect();
        match missing.len() {
            0 => Ok(()),
            many => Err(format!(
                "{many} events are missing, such as {:?}",
                &missing[..many.min(9)]
            )),
        }
    };
    eventually("each event", DEADLINE, complete);
    let mut all: Vec<&str> = (found.values().flatten()).map(StreamMessage::id).collect();
    all.sort_unstable();
    let twice: Vec<_> = all.windows(2).filter(|two| two[0] == two[1]).collect();
    assert!(
        twice.is_empty(),
        "{} events came twice, such as {:?}",
        twice.len(),
        twice[0]
    );
    for (stream, messages) in &found {
        let in_time = messages
            .iter()
            .filter(|it| it.header("Outbox-Late").is_none());
        let positions: Vec<_> = in_time.map(|it| position(it).position).collect();
        assert!(positions.is_sorted(), "the order in {stream} is broken");
    }
}

/// Where in Postgres an event comes from.
pub fn position(message: &StreamMessage) -> SourcePosition {
    let text = message.header("Outbox-Position").expect("an event has one");
    text.parse().expect("a position")
}

/// Waits until Postgres has been told of all that it has now.
#[track_caller]
pub fn wait_for_confirmation(rig: &Rig) {
    let end = rig.pg.current_wal_lsn();
    eventually("all to be confirmed", DEADLINE, || {
        match rig.pg.confirmed_flush_lsn(SLOT) {
            confirmed if confirmed >= end => Ok(()),
            confirmed => Err(confirmed),
        }
    });
}

/// Ends the relay in order.
#[track_caller]
pub fn stop(mut relay: Relay) -> Vec<String> {
    relay.term();
    assert_eq!(relay.wait_exit(DEADLINE), 0);
    relay.log()
}
