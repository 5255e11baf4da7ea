//! What ends a command, and what a person reads.

use crate::exit::Exit;
use crate::{jetstream, postgres};
use std::fmt;
use std::io;

/// A command could not do what it was asked for.
#[derive(Debug)]
pub enum Error {
    /// Postgres could not be reached, or let nobody in.
    Postgres(postgres::Error),
    /// A statement failed.
    Sql {
        /// What it was for.
        doing: String,
        /// The server's error, or the connection's.
        source: ::postgres::Error,
    },
    /// NATS could not be reached, or refused.
    Nats(jetstream::Error),
    /// Something is missing or wrong: what, and what to do.
    Wrong {
        /// `verb noun: cause`.
        what: String,
        /// What to do.
        remedy: String,
        /// The exit code.
        exit: Exit,
    },
    /// Standard output took no more.
    Output(io::Error),
}

impl Error {
    /// The reader of standard output went away, which is its right.
    pub fn is_closed_output(&self) -> bool {
        matches!(self, Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The server's own code for the error, if Postgres refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Error::Postgres(error) => error.sqlstate(),
            Error::Sql { source, .. } => source.code().map(|code| code.code()),
            _ => None,
        }
    }

    /// What the operator can do about it, as a sentence.
    pub fn remedy(&self) -> String {
        match self {
            Error::Wrong { remedy, .. } => remedy.clone(),
            Error::Nats(_) => "correct -nats or what it names; check tells more".into(),
            Error::Output(_) => "give standard output room".into(),
            Error::Postgres(_) | Error::Sql { .. } => match self.sqlstate() {
                Some("28P01") => "check the password of -db (or PGPASSWORD, ~/.pgpass)".into(),
                Some("28000") => "check the lines of pg_hba.conf for this user and database".into(),
                Some("3D000") => "check the database name of -db".into(),
                Some("42501") => {
                    "run it as a role that may do this, or print what an administrator has to run: setup --print-sql".into()
                }
                Some("55000") => "set wal_level = logical in postgresql.conf and restart Postgres".into(),
                Some("53400") => {
                    "raise max_replication_slots, or drop a slot that nobody needs (pg_replication_slots lists them)".into()
                }
                _ => "correct -db or what it names; check tells more".into(),
            },
        }
    }

    /// The exit code it ends the program with.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Wrong { exit, .. } => *exit,
            Error::Output(_) => Exit::Unavailable,
            Error::Nats(
                jetstream::Error::File { .. }
                | jetstream::Error::Authorization { .. }
                | jetstream::Error::Permission { .. }
                | jetstream::Error::Api { .. },
            ) => Exit::Configuration,
            Error::Nats(_) => Exit::Unavailable,
            Error::Postgres(postgres::Error::Auth(_)) => Exit::Configuration,
            // starting up, shutting down, too many connections
            Error::Postgres(_) | Error::Sql { .. } => match self.sqlstate() {
                Some(state) if !state.starts_with("57") && state != "53300" => Exit::Configuration,
                _ => Exit::Unavailable,
            },
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Postgres(error) => error.fmt(f),
            Error::Nats(error) => error.fmt(f),
            Error::Wrong { what, .. } => f.write_str(what),
            Error::Output(error) => write!(f, "write to standard output: {error}"),
            Error::Sql { doing, source } => match source.as_db_error() {
                None => write!(f, "{doing}: {source}"),
                Some(error) => {
                    let (severity, code) = (error.severity(), error.code().code());
                    write!(f, "{doing}: {severity} {code}: {}", error.message())?;
                    if let Some(detail) = error.detail() {
                        write!(f, " ({detail})")?;
                    }
                    if let Some(hint) = error.hint() {
                        write!(f, " (hint: {hint})")?;
                    }
                    Ok(())
                }
            },
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Postgres(error) => Some(error),
            Error::Sql { source, .. } => Some(source),
            Error::Nats(error) => Some(error),
            Error::Output(error) => Some(error),
            Error::Wrong { .. } => None,
        }
    }
}

impl From<postgres::Error> for Error {
    fn from(error: postgres::Error) -> Error {
        Error::Postgres(error)
    }
}

impl From<jetstream::Error> for Error {
    fn from(error: jetstream::Error) -> Error {
        Error::Nats(error)
    }
}
