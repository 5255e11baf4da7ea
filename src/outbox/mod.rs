//! What a row of the outbox table becomes: an event with a subject, an id, headers, a body and a position.
//!
//! [`mapping`] is what the operator says about the tables, [`template`] the subjects of it. [`mapper`] knows the
//! tables, [`plan`] what of each becomes an event in a [`batch`], [`problem`] why one cannot, [`large`] what is kept of a large one; [`subject`],
//! [`message_id`], [`header`] and [`json`] hold the rules for what goes on the wire, over [`percent`]. [`message`] is
//! the event without a table; [`park`] is what an event becomes that cannot be published as it is. [`position`]
//! says where an event stands in Postgres, [`lineage`] what that is worth on a server with another history.

pub mod batch;
pub mod flags;
pub mod header;
pub mod json;
pub mod large;
pub mod lineage;
pub mod mapper;
pub mod mapping;
pub mod message;
pub mod message_id;
pub mod park;
pub mod percent;
pub mod plan;
pub mod position;
pub mod problem;
pub mod subject;
pub mod template;
