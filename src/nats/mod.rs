//! NATS as a client speaks it: one connection, and nothing about JetStream.
//!
//! [`handshake`] reaches a server and signs in ([`tls`], [`sign_in`], [`nkey`]); [`connection`] is what is made of that: messages out,
//! messages in, and requests with a deadline each. [`protocol`] takes bytes apart without doing any IO; [`options`] say where
//! NATS is; [`info`] is what a server reports about itself. `handover` lends a session to the operator's commands.
//!
//! Every wait has a deadline, and nothing that a server sends takes memory beyond a bound.

pub mod connection;
pub mod error;
#[cfg(feature = "admin")]
pub mod handover;
pub mod handshake;
pub mod info;
pub mod nkey;
pub mod options;
pub mod protocol;
pub mod sign_in;
pub mod tls;

pub use connection::Connection;
pub use error::{EndedBy, Error};
