//! JetStream as the relay uses it.
//!
//! [`client`] is the link to a server: a [`connection`] of our own for events, and one of the `nats` crate, which only it
//! names, for questions. [`probe`] looks at a server before both do; [`sign_in`] is the CONNECT line, [`protocol`] what a
//! server says; [`tls`] is TLS, and [`tunnel`] TLS for the crate; [`options`] say where NATS is; [`ack`] reads
//! PubAcks and errors; [`streams`] knows which stream captures a subject, [`preflight`] whether a stream can carry the
//! promises; [`wire`] is what a publish looks like; [`chain`] and [`resume`] are the fence and the resume.

pub mod ack;
pub mod client;
pub mod connection;
pub mod error;
pub mod options;
pub mod preflight;
pub mod probe;
pub mod protocol;
pub mod sign_in;
pub mod streams;
pub mod tls;
pub mod tunnel;
pub mod wire;

pub use error::Error;

/// The header of the fence (ADR-22): the sequence that the stream must end at.
pub const EXPECTED_LAST_SEQUENCE: &str = "Nats-Expected-Last-Sequence";

/// The header that carries a [`SourcePosition`](crate::outbox::position::SourcePosition).
pub const OUTBOX_POSITION: &str = "Outbox-Position";

/// The header of an event that was published after later ones.
pub const OUTBOX_LATE: &str = "Outbox-Late";

/// What a consumer may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Each event stands in the stream once, in commit order: the fence and the resume.
    ExactlyOnce,
    /// No fence and no reading back, for streams with other busy writers. JetStream's deduplication window
    /// catches repeats; order is kept within a subject.
    AtLeastOnce,
}

impl std::fmt::Display for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Delivery::ExactlyOnce => "exactly-once",
            Delivery::AtLeastOnce => "at-least-once",
        })
    }
}
