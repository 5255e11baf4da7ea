//! The servers under torture, the proxies between them and the relay, and what is noted on the way.

use crate::ledger::Violations;
use crate::streams::{self, Streams};
use crate::support::files::temp_dir;
use crate::support::nats::{Nats, NatsCluster};
use crate::support::natsclient::NatsClient;
use crate::support::postgres::Postgres;
use crate::support::process::{keep_folder, lock};
use crate::support::proxy::Proxy;
use crate::support::truth::Confirmed;
use crate::support::wait::secs;
use jetstream_outbox::postgres::Lsn;
use serde_json::json;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The relay's slot, and the stream.
pub const NAME: &str = "jetstream_outbox";

/// What the events' subjects begin with, and those of the service beside when it has a prefix of its own.
pub const PREFIX: &str = "events";
pub const PREFIX_BESIDE: &str = "beside";

/// JetStream's own deduplication forgets so soon that it hides nothing.
pub const DUPLICATE_WINDOW: Duration = Duration::from_millis(200);

/// A walsender gives up a dead connection before the relay is back.
pub const WAL_SENDER_TIMEOUT: &str = "10s";

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What is tortured.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Three servers, and streams replicated over them.
    pub cluster: bool,
    /// Operators are at work, and there is a second service.
    pub operators: bool,
}

impl Setup {
    pub fn name(self) -> &'static str {
        match (self.cluster, self.operators) {
            (false, false) => "single server",
            (true, false) => "R3 cluster",
            (false, true) => "single server with operators",
            (true, true) => "R3 cluster with operators",
        }
    }
}

/// A flag that ends pauses.
#[derive(Default)]
pub struct Stop {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub fn set(&self) {
        *lock(&self.set) = true;
        self.changed.notify_all();
    }

    pub fn is_set(&self) -> bool {
        *lock(&self.set)
    }

