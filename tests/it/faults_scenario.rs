//! What the fault tests share: writers that commit while a test breaks things, and the judgement at the end.
//!
//! Three writers commit transactions of random sizes side by side, and roll some back, so that they
//! commit in another order than they began. What was committed, and in which order, is not asked of the
//! writers but of Postgres: a second slot, made at the start and read at the end. A row's content follows
//! from its id, so the ids are all that has to be kept.
//!
//! A poller notes `confirmed_flush_lsn` with the time throughout. The server's own time of each message
//! then tells whether anything was ever confirmed before it was stored.

use crate::operators_bucket::try_record;
use crate::support::nats::Nats;
use crate::support::natsclient::{NatsClient, StreamMessage};
use crate::support::oracle::{Event, Expected};
use crate::support::postgres::Postgres;
use crate::support::relay::Relay;
use crate::support::truth::{self, Confirmed, Logged, TooEarly};
use crate::support::wait::{eventually, secs};
use crossbeam_channel::{Receiver, Sender, bounded};
use jetstream_outbox::postgres::Lsn;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The relay's slot, and the seed's stream.
pub const NAME: &str = "jetstream_outbox";
/// The slot that keeps what was committed.
const TRUTH: &str = "truth";
const WRITERS: u32 = 3;
/// Between two transactions of a writer, at most: about 500 events a second in all.
const PAUSE_MS: u64 = 120;
/// How long a relay may take to get going again on a busy machine, its longest pause (5 s) included.
const DEADLINE: Duration = secs(90);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A stream, and the subjects of ours that it captures.
type Streams = Vec<(String, String)>;

/// Writers at work on a Postgres, and the streams they are to reach.
pub struct Scenario {
    /// The database.
    pub pg: Arc<Postgres>,
    nats_ports: Vec<u16>,
    streams: Streams,
    committed: Arc<AtomicU64>,
    stop: Option<Sender<Infallible>>,
    writers: Vec<JoinHandle<()>>,
    stop_polling: Option<Sender<Infallible>>,
    poller: Option<JoinHandle<Vec<Confirmed>>>,
}

/// What the end of a scenario tells beyond that all was right.
pub struct Outcome {
    /// The end of the first transaction with events, and of the last.
    pub first_end_lsn: Lsn,
    pub last_end_lsn: Lsn,
    /// What the slot's consumer had confirmed at the end.
    pub confirmed: Lsn,
    /// What the relay said that was ended in order.
    pub log: Vec<String>,
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the events end at {} to {}, {} is confirmed; the relay said\n{}",
            self.first_end_lsn,
            self.last_end_lsn,
            self.confirmed,
            self.log.join("\n")
        )
    }
}

impl Outcome {
    /// A scenario shorter than the hold-back confirms nothing.
    #[track_caller]
    pub fn assert_held_back(&self) {
        assert!(
            self.confirmed < self.first_end_lsn,
            "confirmed too early: {self:?}"
        );
    }
}

impl Scenario {
    /// A Postgres of its own, the seed's stream made on `nats`, and writers at work.
    pub fn start(nats: &Nats) -> Scenario {
        nats.client().add_seed_stream();
        Scenario::start_on(Postgres::start(), &[nats.port()], &[(NAME, "events.")])
    }

    /// On a Postgres without tables, towards streams (names, and how our subjects in them begin) that are
    /// readable at any of the ports.
    pub fn start_on(pg: Postgres, nats_ports: &[u16], streams: &[(&str, &str)]) -> Scenario {
        pg.seed_setup();
        pg.execute(&format!(
            "SELECT pg_create_logical_replication_slot('{TRUTH}', 'pgoutput')"
        ));
        let pg = Arc::new(pg);
        let committed = Arc::new(AtomicU64::new(0));
        let (stop, stopping) = bounded(0);
        let writers = (0..WRITERS).map(|number| {
            let (pg, committed, stopping) = (pg.clone(), committed.clone(), stopping.clone());
            thread::spawn(move || write_until(&stopping, number, &pg, &committed))
        });
        let writers = writers.collect();
        let (stop_polling, stopping) = bounded(0);
        let poller = thread::spawn({
            let pg = pg.clone();
            move || poll_until(&stopping, &pg)
        });
        let owned = |(name, subjects): &(&str, &str)| (name.to_string(), subjects.to_string());
        Scenario {
            pg,
            nats_ports: nats_ports.to_vec(),
            streams: streams.iter().map(owned).collect(),
            committed,
            stop: Some(stop),
            writers,
            stop_polling: Some(stop_polling),
            poller: Some(poller),
        }
    }

