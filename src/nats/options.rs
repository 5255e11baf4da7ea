//! Where NATS is and how to sign in: values only, nothing is opened here.
//!
//! URLs follow the NATS clients' convention: `nats://user:password@host:port`, `tls://token@host`, or a bare
//! host; port 4222 unless told. User and password are percent-decoded, as in RFC 3986.

use crate::uri::percent_decode;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The port NATS listens on unless told otherwise.
const DEFAULT_PORT: u16 = 4222;

/// How to reach and use NATS. The Debug form holds no secrets.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tried in turn, from the first, on every connect. At least one.
    pub servers: Vec<ServerUrl>,
    /// Further servers to try.
    pub discovered: Discovered,
    /// A credentials file: user JWT and nkey seed, as `nsc` writes it. Read again on every connect.
    pub creds: Option<PathBuf>,
    /// A file that holds an nkey seed (`SU…`). Read again on every connect.
    pub nkey: Option<PathBuf>,
    /// PEM file of the authorities to trust in place of the system's.
    pub tls_ca: Option<PathBuf>,
    /// PEM file of the client's certificate chain; needs `tls_key`.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the client certificate's key.
    pub tls_key: Option<PathBuf>,
    /// Make the TLS handshake before the server says anything, as `handshake_first` of nats-server wants it.
    pub tls_first: bool,
    /// What the subjects of the JetStream API begin with: `$JS.API`, or `$JS.<domain>.API`.
    pub api_prefix: String,
    /// The connection's name, as the server's monitoring shows it.
    pub name: String,
    /// Longest time for one server: name lookup, connect, INFO, TLS and sign-in together.
    pub connect_timeout: Duration,
    /// Longest wait for the answer to a request; also how long a server may be silent before it is asked for a sign of life,
    /// and then for that.
    pub request_timeout: Duration,
}

/// The JetStream API of the domain that the server is in.
pub const OWN_API: &str = "$JS.API";

impl Default for Options {
    fn default() -> Options {
        Options {
            servers: vec![ServerUrl::local()],
            discovered: Discovered::default(),
            creds: None,
            nkey: None,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            tls_first: false,
            api_prefix: OWN_API.into(),
            name: "jetstream-outbox".into(),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
        }
    }
}

/// The most servers of a cluster that are remembered beside the configured ones.
const MAX_DISCOVERED: usize = 16;

/// The other servers of the cluster, as the last INFO of a connection has named them. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Discovered(Arc<Mutex<Vec<ServerUrl>>>);

impl Discovered {
    /// Remembers the `connect_urls` that `server` has announced, in place of earlier ones. They are reached as `server` is: with
    /// its user, and with TLS where it has that. What cannot be read is left out.
    pub fn replace(&self, server: &ServerUrl, connect_urls: &[String]) {
        if connect_urls.is_empty() {
            return;
        }
        let found = connect_urls.iter().filter_map(|url| {
            let found = ServerUrl::parse(url).ok()?;
            let is_address = found.host.parse::<IpAddr>().is_ok();
            Some(ServerUrl {
                tls: server.tls,
                auth: server.auth.clone(),
                // a certificate names hosts; an address is known by the name of the server that has announced it
                tls_name: is_address.then(|| server.tls_name().to_string()),
                ..found
            })
        });
        *self.lock() = found.take(MAX_DISCOVERED).collect();
    }

