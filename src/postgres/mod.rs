//! Our side of the Postgres protocol: everything up to decoded pgoutput messages.
//!
//! [`conninfo`] reads what libpq reads, [`connection`] starts a session over a `stream` (plain or
//! `tls`) with `authentication`, [`replication`] speaks the copy-both stream, whose messages `frames` cuts,
//! and [`pgoutput`] decodes what it carries, by [`byte_reader`]. All bounds and deadlines are in `limits`.
//! [`identifier`] writes names for people.
//! With the feature `admin`, `handover` lets the `postgres` crate use such a session.

mod authentication;
pub mod byte_reader;
pub mod connection;
pub mod conninfo;
pub mod encoding;
pub mod error;
mod frames;
#[cfg(feature = "admin")]
pub mod handover;
pub mod identifier;
mod limits;
pub mod lsn;
mod passfile;
pub mod pgoutput;
pub mod pieces;
pub mod replication;
pub mod sqlstate;
mod stream;
mod tls;

pub use connection::Connection;
pub use conninfo::ConnInfo;
pub use error::Error;
pub use lsn::Lsn;
