//! Connecting, authenticating and streaming, against a real PostgreSQL.

mod authentication;
mod cluster;
mod hosts;
mod scripted;
mod streaming;
#[path = "../support/mod.rs"]
mod support;
mod tls;