    /// A relay between the two.
    pub fn relay(&self, extra: &[&str]) -> Relay {
        let db = self.pg.url("postgres", "postgres");
        let servers: Vec<String> = self
            .nats_ports
            .iter()
            .map(|port| format!("127.0.0.1:{port}"))
            .collect();
        let servers = servers.join(",");
        let mut args = vec!["-db", &db, "-nats", &servers];
        args.extend(extra);
        Relay::run(&args, &[])
    }

    /// How many events the writers know to be committed.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// Commits more than the relay, and the sockets between it and Postgres, can hold: over 15 MB.
    pub fn commit_a_backlog(&self) {
        let mut client = self.pg.client();
        for number in 0..5 {
            let sql = transaction(WRITERS, number, 10_000) + "; COMMIT";
            client.batch_execute(&sql).expect("Postgres is up");
            self.committed.fetch_add(10_000, Ordering::Relaxed);
        }
    }

    /// Waits until so many more events are committed: a moment in the middle of the writing.
    #[track_caller]
    pub fn wait_for_commits(&self, events: u64) {
        let target = self.committed() + events;
        eventually("the writers to commit", DEADLINE, || {
            self.committed() >= target
        });
    }

    /// Waits until what is committed by now has reached the streams: the relay works.
    #[track_caller]
    pub fn wait_for_relay(&self, after: &str) {
        self.wait_for_relay_beside(0, after);
    }

    /// The same with so many messages of others in the streams.
    #[track_caller]
    pub fn wait_for_relay_beside(&self, others: u64, after: &str) {
        let target = self.committed() + 1 + others;
        eventually(&format!("events to flow after: {after}"), DEADLINE, || {
            let reached = self.stored().map_err(|error| error.to_string())?;
            if reached >= target {
                Ok(())
            } else {
                Err(format!("{reached} of {target} stored"))
            }
        });
    }

    /// How many messages the streams have ever stored.
    pub fn stored(&self) -> std::io::Result<u64> {
        let mut client = self.try_nats()?;
        let mut sum = 0;
        for (name, _) in &self.streams {
            let info = client.try_api(&format!("STREAM.INFO.{name}"), &Value::Null)?;
            sum += info["state"]["last_seq"].as_u64().unwrap_or(0);
        }
        Ok(sum)
    }

    fn try_nats(&self) -> std::io::Result<NatsClient> {
        let connect = |port: &u16| NatsClient::try_connect_within(*port, &json!({}), secs(2));
        let mut last = Err(std::io::ErrorKind::NotFound.into());
        for port in &self.nats_ports {
            last = connect(port);
            if last.is_ok() {
                break;
            }
        }
        last
    }

    /// Ends the writers; Postgres must be up.
    pub fn stop_writing(&mut self) {
        self.stop = None;
        for writer in self.writers.drain(..) {
            writer.join().expect("a writer works until it is stopped");
        }
    }

    /// The transactions in commit order, from the slot that nobody consumed.
    pub fn truth(&self) -> Vec<Transaction> {
        let sql = format!(
            "SELECT data FROM pg_logical_slot_peek_binary_changes('{TRUTH}', NULL, NULL, \
             'proto_version', '1', 'publication_names', '{NAME}')"
        );
        let rows = self
            .pg
            .client()
            .query(&sql, &[])
            .expect("read the slot of the truth");
        let mut transactions = Vec::new();
        let mut ids = Vec::new();
        for row in rows {
            match truth::read(row.get(0)) {
                Some(Logged::Insert(id)) => ids.push(id.to_string()),
                Some(Logged::Commit(end_lsn)) if !ids.is_empty() => {
                    transactions.push(Transaction {
                        end_lsn,
                        ids: std::mem::take(&mut ids),
                    });
                }
                _ => {}
            }
        }
        transactions
    }

    /// Ends the writers, waits until all is in the streams, ends the relay in order, and judges.
    #[track_caller]
    pub fn finish(mut self, mut relay: Relay) -> Outcome {
        self.stop_writing();
        let truth = self.truth();
        let mut stored: Vec<Vec<StreamMessage>> = vec![Vec::new(); self.streams.len()];
        for ((name, subjects), messages) in self.streams.iter().zip(&mut stored) {
            let ids = truth.iter().flat_map(|transaction| &transaction.ids);
            let last = ids.rev().find(|id| subject(id).starts_with(subjects));
            eventually("the last event to be stored", DEADLINE, || {
                self.read_on(name, messages)
                    .map_err(|error| error.to_string())?;
                let arrived = |last| messages.iter().rev().any(|message| message.id() == last);
                match last {
                    Some(last) if !arrived(last) => {
                        Err(format!("{} are stored, {last} is not", messages.len()))
                    }
                    _ => Ok(()),
                }
            });
        }
        relay.term();
        assert_eq!(relay.wait_exit(secs(30)), 0, "exit code after SIGTERM");
        for ((name, _), messages) in self.streams.iter().zip(&mut stored) {
            self.read_on(name, messages)
                .expect("read the rest of the stream");
        }
        let outcome = self.judge(&truth, &stored);
        Outcome {
            log: relay.log(),
            ..outcome
        }
    }