    /// The configured servers, and then the others.
    pub fn after(&self, configured: &[ServerUrl]) -> Vec<ServerUrl> {
        let mut all = configured.to_vec();
        for server in self.lock().iter() {
            let is_known =
                |known: &ServerUrl| known.host == server.host && known.port == server.port;
            if !all.iter().any(is_known) {
                all.push(server.clone());
            }
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ServerUrl>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who signs in, from the URL.
#[derive(Clone, PartialEq, Eq)]
pub enum UrlAuth {
    /// `user:password@`
    UserPassword(String, String),
    /// `token@`
    Token(String),
}

/// One server. Display is `host:port`, without what is secret.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl {
    /// A name or an address; IPv6 without its brackets.
    pub host: String,
    /// 4222 unless the URL names one.
    pub port: u16,
    /// The scheme is `tls`.
    pub tls: bool,
    /// User and password, or token, if the URL has them.
    pub auth: Option<UrlAuth>,
    /// The name in the server's certificate, where it is not `host`.
    pub tls_name: Option<String>,
}

impl ServerUrl {
    fn local() -> ServerUrl {
        ServerUrl {
            host: "localhost".into(),
            port: DEFAULT_PORT,
            tls: false,
            auth: None,
            tls_name: None,
        }
    }

    /// The name that the server's certificate must have.
    pub fn tls_name(&self) -> &str {
        self.tls_name.as_deref().unwrap_or(&self.host)
    }

    /// Reads one URL.
    pub fn parse(text: &str) -> Result<ServerUrl, ParseServerError> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("nats", text));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "nats" => false,
            "tls" => true,
            _ => return Err(ParseServerError::Scheme),
        };
        // the last one: a password may hold a bare @, a host cannot
        let (auth, address) = match rest.rsplit_once('@') {
            Some((auth, address)) => (parse_auth(auth)?, address),
            None => (None, rest),
        };
        let address = address.strip_suffix('/').unwrap_or(address);
        let (host, port) = match address.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or(ParseServerError::Host)?;
                host.parse::<std::net::Ipv6Addr>()
                    .map_err(|_| ParseServerError::Host)?;
                let port = match after {
                    "" => None,
                    after => Some(after.strip_prefix(':').ok_or(ParseServerError::Port)?),
                };
                (host, port)
            }
            None => match address.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            },
        };
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
        if host.is_empty() || !host.bytes().all(legal) {
            return Err(ParseServerError::Host);
        }
        let port = match port {
            None => DEFAULT_PORT,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits
                .parse()
                .ok()
                .filter(|&port| port != 0)
                .ok_or(ParseServerError::Port)?,
            Some(_) => return Err(ParseServerError::Port),
        };
        Ok(ServerUrl {
            host: host.into(),
            port,
            tls,
            auth,
            tls_name: None,
        })
    }
}

/// Reads a list such as `a,b:4333,tls://c`.
pub fn parse_servers(text: &str) -> Result<Vec<ServerUrl>, ParseServerError> {
    text.split(',')
        .map(|url| ServerUrl::parse(url.trim()))
        .collect()
}

fn parse_auth(text: &str) -> Result<Option<UrlAuth>, ParseServerError> {
    let decode = |text| percent_decode(text).ok_or(ParseServerError::Escape);
    Ok(match text.split_once(':') {
        Some(("", _)) => return Err(ParseServerError::User),
        Some((user, password)) => Some(UrlAuth::UserPassword(decode(user)?, decode(password)?)),
        None if text.is_empty() => None,
        None => Some(UrlAuth::Token(decode(text)?)),
    })
}

impl FromStr for ServerUrl {
    type Err = ParseServerError;

    fn from_str(text: &str) -> Result<ServerUrl, ParseServerError> {
        ServerUrl::parse(text)
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "tls" } else { "nats" };
        let auth = if self.auth.is_some() { "***@" } else { "" };
        write!(f, "{scheme}://{auth}{self}")
    }
}

/// Which part of a URL is wrong. The URL itself is not repeated: it may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseServerError {
    /// Another scheme, such as `ws`.
    Scheme,
    /// Empty, or not a name or address.
    Host,
    /// Not a number from 1 to 65535.
    Port,
    /// A password without a user.
    User,
    /// `%` without two hexadecimal digits, or the decoded bytes are not UTF-8.
    Escape,
}

impl fmt::Display for ParseServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("read NATS server URL: ")?;
        f.write_str(match self {
            ParseServerError::Scheme => "the scheme is neither nats nor tls",
            ParseServerError::Host => {
                "the host is no name or address (IPv6 stands in brackets: nats://[::1]:4222)"
            }
            ParseServerError::Port => "the port is no number from 1 to 65535",
            ParseServerError::User => "it has a password but no user",
            ParseServerError::Escape => {
                "user, password or token has a % that is not followed by two hexadecimal digits of UTF-8 text (write % as %25)"
            }
        })
    }
}

