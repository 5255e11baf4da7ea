//! What can go wrong between us and Postgres. SQLSTATEs are kept; passwords never get in here.
//!
//! Fields of a server's error: <https://www.postgresql.org/docs/current/protocol-error-fields.html>.

use super::Lsn;
use super::byte_reader::ByteReader;
use super::conninfo::TargetSessionAttrs;
use super::limits::{MAX_FIELD_BYTES, MAX_SCRAM_ITERATIONS};
use super::sqlstate::{self, Meaning};
use std::fmt;
use std::io;
use std::time::Duration;

/// A cause of another library, kept for `source()`.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A failure of the connection, of what the server answered, or of what was read from it.
#[derive(Debug)]
pub enum Error {
    /// The operating system refused.
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The server's own error.
    Server(Box<ServerError>),
    /// The server sent what the protocol does not allow here.
    Protocol(String),
    /// TLS could not be set up, or broke.
    Tls {
        /// What was being done, with the file's name if one is concerned.
        doing: String,
        /// Why it failed.
        source: Cause,
        /// It stays so until somebody changes a file, a setting or a certificate.
        lasting: bool,
    },
    /// The server asks for, or offers, an authentication that cannot be used.
    Auth(AuthError),
    /// The deadline passed.
    Timeout {
        /// What was being waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
    /// The server closed the connection without a message, as it does after `wal_sender_timeout`.
    Closed {
        /// What was being done.
        doing: &'static str,
    },
    /// The server is not of the kind that `target_session_attrs` asks for.
    WrongSession(TargetSessionAttrs),
    /// No host could be used: each that was tried, as `host:port`, and its cause.
    Connect(Vec<(String, Error)>),
}

impl Error {
    /// The server's error, also when it ended an attempt to connect (the last one, of several).
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            Error::Server(error) => Some(error),
            Error::Connect(attempts) => attempts.last().and_then(|(_, error)| error.server()),
            _ => None,
        }
    }

    /// The SQLSTATE of [`Error::server`].
    pub fn sqlstate(&self) -> Option<&str> {
        self.server().map(|error| error.code.as_str())
    }

    /// Whether nothing that passes by itself is to blame. Of several hosts one that may come back is enough.
    pub fn is_lasting(&self) -> bool {
        match self {
            Error::Connect(attempts) => {
                !attempts.is_empty() && attempts.iter().all(|(_, error)| error.is_lasting())
            }
            Error::Auth(_) => true,
            Error::Tls { lasting, .. } => *lasting,
            error if error.is_of_a_pooler() => true,
            error => error.meaning() == Some(Meaning::Configuration),
        }
    }

    /// The server did not let us in, or we did not trust it: by a password, a certificate or a line of pg_hba.conf, which may be
    /// about to be renewed.
    pub fn is_of_sign_in(&self) -> bool {
        match self {
            Error::Connect(attempts) => attempts.iter().any(|(_, error)| error.is_of_sign_in()),
            Error::Auth(_) | Error::Tls { .. } => true,
            error => matches!(error.sqlstate(), Some("28P01" | "28000")),
        }
    }

    /// A connection pooler stands in between, and passes no replication on. PgBouncer before 1.23 does not take the start-up
    /// parameter, by a code that it has for much else; those that ignore it have replication commands run as SQL.
    fn is_of_a_pooler(&self) -> bool {
        self.server()
            .is_some_and(|error| match error.code.as_str() {
                "08P01" => error.message.contains("startup parameter: replication"),
                "42601" => true,
                _ => false,
            })
    }

    /// A walsender raised it over a message, by its context: `in the message callback`.
    pub fn is_of_message(&self) -> bool {
        let context = self.server().and_then(|error| error.context.as_deref());
        context.is_some_and(|context| {
            context
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .any(|word| word == "message")
        })
    }

    /// What the server's error means, by its SQLSTATE.
    pub fn meaning(&self) -> Option<Meaning> {
        self.sqlstate().map(sqlstate::meaning)
    }

    /// What to do about what is lasting, where the error does not say it and it does not depend on what was wanted.
    pub fn remedy(&self) -> Option<&'static str> {
        if let Error::Connect(attempts) = self {
            return attempts.last()?.1.remedy();
        }
        if let Error::Tls { lasting: true, .. } = self {
            return Some(
                "check sslmode, sslrootcert, sslcert and sslkey of -db, and the server's certificate",
            );
        }
        if self.is_of_a_pooler() {
            return Some(
                "-db leads to a connection pooler that does not pass replication on: name the host and port of Postgres itself",
            );
        }
        match self.sqlstate()? {
            "28P01" => Some("check the password of -db (or PGPASSWORD, ~/.pgpass)"),
            "3D000" => Some("check the database name of -db"),
            _ => None,
        }
    }

    /// Sorts a failed read or write: a passed deadline, a lost peer, broken TLS, or the system's own error.
    pub(super) fn from_io(doing: &'static str, after: Duration, source: io::Error) -> Error {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        match source.kind() {
            WouldBlock => Error::Timeout { doing, after },
            // with a number it is the system's own, of keepalives or tcp_user_timeout
            TimedOut if source.raw_os_error().is_none() => Error::Timeout { doing, after },
            ConnectionReset | BrokenPipe | UnexpectedEof => Error::Closed { doing },
            _ if source
                .get_ref()
                .is_some_and(|cause| cause.is::<rustls::Error>()) =>
            {
                let source = source
                    .into_inner()
                    .expect("get_ref has just found the cause");
                let refused = matches!(
                    source.downcast_ref(),
                    Some(rustls::Error::InvalidCertificate(_))
                );
                Error::Tls {
                    doing: doing.to_string(),
                    source,
                    lasting: refused,
                }
            }
            _ => Error::Io { doing, source },
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { doing, source } => write!(f, "{doing}: {source}"),
            Error::Server(error) => write!(f, "{error}"),
            Error::Protocol(what) => write!(f, "read from the server: {what}"),
            Error::Tls { doing, source, .. } => write!(f, "{doing}: {source}"),
            Error::Auth(error) => write!(f, "{error}"),
            Error::Timeout { doing, after } => {
                write!(f, "{doing}: no answer within {} s", after.as_secs_f32())
            }
            Error::Closed { doing } => write!(f, "{doing}: the server closed the connection"),
            Error::WrongSession(wanted) => {
                write!(
                    f,
                    "check the session: it is not {wanted}, as target_session_attrs asks"
                )
            }
            Error::Connect(attempts) => {
                for (i, (host, error)) in attempts.iter().enumerate() {
                    let separator = if i == 0 { "" } else { "; " };
                    write!(f, "{separator}connect to Postgres at {host}: {error}")?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Server(error) => Some(error.as_ref()),
            Error::Tls { source, .. } => Some(source.as_ref()),
            Error::Auth(error) => Some(error),
            Error::Connect(attempts) => attempts.last().map(|(_, error)| error as _),
            _ => None,
        }
    }
}

