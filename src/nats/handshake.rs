//! From a name to a session: lookup, connect, INFO, TLS, signing in, up to the answer to our first PING.
//!
//! One deadline holds over all of it, whatever the peer does: each read and write ends there, also when a byte a second comes.
//! Follows <https://docs.nats.io/reference/reference-protocols/nats-protocol>.

use super::error::Error;
use super::info::ServerInfo;
use super::options::{Options, ServerUrl};
use super::protocol::{self, ServerOp};
use super::sign_in::Identity;
use super::tls;
use crate::lookup;
use rustls::client::ClientConnection;
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A connection that is silent for so long is asked for a sign of life by the kernel, also when nobody reads from it.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Read at once; a server that has let nobody in yet has little to say.
const CHUNK_BYTES: usize = 16 * 1024;

/// A connection that is signed in.
pub struct Session {
    /// `host:port`, as configured.
    pub server: String,
    /// The server's last INFO.
    pub info: ServerInfo,
    /// The socket; its timeouts are unset.
    pub stream: TcpStream,
    /// With TLS.
    pub tls: Option<ClientConnection>,
    /// What has come after the PONG, decrypted.
    pub bytes: Vec<u8>,
}

/// Tries the servers in turn, beginning with the one of number `first`, modulo how many there are. Spends at most
/// `connect_timeout` on each.
///
/// # Errors
/// Why no server can be used.
pub fn sign_in_to_any(
    options: &Options,
    first: usize,
    subscription: &str,
) -> Result<(ServerUrl, Session), Error> {
    let mut servers = options.discovered.after(&options.servers);
    let count = servers.len().max(1);
    servers.rotate_left(first % count);
    let mut errors = Vec::new();
    for server in servers {
        match sign_in(options, &server, subscription) {
            Ok(session) => return Ok((server, session)),
            Err(error) => errors.push(error),
        }
    }
    match errors.pop() {
        Some(only) if errors.is_empty() => Err(only),
        last => {
            errors.extend(last);
            Err(Error::NoServer(errors))
        }
    }
}

/// Reaches one server and signs in. `subscription` is sent between CONNECT and PING, so that a refusal of it is found here.
///
/// # Errors
/// Whatever keeps the server from being used, in words for an operator; after `connect_timeout` at the latest.
pub fn sign_in(
    options: &Options,
    server: &ServerUrl,
    subscription: &str,
) -> Result<Session, Error> {
    let attempt = Attempt {
        options,
        server,
        started: Instant::now(),
        deadline: Instant::now() + options.connect_timeout,
    };
    // before anything is said to anybody
    let identity = Identity::load(options, server)?;
    let (mut wire, info) = attempt.reach()?;
    attempt.secure(&mut wire, &info)?;
    if identity.is_secret() && wire.is_exposed() && !EXPOSED.swap(true, Ordering::Relaxed) {
        log::warn!(
            server:% = server;
            "signing in over a connection without TLS: whoever is on the way can read it; use tls:// or -nats-tls-ca"
        );
    }
    attempt.sign_in(wire, info, &identity, subscription)
}

/// What the process has warned of already.
static EXPOSED: AtomicBool = AtomicBool::new(false);

struct Attempt<'a> {
    options: &'a Options,
    server: &'a ServerUrl,
    started: Instant,
    deadline: Instant,
}

