//! JetStream as the relay uses it, over [`crate::nats`].
//!
//! [`client`] is the link to a server: events and their PubAcks, requests of the JetStream API and their answers, over one
//! connection. [`ack`] reads PubAcks and errors; [`streams`] knows which stream captures a subject, [`preflight`] whether a
//! stream can carry the promises, [`bucket`] whether the checkpoint's can hold the record, [`sources`] what copies from it; [`wire`] is
//! what a publish looks like.

pub mod ack;
pub mod bucket;
pub mod client;
pub mod error;
pub mod preflight;
pub mod sources;
pub mod streams;
pub mod wire;

pub use error::Error;

pub use wire::{EXPECTED_LAST_SEQUENCE, MSG_ID, OUTBOX_LATE, OUTBOX_POSITION};

/// The header of a copy, which names the stream that it came from.
pub const STREAM_SOURCE: &str = "Nats-Stream-Source";

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
