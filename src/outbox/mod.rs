//! What a row of the outbox table becomes: an event with a subject, an id, a body and a position.
//!
//! [`mapper`] finds the columns and writes events into a [`batch`]; [`subject`] and [`json`] hold the two
//! rules for bytes; [`position`] says where an event stands in Postgres.

pub mod batch;
pub mod json;
pub mod mapper;
pub mod position;
pub mod subject;
