//! JetStream as the relay uses it.
//!
//! [`client`] is the only place that names the `nats` crate; [`probe`] looks at a server before it does;
//! [`tunnel`] is TLS; [`options`] say where NATS is; [`ack`] reads PubAcks and errors; [`streams`] knows which stream captures a
//! subject; `chain` and `resume` are the fence and the resume.

pub mod ack;
pub mod client;
pub mod error;
pub mod options;
pub mod probe;
pub mod streams;
pub mod tunnel;
