//! An HTTP server for a handful of small answers (RFC 9112), bounded in everything: connections, threads, the size of a
//! request, and the time that a connection may take. It is no web server: GET and HEAD, one request a
//! connection, no body is read.
//!
//! The requests are read by `httparse`; around it stands a loop of our own, because the small blocking servers there
//! are keep a thread for a client for as long as that likes, and as many as there are clients.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Connections at once, each with a thread; those beyond are closed. A scraper, a load balancer and some pages need few.
const MAX_CONNECTIONS: usize = 8;
/// Of one thread: what rendering takes is on the heap.
const STACK_BYTES: usize = 128 * 1024;
/// A request's line and headers.
const MAX_REQUEST_BYTES: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;
/// From the connection to the end of the answer.
const DEADLINE: Duration = Duration::from_secs(3);
/// After an accept that failed, as it does when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The statuses there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 200.
    Ok,
    /// 400.
    BadRequest,
    /// 404.
    NotFound,
    /// 405.
    MethodNotAllowed,
    /// 431.
    TooLarge,
    /// 503.
    Unavailable,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::BadRequest => "400 Bad Request",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
            Status::TooLarge => "431 Request Header Fields Too Large",
            Status::Unavailable => "503 Service Unavailable",
        }
    }
}

/// What is sent back.
pub struct Answer {
    status: Status,
    content_type: &'static str,
    body: String,
}

impl Answer {
    /// Of any type.
    pub fn new(status: Status, content_type: &'static str, body: String) -> Answer {
        Answer {
            status,
            content_type,
            body,
        }
    }

    /// Plain text.
    pub fn text(status: Status, body: String) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", body)
    }
}

/// Starts the thread that accepts. `answer` is given a path without its query.
pub fn serve(
    listener: TcpListener,
    answer: impl Fn(&str) -> Answer + Send + Sync + 'static,
) -> io::Result<()> {
    let answer = Arc::new(answer);
    let open = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                thread::sleep(ACCEPT_PAUSE);
                continue;
            };
            if open.load(Ordering::SeqCst) >= MAX_CONNECTIONS {
                continue;
            }
            let place = Place::take(&open);
            let answer = answer.clone();
            let task = move || {
                // a client that goes away, or is too slow, is its own affair
                let _ = converse(stream, &*answer);
                drop(place);
            };
            let thread = thread::Builder::new().name("http".into());
            // without a thread to spare the connection is closed
            let _ = thread.stack_size(STACK_BYTES).spawn(task);
        }
    };
    let thread = thread::Builder::new().name("http-accept".into());
    thread.stack_size(STACK_BYTES).spawn(accept).map(drop)
}

/// Counts an open connection.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>) -> Place {
        open.fetch_add(1, Ordering::SeqCst);
        Place(open.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One request and its answer.
fn converse(mut stream: TcpStream, answer: &dyn Fn(&str) -> Answer) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    let mut buffer = [0; MAX_REQUEST_BYTES];
    let mut filled = 0;
    let request = loop {
        let free = buffer.get_mut(filled..).unwrap_or_default();
        if free.is_empty() {
            break Err(Status::TooLarge);
        }
        stream.set_read_timeout(Some(left(deadline)?))?;
        let count = stream.read(free)?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        match read_request(buffer.get(..filled).unwrap_or_default()) {
            Ok(Some(request)) => break Ok(request),
            Ok(None) => {}
            Err(status) => break Err(status),
        }
    };
    let (reply, with_body) = match request {
        Ok(Request { path, with_body }) => (answer(&path), with_body),
        Err(status) => (Answer::text(status, format!("{}\n", status.line())), true),
    };
    let mut text = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\n\r\n",
        reply.status.line(),
        reply.content_type,
        reply.body.len()
    );
    if with_body {
        text += &reply.body;
    }
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(deadline)?))?;
        let written = stream.write(rest)?;
        rest = rest.get(written..).unwrap_or_default();
        if written == 0 {
            return Ok(());
        }
    }
    stream.shutdown(Shutdown::Write)
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

#[derive(Debug, PartialEq, Eq)]
struct Request {
    path: String,
    with_body: bool,
}

/// `None`: it is not whole yet.
fn read_request(bytes: &[u8]) -> Result<Option<Request>, Status> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Status::TooLarge),
        Err(_) => return Err(Status::BadRequest),
    }
    let with_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Err(Status::MethodNotAllowed),
    };
    let target = request.path.unwrap_or_default();
    let path = target.split(['?', '#']).next().unwrap_or_default();
    Ok(Some(Request {
        path: path.to_string(),
        with_body,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], expected: Result<Option<(&str, bool)>, Status>) {
        let found = read_request(bytes);
        let found = found.as_ref().map(|request| {
            let request = request.as_ref();
            request.map(|request| (request.path.as_str(), request.with_body))
        });
        let shown = String::from_utf8_lossy(bytes);
        assert_eq!(found, expected.as_ref().copied(), "{shown}");
    }

    #[test]
    fn requests_are_read_when_they_are_whole() {
        let whole = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nX-Y: z\r\n\r\n";
        for end in 0..whole.len() {
            check(&whole[..end], Ok(None));
        }
        check(whole, Ok(Some(("/metrics", true))));
        check(b"HEAD / HTTP/1.0\r\n\r\n", Ok(Some(("/", false))));
        check(b"GET /livez#x HTTP/1.1\n\n", Ok(Some(("/livez", true))));
    }

    #[test]
    fn what_is_none_is_refused() {
        check(b"POST / HTTP/1.1\r\n\r\n", Err(Status::MethodNotAllowed));
        check(b"\x16\x03\x01\x02\x00", Err(Status::BadRequest));
        check(b"GET / HTTP/9.9\r\n\r\n", Err(Status::BadRequest));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(MAX_HEADERS + 1)
        );
        check(many.as_bytes(), Err(Status::TooLarge));
    }
}
