//! Where the server is and how to get in: what libpq reads from a connection string and the environment.
//!
//! It reads and checks; certificates, the password file and the file of `-db-file` are opened by those who connect, each time anew.
//! Sources: <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS>,
//! <https://www.postgresql.org/docs/current/libpq-envars.html>.

mod keyvalue;
mod resolve;
mod url;

use super::limits::MAX_FILE_BYTES;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Debian's libpq looks for the server's socket here when no host is given.
pub(super) const DEFAULT_SOCKET_DIRECTORY: &str = "/var/run/postgresql";

/// A checked connection string. Neither `Debug` nor `Display` shows the password.
#[derive(Clone)]
pub struct ConnInfo {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) dbname: String,
    pub(super) password: Option<String>,
    password_inline: bool,
    /// `None`: there is no home directory to look in.
    pub(super) passfile: Option<PathBuf>,
    pub(super) application_name: String,
    pub(super) options: Option<String>,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) target_session_attrs: TargetSessionAttrs,
    pub(super) load_balance: bool,
    pub(super) keepalives: Option<Keepalives>,
    pub(super) tcp_user_timeout: Option<Duration>,
    pub(super) tls: TlsInfo,
    pub(super) channel_binding: ChannelBindingMode,
    /// Methods that the server may ask for; `None`: any.
    pub(super) require_auth: Option<Vec<AuthMethod>>,
    /// The session is a walsender's.
    pub(super) replication: bool,
    /// What it was read from.
    file: Option<PathBuf>,
}

/// One of the servers to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) address: Address,
    pub(super) port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    /// `name` is the host as it was given, looked up unless `addr` is given too.
    Tcp { name: String, addr: Option<IpAddr> },
    /// The folder the server's socket is in; one starting with `@` is in the abstract namespace.
    Unix { directory: String },
}

/// What kind of server will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    /// Every server.
    Any,
    /// One that accepts writes by default.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// One that is not in hot standby mode.
    Primary,
    /// One that is.
    Standby,
    /// One that is, or if none of the hosts is, any.
    PreferStandby,
}

/// How much TLS is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// TCP keepalives; `None` leaves a number to the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keepalives {
    pub(super) idle: Option<Duration>,
    pub(super) interval: Option<Duration>,
    pub(super) count: Option<u32>,
}

/// Everything about TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TlsInfo {
    pub(super) mode: SslMode,
    pub(super) roots: Roots,
    pub(super) certificate: OptionalFile,
    pub(super) key: OptionalFile,
    pub(super) sni: bool,
    pub(super) min_version: TlsVersion,
    pub(super) max_version: TlsVersion,
}

/// A file that was named, which must exist, or libpq's default, which need not. `None`: no home directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OptionalFile {
    Named(PathBuf),
    Default(Option<PathBuf>),
}

/// Whom to believe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Roots {
    /// `sslrootcert=system`: what the system trusts.
    System,
    File(OptionalFile),
}

/// Those that rustls speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TlsVersion {
    Tls12,
    Tls13,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChannelBindingMode {
    Disable,
    Prefer,
    Require,
}

/// The authentication methods that this program has, as `require_auth` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AuthMethod {
    Password,
    Md5,
    Scram,
    /// The server asks for nothing: trust, or a client certificate.
    None,
}

