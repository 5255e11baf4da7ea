//! One connection to NATS: messages go out without ever waiting, and what comes for its inbox is handed on.
//!
//! Whoever publishes writes to the socket itself, without waiting: what the socket does not take, a thread of the connection
//! writes, and all that comes meanwhile. Another thread reads, and hands on what one read has brought.
//!
//! Answers come to one inbox and are told apart by the last token of their subject: a number for a message of a burst, `r` and a
//! number for a request. A request is answered once: by the server, or after its deadline by [`NoReply::Timeout`].
//!
//! A connection is never silently replaced: when it is over, it reports why, once. A server that has gone silent is asked for a
//! sign of life with a PING, and given up if none comes. Nothing here waits for a server: dropping the connection shuts its
//! socket, which ends both threads.

use super::error::{EndedBy, Error};
use super::handshake::{self, Session};
use super::info::ServerInfo;
use super::options::{Options, ServerUrl};
use super::protocol::{self, ServerOp};
use super::tls;
use crate::random::unique;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustls::client::ClientConnection;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that are written, or read, at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Reads whose answers wait to be taken. Behind them the server is to wait.
const READS_AHEAD: usize = 64;

/// The largest answer to a message of a burst; a PubAck has some dozens of bytes.
const MAX_ACK_BYTES: usize = 64 * 1024;

/// The largest answer to a request, beside a whole message of the server's `max_payload` in base64.
const MAX_REPLY_BYTES: usize = 1024 * 1024;

/// A socket that takes nothing is left for a look at the requests' deadlines after this long; and when the answers' receiver is
/// full, it is tried again.
const LOOK: Duration = Duration::from_millis(500);

/// What comes for the inbox. `A` is what the reading thread makes of an answer to a message of a burst.
#[derive(Debug)]
pub enum Answer<A> {
    /// To a message of a burst.
    Ack(A),
    /// To a request.
    Reply(Reply),
    /// To each PING up to the one of this number.
    Pong(u64),
    /// The server has sent a new INFO: a new `max_payload`, or lame duck mode.
    Info,
}

/// The answer to a request.
#[derive(Debug)]
pub struct Reply {
    /// The request's.
    pub token: u64,
    /// The body, or that there is none.
    pub result: Result<Vec<u8>, NoReply>,
}

/// Why a request has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoReply {
    /// Nobody subscribes to its subject (status 503).
    NoResponders,
    /// Another status.
    Status,
    /// None came in time.
    Timeout,
}

/// Messages that make themselves into protocol only when the socket has room for them.
pub trait Burst: Send {
    /// Appends the next message, whole, as `PUB` or `HPUB` with `<inbox><number>` as its reply subject; false: there is none.
    fn encode_next(&mut self, inbox: &str, out: &mut Vec<u8>) -> bool;
}

/// A request, or anything else that is answered once.
pub struct Request<'a> {
    /// Comes back with the answer. No other request that waits has it.
    pub token: u64,
    /// Where it goes.
    pub subject: &'a str,
    /// A header, if it is to have one.
    pub header: Option<(&'a str, &'a str)>,
    /// What it carries.
    pub body: &'a [u8],
    /// When it counts as unanswered.
    pub deadline: Instant,
}

/// An open connection, signed in.
pub struct Connection<A> {
    shared: Arc<Shared>,
    answers: Receiver<Vec<Answer<A>>>,
    lost: Receiver<Error>,
}

struct Shared {
    server: String,
    stream: TcpStream,
    inbox: String,
    info: Mutex<Arc<ServerInfo>>,
    out: Mutex<Outgoing>,
    /// For the writing thread: there is something for it, or the connection is over.
    rouse: Condvar,
}