    /// Returns after `span`, or when the flag is set.
    pub fn pause(&self, span: Duration) {
        let waited = self
            .changed
            .wait_timeout_while(lock(&self.set), span, |set| !*set);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Where the stream is.
pub enum JetStream {
    Single(Box<Nats>),
    Cluster(Box<NatsCluster>),
}

/// A copy of the store, for a single server to be put back to.
pub struct Copy {
    pub store: TempDir,
    pub taken: Instant,
}

pub struct World {
    pub pg: Postgres,
    pub jetstream: Arc<JetStream>,
    /// Where operators are at work.
    pub streams: Option<Arc<Streams>>,
    pub prefix: &'static str,
    pub system_id: u64,
    pub to_pg: Proxy,
    pub to_nats: Vec<Proxy>,
    pub copy: Mutex<Option<Copy>>,
    pub violations: Mutex<Violations>,
    /// Something is so wrong that more faults tell nothing.
    pub broken: AtomicBool,
    /// Logs of the relays and of the faults.
    pub folder: PathBuf,
    began: Instant,
}

impl World {
    pub fn start(setup: Setup) -> World {
        let jetstream = match setup.cluster {
            true => JetStream::Cluster(Box::new(NatsCluster::start())),
            false => JetStream::Single(Box::new(Nats::start())),
        };
        // goes with this program when that is interrupted, unless something was wrong by then
        let folder = temp_dir("torture-").keep();
        if setup.operators {
            let streams = Streams::create(&jetstream);
            let streams = Some(streams.into());
            return World::with(pg_of_its_own(), jetstream.into(), streams, PREFIX, folder);
        }
        World::on(pg_of_its_own(), jetstream, folder)
    }

    /// One stream and one service on these servers.
    pub fn on(pg: Postgres, jetstream: JetStream, folder: PathBuf) -> World {
        let mut stream = json!({
            "name": NAME, "subjects": ["events.>"], "duplicate_window": DUPLICATE_WINDOW.as_nanos() as u64,
        });
        stream["num_replicas"] = json!(jetstream.nodes().len());
        jetstream.nodes()[0].client().add_stream_with(stream);
        World::with(pg, jetstream.into(), None, PREFIX, folder)
    }

    /// Another service with the default names in the same account: with a prefix of its own, or the same one.
    pub fn beside(&self, prefix: &'static str) -> World {
        let folder = self.folder.join("beside");
        std::fs::create_dir(&folder).expect("create a folder");
        let (jetstream, streams) = (self.jetstream.clone(), self.streams.clone());
        World::with(pg_of_its_own(), jetstream, streams, prefix, folder)
    }

    fn with(
        pg: Postgres,
        jetstream: Arc<JetStream>,
        streams: Option<Arc<Streams>>,
        prefix: &'static str,
        folder: PathBuf,
    ) -> World {
        pg.seed_setup();
        pg.execute(
            "CREATE TABLE noise (number int); ALTER PUBLICATION jetstream_outbox ADD TABLE noise",
        );
        crate::ledger::Ledger::set_up(&pg);
        World {
            system_id: pg.system_id(),
            to_pg: Proxy::start(pg.port()),
            to_nats: jetstream
                .nodes()
                .iter()
                .map(|node| Proxy::start(node.port()))
                .collect(),
            pg,
            jetstream,
            streams,
            prefix,
            copy: Mutex::new(None),
            violations: Mutex::default(),
            broken: AtomicBool::new(false),
            folder,
            began: Instant::now(),
        }
    }

    pub fn violation(&self, kind: &'static str, example: String) {
        keep_folder(&self.folder);
        self.note(&format!("VIOLATION {kind}: {example}"));
        lock(&self.violations).add(kind, example);
    }

    /// A line in the log of the faults.
    pub fn note(&self, what: &str) {
        let now = jiff::Timestamp::now();
        let at = self.began.elapsed().as_secs_f32();
        let line = format!("{now:.6} {at:8.3} {what}\n");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("faults.log"));
        let written = log.and_then(|mut log| log.write_all(line.as_bytes()));
        written.expect("write the log of the faults");
    }

    /// How many messages the stream has ever stored.
    pub fn stored(&self) -> io::Result<u64> {
        streams::last_seq(&mut self.jetstream.client()?, NAME)
    }

    /// The sequence and the id of the last message.
    pub fn last_message(&self) -> io::Result<(u64, String)> {
        let last = self.stored()?;
        let messages = self.jetstream.client()?.try_read_from(NAME, last.max(1))?;
        let last = messages.last().ok_or(io::ErrorKind::NotFound)?;
        Ok((last.seq, last.id().to_string()))
    }

    /// Notes each change of `confirmed_flush_lsn` until stopped.
    pub fn watch_confirmations(&self, stop: &Stop) -> Vec<Confirmed> {
        let sql = format!(
            "SELECT confirmed_flush_lsn::text, pg_postmaster_start_time()::text \
             FROM pg_replication_slots WHERE slot_name = '{NAME}'"
        );
        let mut session = None;
        let mut seen: Vec<Confirmed> = Vec::new();
        let mut started = String::new();
        while !stop.is_set() {
            stop.pause(POLL_INTERVAL);
            let Some(client) = &mut session else {
                session = self.pg.try_client().ok();
                continue;
            };
            let Ok(row) = client.query_one(&sql, &[]) else {
                session = None;
                continue;
            };
            let lsn: Lsn = row
                .get::<_, String>(0)
                .parse()
                .expect("Postgres prints LSNs");
            let start: String = row.get(1);
            if let Some(last) = seen.last() {
                // a crash takes the slot back to its last checkpoint
                if lsn < last.lsn && start == started {
                    let example = format!("from {} to {lsn}", last.lsn);
                    self.violation("confirmed_flush_lsn moved back", example);
                }
            }
            if seen.last().is_none_or(|last| last.lsn != lsn) {
                seen.push(Confirmed::now(lsn));
            }
            started = start;
        }
        seen
    }

    pub fn give_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }
}

fn pg_of_its_own() -> Postgres {
    let pg = Postgres::builder().own_system_id();
    pg.setting("wal_sender_timeout", WAL_SENDER_TIMEOUT).build()
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            keep_folder(&self.folder);
        }
    }
}

impl JetStream {
    pub fn nodes(&self) -> &[Nats] {
        match self {
            JetStream::Single(nats) => std::slice::from_ref(nats),
            JetStream::Cluster(cluster) => &cluster.nodes,
        }
    }

    /// A connection to a node that answers.
    pub fn client(&self) -> io::Result<NatsClient> {
        let mut last = Err(io::ErrorKind::NotFound.into());
        for node in self.nodes() {
            last = NatsClient::try_connect_within(node.port(), &json!({}), secs(2));
            if last.is_ok() {
                break;
            }
        }
        last
    }
}
