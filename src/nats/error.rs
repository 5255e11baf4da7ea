//! What can go wrong between a client and NATS, in words that say what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error of this layer. Servers are named as `host:port`; no variant holds a secret.
#[derive(Debug)]
pub enum Error {
    /// A file that signing in or TLS needs is missing, unreadable or malformed.
    File {
        /// What it should have been.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name did not resolve, or nobody accepted the connection.
    Unreachable {
        /// The server.
        server: String,
        /// Why.
        source: io::Error,
    },
    /// The server did not do its part within the connect timeout.
    Timeout {
        /// The server.
        server: String,
        /// What it did not do.
        what: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// Whoever listens there does not speak NATS as this program can.
    NotNats {
        /// The server.
        server: String,
        /// What it did.
        reason: String,
    },
    /// User, password, token, credentials or nkey are wrong or have expired.
    Authorization {
        /// The server.
        server: String,
        /// The server's words.
        reason: String,
    },
    /// TLS failed.
    Tls {
        /// The server.
        server: String,
        /// Why.
        reason: String,
    },
    /// The user lacks a permission.
    Permission {
        /// The server's words: they name the subject.
        reason: String,
    },
    /// The server refused the connection for another reason, or broke it while it was made.
    Refused {
        /// The server.
        server: String,
        /// The server's words.
        reason: String,
    },
    /// The connection is over.
    Lost {
        /// The server.
        server: String,
        /// What ended it.
        reason: String,
        /// Who.
        by: EndedBy,
    },
    /// A message that NATS would close the connection for was handed over.
    Unpublishable {
        /// What is wrong with it.
        reason: String,
    },
    /// No server of several could be used.
    NoServer(Vec<Error>),
}

/// Who has ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    /// The server, over a message that it does not take.
    Complaint,
    /// The server, or somebody between, without a word.
    Silence,
    /// A timeout, we, or the server for a reason that has nothing to do with a message.
    Other,
}

/// What nats-server says of a message, in lower case: `maxPayloadViolation`, `overMaxControlLineLimit`, `processPub`,
/// `parseErr` in its client.go and parser.go.
const OVER_MESSAGE: [&str; 5] = [
    "maximum payload",
    "maximum control line",
    "invalid publish subject",
    "unknown protocol operation",
    "parser error",
];

/// Of a server's words, so much is kept.
const MAX_WORDS: usize = 400;

impl Error {
    /// What a server's words behind `-ERR` mean.
    pub fn of_server(server: &str, words: &str) -> Error {
        let (server, reason) = (server.to_string(), words.chars().take(MAX_WORDS).collect());
        let has = |text: &str| words.to_ascii_lowercase().contains(text);
        if has("permissions violation") {
            Error::Permission { reason }
        } else if has("authorization") || has("authentication") {
            Error::Authorization { server, reason }
        } else {
            let by = match OVER_MESSAGE.into_iter().any(has) {
                true => EndedBy::Complaint,
                false => EndedBy::Other,
            };
            Error::Lost { server, reason, by }
        }
    }

    /// Who has ended the connection, if this has.
    pub fn ended_by(&self) -> EndedBy {
        match self {
            Error::Lost { by, .. } => *by,
            // the server goes on, but never answers the publish
            Error::Permission { reason } if reason.to_ascii_lowercase().contains("for publish") => {
                EndedBy::Complaint
            }
            _ => EndedBy::Other,
        }
    }

    /// Why a connection is over. With TLS, an alert is how a server refuses a client certificate, and it comes after the
    /// handshake.
    pub fn of_stream(server: &str, error: &io::Error, is_tls: bool) -> Error {
        let (server, reason) = (server.to_string(), error.to_string());
        if is_tls && reason.contains("alert") {
            return Error::Tls { server, reason };
        }
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let by = match error.kind() {
            BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => EndedBy::Silence,
            _ => EndedBy::Other,
        };
        Error::Lost { server, reason, by }
    }

    /// The same of a connection that is still being made.
    pub fn while_connecting(self) -> Error {
        match self {
            Error::Lost { server, reason, .. } => Error::Refused { server, reason },
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::File { what, path, source } => {
                write!(f, "read {what} {}: {source}", path.display())
            }
            Error::Unreachable { server, source } => write!(
                f,
                "connect to NATS at {server}: {source}: check the address, and that the server runs"
            ),
            Error::Timeout {
                server,
                what,
                after,
            } => write!(
                f,
                "connect to NATS at {server}: {what} within {:.1} s",
                after.as_secs_f32()
            ),
            Error::NotNats { server, reason } => {
                write!(f, "connect to NATS at {server}: {reason}")
            }
            Error::Authorization { server, reason } => write!(
                f,
                "sign in to NATS at {server}: {reason}: check user, password, token, credentials or nkey, and whether they have expired"
            ),
            Error::Tls { server, reason } => write!(
                f,
                "secure the connection to NATS at {server}: {reason}: check the certificate authority, the host name and the client certificate"
            ),
            Error::Permission { reason } => write!(
                f,
                "use NATS: {reason}: allow the user to publish to the events' subjects and the JetStream API, and to subscribe to _INBOX.>"
            ),
            Error::Refused { server, reason } => {
                write!(f, "connect to NATS at {server}: {reason}")
            }
            Error::Lost { server, reason, .. } => {
                write!(f, "keep the connection to NATS at {server}: {reason}")
            }
            Error::Unpublishable { reason } => write!(f, "publish to NATS: {reason}"),
            Error::NoServer(errors) => {
                write!(f, "connect to NATS: none of {} servers", errors.len())?;
                errors.iter().try_for_each(|error| write!(f, "; {error}"))
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::File { source, .. } | Error::Unreachable { source, .. } => Some(source),
            _ => None,
        }
    }
}
