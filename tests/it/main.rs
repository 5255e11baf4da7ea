//! Tests against a real Postgres and a real nats-server, one module a subject.
//!
//! `scripts/test` gets the servers; `tests/support` starts them.

mod alterations;
mod credentials;
mod drain;
mod encodings;
mod exposition;
mod failover;
mod faults_cluster;
mod faults_nats;
mod faults_network;
mod faults_postgres;
mod faults_relay;
mod faults_scenario;
mod faults_streams;
mod flags;
mod histories;
mod http;
mod internal;
mod large;
mod leaf;
mod mapping;
mod nats_limits;
mod nats_poison;
mod nats_routes;
mod observe;
mod one_connection;
mod operation;
mod operators;
mod operators_bucket;
mod operators_copies;
mod operators_postgres;
mod operators_shared;
mod operators_streams;
mod park;
mod payloads;
mod publication;
mod renewals;
mod rig;
mod secrets;
mod seed;
mod slot;
mod smoke;
mod stops;
mod subjects;
#[path = "../support/mod.rs"]
mod support;
mod surroundings;
mod synchronous;
mod transactions;