/// What is to be sent: `ready`, then PING and PONG, then `waiting`.
struct Outgoing {
    /// For the socket, as it goes over the network.
    ready: Vec<u8>,
    /// How many bytes of that the socket has taken.
    sent: usize,
    ping_is_due: bool,
    /// PINGs that were sent or are to be sent, and PONGs that have come.
    pings: u64,
    pongs: u64,
    /// One answers all PINGs that have come.
    pong_is_due: bool,
    waiting: VecDeque<Box<dyn Burst>>,
    /// The socket did not take all; until it has, nobody but the writing thread writes.
    is_full: bool,
    is_over: bool,
    /// What has ended it on our side.
    cause: Option<Error>,
    session: Option<ClientConnection>,
    /// Requests without an answer, and when they are overdue.
    requests: BTreeMap<u64, Instant>,
    /// When the writing thread is to look for overdue ones.
    alarm: Option<Instant>,
}

/// What has come from the server.
struct Incoming<F> {
    shared: Arc<Shared>,
    is_tls: bool,
    chunk: Vec<u8>,
    /// Read and not yet looked at.
    bytes: Vec<u8>,
    max_reply: usize,
    discover: Box<dyn Fn(&ServerInfo) + Send>,
    read_ack: F,
    /// The longest silence before the server is asked for a sign of life, and then until it gives one.
    longest_silence: Duration,
    was_asked: bool,
}

impl<A: Send + 'static> Connection<A> {
    /// Tries the servers in turn, beginning with the one of number `first`, modulo how many there are: one that lets clients in
    /// may still be cut off from its cluster, and whoever finds that out goes on with the next. Spends at most
    /// `connect_timeout` on each.
    ///
    /// `read_ack` is given number, status and body of each answer to a message of a burst, on the reading thread.
    ///
    /// # Errors
    /// Why no server can be used, in words for an operator.
    pub fn connect(
        options: &Options,
        first: usize,
        read_ack: impl FnMut(u64, Option<&str>, &[u8]) -> A + Send + 'static,
    ) -> Result<Connection<A>, Error> {
        let inbox = unique().map_err(|source| Error::Unreachable {
            server: "any server".into(),
            source,
        })?;
        let inbox = format!("_INBOX.{inbox}.");
        let subscription = format!("SUB {inbox}* 1\r\n");
        let (server, session) = handshake::sign_in_to_any(options, first, &subscription)?;
        Connection::open(options, server, session, inbox, read_ack)
    }

    fn open(
        options: &Options,
        server: ServerUrl,
        session: Session,
        inbox: String,
        read_ack: impl FnMut(u64, Option<&str>, &[u8]) -> A + Send + 'static,
    ) -> Result<Connection<A>, Error> {
        let discovered = options.discovered.clone();
        let discover = move |info: &ServerInfo| discovered.replace(&server, &info.connect_urls);
        discover(&session.info);
        let refused = |reason: String| Error::Refused {
            server: session.server.clone(),
            reason,
        };
        let longest_silence = options.request_timeout;
        (session.stream.set_read_timeout(Some(longest_silence)))
            .and_then(|()| session.stream.set_write_timeout(Some(LOOK)))
            .map_err(|error| refused(error.to_string()))?;
        let is_tls = session.tls.is_some();
        let max_reply = max_reply(&session.info);
        let shared = Arc::new(Shared {
            server: session.server.clone(),
            stream: session.stream,
            inbox,
            info: Mutex::new(Arc::new(session.info)),
            out: Mutex::new(Outgoing {
                ready: Vec::new(),
                sent: 0,
                ping_is_due: false,
                pings: 0,
                pongs: 0,
                pong_is_due: false,
                waiting: VecDeque::new(),
                is_full: false,
                is_over: false,
                cause: None,
                session: session.tls,
                requests: BTreeMap::new(),
                alarm: None,
            }),
            rouse: Condvar::new(),
        });
        let (give, answers) = bounded(READS_AHEAD);
        let (report, lost) = bounded(1);
        // from here on an early end closes what there is
        let connection = Connection {
            shared: shared.clone(),
            answers,
            lost,
        };
        let incoming = Incoming {
            shared: shared.clone(),
            is_tls,
            chunk: vec![0; CHUNK_BYTES],
            bytes: session.bytes,
            max_reply,
            discover: Box::new(discover),
            read_ack,
            longest_silence,
            was_asked: false,
        };
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.into());
            let spawned = thread.spawn(run).map(drop);
            spawned.map_err(|error| refused(format!("start a thread: {error}")))
        };
        let (writer, expire) = (Closer(shared), give.clone());
        spawn("nats-writer", Box::new(move || writer.0.write_on(&expire)))?;
        let read_on = move || {
            let _closer = Closer(incoming.shared.clone());
            let error = incoming.run(&give);
            // before `give` is dropped, so that whoever finds the answers at their end finds out why
            let _ = report.try_send(error);
        };
        spawn("nats-reader", Box::new(read_on))?;
        Ok(connection)
    }

    /// What comes, in the order it came, as much as one read has brought. It ends with the connection.
    pub fn answers(&self) -> &Receiver<Vec<Answer<A>>> {
        &self.answers
    }
}

