//! Looks at a server before the `nats` crate does.
//!
//! The crate connects and reads without deadlines, and fails or panics on an INFO of more than 4096 bytes. A
//! connection of our own, which the events then use, turns a frozen, silent or foreign server into a clear error and
//! leaves no thread behind. Follows <https://docs.nats.io/reference/reference-protocols/nats-protocol#info>.

use super::error::Error;
use super::options::ServerUrl;
use super::protocol::{self, ServerOp};
use serde::Deserialize;
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// The longest INFO line the `nats` crate can read, line end included (`proto.rs`, `command_buf`).
const MAX_INFO_BYTES: usize = 4096;

/// A connection that is silent for so long is asked for a sign of life, so that no thread outlives a network that
/// vanished.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// What the relay wants to know of a server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerInfo {
    /// The server's name, or its id if it was given none.
    #[serde(default)]
    pub server_name: String,
    /// For instance `2.12.1`.
    #[serde(default)]
    pub version: String,
    /// The largest message in bytes, headers included.
    pub max_payload: usize,
    /// Headers are enabled.
    #[serde(default)]
    pub headers: bool,
    /// JetStream is enabled on the server (an account may still lack it).
    #[serde(default)]
    pub jetstream: bool,
    /// The cluster it is part of.
    #[serde(default)]
    pub cluster: Option<String>,
    /// The JetStream domain, if the server has one.
    #[serde(default)]
    pub domain: Option<String>,
    /// The server insists on TLS.
    #[serde(default)]
    pub tls_required: bool,
    /// The server offers TLS.
    #[serde(default)]
    pub tls_available: bool,
    /// The server wants the client to sign in.
    #[serde(default)]
    pub auth_required: bool,
    /// What an nkey is to sign.
    #[serde(default)]
    pub nonce: Option<String>,
}

/// A server that answered.
#[derive(Debug)]
pub struct Greeting {
    /// Which of the name's addresses.
    pub address: SocketAddr,
    /// What the server said of itself.
    pub info: ServerInfo,
    /// The INFO line as it came.
    pub line: Vec<u8>,
    /// What has come behind it.
    pub rest: Vec<u8>,
    /// The connection, on which nothing has been said yet.
    pub stream: TcpStream,
}

