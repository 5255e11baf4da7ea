//! JetStream as the relay uses it.
//!
//! [`client`] is the only place that names the `nats` crate; [`ack`] reads PubAcks and errors;
//! [`streams`] knows which stream captures a subject; `chain` and `resume` are the fence and the resume.

pub mod ack;
pub mod client;
pub mod streams;