impl<A> Connection<A> {
    /// Sends messages, in this order. Never blocks: what the socket does not take waits, and its bound is the caller's
    /// window, as none of it has been answered. Without effect once the connection is over.
    pub fn publish(&self, burst: Box<dyn Burst>) {
        let mut out = self.shared.lock();
        self.shared.send(&mut out, burst);
    }

    /// Sends a request after what was published before. Never blocks; the answer comes as a [`Reply`].
    pub fn request(&self, request: &Request<'_>) {
        let mut message = Vec::new();
        encode(request, &self.shared.inbox, &mut message);
        let mut out = self.shared.lock();
        out.requests.insert(request.token, request.deadline);
        if out.alarm.is_none_or(|alarm| request.deadline < alarm) {
            out.alarm = Some(request.deadline);
            self.shared.rouse.notify_one();
        }
        self.shared.send(&mut out, Box::new(Some(message)));
    }

    /// Asks the server for a sign of life, after what was sent before: it takes what comes in turn. Never blocks.
    /// [`Answer::Pong`] names this PING by the number that is returned.
    pub fn ping(&self) -> u64 {
        let mut out = self.shared.lock();
        out.pings += 1;
        self.shared
            .send(&mut out, Box::new(Some(b"PING\r\n".to_vec())));
        out.pings
    }

    /// Gives up waiting for the answer to a request. False: it is among the answers already, or is about to be.
    pub fn forget(&self, token: u64) -> bool {
        self.shared.lock().requests.remove(&token).is_some()
    }

    /// Ends the connection; `cause` is reported unless the server has said more.
    pub fn close(&self, cause: Error) {
        self.shared.close(&mut self.shared.lock(), Some(cause));
    }

    /// Yields once, why the connection is over, before the answers end.
    pub fn lost(&self) -> &Receiver<Error> {
        &self.lost
    }

    /// `host:port` of the server.
    pub fn server(&self) -> &str {
        &self.shared.server
    }

    /// The server's last INFO.
    pub fn info(&self) -> Arc<ServerInfo> {
        self.shared.info().clone()
    }
}

impl<A> Drop for Connection<A> {
    fn drop(&mut self) {
        self.shared.close(&mut self.shared.lock(), None);
    }
}

/// Closes the connection when a thread of it ends, also by a panic.
struct Closer(Arc<Shared>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.close(&mut self.0.lock(), None);
    }
}

/// One message, made already.
impl Burst for Option<Vec<u8>> {
    fn encode_next(&mut self, _inbox: &str, out: &mut Vec<u8>) -> bool {
        let message = self.take();
        out.extend_from_slice(message.as_deref().unwrap_or_default());
        message.is_some()
    }
}

