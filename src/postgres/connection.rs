//! A session with the server: which host, TLS, startup, authentication, and simple queries.
//!
//! It is, unless told otherwise, a replication session to a database, which takes plain SQL by the simple query protocol as well.
//! Sources: <https://www.postgresql.org/docs/current/protocol-flow.html>,
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS>.

use super::authentication::{Authentication, Progress};
use super::conninfo::{Address, ConnInfo, Host, SslMode, TargetSessionAttrs};
use super::encoding::Encoding;
use super::error::{Error, ServerError};
use super::frames::{Frame, FrameBuffer};
use super::limits::{
    CONNECT_TIMEOUT, MAX_NOTICES, MAX_RESULT_BYTES, MAX_SETTING_BYTES, MAX_SETTINGS,
    REQUEST_TIMEOUT,
};
use super::stream::{Deadlined, Stream};
use super::{passfile, tls};
use crate::lookup;
use bytes::{BufMut, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use rustls::{ClientConfig, ClientConnection};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use postgres_protocol::escape::{
    escape_identifier as quote_identifier, escape_literal as quote_literal,
};

/// SQLSTATE cannot_connect_now: starting up, shutting down, in recovery.
const CANNOT_CONNECT_NOW: &str = "57P03";
/// SQLSTATE invalid_authorization_specification: among others, no line of pg_hba.conf fits.
const INVALID_AUTHORIZATION: &str = "28000";

/// The rows of a simple query, all values as text.
pub type Rows = Vec<Vec<Option<String>>>;

/// The same notice is logged this often. Postgres 19 repeats some at each login (a password that expires soon), and a relay
/// logs in every ten seconds to look at the publication.
const NOTICE_INTERVAL: Duration = Duration::from_secs(3600);

/// Logs what the server has to say, unless it was the last thing it said.
fn log_notice(notice: &ServerError) {
    static LAST: Mutex<Option<(Instant, ServerError)>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let is_known = last.as_ref().is_some_and(|(at, last)| {
        last == notice && now.saturating_duration_since(*at) < NOTICE_INTERVAL
    });
    if is_known {
        return;
    }
    match notice.severity.as_str() {
        "WARNING" => log::warn!(notice:% = notice; "Postgres warns"),
        _ => log::info!(notice:% = notice; "Postgres says"),
    }
    *last = Some((now, notice.clone()));
}

/// An authenticated session, ready for a query.
pub struct Connection {
    pub(super) stream: Arc<Stream>,
    pub(super) frames: FrameBuffer,
    parameters: BTreeMap<String, String>,
    backend_pid: i32,
    peer: String,
    notices: u32,
    encoding: Encoding,
}

impl Connection {
    /// Tries the hosts of `info` in turn. A host that cannot be reached or trusted, is not ready (57P03) or is of
    /// the wrong kind leads to the next one; a host that refuses us ends the search, as in libpq.
    ///
    /// # Errors
    /// [`Error::Connect`], with what every host that was tried has said.
    pub fn connect(info: &ConnInfo) -> Result<Connection, Error> {
        let info = &info.renewed();
        let mut hosts: Vec<&Host> = info.hosts.iter().collect();
        if info.load_balance {
            shuffle(&mut hosts);
        }
        let passes: &[TargetSessionAttrs] = match info.target_session_attrs {
            TargetSessionAttrs::PreferStandby => {
                &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any]
            }
            ref other => std::slice::from_ref(other),
        };
        let mut attempts = Vec::new();
        for wanted in passes {
            attempts.clear();
            for host in &hosts {
                let error = match connect_host(info, host, *wanted) {
                    Ok(connection) => return Ok(connection),
                    Err(error) => error,
                };
                let next = next_may_help(&error);
                attempts.push((host.to_string(), error));
                if !next {
                    return Err(Error::Connect(attempts));
                }
            }
        }
        Err(Error::Connect(attempts))
    }

    /// Runs `sql`, which may be several statements or a replication command, and gives all their rows.
    /// After an error other than [`Error::Server`] the connection is of no more use.
    pub fn simple_query(&mut self, sql: &str) -> Result<Rows, Error> {
        self.simple_query_within(sql, REQUEST_TIMEOUT)
    }

    /// [`Connection::simple_query`] with another deadline than 30 s.
    pub fn simple_query_within(&mut self, sql: &str, timeout: Duration) -> Result<Rows, Error> {
        let doing = "run a query";
        let deadline = Deadline::after(doing, timeout);
        self.send_query(sql, &deadline)?;
        let mut rows = Vec::new();
        let mut bytes = 0;
        let mut failure = None;
        loop {
            let frame = match self.read_frame(&deadline) {
                // after a FATAL error the server closes; the error says more than that
                Err(Error::Closed { .. }) if failure.is_some() => break,
                frame => frame?,
            };
            if frame.tag == b'E' {
                failure = Some(self.server_error(frame));
                continue;
            }
            if self.take_asynchronous(frame) {
                continue;
            }
            match self.parse(frame)? {
                Message::DataRow(row) => {
                    bytes += row.buffer().len();
                    if bytes > MAX_RESULT_BYTES {
                        return Err(Error::Protocol(format!(
                            "a query's result of more than {MAX_RESULT_BYTES} bytes"
                        )));
                    }
                    rows.push(columns(&row, &self.encoding)?);
                }
                Message::ReadyForQuery(_) => break,
                Message::RowDescription(_)
                | Message::CommandComplete(_)
                | Message::EmptyQueryResponse => {}
                _ => return Err(out_of_turn(doing)),
            }
        }
        failure.map_or(Ok(rows), Err)
    }

    /// From now on values are written in one way, whatever role, database and server have set: ids and bodies that change with
    /// a setting would be others. And nothing of theirs ends what takes long. What Postgres' own subscriber sets
    /// (`libpqrcv_connect`), and what else the text of a type depends on.
    pub fn pin_settings(&mut self) -> Result<(), Error> {
        const IDLE_SESSION_TIMEOUT: u32 = 140_000;
        const TRANSACTION_TIMEOUT: u32 = 170_000;
        let mut settings = vec![
            ("statement_timeout", "0"),
            ("datestyle", "ISO"),
            ("intervalstyle", "postgres"),
            ("timezone", "UTC"),
            ("extra_float_digits", "3"),
            ("bytea_output", "hex"),
            ("xmlbinary", "base64"),
            ("lc_monetary", "C"),
            ("quote_all_identifiers", "off"),
            ("default_transaction_isolation", "read committed"),
            ("default_transaction_deferrable", "off"),
            // that a publication is left out is a warning since 18
            ("client_min_messages", "notice"),
        ];
        if self.server_version_num() >= IDLE_SESSION_TIMEOUT {
            settings.push(("idle_session_timeout", "0"));
        }
        if self.server_version_num() >= TRANSACTION_TIMEOUT {
            settings.push(("transaction_timeout", "0"));
        }
        let calls: Vec<String> = settings
            .iter()
            .map(|(name, value)| format!("pg_catalog.set_config('{name}', '{value}', false)"))
            .collect();
        // one statement: walsenders before 12.10, 13.6 and 14.2 take no more at a time (bug 17379)
        self.simple_query(&format!("SELECT {}", calls.join(", ")))
            .map(drop)
    }

    /// [`Connection::pin_settings`], and from now on text comes in the encoding of the database, where that is one that we can read, so that no name and no row
    /// can be refused for what it holds. How the text of the session's stream is to be read from now on.
    pub fn use_database_encoding(&mut self) -> Result<Encoding, Error> {
        self.pin_settings()?;
        let name = self.parameter("server_encoding").unwrap_or_default();
        match Encoding::of_database(name) {
            Some(Encoding::Utf8) | None => {}
            Some(encoding) => {
                self.simple_query("SET client_encoding TO 'SQL_ASCII'")?;
                self.encoding = encoding;
            }
        }
        Ok(self.encoding.clone())
    }

    /// A setting that the server has reported, like `server_version` or `in_hot_standby`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// All settings that the server has reported.
    #[cfg(feature = "admin")]
    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, &str)> {
        let pairs = self.parameters.iter();
        pairs.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The server's version as libpq counts: 150018 for 15.18, 90603 for 9.6.3; 0 if it has not said.
    pub fn server_version_num(&self) -> u32 {
        self.parameter("server_version").map_or(0, version_number)
    }

    /// The process that serves us.
    pub fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// Version and cipher, or `None` without TLS: for a log line.
    pub fn tls_description(&self) -> Option<String> {
        self.stream.tls_description()
    }

    /// The host that was chosen, as `host:port`.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    pub(super) fn send_query(&mut self, sql: &str, deadline: &Deadline) -> Result<(), Error> {
        let sql = self.encoding.encode(sql);
        let len = i32::try_from(sql.len() + size_of::<i32>() + 1);
        let Some(len) = len.ok().filter(|_| !sql.contains(&0)) else {
            return Err(deadline.error(std::io::ErrorKind::InvalidInput.into()));
        };
        let mut message = BytesMut::with_capacity(sql.len() + 6);
        message.put_u8(b'Q');
        message.put_i32(len);
        message.put_slice(&sql);
        message.put_u8(0);
        self.send(&message, deadline)
    }

    pub(super) fn send(&self, bytes: &[u8], deadline: &Deadline) -> Result<(), Error> {
        self.stream
            .write_all(bytes, deadline.end)
            .map_err(|source| deadline.error(source))
    }

    /// The next message, whole unless it is one that is cut.
    pub(super) fn read_frame(&mut self, deadline: &Deadline) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = self.frames.take()? {
                return Ok(frame);
            }
            self.receive(Some(deadline))?;
        }
    }

    /// Receives what there is, at least one byte. Without a deadline it waits for ever.
    pub(super) fn receive(&mut self, deadline: Option<&Deadline>) -> Result<(), Error> {
        let doing = deadline.map_or("read the replication stream", |deadline| deadline.doing);
        let length = deadline.map_or(Duration::ZERO, |deadline| deadline.length);
        let end = deadline.map(|deadline| deadline.end);
        let received = self.stream.read(self.frames.space(), end);
        match received.map_err(|source| Error::from_io(doing, length, source))? {
            0 => Err(Error::Closed { doing }),
            count => {
                self.frames.received(count);
                Ok(())
            }
        }
    }

    fn parse(&self, frame: Frame) -> Result<Message, Error> {
        parse_message(self.frames.message(frame))
    }

    /// An ErrorResponse.
    pub(super) fn server_error(&self, frame: Frame) -> Error {
        match ServerError::from_body(self.frames.body(frame)) {
            Ok(error) => Error::Server(Box::new(error)),
            Err(error) => error,
        }
    }

    /// Takes what the server may send at any time; `false`: it is something else.
    pub(super) fn take_asynchronous(&mut self, frame: Frame) -> bool {
        match frame.tag {
            b'S' => {
                let mut words = self.frames.body(frame).splitn(3, |byte| *byte == 0);
                let text = |word: &[u8]| std::str::from_utf8(word).ok().map(str::to_string);
                // one that is cut has no third word
                if let (Some(name), Some(value), Some(_)) =
                    (words.next(), words.next(), words.next())
                    && let (Some(name), Some(value)) = (text(name), text(value))
                {
                    self.set_parameter(name, value);
                }
                true
            }
            b'N' => {
                self.notices = self.notices.saturating_add(1);
                if let Ok(notice) = ServerError::from_body(self.frames.body(frame))
                    && self.notices <= MAX_NOTICES
                {
                    log_notice(&notice);
                }
                true
            }
            // a notification
            b'A' => true,
            _ => false,
        }
    }

    /// Of the settings that the server reports, what a server of Postgres' has need of.
    fn set_parameter(&mut self, name: String, value: String) {
        // what it was before it is no more
        self.parameters.remove(&name);
        if name.len() + value.len() <= MAX_SETTING_BYTES && self.parameters.len() < MAX_SETTINGS {
            self.parameters.insert(name, value);
        }
    }
}

