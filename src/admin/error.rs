//! What ends a command, and what a person reads.

use super::remedy;
use crate::exit::Exit;
use crate::{jetstream, nats, postgres};
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
            Error::Output(_) => "give standard output room".into(),
            error => match error.known_remedy() {
                Some(remedy) => remedy.into(),
                None => format!("{}; check tells more", self.setting()),
            },
        }
    }

    /// The same in the mouth of `check`, for an error of one of the two servers.
    pub fn mend(&self) -> String {
        self.known_remedy().unwrap_or(self.setting()).into()
    }

    fn known_remedy(&self) -> Option<&'static str> {
        match self {
            Error::Postgres(error) => remedy::postgres(error),
            Error::Sql { source, .. } => remedy::sql(source),
            Error::Nats(error) => remedy::nats(error),
            Error::Wrong { .. } | Error::Output(_) => None,
        }
    }

    fn setting(&self) -> &'static str {
        match self {
            Error::Nats(_) => "correct -nats or what it names",
            _ => "correct -db or what it names",
        }
    }

    /// The exit code it ends the program with.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Wrong { exit, .. } => *exit,
            Error::Output(_) => Exit::Unavailable,
            Error::Nats(
                jetstream::Error::Nats(
                    nats::Error::File { .. }
                    | nats::Error::Authorization { .. }
                    | nats::Error::Permission { .. },
                )
                | jetstream::Error::Api { .. },
            ) => Exit::Configuration,
            Error::Nats(_) => Exit::Unavailable,
            Error::Postgres(error) if error.is_lasting() => Exit::Configuration,
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
