//! What a NATS server says on a connection, operation by operation. Pure: bytes in, values out.
//!
//! Follows <https://docs.nats.io/reference/reference-protocols/nats-protocol>; headers and their status are ADR-4's.
//!
//! Whoever is on the wire decides no amount of memory: a line, a block of headers and a message have bounds, and what is beyond
//! is an error before any of it is waited for.

use std::borrow::Cow;

/// The longest INFO: a cluster of hundreds of servers lists them all.
const MAX_INFO_BYTES: usize = 256 * 1024;

/// The longest other line; nats-server's own `max_control_line` is 4 KiB.
const MAX_LINE_BYTES: usize = 8 * 1024;

/// The largest block of headers: JetStream takes 64 KiB, and a server's answer has some dozens of bytes.
const MAX_HEADER_BYTES: usize = 64 * 1024;

/// What the server says.
#[derive(Debug, PartialEq, Eq)]
pub enum ServerOp<'a> {
    /// `MSG` or `HMSG`: a message on a subject that was subscribed to.
    Message {
        /// The subject.
        subject: &'a [u8],
        /// Of the header line, for instance `503` of `NATS/1.0 503`.
        status: Option<&'a str>,
        /// What follows the headers.
        body: &'a [u8],
    },
    /// INFO, with its JSON.
    Info(&'a [u8]),
    /// To be answered with PONG.
    Ping,
    /// The answer to a PING: what was sent before it has been looked at.
    Pong,
    /// `-ERR`, with the server's words.
    Error(Cow<'a, str>),
    /// `+OK`: nothing to be done.
    Ok,
}

/// The first operation of `bytes`, and how long it is; `None` while its end has not come. `limit` is the largest message that
/// may come on a subject, headers included. The error says what is there in place of an operation: nothing after it can be
/// read.
pub fn parse(
    bytes: &[u8],
    limit: impl FnOnce(&[u8]) -> usize,
) -> Result<Option<(ServerOp<'_>, usize)>, String> {
    let is_info = bytes
        .get(..4)
        .is_some_and(|word| word.eq_ignore_ascii_case(b"INFO"));
    let longest = match is_info {
        true => MAX_INFO_BYTES,
        false => MAX_LINE_BYTES,
    };
    let within = bytes.get(..longest).unwrap_or(bytes);
    let Some(end) = memchr::memchr(b'\n', within) else {
        return match bytes.len() {
            len if len < longest => Ok(None),
            _ => Err(format!("a line of more than {longest} bytes")),
        };
    };
    let line = bytes.get(..end).unwrap_or_default().trim_ascii_end();
    let (word, rest) = match line.iter().position(u8::is_ascii_whitespace) {
        Some(at) => line.split_at(at),
        None => (line, &[][..]),
    };
    let is = |name: &str| word.eq_ignore_ascii_case(name.as_bytes());
    let op = if is("MSG") || is("HMSG") {
        let Some((subject, headers_len, len)) = message_line(rest, is("HMSG")) else {
            return Err(format!("the line {:?}", shown(line)));
        };
        if headers_len > MAX_HEADER_BYTES || len > limit(subject) {
            return Err(format!(
                "a larger message than was asked for: {:?}",
                shown(line)
            ));
        }
        let after = bytes.get(end + 1..).unwrap_or_default();
        if after.len() < len + 2 {
            return Ok(None);
        }
        let (message, after) = after.split_at_checked(len).unwrap_or_default();
        if !after.starts_with(b"\r\n") {
            return Err("a message that does not end where it should".into());
        }
        let (headers, body) = message.split_at_checked(headers_len).unwrap_or_default();
        let message = ServerOp::Message {
            subject,
            status: status(headers),
            body,
        };
        return Ok(Some((message, end + 1 + len + 2)));
    } else if is("PING") {
        ServerOp::Ping
    } else if is("PONG") {
        ServerOp::Pong
    } else if is("-ERR") {
        let words = String::from_utf8_lossy(rest.trim_ascii());
        ServerOp::Error(match words {
            Cow::Borrowed(words) => Cow::Borrowed(words.trim_matches('\'')),
            Cow::Owned(words) => Cow::Owned(words.trim_matches('\'').into()),
        })
    } else if is("INFO") {
        ServerOp::Info(rest)
    } else if is("+OK") {
        ServerOp::Ok
    } else {
        return Err(format!("the line {:?}", shown(line)));
    };
    Ok(Some((op, end + 1)))
}

/// Subject, length of the headers, length of headers and body: `<subject> <sid> [reply] [<headers>] <all>`.
fn message_line(line: &[u8], has_headers: bool) -> Option<(&[u8], usize, usize)> {
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let (subject, _sid) = (words.next()?, words.next()?);
    let len = number(words.next_back()?)?;
    let headers = if has_headers {
        number(words.next_back()?)?
    } else {
        0
    };
    let _reply = words.next();
    let is_whole = words.next().is_none() && headers <= len;
    is_whole.then_some((subject, headers, len))
}

fn number(digits: &[u8]) -> Option<usize> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn status(headers: &[u8]) -> Option<&str> {
    let line = headers.strip_prefix(b"NATS/1.0 ")?;
    let words = std::str::from_utf8(line.get(..3)?).ok()?;
    Some(words)
}

/// Enough to recognise it.
fn shown(line: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(line.get(..line.len().min(40)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nats-server 2.15.1 words it, and others could.
    const SAID: &[u8] = b"INFO {\"server_id\":\"N\"} \r\n+OK\r\nPING\r\nMSG _INBOX.a.7 1 27\r\n{\"stream\":\"EVENTS\",\"seq\":1}\r\nHMSG _INBOX.a.8 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\npong\r\nMSG _INBOX.a.9 1 reply.to 0\r\n\r\nHMSG _INBOX.a.10 1 r 17 19\r\nNATS/1.0\r\nA:1\r\n\r\nhi\r\n-ERR 'Authorization Violation'\r\n";

    fn message<'a>(subject: &'a str, status: Option<&'a str>, body: &'a str) -> ServerOp<'a> {
        ServerOp::Message {
            subject: subject.as_bytes(),
            status,
            body: body.as_bytes(),
        }
    }

    fn said() -> Vec<ServerOp<'static>> {
        vec![
            ServerOp::Info(b" {\"server_id\":\"N\"}"),
            ServerOp::Ok,
            ServerOp::Ping,
            message("_INBOX.a.7", None, r#"{"stream":"EVENTS","seq":1}"#),
            message("_INBOX.a.8", Some("503"), ""),
            ServerOp::Pong,
            message("_INBOX.a.9", None, ""),
            message("_INBOX.a.10", None, "hi"),
            ServerOp::Error("Authorization Violation".into()),
        ]
    }

    fn any(_subject: &[u8]) -> usize {
        100_000
    }

    #[test]
    fn a_line_has_a_bound_wherever_it_is_cut() {
        for (start, longest) in [("INFO ", MAX_INFO_BYTES), ("+OK ", MAX_LINE_BYTES)] {
            let mut line = start.as_bytes().to_vec();
            line.resize(longest - 1, b' ');
            assert_eq!(parse(&line, any), Ok(None));
            line.push(b'\n');
            assert!(parse(&line, any).unwrap().is_some());
            line.insert(start.len(), b' ');
            assert!(parse(&line, any).is_err());
            assert!(parse(&line[..longest], any).is_err());
        }
    }

    #[test]
    fn reads_what_a_server_says() {
        let mut rest = SAID;
        for expected in said() {
            let (op, len) = parse(rest, any).unwrap().unwrap();
            assert_eq!(op, expected);
            // it takes its last byte to be one
            for end in 0..len {
                assert_eq!(parse(&rest[..end], any), Ok(None), "{end} bytes of {op:?}");
            }
            rest = &rest[len..];
        }
        assert_eq!(rest, b"");
    }

    #[test]
    fn says_what_cannot_be_read() {
        for (bytes, expected) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "HTTP/1.1 400"),
            (b"MSG a 1\r\n", "MSG a 1"),
            (b"MSG a 1 b c 1\r\n", "MSG a 1 b c 1"),
            (b"MSG a 1 -1\r\n", "MSG a 1 -1"),
            (b"MSG a 1 99999999999\r\n", "MSG a 1 99999999999"),
            (b"HMSG a 1 3 2\r\n", "HMSG a 1 3 2"),
            (b"HMSG a 1 2\r\n", "HMSG a 1 2"),
            (b"MSG a 1 1\r\nxyz", "does not end where it should"),
            (&[b'x'; MAX_LINE_BYTES], "a line of more than"),
            (b"MSG a 1 4294967295\r\n", "a larger message than"),
            (b"HMSG a 1 70000 70000\r\n", "a larger message than"),
        ] {
            let error = parse(bytes, any).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..200_000 {
            let mut bytes = SAID.to_vec();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..bytes.len().max(1));
                match random.u8(..8) {
                    _ if bytes.is_empty() => {}
                    0 => bytes.truncate(at),
                    1..4 => drop(bytes.remove(at)),
                    _ => bytes[at] = random.choice(b" \r\n0189MSGH-".iter()).copied().unwrap(),
                }
            }
            let mut rest = bytes.as_slice();
            while let Ok(Some((_, len))) = parse(rest, any) {
                assert!(len > 0);
                rest = &rest[len..];
            }
        }
    }
}