/// Resolves the server's name and asks each address for its INFO, until one answers or `deadline` has passed.
pub fn probe(server: &ServerUrl, deadline: Instant) -> Result<Greeting, Error> {
    let unreachable = |source| Error::Unreachable {
        server: server.to_string(),
        source,
    };
    let addresses: Vec<SocketAddr> = (server.host.as_str(), server.port)
        .to_socket_addrs()
        .map_err(unreachable)?
        .collect();
    let mut last = unreachable(io::Error::new(
        io::ErrorKind::NotFound,
        "the name has no address",
    ));
    let count = addresses.len();
    for (index, address) in addresses.into_iter().enumerate() {
        // a share of the time for each, so that a dead first address leaves some for the next
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(count - index).unwrap_or(u32::MAX);
        match ask(server, address, share) {
            Ok(greeting) => return Ok(greeting),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Asks one address for its INFO; spends at most `time`.
pub fn ask(server: &ServerUrl, address: SocketAddr, time: Duration) -> Result<Greeting, Error> {
    let timeout = |what| Error::Timeout {
        server: server.to_string(),
        what,
        after: time,
    };
    // the standard library refuses a timeout of zero
    let time = time.max(Duration::from_millis(1));
    let deadline = Instant::now() + time;
    let mut stream = match TcpStream::connect_timeout(&address, time) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            return Err(timeout("nobody accepted the connection"));
        }
        Err(source) => {
            return Err(Error::Unreachable {
                server: server.to_string(),
                source,
            });
        }
    };
    let unusable = |source| Error::Unreachable {
        server: server.to_string(),
        source,
    };
    stream.set_nodelay(true).map_err(unusable)?;
    keep_alive(&stream).map_err(unusable)?;
    let (mut line, mut rest) = (Vec::new(), Vec::new());
    while !line.ends_with(b"\n") {
        if line.len() >= MAX_INFO_BYTES {
            return Err(not_nats(
                server,
                format!(
                    "its first line is longer than {MAX_INFO_BYTES} bytes, which this client cannot read: a large cluster shortens it with `no_advertise: true`"
                ),
            ));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let mut chunk = [0; 1024];
        let room = chunk.len().min(MAX_INFO_BYTES - line.len());
        let read = if left.is_zero() {
            Err(io::ErrorKind::WouldBlock.into())
        } else {
            stream
                .set_read_timeout(Some(left))
                .and_then(|()| stream.read(chunk.get_mut(..room).unwrap_or_default()))
        };
        match read {
            Ok(0) => {
                return Err(not_nats(
                    server,
                    "it closed the connection without a NATS greeting: check the port".into(),
                ));
            }
            Ok(n) => {
                let new = chunk.get(..n).unwrap_or_default();
                let end = new.iter().position(|&byte| byte == b'\n');
                let (of_line, behind) = new.split_at(end.map_or(n, |end| end + 1));
                line.extend_from_slice(of_line);
                rest.extend_from_slice(behind);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Err(timeout(
                    "it accepted the connection but sent no NATS greeting (frozen, not NATS, or it wants TLS first: `handshake_first`, which is not supported)",
                ));
            }
            Err(source) => {
                return Err(Error::Unreachable {
                    server: server.to_string(),
                    source,
                });
            }
        }
    }
    let info = parse_info(&line).map_err(|reason| not_nats(server, reason))?;
    // why the server lets nobody in, for instance that it has too many connections
    if let Ok(Some((ServerOp::Error(words), _))) = protocol::parse(&rest) {
        return Err(Error::of_server(&server.to_string(), &words).while_connecting());
    }
    if !info.headers {
        return Err(not_nats(
            server,
            "headers are off, and the relay needs them: use NATS 2.2 or newer without `no_header_support`".into(),
        ));
    }
    Ok(Greeting {
        address,
        info,
        line,
        rest,
        stream,
    })
}

/// Has the kernel look after the other side.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

fn not_nats(server: &ServerUrl, reason: String) -> Error {
    Error::NotNats {
        server: server.to_string(),
        reason,
    }
}

/// Reads `INFO {…}`; the error says what was there instead.
fn parse_info(line: &[u8]) -> Result<ServerInfo, String> {
    let (word, json) = line.split_at_checked(4).unwrap_or((line, b""));
    if !word.eq_ignore_ascii_case(b"INFO") {
        // enough to recognise another protocol's greeting
        let start = line.get(..line.len().min(40)).unwrap_or_default();
        return Err(format!(
            "it is no NATS server, it says {:?}",
            String::from_utf8_lossy(start).trim_end()
        ));
    }
    serde_json::from_slice(json).map_err(|error| format!("its greeting cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn reads_info() {
        let line = br#"INFO {"server_id":"N","server_name":"hub","version":"2.15.1","proto":1,"host":"127.0.0.1","port":4222,"headers":true,"max_payload":1048576,"jetstream":true,"client_id":5,"domain":"d","xkey":"X"} 
"#;
        assert_eq!(
            parse_info(line),
            Ok(ServerInfo {
                server_name: "hub".into(),
                version: "2.15.1".into(),
                max_payload: 1_048_576,
                headers: true,
                jetstream: true,
                cluster: None,
                domain: Some("d".into()),
                tls_required: false,
                tls_available: false,
                auth_required: false,
                nonce: None,
            })
        );
        for end in 0..line.len() - 3 {
            assert!(parse_info(&line[..end]).is_err());
        }
    }

    /// What a server that sends `greeting` and then closes (or stays silent) is said to be.
    fn check(greeting: Vec<u8>, close: bool, expected: &str) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = ServerUrl::parse(&listener.local_addr().unwrap().to_string()).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // the probe may have gone away in the middle
            let _ = stream.write_all(&greeting);
            (!close).then_some(stream)
        });
        let error = probe(&server, Instant::now() + Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        drop(thread.join());
    }

    #[test]
    fn says_what_is_wrong_with_a_server() {
        let urls = r#""10.0.0.1:4222","#.repeat(400);
        check(
            format!(r#"INFO {{"headers":true,"max_payload":1,"connect_urls":[{urls}""]}}"#).into(),
            false,
            "longer than 4096 bytes",
        );
        check(b"SSH-2.0-x\r\n".to_vec(), false, r#"it says "SSH-2.0-x""#);
        check(
            b"INFO {}\r\n".to_vec(),
            false,
            "missing field `max_payload`",
        );
        check(
            b"INFO {\"max_payload\":1}\r\n".to_vec(),
            false,
            "headers are off",
        );
        check(
            b"INFO {\"headers\":true,\"max_payload\":1}\r\n-ERR 'maximum connections exceeded'\r\n"
                .to_vec(),
            true,
            "maximum connections exceeded",
        );
        check(Vec::new(), true, "closed the connection");
        check(b"INFO {".to_vec(), true, "closed the connection");
        check(Vec::new(), false, "sent no NATS greeting");
        check(b"INFO {".to_vec(), false, "sent no NATS greeting");
    }

    /// Both connections are made of it.
    #[test]
    fn what_is_handed_on_waits_for_nothing_and_is_looked_after() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = ServerUrl::parse(&listener.local_addr().unwrap().to_string()).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let info = b"INFO {\"headers\":true,\"max_payload\":1}\r\nPING\r\n";
            stream.write_all(info).unwrap();
            stream
        });
        let greeting = probe(&server, Instant::now() + Duration::from_secs(5)).unwrap();
        assert!(greeting.stream.nodelay().unwrap());
        let socket = SockRef::from(&greeting.stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE);
        drop(thread.join());
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
            let server = ServerUrl::parse(&url).unwrap();
            let error = probe(&server, Instant::now() + Duration::from_secs(5)).unwrap_err();
            assert!(
                matches!(error, Error::Unreachable { .. }) && error.to_string().contains(expected),
                "{error}"
            );
        }
    }
}