fn out_of_turn(doing: &'static str) -> Error {
    Error::Protocol(format!("a message out of turn, to {doing}"))
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("backend_pid", &self.backend_pid)
            .finish_non_exhaustive()
    }
}

impl Drop for Connection {
    /// Takes leave, so that the server logs no lost connection; it does not matter if that fails.
    fn drop(&mut self) {
        // a clone of the stream lives on in a replication stream, which takes leave itself
        if Arc::strong_count(&self.stream) == 1 {
            let mut message = BytesMut::new();
            frontend::terminate(&mut message);
            let _ = self
                .stream
                .write_all(&message, Instant::now() + Duration::from_millis(100));
        }
    }
}

/// An end for a piece of work, and its name and length for the error that tells that it was reached.
pub(super) struct Deadline {
    pub(super) doing: &'static str,
    pub(super) length: Duration,
    pub(super) end: Instant,
}

impl Deadline {
    pub(super) fn after(doing: &'static str, length: Duration) -> Deadline {
        Deadline {
            doing,
            length,
            end: Instant::now() + length,
        }
    }

    fn remaining(&self) -> Result<Duration, Error> {
        match self.end.saturating_duration_since(Instant::now()) {
            // the system would take less than a microsecond for "no timeout"
            remaining if remaining < Duration::from_micros(1) => Err(Error::Timeout {
                doing: self.doing,
                after: self.length,
            }),
            remaining => Ok(remaining),
        }
    }