    /// With `--hold-back 0` a relay that has caught up, and stops in order, leaves nothing to repeat.
    #[track_caller]
    pub fn finish_confirmed(mut self, relay: Relay) {
        self.stop_writing();
        let end = self.truth().last().map_or(Lsn::INVALID, |it| it.end_lsn);
        // one that is told to stop between two sessions tells nobody how far it is
        eventually("the record to have everything", DEADLINE, || {
            let mut client = self.try_nats().map_err(|error| error.to_string())?;
            let (_, value) = try_record(&mut client).map_err(|error| error.to_string())?;
            let record: Value = serde_json::from_slice(&value).expect("a record");
            let stored = record["young"]["stored_lsn"].as_str();
            let stored: Option<Lsn> = stored.and_then(|text| text.parse().ok());
            match stored {
                Some(lsn) if lsn >= end => Ok(()),
                stored => Err(format!("{stored:?} of {end}")),
            }
        });
        let outcome = self.finish(relay);
        assert!(
            outcome.confirmed >= outcome.last_end_lsn,
            "not all is confirmed: {outcome:?}"
        );
    }

    /// Judges messages that were read in another way; the relay must have ended.
    #[track_caller]
    pub fn judge(&mut self, truth: &[Transaction], stored: &[Vec<StreamMessage>]) -> Outcome {
        self.stop_writing();
        let mut time_of = HashMap::new();
        for ((name, subjects), messages) in self.streams.iter().zip(stored) {
            let mut expected = Expected::new();
            for transaction in truth {
                let ids = transaction
                    .ids
                    .iter()
                    .filter(|id| subject(id).starts_with(subjects));
                expected.commit(
                    0,
                    ids.map(|id| Event::new(id, subject(id), payload(id).as_bytes())),
                );
            }
            let is_ours = |message: &&StreamMessage| message.header("Outbox-Position").is_some();
            let ours: Vec<StreamMessage> = messages.iter().filter(is_ours).cloned().collect();
            let report = expected.check(&ours);
            eprintln!(
                "stream {name}: {} events of {} transactions",
                ours.len(),
                truth.len()
            );
            report.assert_clean();
            time_of.extend(
                ours.iter()
                    .map(|message| (message.id().to_string(), message.time_ns)),
            );
        }
        self.judge_confirmations(truth, &time_of);
        let end = |transaction: Option<&Transaction>| {
            transaction
                .map(|t| t.end_lsn)
                .expect("the writers committed")
        };
        Outcome {
            first_end_lsn: end(truth.first()),
            last_end_lsn: end(truth.last()),
            confirmed: self.pg.confirmed_flush_lsn(NAME),
            log: Vec::new(),
        }
    }

    /// Nothing was confirmed before it was stored.
    #[track_caller]
    fn judge_confirmations(&mut self, truth: &[Transaction], time_of: &HashMap<String, u64>) {
        self.stop_polling = None;
        let poller = self.poller.take().expect("a scenario is judged once");
        let confirmations = poller.join().expect("the poller works until it is stopped");
        assert!(
            !confirmations.is_empty(),
            "confirmed_flush_lsn was never read"
        );
        let (mut ends, mut stored_ns) = (Vec::new(), Vec::new());
        for transaction in truth {
            stored_ns.extend(transaction.ids.iter().map(|id| time_of[id]));
            ends.push((transaction.end_lsn, stored_ns.len()));
        }
        let early = truth::too_early(&confirmations, &ends, &stored_ns, Duration::ZERO);
        if let Some(TooEarly { lsn, age_ms, .. }) = early.first() {
            let late_ms = -age_ms.expect("all events are stored");
            panic!("{lsn} was confirmed {late_ms} ms before all up to it was stored");
        }
    }

    /// Reads what came since the last time.
    fn read_on(&self, stream: &str, messages: &mut Vec<StreamMessage>) -> std::io::Result<()> {
        let next = messages.last().map_or(1, |message| message.seq + 1);
        let mut client = self.try_nats()?;
        let info = client.try_api(&format!("STREAM.INFO.{stream}"), &Value::Null)?;
        if info["state"]["last_seq"].as_u64() >= Some(next) {
            messages.extend(client.try_read_from(stream, next)?);
        }
        Ok(())
    }
}

