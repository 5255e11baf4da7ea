//! An HTTP server for a handful of small answers (RFC 9112), bounded in everything: connections, the size of a
//! request, and the time that a connection may take. It is no web server: GET and HEAD, one request a
//! connection, no body is read.
//!
//! One thread serves all connections, none of which it waits for. When there are too many the oldest that has not sent
//! a whole request is closed, so that clients that only hold connections cannot keep probes and scrapers out. The small
//! blocking servers there are keep a thread for a client for as long as that likes, and as many as there are clients.

use super::request::{self, Refusal, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// Connections at once. A scraper, a load balancer and some pages need few.
const MAX_CONNECTIONS: usize = 32;
/// From each listener, before those that are open are served again: few enough that each is looked at before others
/// can take its place.
const ACCEPTS_A_ROUND: usize = MAX_CONNECTIONS / 4;
/// A request's line and headers.
const MAX_REQUEST_BYTES: usize = 8 * 1024;
/// From the connection to the end of the answer.
const DEADLINE: Duration = Duration::from_secs(3);
/// What is read and thrown away after the answer: closing a socket with unread bytes would take the answer away from
/// a client that is still sending.
const MAX_DISCARDED_BYTES: usize = 64 * 1024;
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
    /// 421: the client believes that it asks somebody else.
    Misdirected,
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
            Status::Misdirected => "421 Misdirected Request",
            Status::TooLarge => "431 Request Header Fields Too Large",
            Status::Unavailable => "503 Service Unavailable",
        }
    }
}

/// What is sent back.
pub struct Answer {
    status: Status,
    content_type: &'static str,
    /// More header fields, each with its line end.
    headers: &'static str,
    body: String,
}

impl Answer {
    /// Of any type.
    pub fn new(status: Status, content_type: &'static str, body: String) -> Answer {
        Answer {
            status,
            content_type,
            headers: "",
            body,
        }
    }

    /// Plain text.
    pub fn text(status: Status, body: String) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", body)
    }

    /// With these header fields besides, each with its line end.
    pub fn with(self, headers: &'static str) -> Answer {
        Answer { headers, ..self }
    }

    fn to_bytes(&self, wants_body: bool) -> Vec<u8> {
        let date = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
        let head = format!(
            "HTTP/1.1 {}\r\nDate: {date}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\
             Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{}\r\n",
            self.status.line(),
            self.content_type,
            self.body.len(),
            self.headers
        );
        let body = if wants_body { self.body.as_str() } else { "" };
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

/// Starts the thread that serves them all.
pub fn serve(
    listeners: Vec<TcpListener>,
    answer: impl Fn(&Request) -> Answer + Send + 'static,
) -> io::Result<()> {
    let is_loopback = |listener: &TcpListener| {
        let address = listener.local_addr();
        address.is_ok_and(|address| address.ip().is_loopback())
    };
    for listener in &listeners {
        listener.set_nonblocking(true)?;
    }
    let server = Server {
        on_loopback: listeners.iter().all(is_loopback),
        listeners,
        connections: Vec::new(),
        accepts_from: Instant::now(),
        answer,
    };
    let thread = thread::Builder::new().name("http".into());
    thread.spawn(move || server.run()).map(drop)
}

struct Server<A> {
    listeners: Vec<TcpListener>,
    on_loopback: bool,
    /// The oldest first.
    connections: Vec<Connection>,
    accepts_from: Instant,
    answer: A,
}

impl<A: Fn(&Request) -> Answer> Server<A> {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            let accepts = now >= self.accepts_from;
            let ready = self.wait(now, accepts);
            let (answer, on_loopback) = (&self.answer, self.on_loopback);
            let now = Instant::now();
            let mut ready = ready.into_iter();
            self.connections.retain_mut(|connection| {
                let is_ready = ready.next().unwrap_or(false);
                let goes_on =
                    !is_ready || connection.advance(&|found| respond(found, on_loopback, answer));
                goes_on && now < connection.deadline
            });
            if accepts {
                self.accept();
            }
        }
    }

    /// Waits until there is something to do, and says which connections have something.
    fn wait(&self, now: Instant, accepts: bool) -> Vec<bool> {
        let mut polled: Vec<PollFd<'_>> = Vec::with_capacity(MAX_CONNECTIONS + 2);
        for connection in &self.connections {
            polled.push(PollFd::new(&connection.stream, connection.waits_for()));
        }
        if accepts {
            for listener in &self.listeners {
                polled.push(PollFd::new(listener, PollFlags::IN));
            }
        }
        let deadlines = self.connections.iter().map(|it| it.deadline);
        let wake = deadlines
            .chain((!accepts).then_some(self.accepts_from))
            .min();
        let timeout = wake.map(|wake| {
            // whole milliseconds up, or it would come round with nothing to do
            let wait = wake.saturating_duration_since(now) + Duration::from_millis(1);
            Timespec::try_from(wait).unwrap_or_default()
        });
        if poll(&mut polled, timeout.as_ref()).is_err() {
            // a lack of memory, most likely: the next round asks again
            thread::sleep(ACCEPT_PAUSE);
            return Vec::new();
        }
        let connections = polled.iter().take(self.connections.len());
        connections.map(|it| !it.revents().is_empty()).collect()
    }

    fn accept(&mut self) {
        for listener in &self.listeners {
            for _ in 0..ACCEPTS_A_ROUND {
                let stream = match listener.accept() {
                    Ok((stream, _)) => stream,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                    Err(_) => {
                        self.accepts_from = Instant::now() + ACCEPT_PAUSE;
                        make_room(&mut self.connections);
                        break;
                    }
                };
                if stream.set_nonblocking(true).is_err() {
                    continue;
                }
                if self.connections.len() >= MAX_CONNECTIONS {
                    make_room(&mut self.connections);
                }
                self.connections.push(Connection {
                    stream,
                    deadline: Instant::now() + DEADLINE,
                    state: State::Reading(Vec::new()),
                });
            }
        }
    }
}