    pub(super) fn error(&self, source: std::io::Error) -> Error {
        Error::from_io(self.doing, self.length, source)
    }

    /// The same end for the next step.
    fn doing(&self, doing: &'static str) -> Deadline {
        Deadline { doing, ..*self }
    }
}

/// One message; `CopyBothResponse`, which the library does not know, must have been taken out before.
fn parse_message(bytes: &[u8]) -> Result<Message, Error> {
    match Message::parse(&mut BytesMut::from(bytes)) {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(Error::Protocol("an incomplete message".into())),
        Err(cause) => Err(Error::Protocol(cause.to_string())),
    }
}

fn columns(row: &DataRowBody, encoding: &Encoding) -> Result<Vec<Option<String>>, Error> {
    let malformed = || Error::Protocol("a malformed row".into());
    let text = |range: Option<std::ops::Range<usize>>| match range {
        None => Ok(None),
        Some(range) => {
            let bytes = row.buffer().get(range).ok_or_else(malformed)?;
            Ok(Some(encoding.decode_name(bytes).into_owned()))
        }
    };
    let ranges: Vec<_> = row.ranges().collect().map_err(|_| malformed())?;
    ranges.into_iter().map(text).collect()
}

/// libpq's PQserverVersion: `15.18 (Debian …)` is 150018, `9.6.3` is 90603, `18beta1` is 180000.
fn version_number(text: &str) -> u32 {
    let end = text
        .find(|c: char| c != '.' && !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (numbers, _) = text.split_at(end);
    let mut numbers = numbers.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0).min(9_999);
    match next() {
        major @ 10.. => major * 10_000 + next(),
        major => major * 10_000 + next() * 100 + next(),
    }
}

