//! What a row of the outbox table becomes: an event with a subject, an id, a body and a position.
//!
//! [`mapper`] finds the columns and writes events into a [`batch`]; [`subject`], [`message_id`] and [`json`]
//! hold the rules for what goes on the wire, the first two over [`percent`]; [`position`] says where an
//! event stands in Postgres.

pub mod batch;
pub mod json;
pub mod mapper;
pub mod message_id;
pub mod percent;
pub mod position;
pub mod subject;