/// Closes the connection that needs it least: one that has its answer, else the oldest without a whole request.
fn make_room(connections: &mut Vec<Connection>) {
    let oldest = |is: fn(&State) -> bool| connections.iter().position(move |it| is(&it.state));
    let index = oldest(|state| matches!(state, State::Closing(_)))
        .or_else(|| oldest(|state| matches!(state, State::Reading(_))))
        .unwrap_or(0);
    if index < connections.len() {
        connections.remove(index);
    }
}

fn respond(
    found: Result<Request, Refusal>,
    on_loopback: bool,
    answer: &dyn Fn(&Request) -> Answer,
) -> Vec<u8> {
    let plain = |status: Status| Answer::text(status, format!("{}\n", status.line()));
    match found {
        // a page of another site, whose name its owner lets point to 127.0.0.1, could read everything here
        Ok(request) if on_loopback && !request::is_safe_on_loopback(&request.authority) => {
            let text = "this is served to this machine only, as localhost or by address; for another name pass \
                        -listen an address that is not a loopback one, or let a proxy send Host: localhost\n";
            Answer::text(Status::Misdirected, text.to_string()).to_bytes(request.wants_body)
        }
        Ok(request) => answer(&request).to_bytes(request.wants_body),
        Err(Refusal::Method) => plain(Status::MethodNotAllowed)
            .with("Allow: GET, HEAD\r\n")
            .to_bytes(true),
        Err(Refusal::Malformed) => plain(Status::BadRequest).to_bytes(true),
        Err(Refusal::TooLarge) => plain(Status::TooLarge).to_bytes(true),
    }
}

struct Connection {
    stream: TcpStream,
    deadline: Instant,
    state: State,
}

enum State {
    /// What has come of the request.
    Reading(Vec<u8>),
    /// The answer, and how much of it has gone.
    Writing(Vec<u8>, usize),
    /// The answer has gone; how much was thrown away since.
    Closing(usize),
}

impl Connection {
    fn waits_for(&self) -> PollFlags {
        match self.state {
            State::Reading(_) | State::Closing(_) => PollFlags::IN,
            State::Writing(..) => PollFlags::OUT,
        }
    }

    /// Does what can be done without waiting; `false`: the connection is over.
    fn advance(&mut self, respond: &dyn Fn(Result<Request, Refusal>) -> Vec<u8>) -> bool {
        loop {
            match self.step(respond) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // a client that goes away is its own affair
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    fn step(&mut self, respond: &dyn Fn(Result<Request, Refusal>) -> Vec<u8>) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        match &mut self.state {
            State::Reading(request) => {
                let count = self.stream.read(&mut buffer)?;
                if count == 0 {
                    return Ok(false);
                }
                request.extend(buffer.iter().take(count));
                let found = match request::read(request) {
                    Ok(None) if request.len() < MAX_REQUEST_BYTES => return Ok(true),
                    Ok(None) => Err(Refusal::TooLarge),
                    Ok(Some(request)) => Ok(request),
                    Err(refusal) => Err(refusal),
                };
                self.state = State::Writing(respond(found), 0);
            }
            State::Writing(answer, sent) => {
                let rest = answer.get(*sent..).unwrap_or_default();
                if rest.is_empty() {
                    self.stream.shutdown(Shutdown::Write)?;
                    self.state = State::Closing(0);
                    return Ok(true);
                }
                let count = self.stream.write(rest)?;
                *sent += count;
                return Ok(count > 0);
            }
            State::Closing(discarded) => {
                let count = self.stream.read(&mut buffer)?;
                *discarded += count;
                return Ok(count > 0 && *discarded <= MAX_DISCARDED_BYTES);
            }
        }
        Ok(true)
    }
}