/// In random order. The hasher's keys are random, and nothing here needs more.
fn shuffle<T>(list: &mut [T]) {
    let random = RandomState::new();
    let mut number = 0_usize;
    list.sort_by_cached_key(|_| {
        number += 1;
        random.hash_one(number)
    });
}

/// Another host is worth a try.
fn next_may_help(error: &Error) -> bool {
    match error {
        Error::Io { .. }
        | Error::Tls { .. }
        | Error::Timeout { .. }
        | Error::Closed { .. }
        | Error::WrongSession(_) => true,
        error => error.sqlstate() == Some(CANNOT_CONNECT_NOW),
    }
}

fn connect_host(
    info: &ConnInfo,
    host: &Host,
    wanted: TargetSessionAttrs,
) -> Result<Connection, Error> {
    let length = info.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
    let mut addresses = match &host.address {
        Address::Unix { directory } => vec![unix_address(host, directory)?],
        Address::Tcp {
            addr: Some(addr), ..
        } => vec![SocketAddr::new(*addr, host.port).into()],
        Address::Tcp { name, addr: None } => look_up(name, host.port, length)?,
    };
    if info.load_balance {
        shuffle(&mut addresses);
    }
    let mut last = Err(Error::Closed {
        doing: "look up the host",
    });
    for address in &addresses {
        let deadline = Deadline::after("connect", length);
        last = connect_address(info, host, address, &deadline)
            .and_then(|connection| check_session(connection, wanted, &deadline));
        match &last {
            Err(error) if next_may_help(error) => {}
            _ => break,
        }
    }
    last
}

