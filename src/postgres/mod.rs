//! Our side of the Postgres protocol: everything up to decoded pgoutput messages.
//!
//! [`conninfo`] reads what libpq reads, [`connection`] starts a session over a [`stream`] (plain or
//! [`tls`]), [`replication`] speaks the copy-both stream, [`pgoutput`] decodes what it carries
//! field by field with a [`byte_reader`].

pub mod byte_reader;
pub mod connection;
pub mod conninfo;
pub mod error;
pub mod lsn;
pub mod pgoutput;
pub mod replication;
pub mod stream;
pub mod tls;

pub use connection::Connection;
pub use conninfo::ConnInfo;
pub use error::Error;
pub use lsn::Lsn;
