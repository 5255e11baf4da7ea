//! Tests against a real Postgres and a real nats-server, one module a subject.
//!
//! `scripts/test` gets the servers; `tests/support` starts them.

mod smoke;
#[path = "../support/mod.rs"]
mod support;
