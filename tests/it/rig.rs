//! What most tests stand on: one Postgres and one nats-server, set up as the seed's README does it.

use crate::support::nats::Nats;
use crate::support::natsclient::StreamMessage;
use crate::support::postgres::{self, Postgres};
use crate::support::relay::Relay;
use crate::support::wait::{eventually, secs};
use serde_json::{Value, json};
use std::time::Duration;

/// The seed's name for the slot, the publication and the stream.
pub const SLOT: &str = "jetstream_outbox";
/// See [`SLOT`].
pub const STREAM: &str = SLOT;

/// More than anything takes on a machine that is busy with other tests.
pub const DEADLINE: Duration = secs(60);

/// The two servers.
pub struct Rig {
    pub pg: Postgres,
    pub nats: Nats,
}

impl Rig {
    /// With the seed's table, publication, slot and stream.
    pub fn start() -> Rig {
        Rig::start_with(Postgres::builder())
    }

    /// The same on a cluster of the test's own.
    pub fn start_with(pg: postgres::Builder) -> Rig {
        let rig = Rig {
            pg: pg.build(),
            nats: Nats::start(),
        };
        rig.pg.seed_setup();
        rig.nats.client().add_seed_stream();
        rig
    }

    /// With the seed's table, publication and slot, and no stream.
    pub fn start_without_stream() -> Rig {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::start(),
        };
        rig.pg.seed_setup();
        rig
    }

    /// With the seed's stream, the tables that `sql` makes, a publication for all tables, and then the slot.
    pub fn start_with_tables(sql: &str) -> Rig {
        let rig = Rig {
            pg: Postgres::start(),
            nats: Nats::start(),
        };
        rig.pg.execute(sql);
        rig.pg
            .execute(&format!("CREATE PUBLICATION {SLOT} FOR ALL TABLES"));
        rig.add_slot(SLOT);
        rig.nats.client().add_seed_stream();
        rig
    }

    /// Makes another slot for the relay.
    pub fn add_slot(&self, name: &str) {
        self.pg.execute(&format!(
            "SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')"
        ));
    }

    /// Starts the relay.
    pub fn relay(&self, args: &[&str]) -> Relay {
        Relay::start(&self.pg, &self.nats, args)
    }

    /// Runs `--drain` to its end, which must be a good one, and returns its log.
    #[track_caller]
    pub fn drain(&self, args: &[&str]) -> Vec<String> {
        let args = [&["--drain"], args].concat();
        let (code, log) = self.run(&args);
        assert_eq!(code, 0, "{}", log.join("\n"));
        log
    }

    /// Runs the relay until it ends by itself: exit code and log.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> (i32, Vec<String>) {
        let mut relay = self.relay(args);
        let code = relay.wait_exit(DEADLINE);
        (code, relay.log())
    }

    /// Everything in the stream, in order.
    #[track_caller]
    pub fn messages(&self) -> Vec<StreamMessage> {
        self.nats.client().read_all(STREAM)
    }

    /// The ids of everything in the stream, in order.
    #[track_caller]
    pub fn ids(&self) -> Vec<String> {
        let messages = self.messages().into_iter();
        messages.map(|message| message.id().to_string()).collect()
    }

    /// The subjects of everything in the stream, in order.
    #[track_caller]
    pub fn subjects(&self) -> Vec<String> {
        self.messages().into_iter().map(|m| m.subject).collect()
    }

    /// Waits until the stream holds so many messages, or more.
    #[track_caller]
    pub fn wait_for_messages(&self, count: u64) {
        let mut client = self.nats.client();
        eventually(&format!("{count} messages"), DEADLINE, || {
            match client.message_count(STREAM) {
                found if found >= count => Ok(()),
                found => Err(found),
            }
        });
    }

    /// Gives the stream these settings in place of the server's.
    pub fn set_stream(&self, settings: &Value) {
        let api = format!("STREAM.UPDATE.{STREAM}");
        self.nats.client().api(&api, &stream(settings));
    }

    /// Commits one event into the seed's table, under `events.account.<aggregateid>`.
    #[track_caller]
    pub fn commit_event(&self, number: u64, aggregateid: &str) {
        let id = uuid(number);
        self.pg.execute(&format!(
            "INSERT INTO outbox VALUES ('{id}', 'account', '{aggregateid}', '{{\"n\": {number}}}')"
        ));
    }
}

/// The stream of the seed, with these settings in place of the server's.
pub fn stream(settings: &Value) -> Value {
    let mut config = json!({ "name": STREAM, "subjects": ["events.>"] });
    for (name, value) in settings.as_object().expect("settings") {
        config[name] = value.clone();
    }
    config
}

/// The uuid of this number, as the tests' SQL makes it too: see [`UUID_SQL`].
pub fn uuid(number: u64) -> String {
    format!("00000000-0000-0000-0000-{number:012}")
}

/// SQL for [`uuid`] of the column or variable `n`.
pub const UUID_SQL: &str = "('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid";

/// The value of `name=` in a log line.
pub fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let mut words = line.split(' ');
    words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// How many events a relay says it has published, found in the stream already, or dropped: the sum of `counter`
/// over its progress lines.
#[track_caller]
pub fn counted(log: &[String], counter: &str) -> u64 {
    let counts = log.iter().filter_map(|line| field(line, counter));
    counts
        .map(|count| count.parse::<u64>().expect("a counter is a number"))
        .sum()
}