impl Attempt<'_> {
    /// Tries each address of the name in turn, until one sends its INFO.
    fn reach(&self) -> Result<(Wire, ServerInfo), Error> {
        let left = self.left();
        let addresses = lookup::look_up(&self.server.host, self.server.port, left).map_err(
            |error| match error.kind() {
                io::ErrorKind::TimedOut => self.too_late("the name lookup had no answer"),
                _ => self.unreachable(error),
            },
        )?;
        let mut last = self.too_late("nothing was tried");
        let count = addresses.len();
        for (index, address) in addresses.into_iter().enumerate() {
            // a share of the time for each, so that a dead first address leaves some for the next
            let share = self.left() / u32::try_from(count - index).unwrap_or(u32::MAX);
            match self.greet(address, Instant::now() + share) {
                Ok(greeted) => return Ok(greeted),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Connects to one address and reads its INFO.
    fn greet(&self, address: SocketAddr, deadline: Instant) -> Result<(Wire, ServerInfo), Error> {
        let unreachable = |error| self.unreachable(error);
        // the standard library refuses a timeout of zero
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let stream = match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => stream,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(self.too_late("nobody accepted the connection"));
            }
            Err(error) => return Err(self.unreachable(error)),
        };
        stream.set_nodelay(true).map_err(unreachable)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE);
        SockRef::from(&stream)
            .set_tcp_keepalive(&keepalive)
            .map_err(unreachable)?;
        let mut wire = Wire {
            stream,
            tls: None,
            bytes: Vec::new(),
        };
        if self.options.tls_first {
            self.handshake(&mut wire, deadline)?;
        }
        let what = match self.options.tls_first {
            true => "it made the TLS handshake but sent no NATS greeting",
            false => {
                "it accepted the connection but sent no NATS greeting (frozen, not NATS, or it wants TLS first: a server with \
                 handshake_first needs -nats-tls-first)"
            }
        };
        let info = match self.next(&mut wire, deadline, what)? {
            Some(Said::Info(info)) => *info,
            Some(Said::Error(words)) => return Err(self.refused_with(&words)),
            Some(_) => return Err(self.not_nats("it does not begin with INFO".into())),
            None => {
                return Err(self.not_nats(
                    match self.options.tls_first {
                        true => "it closed the connection without a NATS greeting",
                        false => "it closed the connection without a NATS greeting: check the port; a server with handshake_first needs -nats-tls-first",
                    }
                    .into(),
                ));
            }
        };
        // why the server lets nobody in, for instance that it has too many connections
        if let Ok(Some((ServerOp::Error(words), _))) = protocol::parse(&wire.bytes, nothing) {
            return Err(self.refused_with(&words));
        }
        if !info.headers {
            return Err(self.not_nats(
                "headers are off, and the relay needs them: use NATS 2.2 or newer without `no_header_support`".into(),
            ));
        }
        Ok((wire, info))
    }

    /// TLS, if either side wants it.
    fn secure(&self, wire: &mut Wire, info: &ServerInfo) -> Result<(), Error> {
        if wire.tls.is_some() || !tls::is_wanted(self.options, self.server, info)? {
            return Ok(());
        }
        // nobody can trust what was said before TLS
        wire.bytes.clear();
        self.handshake(wire, self.deadline)
    }

    fn handshake(&self, wire: &mut Wire, deadline: Instant) -> Result<(), Error> {
        let config = tls::config(self.options, self.server)?;
        let session = match tls::open(&config, self.server, &wire.stream, deadline) {
            Ok(session) => session,
            Err(_) if Instant::now() >= deadline => {
                return Err(self.too_late("it did not finish the TLS handshake"));
            }
            Err(Error::Tls { server, reason }) if self.options.tls_first => {
                let reason =
                    format!("{reason} (-nats-tls-first is for servers with handshake_first)");
                return Err(Error::Tls { server, reason });
            }
            Err(error) => return Err(error),
        };
        let session = wire.tls.insert(session);
        tls::take_plaintext(session, &mut wire.bytes)
            .map_err(|error| self.failed(&error, "it did not go on after TLS", true))
    }

    fn sign_in(
        &self,
        mut wire: Wire,
        mut info: ServerInfo,
        identity: &Identity,
        subscription: &str,
    ) -> Result<Session, Error> {
        let is_tls = wire.tls.is_some();
        let mut hello = identity.connect_line(self.options, is_tls, info.nonce.as_deref());
        hello.extend_from_slice(subscription.as_bytes());
        hello.extend_from_slice(b"PING\r\n");
        let what = "it did not answer to signing in";
        // a server that refuses may close before it has read all: what it said is there to be read
        let written = wire.write_all(&hello, self.deadline);
        loop {
            match self.next(&mut wire, self.deadline, what)? {
                Some(Said::Pong) => break,
                Some(Said::Error(words)) => return Err(self.refused_with(&words)),
                // a limit of the account, say
                Some(Said::Info(later)) => info = *later,
                Some(Said::Ping) => wire
                    .write_all(b"PONG\r\n", self.deadline)
                    .map_err(|error| self.failed(&error, what, is_tls))?,
                Some(Said::Other) => {}
                None => {
                    let hint = match info.auth_required {
                        true => " while signing in: check the credentials",
                        false => "",
                    };
                    return Err(Error::Refused {
                        server: self.server.to_string(),
                        reason: match written {
                            Err(error) => error.to_string(),
                            Ok(()) => format!("the server closed the connection{hint}"),
                        },
                    });
                }
            }
        }
        wire.stream
            .set_read_timeout(None)
            .and_then(|()| wire.stream.set_write_timeout(None))
            .map_err(|error| self.unreachable(error))?;
        Ok(Session {
            server: self.server.to_string(),
            info,
            stream: wire.stream,
            tls: wire.tls,
            bytes: wire.bytes,
        })
    }

    /// The next thing that is said, or the end; `what` the server did not do if nothing comes.
    fn next(
        &self,
        wire: &mut Wire,
        deadline: Instant,
        what: &'static str,
    ) -> Result<Option<Said>, Error> {
        loop {
            let said = wire
                .take()
                .map_err(|reason| self.not_nats(format!("it is no NATS server: {reason}")))?;
            if said.is_some() {
                return Ok(said);
            }
            let is_tls = wire.tls.is_some();
            match wire.read(deadline) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => return Err(self.failed(&error, what, is_tls)),
            }
        }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn too_late(&self, what: &'static str) -> Error {
        Error::Timeout {
            server: self.server.to_string(),
            what,
            after: self.started.elapsed(),
        }
    }

    fn unreachable(&self, source: io::Error) -> Error {
        Error::Unreachable {
            server: self.server.to_string(),
            source,
        }
    }

    fn not_nats(&self, reason: String) -> Error {
        Error::NotNats {
            server: self.server.to_string(),
            reason,
        }
    }

    fn refused_with(&self, words: &str) -> Error {
        Error::of_server(&self.server.to_string(), words).while_connecting()
    }

    /// A read or a write failed; `what` the server did not do if it was too late.
    fn failed(&self, error: &io::Error, what: &'static str, is_tls: bool) -> Error {
        match error.kind() {
            io::ErrorKind::TimedOut => self.too_late(what),
            _ => Error::of_stream(&self.server.to_string(), error, is_tls).while_connecting(),
        }
    }
}