impl std::error::Error for ParseServerError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(host: &str, port: u16, tls: bool, auth: Option<UrlAuth>) -> ServerUrl {
        ServerUrl {
            host: host.into(),
            port,
            tls,
            auth,
            tls_name: None,
        }
    }

    fn user(user: &str, password: &str) -> Option<UrlAuth> {
        Some(UrlAuth::UserPassword(user.into(), password.into()))
    }

    #[test]
    fn reads_urls() {
        for (text, expected) in [
            ("localhost", url("localhost", 4222, false, None)),
            ("localhost:14222", url("localhost", 14222, false, None)),
            ("nats://10.0.0.1", url("10.0.0.1", 4222, false, None)),
            ("NATS://h/", url("h", 4222, false, None)),
            ("tls://h:1", url("h", 1, true, None)),
            ("nats://[::1]:5", url("::1", 5, false, None)),
            ("[fe80::1]", url("fe80::1", 4222, false, None)),
            ("nats://u:p@h", url("h", 4222, false, user("u", "p"))),
            ("u:p@h:7", url("h", 7, false, user("u", "p"))),
            (
                "nats://a%40b:p%3A%25%C3%A4@h",
                url("h", 4222, false, user("a@b", "p:%ä")),
            ),
            (
                "nats://u:p@q:r@h",
                url("h", 4222, false, user("u", "p@q:r")),
            ),
            (
                "tls://s3cr%2Ft@h",
                url("h", 4222, true, Some(UrlAuth::Token("s3cr/t".into()))),
            ),
        ] {
            assert!(ServerUrl::parse(text) == Ok(expected), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_url() {
        use ParseServerError::*;
        for (text, expected) in [
            ("", Host),
            ("ws://h", Scheme),
            ("nats://", Host),
            ("nats://h:0", Port),
            ("nats://h:65536", Port),
            ("nats://h:+1", Port),
            ("nats://h:", Port),
            ("nats://::1", Host),
            ("nats://[::1", Host),
            ("nats://[h]", Host),
            ("nats://[::1]x", Port),
            ("nats://h i", Host),
            ("nats://h\r\nPUB", Host),
            ("nats://h/path", Host),
            ("nats://:p@h", User),
            ("nats://u:%4@h", Escape),
            ("nats://u:%zz@h", Escape),
            ("nats://%ff@h", Escape),
        ] {
            assert!(ServerUrl::parse(text) == Err(expected), "{text:?}");
        }
    }

    #[test]
    fn reads_lists() {
        let hosts = |text| {
            parse_servers(text).map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(
            hosts("a, nats://u:p@b:1,tls://[::1]").unwrap(),
            ["a:4222", "b:1", "[::1]:4222"]
        );
        assert_eq!(hosts("a,,b"), Err(ParseServerError::Host));
    }

    #[test]
    fn servers_of_a_cluster_are_tried_after_the_configured_ones() {
        let configured = parse_servers("tls://u:p@a:4222,b").unwrap();
        let discovered = Discovered::default();
        let urls = |urls: &[&str]| urls.iter().map(ToString::to_string).collect::<Vec<_>>();
        let shown = |discovered: &Discovered| {
            let all = discovered.after(&configured);
            all.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(shown(&discovered), ["a:4222", "b:4222"]);
        discovered.replace(
            &configured[0],
            &urls(&["10.0.0.1:4222", "b:4222", "[::1]:5", "c d", "e:1"]),
        );
        assert_eq!(
            shown(&discovered),
            ["a:4222", "b:4222", "10.0.0.1:4222", "[::1]:5", "e:1"]
        );
        let found = discovered.after(&configured);
        assert!(
            found[2..]
                .iter()
                .all(|s| s.tls && s.auth == configured[0].auth)
        );
        let names: Vec<&str> = found.iter().map(ServerUrl::tls_name).collect();
        assert_eq!(names, ["a", "b", "a", "a", "e"]);
        let many: Vec<String> = (0..1000).map(|n| format!("h{n}:1")).collect();
        discovered.replace(&configured[1], &many);
        assert_eq!(shown(&discovered).len(), 2 + MAX_DISCOVERED);
        assert!(!format!("{discovered:?}").contains("p@"));
    }

    #[test]
    fn secrets_are_in_no_printed_form() {
        let options = Options {
            servers: parse_servers("nats://hidden:hidden@h,tls://hidden@h").unwrap(),
            ..Options::default()
        };
        let printed = format!("{options:?} {}", options.servers[0]);
        assert!(
            !printed.contains("hidden") && printed.contains("nats://***@h:4222"),
            "{printed}"
        );
    }
}
