//! Relays the rows of a Postgres `outbox` table to NATS JetStream: each committed row once, in commit order.
//!
//! # Map of the code
//!
//! Layers import strictly downwards; each file holds one idea and says so in its header.
//!
//! | layer | what it is |
//! | --- | --- |
//! | `main.rs` | parse, start the logger, run, exit code |
//! | [`cli`] | the flags as they are typed; nothing is validated there |
//! | [`config`] | the one validated [`config::Config`], from flags, environment and files |
//! | [`exit`] | the exit codes |
//! | [`logging`] | one line of `key=value` (or JSON) an event, on stderr |
//! | `admin` | the operator's commands (feature `admin`) |
//! | [`observe`] | metrics, health and the status page over HTTP, and what systemd is told |
//! | [`relay`] | the supervisor, a session, its three threads, and the pure [`relay::core`] they serve |
//! | [`jetstream`] | the JetStream API, streams, publishes and acks, over [`nats`] |
//! | [`outbox`] | what a row becomes: subject, id, body, position |
//! | [`nats`] | the one connection to NATS: handshake, TLS, protocol; knows no JetStream |
//! | [`postgres`] | connection strings, TLS, authentication, the replication stream, pgoutput |
//! | [`lookup`], `random`, `loopback`, `uri` | under both: addresses of a host, names that nobody else has, a socket for one client, percent-encoding |
//!
//! The manual for whoever runs it is [`manual`]; [`manual::_15_architecture`] follows one row through the code.
//!
//! To read the main job, start at [`relay::session`], follow [`relay::reader`] to the channel, and
//! [`relay::publisher`] from there; every decision they carry out is made in [`relay::core`], which
//! knows no socket, clock or thread.

// bytes from a network reach no panic
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::indexing_slicing))]

#[cfg(feature = "admin")]
pub mod admin;
pub mod cli;
pub mod config;
pub mod exit;
pub mod jetstream;
pub mod logging;
pub mod lookup;
#[cfg(feature = "admin")]
mod loopback;
pub mod manual;
pub mod nats;
pub mod observe;
pub mod outbox;
pub mod postgres;
mod random;
pub mod relay;
mod uri;
