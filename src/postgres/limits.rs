//! Every bound and deadline of this layer, with the reason for each number.

use std::time::Duration;

/// Longest message accepted before copy-both begins. Parameters, errors and catalog rows are far smaller;
/// whoever answers has not yet proven to be our server and must not make us hold more.
pub(super) const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Longest CopyData message accepted: Postgres cannot build a message of more than 1 GiB; the rest is room for the
/// headers around it. It is never held whole: see [`super::frames`].
pub(super) const MAX_COPY_MESSAGE_BYTES: usize = (1 << 30) + (1 << 16);

/// So much of an error, a notice or a reported setting is kept; the rest is passed over as it comes. Whoever can raise
/// an error chooses how long it is.
pub(super) const CUT_MESSAGE_BYTES: usize = 16 << 10;

/// Longest field of an error or a notice: more is no help to a person, and it goes to the log.
pub(super) const MAX_FIELD_BYTES: usize = 2 << 10;

/// So much of a large CopyData message is there when its receiver is asked what to do with it: more than a type, a table's id,
/// or the longest prefix of a message that a flag can name.
pub(super) const HEAD_BYTES: usize = 8 << 10;

/// Settings that are kept of those that the server reports (Postgres reports 14), and the longest of them: a role's
/// `search_path` is reported too, and can be as long as its owner likes.
pub(super) const MAX_SETTINGS: usize = 64;
/// See [`MAX_SETTINGS`].
pub(super) const MAX_SETTING_BYTES: usize = 1 << 10;

/// Notices of one session that go to the log: a trigger on login can raise any number.
pub(super) const MAX_NOTICES: u32 = 20;

/// Most rounds of SCRAM's hash that a server may ask for before it has proven anything: each costs the client as much as
/// the server says. Postgres' default is 4096; a million take less than a second.
pub(super) const MAX_SCRAM_ITERATIONS: u32 = 1_000_000;

/// Most bytes of rows one simple query may answer with: what we ask for is a handful of catalog rows.
pub(super) const MAX_RESULT_BYTES: usize = 16 << 20;

/// The receive buffer: several TLS records, and more than one `recv` yields on a common socket. A CopyData message that is larger
/// goes through it in pieces; any other lets it grow, to [`MAX_MESSAGE_BYTES`] at most.
pub(super) const RECEIVE_BUFFER_BYTES: usize = 128 << 10;

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