fn look_up(name: &str, port: u16, length: Duration) -> Result<Vec<SockAddr>, Error> {
    let doing = "look up the host";
    let found = lookup::look_up(name, port, length).map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut => Error::Timeout {
            doing,
            after: length,
        },
        _ => Error::Io { doing, source },
    })?;
    Ok(found.into_iter().map(SockAddr::from).collect())
}

fn unix_address(host: &Host, directory: &str) -> Result<SockAddr, Error> {
    let path = host.socket_path(directory);
    let path = match path.strip_prefix('@') {
        Some(name) => format!("\0{name}"),
        None => path,
    };
    SockAddr::unix(path).map_err(|source| Error::Io {
        doing: "name the socket",
        source,
    })
}

/// Tries TLS and plain in the order that `sslmode` gives.
fn connect_address(
    info: &ConnInfo,
    host: &Host,
    address: &SockAddr,
    deadline: &Deadline,
) -> Result<Connection, Error> {
    // over a Unix socket there is nobody in between, and Postgres offers no TLS
    let mode = match address.as_socket() {
        Some(_) => info.tls.mode,
        None => SslMode::Disable,
    };
    let plain = || start_session(info, host, address, Tls::Never, deadline);
    if mode == SslMode::Disable {
        return plain();
    }
    // a file that cannot be read is an error of its own, and no reason to do without TLS
    let config = tls::client_config(&info.tls)?;
    let over_tls = |tls: fn(Arc<ClientConfig>) -> Tls| {
        start_session(info, host, address, tls(config.clone()), deadline)
    };
    match mode {
        SslMode::Allow => match plain() {
            Err(first) if is_refusal(&first) => second_try(first, over_tls(Tls::Always)),
            result => result,
        },
        // a wrong password (28P01) is no reason to send it once more, in clear
        SslMode::Prefer => match over_tls(Tls::IfOffered) {
            Err(first) if is_refusal(&first) || matches!(first, Error::Tls { .. }) => {
                second_try(first, plain())
            }
            result => result,
        },
        _ => over_tls(Tls::Always),
    }
}

/// pg_hba.conf may have a line for sessions with TLS only, or for those without.
fn is_refusal(error: &Error) -> bool {
    error.sqlstate() == Some(INVALID_AUTHORIZATION)
}

/// The second failure counts, unless it only says that the second way is closed, too.
fn second_try(first: Error, second: Result<Connection, Error>) -> Result<Connection, Error> {
    match second {
        Err(error) if is_refusal(&error) => Err(first),
        result => result,
    }
}

/// Whether to ask for TLS, and whether to go on if there is none.
enum Tls {
    Never,
    IfOffered(Arc<ClientConfig>),
    Always(Arc<ClientConfig>),
}