/// What is said before anybody is let in.
enum Said {
    Info(Box<ServerInfo>),
    Ping,
    Pong,
    Error(String),
    Other,
}

/// Nothing was subscribed to that anybody could have published to yet.
fn nothing(_subject: &[u8]) -> usize {
    0
}

/// A socket, perhaps with TLS over it, and what was read from it.
struct Wire {
    stream: TcpStream,
    tls: Option<ClientConnection>,
    bytes: Vec<u8>,
}

impl Wire {
    /// Takes the first operation off what was read, if it is there as a whole.
    fn take(&mut self) -> Result<Option<Said>, String> {
        let Some((op, len)) = protocol::parse(&self.bytes, nothing)? else {
            return Ok(None);
        };
        let said = match op {
            ServerOp::Info(json) => {
                Said::Info(Box::new(ServerInfo::parse(json).map_err(|error| {
                    format!("its greeting cannot be read: {error}")
                })?))
            }
            ServerOp::Ping => Said::Ping,
            ServerOp::Pong => Said::Pong,
            ServerOp::Error(words) => Said::Error(words.into_owned()),
            ServerOp::Ok | ServerOp::Message { .. } => Said::Other,
        };
        self.bytes.drain(..len);
        Ok(Some(said))
    }

    /// Reads more; false: nothing more comes.
    fn read(&mut self, deadline: Instant) -> io::Result<bool> {
        let mut chunk = [0; CHUNK_BYTES];
        let stream = &self.stream;
        let n = Timed { stream, deadline }.read(&mut chunk)?;
        let came = chunk.get(..n).unwrap_or_default();
        if came.is_empty() {
            return Ok(false);
        }
        match &mut self.tls {
            Some(session) => tls::unseal(session, came, &mut self.bytes),
            None => {
                self.bytes.extend_from_slice(came);
                Ok(true)
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let stream = &self.stream;
        let mut stream = Timed { stream, deadline };
        let Some(session) = &mut self.tls else {
            return stream.write_all(bytes);
        };
        session.writer().write_all(bytes)?;
        while session.wants_write() {
            session.write_tls(&mut stream)?;
        }
        Ok(())
    }

    /// Somebody else may listen to what goes over it.
    fn is_exposed(&self) -> bool {
        let stays_here = match (self.stream.local_addr(), self.stream.peer_addr()) {
            (Ok(here), Ok(there)) => stays_here(here.ip(), there.ip()),
            _ => false,
        };
        self.tls.is_none() && !stays_here
    }
}

/// What is sent between these two addresses does not leave this machine.
fn stays_here(here: IpAddr, there: IpAddr) -> bool {
    here == there || there.to_canonical().is_loopback()
}

/// A socket whose every read and write ends at `deadline` with [`io::ErrorKind::TimedOut`].
pub(super) struct Timed<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        // the system would take less than a microsecond for "no timeout"
        match self.deadline.saturating_duration_since(Instant::now()) {
            left if left < Duration::from_micros(1) => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(self.left()?)?;
            let mut stream = self.stream;
            match stream.read(into) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                result => return result,
            }
        }
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.write(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leaves_the_machine_is_exposed() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        for (here, there) in [
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.1", "127.0.0.2"),
            ("::1", "::1"),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.2"),
            ("10.0.0.7", "10.0.0.7"),
            ("fd00::7", "fd00::7"),
        ] {
            assert!(stays_here(ip(here), ip(there)), "{here} {there}");
        }
        for (here, there) in [
            ("10.0.0.7", "10.0.0.8"),
            ("fd00::7", "fd00::8"),
            ("192.168.1.2", "203.0.113.9"),
        ] {
            assert!(!stays_here(ip(here), ip(there)), "{here} {there}");
        }
    }
    use std::net::TcpListener;

    fn attempt(url: &str, connect_timeout: Duration) -> Error {
        let options = Options {
            connect_timeout,
            ..Options::default()
        };
        let server = ServerUrl::parse(url).unwrap();
        sign_in(&options, &server, "").err().expect("it is refused")
    }

    #[test]
    fn says_that_nobody_is_there() {
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        for (url, expected) in [
            (format!("127.0.0.1:{port}"), "refused"),
            ("no-such-host.invalid".into(), "no-such-host.invalid:4222: "),
        ] {
            let error = attempt(&url, Duration::from_secs(5));
            assert!(
                matches!(error, Error::Unreachable { .. }) && error.to_string().contains(expected),
                "{error}"
            );
        }
    }
}