/// What is wrong with a connection string. It never repeats a value that may be a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnInfoError {
    /// The `key=value` form is broken at this byte.
    Syntax {
        /// What stands there.
        what: &'static str,
        /// Counted from 0.
        place: usize,
    },
    /// The URL is broken.
    Url(&'static str),
    /// A `%` that no two hexadecimal digits follow, `%00`, or bytes that are not UTF-8, and in which part.
    Percent(&'static str),
    /// Not a parameter of libpq.
    UnknownParameter(String),
    /// A key that cannot be the name of any parameter.
    NotAParameter,
    /// A port that is no number from 1 to 65535. (A password with a `/` can end up in its place.)
    BadPort,
    /// A parameter of libpq that this program cannot honour.
    UnsupportedParameter(&'static str),
    /// A value that the parameter cannot have, and those it can.
    BadValue {
        /// The parameter.
        parameter: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Two parameters that contradict each other, and why.
    Conflict(&'static str),
    /// No user was given, and the system does not know who runs this program.
    NoUser,
}

impl fmt::Display for ConnInfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("read the connection string: ")?;
        match self {
            ConnInfoError::Syntax { what, place } => write!(f, "{what}, at byte {place}"),
            ConnInfoError::Url(what) => f.write_str(what),
            ConnInfoError::Percent(part) => write!(
                f,
                "{part} has a `%` without two hexadecimal digits that make UTF-8; write a percent sign as %25"
            ),
            ConnInfoError::UnknownParameter(name) => write!(f, "unknown parameter {name:?}"),
            ConnInfoError::NotAParameter => f.write_str(
                "neither a postgres:// URL nor key=value pairs",
            ),
            ConnInfoError::BadPort => f.write_str(
                "a port must be a number from 1 to 65535 (write a slash in a URL's password as %2F)",
            ),
            ConnInfoError::UnsupportedParameter(name) => {
                write!(f, "the parameter {name} is not supported by this program")
            }
            ConnInfoError::BadValue {
                parameter,
                value,
                expected,
            } => write!(f, "{parameter} is {value:?}, but must be {expected}"),
            ConnInfoError::Conflict(what) => f.write_str(what),
            ConnInfoError::NoUser => f.write_str("no user given; add one, or set PGUSER"),
        }
    }
}

impl std::error::Error for ConnInfoError {}

impl ConnInfo {
    /// The name that the session has in `pg_stat_activity`, and as a standby.
    pub fn application_name(&self) -> &str {
        &self.application_name
    }

    /// Reads a `postgres://` URL or a `key=value` string; what it does not say is asked of `env` (the
    /// environment of the process, or a test's), and then is libpq's default.
    pub fn parse(
        text: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<ConnInfo, ConnInfoError> {
        let pairs = match url::strip_scheme(text) {
            Some(rest) => url::parse(rest)?,
            None => keyvalue::parse(text)?,
        };
        let mut given = BTreeMap::new();
        for (key, value) in pairs {
            given.insert(resolve::keyword(&key)?, value);
        }
        resolve::resolve(given, env)
    }

    /// The same for an ordinary session, which neither counts as a walsender nor shows up as one.
    pub fn without_replication(&self) -> ConnInfo {
        ConnInfo {
            replication: false,
            ..self.clone()
        }
    }

    /// The same for the one of its hosts that a connection calls its peer.
    pub fn only_at(&self, peer: &str) -> ConnInfo {
        let mut only = self.clone();
        only.hosts.retain(|host| host.to_string() == peer);
        only
    }

    /// The same for somebody who waits no longer than this for a connection, also if `connect_timeout` allows more.
    pub fn connecting_within(&self, limit: Duration) -> ConnInfo {
        ConnInfo {
            connect_timeout: Some(self.connect_timeout.map_or(limit, |given| given.min(limit))),
            ..self.clone()
        }
    }

    /// The same, read from this file.
    pub fn from_file(self, path: PathBuf) -> ConnInfo {
        ConnInfo {
            file: Some(path),
            ..self
        }
    }

    /// The same with the user and the password that its file has now, if it is from one: who renews them restarts nothing.
    pub(super) fn renewed(&self) -> ConnInfo {
        let read = |path| {
            let user = |name: &str| (name == "PGUSER").then(|| self.user.clone());
            let text = secret_in(path).map_err(|error| error.to_string())?;
            ConnInfo::parse(&text, &user).map_err(|error| error.to_string())
        };
        let mut renewed = self.clone();
        // a pipe is empty by now
        let Some(path) = self.file.as_deref().filter(|path| path.is_file()) else {
            return renewed;
        };
        match read(path) {
            Ok(now) => {
                renewed.user = now.user;
                renewed.password = now.password.or(renewed.password);
            }
            Err(cause) => {
                log::warn!(path:% = path.display(), cause:% = cause; "the file of -db-file cannot be read again, or does not stand alone; going on with the user and the password that it had");
            }
        }
        renewed
    }

    /// The password stood in the connection string itself, where `ps` and shell histories show it.
    pub fn has_password_inline(&self) -> bool {
        self.password_inline
    }

    /// To which database.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// Where: `host:port,host:port`.
    pub fn servers(&self) -> String {
        let hosts = self.hosts.iter().map(ToString::to_string);
        hosts.collect::<Vec<_>>().join(",")
    }
}

fn secret_in(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = File::open(path)?;
    file.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text.trim().to_string())
}

impl fmt::Display for ConnInfo {
    /// `user@host:port,host:port/db sslmode=prefer`: for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, servers, dbname) = (&self.user, self.servers(), &self.dbname);
        write!(
            f,
            "{user}@{servers}/{dbname} sslmode={}",
            self.tls.mode.name()
        )
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnInfo({self})")
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.address {
            Address::Tcp { name, .. } if name.contains(':') => write!(f, "[{name}]:{port}"),
            Address::Tcp { name, .. } => write!(f, "{name}:{port}"),
            Address::Unix { directory } => write!(f, "{directory}:{port}"),
        }
    }
}

impl Host {
    /// The path of the server's socket in `directory`.
    pub(super) fn socket_path(&self, directory: &str) -> String {
        format!("{directory}/.s.PGSQL.{}", self.port)
    }
}

impl SslMode {
    pub(super) fn name(self) -> &'static str {
        match self {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }
}

impl fmt::Display for TargetSessionAttrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TargetSessionAttrs::Any => "any",
            TargetSessionAttrs::ReadWrite => "read-write",
            TargetSessionAttrs::ReadOnly => "read-only",
            TargetSessionAttrs::Primary => "primary",
            TargetSessionAttrs::Standby => "standby",
            TargetSessionAttrs::PreferStandby => "prefer-standby",
        })
    }
}

impl AuthMethod {
    pub(super) fn name(self) -> &'static str {
        match self {
            AuthMethod::Password => "password",
            AuthMethod::Md5 => "md5",
            AuthMethod::Scram => "scram-sha-256",
            AuthMethod::None => "none",
        }
    }
}

#[cfg(test)]
mod tests;
