//! Every bound and deadline of this layer, with the reason for each number.

use std::time::Duration;

/// Longest message accepted before copy-both begins. Parameters, errors and catalog rows are far smaller;
/// whoever answers has not yet proven to be our server and must not make us hold more.
pub(super) const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Longest message accepted in copy-both: Postgres cannot build a message of more than 1 GiB; the rest is
/// room for the headers around it.
pub(super) const MAX_COPY_MESSAGE_BYTES: usize = (1 << 30) + (1 << 16);

/// Most bytes of rows one simple query may answer with: what we ask for is a handful of catalog rows.
pub(super) const MAX_RESULT_BYTES: usize = 16 << 20;

/// The receive buffer at start: several TLS records, and more than one `recv` yields on a common socket.
pub(super) const RECEIVE_BUFFER_BYTES: usize = 128 << 10;

/// A receive buffer that grew beyond this for a large message is given back after it; up to this it is
/// kept, so that a table of large rows does not allocate for each.
pub(super) const KEEP_BUFFER_BYTES: usize = 1 << 20;

/// Ciphertext read from the socket at once: four full TLS records.
pub(super) const CIPHERTEXT_BUFFER_BYTES: usize = 64 << 10;

/// For TCP, TLS and authentication together, for each address that is tried, unless `connect_timeout` is given.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// For an answer to a simple query or to START_REPLICATION, unless the caller gives another.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// For handing a message to the socket once the stream runs. Below Postgres' default `wal_sender_timeout` of
/// 60 s: a status update that cannot be sent for this long means that the session is lost.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A password file, certificate or key larger than this is not one.
pub(super) const MAX_FILE_BYTES: u64 = 4 << 20;
