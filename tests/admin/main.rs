//! The operator's commands, run as an operator runs them, against a real Postgres and a real nats-server.
#![cfg(feature = "admin")]

mod aggregate;
mod aggregate_cluster;
mod bucket;
mod catalog;
mod check_faults;
mod check_nats;
mod check_past;
mod check_postgres;
mod check_publication;
mod command;
mod compare;
mod faults;
mod handover;
mod preflight;
#[path = "../it/rig.rs"]
#[allow(dead_code, reason = "it is shared with the relay's own tests")]
mod rig;
mod routes;
mod setup;
mod status;
#[path = "../support/mod.rs"]
mod support;
mod tail;
mod unpark;
mod unreachable;
