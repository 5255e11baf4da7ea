//! What can go wrong between the relay and JetStream, in words that say what to do.

use super::ack::{AckError, ApiError};
use crate::nats;
use std::fmt;
use std::time::Duration;

/// An error of this layer.
#[derive(Debug)]
pub enum Error {
    /// The connection.
    Nats(nats::Error),
    /// The JetStream API did not answer in time.
    ApiTimeout {
        /// What was asked.
        api: String,
        /// How long the answer was waited for.
        after: Duration,
    },
    /// The JetStream API answered with an error, nobody, or something else.
    Api {
        /// What was asked.
        api: String,
        /// The answer.
        source: AckError,
    },
}

impl Error {
    /// What it is called where messages are read from streams, which makes the largest answers.
    pub fn while_reading(&self) -> String {
        match self {
            Error::Nats(nats::Error::Lost { .. }) => format!(
                "{self}; if that comes again and again, nats-server has a max_pending of less than three of the largest messages: raise \
                 that"
            ),
            error => error.to_string(),
        }
    }

    /// The error object of the JetStream API, if it is one.
    pub fn api_error(&self) -> Option<&ApiError> {
        match self {
            Error::Api {
                source: AckError::Api(error),
                ..
            } => Some(error),
            _ => None,
        }
    }
}

impl From<nats::Error> for Error {
    fn from(error: nats::Error) -> Error {
        Error::Nats(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Nats(error) => error.fmt(f),
            Error::ApiTimeout { api, after } => write!(
                f,
                "ask JetStream for {api}: no answer within {:.1} s: check that it has a leader, that the store can write (a full disk; see the log of \
                 nats-server), and the API prefix",
                after.as_secs_f32()
            ),
            Error::Api { api, source } => match source {
                AckError::NoResponders => write!(
                    f,
                    "ask JetStream for {api}: nobody answers: enable JetStream on the server and for the account, or correct the API prefix"
                ),
                AckError::Malformed => {
                    write!(f, "ask JetStream for {api}: the answer is not JetStream's")
                }
                AckError::NoAnswer => write!(f, "ask JetStream for {api}: no answer in time"),
                AckError::Api(error) => write!(f, "ask JetStream for {api}: {error}"),
            },
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Nats(error) => error.source(),
            Error::Api { source, .. } => Some(source),
            Error::ApiTimeout { .. } => None,
        }
    }
}