fn start_session(
    info: &ConnInfo,
    host: &Host,
    address: &SockAddr,
    tls: Tls,
    deadline: &Deadline,
) -> Result<Connection, Error> {
    let socket = open_socket(info, address, deadline)?;
    let config = match tls {
        Tls::Never => None,
        Tls::IfOffered(config) => server_offers_tls(&socket, deadline)?.then_some(config),
        Tls::Always(config) if server_offers_tls(&socket, deadline)? => Some(config),
        Tls::Always(_) => {
            return Err(Error::Tls {
                doing: "ask for TLS".into(),
                source: "the server does not offer it, but sslmode requires it".into(),
                lasting: true,
            });
        }
    };
    let mut end_point = None;
    let stream = match (config, &host.address, address.as_socket()) {
        (Some(config), Address::Tcp { name, .. }, Some(peer)) => {
            let session = start_tls(&socket, &config, info, name, peer.ip(), deadline)?;
            end_point = tls::server_end_point(&session);
            Stream::tls(socket, session)
        }
        _ => Stream::plain(socket),
    };
    let mut connection = Connection {
        stream: Arc::new(stream),
        frames: FrameBuffer::new(),
        parameters: BTreeMap::new(),
        backend_pid: 0,
        peer: host.to_string(),
        notices: 0,
        encoding: Encoding::Utf8,
    };
    let password = match &info.password {
        Some(password) => Some(password.clone()),
        None => passfile::look_up(info, host),
    };
    let authentication = Authentication {
        user: &info.user,
        password: password.as_deref(),
        mode: info.channel_binding,
        allowed: info.require_auth.as_deref(),
        tls: connection.stream.tls_description().is_some(),
        end_point,
        progress: Progress::Start,
    };
    connection.start_up(info, authentication, deadline)?;
    Ok(connection)
}

fn open_socket(info: &ConnInfo, address: &SockAddr, deadline: &Deadline) -> Result<Socket, Error> {
    let deadline = deadline.doing("open the connection");
    let io = |source| deadline.error(source);
    let socket = Socket::new(address.domain(), Type::STREAM, None).map_err(io)?;
    socket
        .connect_timeout(address, deadline.remaining()?)
        .map_err(|source| match source.kind() {
            // nothing has been closed: there was never a connection
            std::io::ErrorKind::ConnectionReset => Error::Io {
                doing: deadline.doing,
                source,
            },
            _ => io(source),
        })?;
    if address.domain() != Domain::UNIX {
        socket.set_tcp_nodelay(true).map_err(io)?;
        if let Some(keepalives) = &info.keepalives {
            let mut settings = TcpKeepalive::new();
            if let Some(idle) = keepalives.idle {
                settings = settings.with_time(idle);
            }
            if let Some(interval) = keepalives.interval {
                settings = settings.with_interval(interval);
            }
            if let Some(count) = keepalives.count {
                settings = settings.with_retries(count);
            }
            socket.set_tcp_keepalive(&settings).map_err(io)?;
        }
        if info.tcp_user_timeout.is_some() {
            socket
                .set_tcp_user_timeout(info.tcp_user_timeout)
                .map_err(io)?;
        }
    }
    Ok(socket)
}

/// Asks for TLS. The answer is read as one byte and nothing behind it, so that bytes which somebody put in
/// before the handshake end up in the handshake, and not in the session (CVE-2021-23222).
fn server_offers_tls(socket: &Socket, deadline: &Deadline) -> Result<bool, Error> {
    let deadline = deadline.doing("ask for TLS");
    let mut bytes = BytesMut::new();
    frontend::ssl_request(&mut bytes);
    let mut answer = [0];
    let mut socket = Deadlined {
        socket,
        deadline: deadline.end,
    };
    socket
        .write_all(&bytes)
        .and_then(|()| socket.read_exact(&mut answer))
        .map_err(|source| deadline.error(source))?;
    match &answer {
        b"S" => Ok(true),
        b"N" => Ok(false),
        // an error's text would not be authenticated, so it is not shown
        _ => Err(Error::Protocol(
            "the server answered the request for TLS with something else".into(),
        )),
    }
}

/// Whatever goes wrong in the handshake, short of the deadline, is TLS' fault: `sslmode=prefer` does without.
fn start_tls(
    socket: &Socket,
    config: &Arc<ClientConfig>,
    info: &ConnInfo,
    name: &str,
    peer: IpAddr,
    deadline: &Deadline,
) -> Result<ClientConnection, Error> {
    let deadline = deadline.doing("agree on TLS");
    let session = tls::handshake(socket, config.clone(), info, name, peer, deadline.end);
    session.map_err(|source| match deadline.error(source) {
        Error::Closed { doing } => Error::Tls {
            doing: doing.into(),
            source: "the server closed the connection".into(),
            lasting: false,
        },
        // what is not the system's own is a host's name that no certificate can bear
        Error::Io { doing, source } => Error::Tls {
            doing: doing.into(),
            lasting: source.raw_os_error().is_none(),
            source: source.into(),
        },
        Error::Tls {
            doing,
            source,
            lasting,
        } => Error::Tls {
            doing,
            source: tls::explain(source),
            lasting,
        },
        error => error,
    })
}

