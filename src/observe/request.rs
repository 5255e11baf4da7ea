//! A request for one of the small answers, read from its bytes (RFC 9112). Pure; the syntax is `httparse`'s.

use std::net::{Ipv4Addr, Ipv6Addr};

/// More header fields than any client sends.
const MAX_HEADERS: usize = 64;

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// Without query and fragment.
    pub path: String,
    /// The body is to be sent: GET, and not HEAD.
    pub wants_body: bool,
    /// All `Accept` fields.
    pub accept: String,
    /// Whom the client believes it asks, as `host:port`; empty: it does not say, as HTTP/1.0 need not.
    pub authority: String,
}

/// Why a request has no answer but this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is none.
    Malformed,
    /// The method is neither GET nor HEAD.
    Method,
    /// More headers than anybody sends.
    TooLarge,
}

/// Reads a request; `None`: it is not whole yet.
pub fn read(bytes: &[u8]) -> Result<Option<Request>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::TooLarge),
        Err(_) => return Err(Refusal::Malformed),
    }
    let wants_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Err(Refusal::Method),
    };
    let values = |name: &'static str| {
        let of_name = request.headers.iter();
        of_name
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .map(|header| str::from_utf8(header.value).unwrap_or_default().trim())
    };
    let mut hosts = values("host");
    let host = match (hosts.next(), hosts.next(), request.version) {
        (Some(host), None, _) => host,
        // RFC 9112, section 3.2: none, or more than one, is an error from HTTP/1.1 on
        (None, _, Some(0)) => "",
        _ => return Err(Refusal::Malformed),
    };
    let target = request.path.unwrap_or_default();
    let (authority, path) = split_target(target).ok_or(Refusal::Malformed)?;
    let path = path.split(['?', '#']).next().unwrap_or_default();
    Ok(Some(Request {
        path: if path.is_empty() { "/" } else { path }.to_string(),
        wants_body,
        accept: values("accept").collect::<Vec<_>>().join(","),
        // what is in the target counts, whatever `Host` says
        authority: authority.unwrap_or(host).to_string(),
    }))
}

/// The origin form, `/path`, or the absolute form that goes to proxies, `http://host:port/path`.
fn split_target(target: &str) -> Option<(Option<&str>, &str)> {
    if target.starts_with('/') {
        return Some((None, target));
    }
    let (scheme, rest) = target.split_once("://")?;
    let is_http = ["http", "https"]
        .iter()
        .any(|it| scheme.eq_ignore_ascii_case(it));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at_checked(end)?;
    (is_http && !authority.is_empty()).then_some((Some(authority), path))
}

/// Whether this authority cannot be a name that a stranger has let point here (DNS rebinding): it is an address, or
/// `localhost`, which resolvers keep for this machine (RFC 6761).
pub fn is_safe_on_loopback(authority: &str) -> bool {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else {
                return false;
            };
            if address.parse::<Ipv6Addr>().is_err() {
                return false;
            }
            (
                "localhost",
                after.strip_prefix(':').or(after.is_empty().then_some("")),
            )
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, Some("")),
        },
    };
    if !port.is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit())) {
        return false;
    }
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    host.is_empty()
        || host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<Ipv4Addr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &str, path: &str, authority: &str) -> Request {
        let request = read(bytes.as_bytes()).unwrap().unwrap();
        let found = (request.path.as_str(), request.authority.as_str());
        assert_eq!(found, (path, authority), "{bytes}");
        request
    }

    #[test]
    fn a_request_is_read_when_it_is_whole() {
        let whole =
            "GET /metrics?x=1 HTTP/1.1\r\nhost: a:1\r\nAccept: b\r\nX-Y: z\r\naccept: c\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(read(&whole.as_bytes()[..end]), Ok(None));
        }
        let request = check(whole, "/metrics", "a:1");
        assert!(request.wants_body);
        assert_eq!(request.accept, "b,c");
        assert!(!check("HEAD / HTTP/1.0\r\n\r\n", "/", "").wants_body);
        check("GET /livez#x HTTP/1.1\nHost:\n\n", "/livez", "");
    }

    #[test]
    fn the_absolute_form_says_whom_it_asks() {
        let with = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: other\r\n\r\n");
        check(&with("http://a:9464/metrics?x"), "/metrics", "a:9464");
        check(&with("HTTPS://a"), "/", "a");
        check(&with("http://[::1]:80?x"), "/", "[::1]:80");
        for none in [
            "metrics",
            "*",
            "http:///metrics",
            "ftp://a/",
            "a:80",
            "://a/",
        ] {
            assert_eq!(
                read(with(none).as_bytes()),
                Err(Refusal::Malformed),
                "{none}"
            );
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        let refused = |text: &str, refusal| {
            assert_eq!(read(text.as_bytes()), Err(refusal), "{text}");
        };
        refused("POST / HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Method);
        refused("\u{16}\u{3}\u{1}\u{2}\0", Refusal::Malformed);
        refused("GET / HTTP/9.9\r\n\r\n", Refusal::Malformed);
        refused("GET / HTTP/1.1\r\n\r\n", Refusal::Malformed);
        refused(
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            Refusal::Malformed,
        );
        let many = "a: b\r\n".repeat(MAX_HEADERS + 1);
        refused(&format!("GET / HTTP/1.1\r\n{many}\r\n"), Refusal::TooLarge);
    }

    #[test]
    fn on_loopback_only_addresses_and_localhost_are_asked() {
        for safe in [
            "",
            "localhost",
            "LocalHost:9464",
            "relay.localhost:1",
            "localhost.",
            "127.0.0.1:9464",
            "10.1.2.3",
            "[::1]",
            "[::1]:9464",
        ] {
            assert!(is_safe_on_loopback(safe), "{safe}");
        }
        for unsafe_ in [
            "evil.example:9464",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "localhost:x",
            "[evil.example]",
            "[::1].evil.example",
            "[::1",
            "0x7f000001",
        ] {
            assert!(!is_safe_on_loopback(unsafe_), "{unsafe_}");
        }
    }
}
