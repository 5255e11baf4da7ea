//! The checkpoint: one key of a JetStream key-value bucket (ADR-8) per slot and system id, which says how far the relay is.
//!
//! [`record`] is the key's value, [`store`] decides when it is written, what with, and what an answer means, [`kv`] has
//! the requests.

pub mod kv;
pub mod record;
pub mod store;