impl Connection {
    fn start_up(
        &mut self,
        info: &ConnInfo,
        mut authentication: Authentication<'_>,
        deadline: &Deadline,
    ) -> Result<(), Error> {
        let deadline = &deadline.doing("start the session");
        let mut parameters = vec![
            ("user", info.user.as_str()),
            ("database", info.dbname.as_str()),
            ("client_encoding", "UTF8"),
            ("application_name", info.application_name.as_str()),
        ];
        if info.replication {
            parameters.push(("replication", "database"));
        }
        if let Some(options) = &info.options {
            parameters.push(("options", options));
        }
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out).map_err(|source| deadline.error(source))?;
        self.send(&out, deadline)?;

        let mut authenticated = false;
        loop {
            let frame = self.read_frame(deadline)?;
            match frame.tag {
                b'E' => return Err(self.server_error(frame)),
                // who has not been authenticated fills no map and no log
                b'N' if !authenticated => continue,
                _ if authenticated && self.take_asynchronous(frame) => continue,
                _ => {}
            }
            match self.parse(frame)? {
                message if frame.tag == b'R' && !authenticated => {
                    out.clear();
                    authenticated = authentication.answer(&message, &mut out)?;
                    self.send(&out, deadline)?;
                }
                Message::BackendKeyData(body) if authenticated => {
                    self.backend_pid = body.process_id();
                }
                Message::ReadyForQuery(_) if authenticated => return Ok(()),
                _ if authenticated => return Err(out_of_turn(deadline.doing)),
                _ => return Err(Error::Protocol("a message before authentication".into())),
            }
        }
    }
}

/// Gives the connection back if the server is of the kind that is wanted.
fn check_session(
    mut connection: Connection,
    wanted: TargetSessionAttrs,
    deadline: &Deadline,
) -> Result<Connection, Error> {
    let fits = match wanted {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => true,
        TargetSessionAttrs::ReadWrite => !connection.is_read_only(deadline)?,
        TargetSessionAttrs::ReadOnly => connection.is_read_only(deadline)?,
        TargetSessionAttrs::Primary => !connection.is_standby(deadline)?,
        TargetSessionAttrs::Standby => connection.is_standby(deadline)?,
    };
    match fits {
        true => Ok(connection),
        false => Err(Error::WrongSession(wanted)),
    }
}

impl Connection {
    fn is_standby(&mut self, deadline: &Deadline) -> Result<bool, Error> {
        // reported from Postgres 14 on
        match self.parameter("in_hot_standby") {
            Some(value) => Ok(value == "on"),
            None => self.answers("SELECT pg_catalog.pg_is_in_recovery()", "t", deadline),
        }
    }

    fn is_read_only(&mut self, deadline: &Deadline) -> Result<bool, Error> {
        match self.parameter("default_transaction_read_only") {
            Some(value) => Ok(value == "on" || self.is_standby(deadline)?),
            None => self.answers("SHOW transaction_read_only", "on", deadline),
        }
    }

    fn answers(&mut self, sql: &str, expected: &str, deadline: &Deadline) -> Result<bool, Error> {
        let rows = self.simple_query_within(sql, deadline.remaining()?)?;
        let value = rows.first().and_then(|row| row.first());
        Ok(value.and_then(Option::as_deref) == Some(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_counted_as_libpq_counts_them() {
        for (text, number) in [
            ("15.18 (Debian 15.18-0+deb12u1)", 150_018),
            ("18.4", 180_004),
            ("18beta1", 180_000),
            ("9.6.3", 90_603),
            ("", 0),
        ] {
            assert_eq!(version_number(text), number, "{text:?}");
        }
    }
}
