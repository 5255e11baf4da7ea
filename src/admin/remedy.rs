//! What to do about an error of either server: for somebody who was woken by it.
//!
//! `None`: a setting is wrong, and the error says which.

use crate::{jetstream, nats, postgres};
use std::io::ErrorKind::{ConnectionRefused, NotFound};

const STARTS: &str = "the server starts up, recovers or shuts down: its log tells how far it is; then run this again";
const LOST: &str =
    "the server ended the session, or the network did: its log tells why; then run this again";

/// The relay's own connection.
pub fn postgres(error: &postgres::Error) -> Option<&'static str> {
    use postgres::Error::{Closed, Connect, Io, Protocol, Timeout, WrongSession};
    Some(match error {
        Connect(attempts) => return postgres(&attempts.last()?.1),
        Io { source, .. } if source.kind() == ConnectionRefused => {
            "nothing listens there: is Postgres up (systemctl status postgresql on its host, and its log), are host and port of \
             -db right, does listen_addresses name that address"
        }
        Io { source, .. } if source.kind() == NotFound => {
            "there is no such socket: is Postgres up (systemctl status postgresql, and its log), are folder and port of -db \
             right, does unix_socket_directories name that folder"
        }
        Io { doing, .. } | Timeout { doing, .. } if *doing == "look up the host" => {
            "is the host of -db right, and does the name service of this machine answer"
        }
        Io { .. } => {
            "is its host up and reachable from here (network, firewall), are host and port of -db right"
        }
        Timeout { doing, .. } if *doing == "open the connection" => {
            "is its host up, are host and port of -db right, does a firewall on the way let the port through"
        }
        Timeout { .. } => {
            "the connection stands and nothing answers: is the server frozen or overloaded, are host and port of -db right"
        }
        Closed { .. } => LOST,
        Protocol(_) => "are host and port of -db those of a Postgres",
        WrongSession(_) => {
            "name every server of the cluster in -db, or wait until its failover is done"
        }
        error => return error.remedy().or_else(|| state(error.sqlstate()?)),
    })
}

/// A statement. Without an error of the server's own its session is gone.
pub fn sql(error: &::postgres::Error) -> Option<&'static str> {
    match error.code() {
        Some(code) => state(code.code()),
        None => Some(LOST),
    }
}

fn state(sqlstate: &str) -> Option<&'static str> {
    Some(match sqlstate {
        "28000" => "check the lines of pg_hba.conf for this user and database",
        "42501" => {
            "run it as a role that may do this: the owner of what is meant, for what is created also print it for an \
             administrator (setup -print-sql)"
        }
        "3F000" => "create the schema that -table names, then run this again",
        "55000" => "set wal_level = logical in postgresql.conf and restart Postgres",
        "53300" => {
            "every connection is taken: end sessions that nobody needs (pg_stat_activity lists them), or raise max_connections"
        }
        "53400" => {
            "raise max_replication_slots, or drop a slot that nobody needs (pg_replication_slots lists them)"
        }
        // by statement_timeout or lock_timeout
        "57014" | "55P03" => {
            "it took too long: pg_stat_activity tells what the server is busy with, and who waits for whom"
        }
        state if state.starts_with("57") => STARTS,
        _ => return None,
    })
}

/// JetStream, or the connection to it.
pub fn nats(error: &jetstream::Error) -> Option<&'static str> {
    match error {
        jetstream::Error::Nats(error) => connection(error),
        jetstream::Error::ApiTimeout { .. } => Some(
            "is nats-server frozen or overloaded, or the stream without a leader: its log, and nats server report jetstream",
        ),
        jetstream::Error::Api { .. } => None,
    }
}

fn connection(error: &nats::Error) -> Option<&'static str> {
    use nats::Error::{Lost, NoServer, NotNats, Refused, Timeout, Unreachable};
    Some(match error {
        NoServer(errors) => return connection(errors.last()?),
        Unreachable { source, .. } if source.kind() == ConnectionRefused => {
            "nothing listens there: is nats-server up (systemctl status nats-server on its host, and its log), are host and port \
             of -nats right"
        }
        Unreachable { .. } => {
            "is its host up and its name known here, are host and port of -nats right, does a firewall let the port through"
        }
        Timeout { .. } => {
            "is nats-server frozen or overloaded (its log), are host and port of -nats right, does a firewall let the port through"
        }
        NotNats { .. } => "are host and port of -nats those of a nats-server",
        Refused { .. } | Lost { .. } => LOST,
        _ => return None,
    })
}
