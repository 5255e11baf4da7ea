//! Real servers, faults and an oracle for the integration tests.
//!
//! Each fixture owns what it starts: dropping it ends the server and removes its folder, and
//! [`process`] sees to it that this happens even when the test program is killed. Fixtures print their
//! server's log when the test that holds them panics. Everything listens on 127.0.0.1 only.
//!
//! Independent of the relay on purpose: what the tests read from a stream comes through
//! [`natsclient`], not through the code under test.
#![allow(
    dead_code,
    reason = "a fixture offers what a server can do, whether or not a test uses it today"
)]

pub mod command;
pub mod files;
pub mod nats;
pub mod natsclient;
pub mod operator;
pub mod oracle;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod relay;
pub mod scripted_nats;
pub mod truth;
pub mod wait;