impl Drop for Scenario {
    fn drop(&mut self) {
        // the threads hold the Postgres, which must not outlive the test
        self.stop = None;
        self.stop_polling = None;
        for writer in self.writers.drain(..) {
            let _ = writer.join();
        }
        if let Some(poller) = self.poller.take() {
            let _ = poller.join();
        }
    }
}

/// A committed transaction that inserted into the outbox.
pub struct Transaction {
    /// Behind its commit record.
    pub end_lsn: Lsn,
    /// The ids of its rows, in the order of the inserts.
    pub ids: Vec<String>,
}

/// Whether the stop channel closed within the pause.
fn stopped(stopping: &Receiver<Infallible>, pause: Duration) -> bool {
    stopping.recv_timeout(pause) == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
}

/// Commits and rolls back until stopped, through a new session whenever the old one is lost.
fn write_until(stopping: &Receiver<Infallible>, writer: u32, pg: &Postgres, committed: &AtomicU64) {
    let mut random = fastrand::Rng::with_seed(u64::from(writer) + 1);
    let mut number = 0;
    loop {
        let mut client = loop {
            if stopped(stopping, Duration::from_millis(random.u64(5..50))) {
                return;
            }
            if let Ok(client) = pg.try_client() {
                break client;
            }
        };
        loop {
            number += 1;
            let rows = match random.u32(0..100) {
                0..75 => random.u64(1..5),
                75..95 => random.u64(5..50),
                _ => random.u64(50..=200),
            };
            let rolled_back = random.u32(0..10) == 0;
            // the transactions of the writers overlap
            let held_ms = random.u64(0..20) * u64::from(random.bool());
            let begun = client.batch_execute(&transaction(writer, number, rows));
            let stop = stopped(stopping, Duration::from_millis(held_ms));
            let end = if rolled_back { "ROLLBACK" } else { "COMMIT" };
            let ended = begun.and_then(|()| client.batch_execute(end));
            if ended.is_ok() && !rolled_back {
                committed.fetch_add(rows, Ordering::Relaxed);
            }
            if stop || stopped(stopping, Duration::from_millis(random.u64(0..PAUSE_MS))) {
                return;
            }
            if ended.is_err() {
                break;
            }
        }
    }
}

/// Begins a transaction that inserts rows and, as the seed's application does, deletes them again.
fn transaction(writer: u32, number: u64, rows: u64) -> String {
    let mut sql = String::from("BEGIN; INSERT INTO outbox VALUES ");
    let (high, low) = (number >> 16, number & 0xffff);
    for row in 0..rows {
        let id = format!("{writer:08x}-{high:04x}-{low:04x}-0000-{row:012x}");
        let Route {
            aggregate_type,
            aggregate_id,
        } = route(&id);
        let comma = if row > 0 { "," } else { "" };
        let _ = write!(
            sql,
            "{comma}('{id}','{aggregate_type}','{aggregate_id}','{}')",
            payload(&id)
        );
    }
    sql + "; DELETE FROM outbox"
}

fn hash_of(id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

struct Route {
    aggregate_type: &'static str,
    aggregate_id: u64,
}

fn route(id: &str) -> Route {
    let hash = hash_of(id);
    let aggregate_type = if hash.is_multiple_of(2) {
        "account"
    } else {
        "order"
    };
    Route {
        aggregate_type,
        aggregate_id: hash / 2 % 100,
    }
}

fn subject(id: &str) -> String {
    let Route {
        aggregate_type,
        aggregate_id,
    } = route(id);
    format!("events.{aggregate_type}.{aggregate_id}")
}

/// Compact, and with the keys in jsonb's order: as it is to arrive. One in fifty is large.
fn payload(id: &str) -> String {
    let hash = hash_of(id);
    let size = if hash.is_multiple_of(50) {
        8_000
    } else {
        hash / 50 % 300
    };
    format!(r#"{{"id":"{id}","pad":"{}"}}"#, "x".repeat(size as usize))
}

/// Reads `confirmed_flush_lsn` until stopped, and then once more.
fn poll_until(stopping: &Receiver<Infallible>, pg: &Postgres) -> Vec<Confirmed> {
    let sql = format!(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{NAME}'"
    );
    let mut client = None;
    let mut seen = Vec::new();
    loop {
        let last = stopped(stopping, POLL_INTERVAL);
        if client.is_none() {
            client = pg.try_client().ok();
        }
        let row = client.as_mut().map(|session| session.query_one(&sql, &[]));
        if let Some(Ok(row)) = row {
            let lsn = row.get::<_, String>(0).parse();
            seen.push(Confirmed::now(lsn.expect("Postgres prints LSNs")));
        } else {
            client = None;
        }
        if last {
            return seen;
        }
    }
}
