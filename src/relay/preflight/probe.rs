//! What the relay does at a start, tried: a replication connection, and a start from a copy of the slot.
//!
//! The rules about catalogs cannot see a pooler on the way, a line of pg_hba.conf, or a publication that is younger than
//! what the slot has to send; a try can. The copy is temporary and goes with its session; the slot itself is not touched.

use super::slot::recreate;
use super::{Facts, Finding, fail, ok};
use crate::config::Config;
use crate::postgres::connection::quote_literal;
use crate::postgres::replication::{self, IdentifySystem, ReplicationMessage, ReplicationReader};
use crate::postgres::{self, Connection, Lsn};
use crate::relay::slot::{current_lsn, pgoutput_options};
use crossbeam_channel::{RecvTimeoutError, bounded};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How long the start is watched. Postgres has sent something by then, or decodes a long way up to the slot's position.
const WATCH_LIMIT: Duration = Duration::from_secs(5);
/// So many messages show that the slot can be decoded.
const MAX_MESSAGES: usize = 1000;

/// Whether the relay's kind of connection is admitted.
#[derive(Debug, Clone)]
pub enum Probe {
    /// It is, by this system.
    Admitted {
        /// What it says of itself.
        system: IdentifySystem,
    },
    /// It is not.
    Refused {
        /// Why.
        error: Arc<postgres::Error>,
    },
}

/// What became of a start.
#[derive(Debug, Clone)]
pub enum Start {
    /// Postgres sends.
    Sends,
    /// Nothing came within five seconds.
    Silent,
    /// Postgres refused it, or broke it off.
    Failed(Arc<postgres::Error>),
}

impl Probe {
    /// The server's code for its refusal.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Probe::Admitted { .. } => None,
            Probe::Refused { error } => error.sqlstate(),
        }
    }
}

/// Connects as the relay does, and asks who is there.
pub fn connect(config: &Config) -> (Probe, Option<Connection>) {
    let connected = Connection::connect(&config.db).and_then(|mut connection| {
        let system = replication::identify_system(&mut connection)?;
        Ok((system, connection))
    });
    match connected {
        Ok((system, connection)) => (Probe::Admitted { system }, Some(connection)),
        Err(error) => {
            let error = error.into();
            (Probe::Refused { error }, None)
        }
    }
}

/// Starts from a copy of the slot, if one can be made without harm: `None` otherwise.
pub fn start(connection: Connection, facts: &Facts, config: &Config) -> Option<Start> {
    let slot = facts.slot.as_ref()?;
    let room = facts.server.slots < facts.server.number("max_replication_slots");
    if !room || !slot.can_be_copied() {
        return None;
    }
    Some(match try_start(connection, config) {
        Ok(sends) => sends,
        Err(error) => Start::Failed(error.into()),
    })
}

fn try_start(mut connection: Connection, config: &Config) -> Result<Start, postgres::Error> {
    let copy = format!("jetstream_outbox_check_{}", connection.backend_pid());
    connection.simple_query(&format!(
        "SELECT pg_catalog.pg_copy_logical_replication_slot({}, {}, true)",
        quote_literal(&config.slot),
        quote_literal(&copy)
    ))?;
    let end = current_lsn(&mut connection)?;
    let messages = config.mapping.message_prefix.is_some();
    let version = connection.server_version_num();
    let options = pgoutput_options(version, &config.publication, messages);
    let options: Vec<(&str, &str)> = options
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let (mut stream, writer) =
        replication::start_replication(connection, &copy, Lsn::INVALID, &options)?;
    let (done, ended) = bounded::<()>(0);
    thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let is_late = ended.recv_timeout(WATCH_LIMIT) == Err(RecvTimeoutError::Timeout);
            if is_late {
                writer.shutdown();
            }
            is_late
        });
        let read = watch(&mut stream, end);
        drop(done);
        match (watchdog.join(), read) {
            (Ok(true), Err(postgres::Error::Closed { .. })) => Ok(Start::Silent),
            (_, read) => read,
        }
    })
}

/// Reads until everything up to `end` was sent, or so much that the rest will be no different. A walsender says how far
/// it has come when it has nothing more to send.
fn watch(stream: &mut ReplicationReader, end: Lsn) -> Result<Start, postgres::Error> {
    for _ in 0..MAX_MESSAGES {
        match stream.read()? {
            // Postgres 18 and later send on without the rows of a publication that is missing
            Some(ReplicationMessage::Notice(notice)) if notice.code == "55000" => {
                return Err(postgres::Error::Server(notice));
            }
            Some(ReplicationMessage::PrimaryKeepalive { wal_end, .. }) if wal_end >= end => break,
            Some(_) => {}
            None => return Ok(Start::Silent),
        }
    }
    Ok(Start::Sends)
}

/// Whether Postgres sends what the slot has.
pub fn rule(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.start";
    let slot = &config.slot;
    let error = match &facts.start {
        None => return Vec::new(),
        Some(Start::Sends) => {
            return vec![ok(NAME, format!("Postgres sends what slot {slot} has"))];
        }
        Some(Start::Silent) => {
            let seconds = WATCH_LIMIT.as_secs();
            let found = format!(
                "Postgres has sent nothing for {seconds} s; it decodes up to where slot {slot} is"
            );
            return vec![ok(NAME, found)];
        }
        Some(Start::Failed(error)) => error,
    };
    let fix = match error.sqlstate() {
        // the publication was created later than what the slot has to send
        Some("42704" | "55000") => recreate(
            facts,
            config,
            "a slot does not see a publication that is younger than its events",
        ),
        _ => match error.remedy() {
            Some(remedy) => remedy.to_string(),
            None => "start the relay: it stops there, and says what to do".into(),
        },
    };
    vec![fail(
        NAME,
        error.to_string(),
        "so ends a start of the relay",
        fix,
    )]
}