/// Subject and header are the caller's own words; see the callers.
fn encode(request: &Request<'_>, inbox: &str, out: &mut Vec<u8>) {
    let Request {
        token,
        subject,
        header,
        body,
        ..
    } = request;
    // writing to a Vec cannot fail
    let _ = match header {
        None => write!(out, "PUB {subject} {inbox}r{token} {}\r\n", body.len()),
        Some((name, value)) => {
            let headers = format!("NATS/1.0\r\n{name}: {value}\r\n\r\n");
            let (len, all) = (headers.len(), headers.len() + body.len());
            write!(
                out,
                "HPUB {subject} {inbox}r{token} {len} {all}\r\n{headers}"
            )
        }
    };
    out.extend_from_slice(body);
    out.extend_from_slice(b"\r\n");
}

/// A stored message comes in base64 in an answer of the JetStream API, as JSON.
pub(super) fn max_reply(info: &ServerInfo) -> usize {
    info.max_payload / 3 * 4 + MAX_REPLY_BYTES
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Outgoing> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> MutexGuard<'_, Arc<ServerInfo>> {
        self.info.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, out: &mut Outgoing, burst: Box<dyn Burst>) {
        if !out.is_over {
            out.waiting.push_back(burst);
            self.send_now(out);
        }
    }

    /// Sends what the socket takes without waiting; the rest is the writing thread's.
    fn send_now(&self, out: &mut Outgoing) {
        if out.is_full || out.is_over {
            return;
        }
        match out.write_now(&self.stream, &self.inbox) {
            Ok(true) => {}
            Ok(false) => {
                out.is_full = true;
                self.rouse.notify_one();
            }
            Err(error) => self.close(out, Some(self.failed(&error))),
        }
    }

    /// The writing thread, which keeps the requests' time as well.
    fn write_on<A>(&self, give: &Sender<Vec<Answer<A>>>) {
        let mut out = self.lock();
        while !out.is_over {
            out.expire(give);
            if !out.is_full {
                out = self.wait(out);
                continue;
            }
            match out.prepare(&self.inbox) {
                Ok(true) => {}
                Ok(false) => {
                    out.is_full = false;
                    continue;
                }
                Err(error) => return self.close(&mut out, Some(self.failed(&error))),
            }
            let (ready, sent) = (std::mem::take(&mut out.ready), out.sent);
            drop(out);
            let result = (&self.stream).write(ready.get(sent..).unwrap_or_default());
            out = self.lock();
            out.ready = ready;
            match result {
                Ok(0) => {
                    return self.close(
                        &mut out,
                        Some(self.lost("it takes no more", EndedBy::Other)),
                    );
                }
                Ok(count) => out.sent += count,
                Err(error) if is_timeout(&error) || error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.close(&mut out, Some(self.failed(&error))),
            }
        }
    }

    /// Until there is something for the writing thread, or its alarm goes off.
    fn wait<'a>(&self, out: MutexGuard<'a, Outgoing>) -> MutexGuard<'a, Outgoing> {
        let Some(alarm) = out.alarm else {
            return (self.rouse.wait(out)).unwrap_or_else(PoisonError::into_inner);
        };
        let left = alarm.saturating_duration_since(Instant::now());
        let waited = self.rouse.wait_timeout(out, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Ends the connection. The reading thread reports why: what the server has still said comes before `cause`.
    fn close(&self, out: &mut Outgoing, cause: Option<Error>) {
        out.is_over = true;
        out.cause = out.cause.take().or(cause);
        out.waiting.clear();
        self.rouse.notify_one();
        // one that is closed already needs no closing
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn lost(&self, reason: impl ToString, by: EndedBy) -> Error {
        Error::Lost {
            server: self.server.clone(),
            reason: reason.to_string(),
            by,
        }
    }

    fn failed(&self, error: &io::Error) -> Error {
        Error::of_stream(&self.server, error, false)
    }
}

impl Outgoing {
    /// Answers the requests that the server has not answered in time.
    fn expire<A>(&mut self, give: &Sender<Vec<Answer<A>>>) {
        let now = Instant::now();
        if self.alarm.is_none_or(|alarm| now < alarm) {
            return;
        }
        let overdue = |(_, deadline): &(&u64, &Instant)| **deadline <= now;
        let answer = |(token, _): (&u64, &Instant)| {
            Answer::Reply(Reply {
                token: *token,
                result: Err(NoReply::Timeout),
            })
        };
        let answers: Vec<Answer<A>> = self.requests.iter().filter(overdue).map(answer).collect();
        if !answers.is_empty() && give.try_send(answers).is_err() {
            self.alarm = Some(now + LOOK);
            return;
        }
        self.requests.retain(|_, deadline| *deadline > now);
        self.alarm = self.requests.values().min().copied();
    }

    /// False: the socket takes no more for now.
    fn write_now(&mut self, stream: &TcpStream, inbox: &str) -> io::Result<bool> {
        while self.prepare(inbox)? {
            let rest = self.ready.get(self.sent..).unwrap_or_default();
            match send(stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Whether there are bytes for the socket; makes the next ones if it has taken all.
    fn prepare(&mut self, inbox: &str) -> io::Result<bool> {
        if self.sent < self.ready.len() {
            return Ok(true);
        }
        self.sent = 0;
        self.ready.clear();
        // one large message must not be remembered for ever
        self.ready.shrink_to(4 * CHUNK_BYTES);
        if std::mem::take(&mut self.ping_is_due) {
            self.ready.extend_from_slice(b"PING\r\n");
        }
        if std::mem::take(&mut self.pong_is_due) {
            self.ready.extend_from_slice(b"PONG\r\n");
        }
        while self.ready.len() < CHUNK_BYTES
            && let Some(burst) = self.waiting.front_mut()
        {
            if !burst.encode_next(inbox, &mut self.ready) {
                self.waiting.pop_front();
            }
        }
        self.seal()?;
        Ok(!self.ready.is_empty())
    }

    /// With TLS, makes records of what is `ready`, and of what TLS itself has to say.
    fn seal(&mut self) -> io::Result<()> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        session.writer().write_all(&self.ready)?;
        self.ready.clear();
        while session.wants_write() {
            session.write_tls(&mut self.ready)?;
        }
        Ok(())
    }
}

/// How a read ended.
enum Came {
    Bytes,
    Nothing,
    End,
}

impl<A, F: FnMut(u64, Option<&str>, &[u8]) -> A> Incoming<F> {
    /// The reading thread. Returns why the connection is over.
    fn run(mut self, give: &Sender<Vec<Answer<A>>>) -> Error {
        loop {
            let mut answers = Vec::new();
            let taken = self.take(&mut answers);
            if !answers.is_empty() && give.send(answers).is_err() {
                return self.ended("it was closed", EndedBy::Other);
            }
            if let Err(error) = taken {
                return error;
            }
            match self.read() {
                Ok(Came::Bytes) => self.was_asked = false,
                Ok(Came::Nothing) if self.was_asked => {
                    let limit = self.longest_silence.as_secs_f32();
                    let reason = format!("the server has not answered a PING within {limit:.1} s");
                    return self.ended(&reason, EndedBy::Other);
                }
                Ok(Came::Nothing) => {
                    self.was_asked = true;
                    let mut out = self.shared.lock();
                    out.ping_is_due = true;
                    out.pings += 1;
                    self.shared.send_now(&mut out);
                }
                Ok(Came::End) => {
                    let reason =
                        "the server closed the connection without a word (its log says why)";
                    return self.ended(reason, EndedBy::Silence);
                }
                Err(error) => return self.failed(&error),
            }
        }
    }

    /// Waits for more, not longer than the longest silence.
    fn read(&mut self) -> io::Result<Came> {
        let n = loop {
            match (&self.shared.stream).read(&mut self.chunk) {
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Ok(Came::Nothing),
                Err(error) => return Err(error),
            }
        };
        let came = self.chunk.get(..n).unwrap_or_default();
        if n == 0 {
            return Ok(Came::End);
        }
        if self.is_tls
            && let Some(session) = &mut self.shared.lock().session
        {
            return match tls::unseal(session, came, &mut self.bytes)? {
                true => Ok(Came::Bytes),
                false => Ok(Came::End),
            };
        }
        self.bytes.extend_from_slice(came);
        Ok(Came::Bytes)
    }

    /// Takes all that is there as a whole.
    fn take(&mut self, answers: &mut Vec<Answer<A>>) -> Result<(), Error> {
        let mut done = 0;
        let result = loop {
            let rest = self.bytes.get(done..).unwrap_or_default();
            let shared = &self.shared;
            let limit = |subject: &[u8]| match shared.token(subject) {
                Some(Token::Reply(token)) if shared.lock().requests.contains_key(&token) => {
                    self.max_reply
                }
                _ => MAX_ACK_BYTES,
            };
            let (op, len) = match protocol::parse(rest, limit) {
                Ok(Some(found)) => found,
                Ok(None) => break Ok(()),
                Err(reason) => {
                    break Err(shared.lost(format!("not NATS: {reason}"), EndedBy::Other));
                }
            };
            match op {
                ServerOp::Message {
                    subject,
                    status,
                    body,
                } => match shared.token(subject) {
                    Some(Token::Ack(number)) => {
                        answers.push(Answer::Ack((self.read_ack)(number, status, body)));
                    }
                    // one that nobody waits for any more is dropped
                    Some(Token::Reply(token))
                        if shared.lock().requests.remove(&token).is_some() =>
                    {
                        let result = match status {
                            None => Ok(body.to_vec()),
                            Some("503") => Err(NoReply::NoResponders),
                            Some(_) => Err(NoReply::Status),
                        };
                        answers.push(Answer::Reply(Reply { token, result }));
                    }
                    _ => {}
                },
                ServerOp::Ping => {
                    let mut out = shared.lock();
                    out.pong_is_due = true;
                    shared.send_now(&mut out);
                }
                ServerOp::Pong => {
                    let mut out = shared.lock();
                    out.pongs += 1;
                    // the PING of an idle connection goes before what waits: only of all together it is known which
                    if out.pongs == out.pings {
                        answers.push(Answer::Pong(out.pings));
                    }
                }
                ServerOp::Ok => {}
                ServerOp::Error(words) => {
                    break Err(Error::of_server(&shared.server, &words));
                }
                ServerOp::Info(json) => match ServerInfo::parse(json) {
                    Ok(info) => {
                        self.max_reply = max_reply(&info);
                        (self.discover)(&info);
                        *shared.info() = Arc::new(info);
                        answers.push(Answer::Info);
                    }
                    Err(error) => log::debug!(cause:% = error; "a later INFO cannot be read"),
                },
            }
            done += len;
        };
        self.bytes.drain(..done);
        self.bytes.shrink_to(CHUNK_BYTES);
        result
    }

    fn failed(&self, error: &io::Error) -> Error {
        match Error::of_stream(&self.shared.server, error, self.is_tls) {
            Error::Lost { reason, by, .. } => self.ended(&reason, by),
            alert => alert,
        }
    }

    /// What was found out by writing comes before what reading says of its own.
    fn ended(&self, reason: &str, by: EndedBy) -> Error {
        let cause = self.shared.lock().cause.take();
        cause.unwrap_or_else(|| self.shared.lost(reason, by))
    }
}

/// The last token of a subject in the inbox.
enum Token {
    Ack(u64),
    Reply(u64),
}

impl Shared {
    fn token(&self, subject: &[u8]) -> Option<Token> {
        let last = subject.strip_prefix(self.inbox.as_bytes())?;
        let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse().ok();
        match last.strip_prefix(b"r") {
            Some(digits) => number(digits).map(Token::Reply),
            None => number(last).map(Token::Ack),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests;