/// An ErrorResponse or a NoticeResponse.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerError {
    /// ERROR, FATAL, PANIC, WARNING, NOTICE …, never translated.
    pub severity: String,
    /// The SQLSTATE.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// What the server was doing.
    pub context: Option<String>,
    /// The server's function that raised it, never translated.
    pub routine: Option<String>,
}

impl ServerError {
    /// Reads the fields, of a message that may have been cut. Text that is not UTF-8 (before authentication the server may
    /// speak its own encoding) is replaced, and what is too long to be of help is left out.
    pub(super) fn from_body(body: &[u8]) -> Result<ServerError, Error> {
        let mut error = ServerError::default();
        let mut reader = ByteReader::new(body);
        // the last field of one that was cut has no end, and nothing follows it
        while let Ok(field) = reader.u8("type of a field")
            && field != 0
        {
            let value = text(reader.bytes_to_nul());
            match field {
                // 'S' may be translated; 'V' follows it from Postgres 9.6 on
                b'S' | b'V' => error.severity = value,
                b'C' => error.code = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                b'W' => error.context = Some(value),
                b'R' => error.routine = Some(value),
                _ => {}
            }
        }
        match error.code.is_empty() {
            true => Err(Error::Protocol("malformed error message".into())),
            false => Ok(error),
        }
    }

    /// Where in the WAL the change is that the server was decoding: a walsender's context ends in `associated LSN 0/16B3748`,
    /// in whatever language.
    pub fn associated_lsn(&self) -> Option<Lsn> {
        let mut lines = self.context.as_deref()?.lines();
        lines.find_map(|line| {
            let mut words = line.rsplit(|c: char| !c.is_ascii_hexdigit() && c != '/');
            words.find_map(|word| word.parse().ok())
        })
    }
}

/// The beginning of a field, for a person.
fn text(bytes: &[u8]) -> String {
    match bytes.split_at_checked(MAX_FIELD_BYTES) {
        None => String::from_utf8_lossy(bytes).into_owned(),
        Some((kept, _)) => {
            let kept = String::from_utf8_lossy(kept);
            // a character that was cut through
            format!("{}…", kept.trim_end_matches(char::REPLACEMENT_CHARACTER))
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity, self.code, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, " (hint: {hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

/// Why no authentication came about, apart from the server's own refusal.
#[derive(Debug)]
pub enum AuthError {
    /// A method that this program does not have.
    Unsupported(String),
    /// The server asks for a password and none was given.
    NoPassword,
    /// `require_auth` does not allow the method.
    NotAllowed(&'static str),
    /// `channel_binding=require` cannot be met, and why.
    NoChannelBinding(&'static str),
    /// The server let us in before it had proven that it knows the password.
    ServerNotProven,
    /// The server asks for more rounds of SCRAM's hash than anybody should.
    ManyIterations(u32),
    /// The SCRAM exchange itself failed; also when the server's proof is wrong.
    Scram(io::Error),
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("authenticate: ")?;
        match self {
            AuthError::Unsupported(method) => write!(
                f,
                "the server asks for {method}, which is not supported; give the user trust, password, md5, \
                 scram-sha-256 or cert in pg_hba.conf"
            ),
            AuthError::NoPassword => f.write_str(
                "the server asks for a password and none was given; set PGPASSWORD or a line of the password file",
            ),
            AuthError::NotAllowed(method) => {
                write!(f, "the server asks for {method}, which require_auth does not allow")
            }
            AuthError::NoChannelBinding(why) => write!(f, "channel_binding=require, but {why}"),
            AuthError::ServerNotProven => {
                f.write_str("the server ended SCRAM without proving that it knows the password")
            }
            AuthError::ManyIterations(count) => write!(
                f,
                "the server asks for {count} iterations of SCRAM, of at most {MAX_SCRAM_ITERATIONS}; set the user's password \
                 again with a lower scram_iterations"
            ),
            AuthError::Scram(source) => write!(f, "SCRAM exchange: {source}"),
        }
    }
}

impl std::error::Error for AuthError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            AuthError::Scram(source) => Some(source),
            _ => None,
        }
    }
}
