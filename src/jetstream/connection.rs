//! A connection of our own to NATS, on which events go out and their PubAcks come in.
//!
//! The `nats` crate would write each event by way of a map of headers and a lock, flush with a PING that is waited for,
//! and wake two more threads a burst. Here whoever publishes writes to the socket itself, without waiting: what the
//! socket does not take, a thread of the connection writes, and all that comes meanwhile. Another reads the answers, and
//! hands on what one read has brought.
//!
//! A connection is never silently replaced: when it is over, it says why once. Nothing here waits for a server:
//! dropping the connection shuts its socket, which ends both threads.

use super::ack::{AckError, PubAck, parse_ack};
use super::error::Error;
use super::options::{Options, ServerUrl};
use super::probe::Greeting;
use super::protocol::{self, ServerOp};
use super::sign_in::{self, Identity};
use super::tls;
use super::wire::{self, Encoder, Publish};
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustls::ClientConfig;
use rustls::client::ClientConnection;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Bytes that are written, or read, at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Reads whose acks wait to be taken. Behind them the server is to wait.
const READS_AHEAD: usize = 64;

/// The answer to a publish.
#[derive(Debug)]
pub struct Ack {
    /// The publish's `reply`.
    pub reply: u64,
    /// Stored, or why not.
    pub result: Result<PubAck, AckError>,
}

/// An open connection, signed in.
pub struct Connection {
    shared: Arc<Shared>,
    acks: Receiver<Vec<Ack>>,
}

struct Shared {
    server: String,
    stream: TcpStream,
    out: Mutex<Outgoing>,
    /// For the writing thread: there is something for it, or the connection is over.
    rouse: Condvar,
}

/// What is to be sent: `ready`, then the answer to a PING, then `waiting`.
struct Outgoing {
    /// For the socket, as it goes over the network.
    ready: Vec<u8>,
    /// How many bytes of that the socket has taken.
    sent: usize,
    /// One answers all PINGs that have come.
    pong_is_due: bool,
    waiting: VecDeque<Burst>,
    /// The socket did not take all; until it has, nobody but the writing thread writes.
    is_full: bool,
    is_over: bool,
    /// What has ended it on our side.
    cause: Option<Error>,
    session: Option<ClientConnection>,
    encoder: Encoder,
}

struct Burst {
    publishes: std::vec::IntoIter<Publish>,
    position_source: Arc<str>,
}

/// What has come from the server.
struct Incoming {
    shared: Arc<Shared>,
    is_tls: bool,
    inbox: String,
    chunk: Vec<u8>,
    /// Read and not yet looked at.
    bytes: Vec<u8>,
}

impl Connection {
    /// Signs in on what the probe has opened, with TLS if there is a configuration for it, and subscribes to an inbox.
    /// `ended` is called once, on a thread of the connection, when an open connection is over.
    pub fn open(
        options: &Options,
        server: &ServerUrl,
        identity: &Identity,
        greeting: Greeting,
        tls: Option<&Arc<ClientConfig>>,
        deadline: Instant,
        ended: impl FnOnce(Error) + Send + 'static,
    ) -> Result<Connection, Error> {
        let started = Instant::now();
        let Greeting {
            stream, info, rest, ..
        } = greeting;
        let refused = |error: io::Error| Error::Refused {
            server: server.to_string(),
            reason: error.to_string(),
        };
        // nobody can trust what was said before TLS
        let (session, bytes) = match tls {
            Some(config) => {
                let session = tls::open(config, server, &stream, deadline)?;
                (Some(session), Vec::new())
            }
            None => (None, rest),
        };
        let inbox = format!("_INBOX.{}.", sign_in::unique().map_err(refused)?);
        let mut hello = identity.connect_line(options, tls.is_some(), info.nonce.as_deref());
        hello.extend_from_slice(format!("SUB {inbox}* 1\r\nPING\r\n").as_bytes());
        let out = Outgoing::new(session, &inbox, hello).map_err(refused)?;
        let shared = Arc::new(Shared {
            server: server.to_string(),
            stream,
            out: Mutex::new(out),
            rouse: Condvar::new(),
        });
        let (give, acks) = bounded(READS_AHEAD);
        // from here on an early end closes what there is
        let connection = Connection {
            shared: shared.clone(),
            acks,
        };
        let mut incoming = Incoming {
            shared: shared.clone(),
            is_tls: tls.is_some(),
            inbox,
            chunk: vec![0; CHUNK_BYTES],
            bytes,
        };
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.into());
            thread.spawn(run).map(drop).map_err(|error| Error::Refused {
                server: server.to_string(),
                reason: format!("start a thread: {error}"),
            })
        };
        let writer = Closer(shared.clone());
        spawn("nats-writer", Box::new(move || writer.0.write_on()))?;
        shared.send_now(&mut shared.lock());
        incoming.wait_for_pong(started, deadline, info.auth_required)?;
        let read_on = move || {
            let _closer = Closer(incoming.shared.clone());
            // `give` is dropped behind it, so that whoever finds the acks at their end is told why
            ended(incoming.run(&give));
        };
        spawn("nats-acks", Box::new(read_on))?;
        Ok(connection)
    }

    /// Sends events, in this order. Never blocks: what the socket does not take waits, and its bound is the caller's
    /// window, as none of it has been answered. `position_source`, `<slot> <system id> <timeline>`, begins their
    /// `Outbox-Position`. Sizes are the caller's to check. Without effect once the connection is over.
    pub fn publish(&self, burst: Vec<Publish>, position_source: &Arc<str>) {
        let mut out = self.shared.lock();
        if out.is_over {
            return;
        }
        if let Some(error) = burst
            .iter()
            .find_map(|publish| wire::check(&publish.event.view()).err())
        {
            return self.shared.close(&mut out, Some(error));
        }
        out.waiting.push_back(Burst {
            publishes: burst.into_iter(),
            position_source: position_source.clone(),
        });
        self.shared.send_now(&mut out);
    }

    /// The answers, in the order they came, as many as one read has brought.
    pub fn acks(&self) -> &Receiver<Vec<Ack>> {
        &self.acks
    }
}

impl Drop for Connection {
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Outgoing> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what the socket takes without waiting; the rest is the writing thread's.
    fn send_now(&self, out: &mut Outgoing) {
        if out.is_full || out.is_over {
            return;
        }
        match out.write_now(&self.stream) {
            Ok(true) => {}
            Ok(false) => {
                out.is_full = true;
                self.rouse.notify_one();
            }
            Err(error) => self.close(out, Some(self.lost(error))),
        }
    }

    /// The writing thread.
    fn write_on(&self) {
        let mut out = self.lock();
        loop {
            while !out.is_full && !out.is_over {
                out = (self.rouse.wait(out)).unwrap_or_else(PoisonError::into_inner);
            }
            if out.is_over {
                return;
            }
            match out.prepare() {
                Ok(true) => {}
                Ok(false) => {
                    out.is_full = false;
                    continue;
                }
                Err(error) => return self.close(&mut out, Some(self.lost(error))),
            }
            let (ready, sent) = (std::mem::take(&mut out.ready), out.sent);
            drop(out);
            let result = (&self.stream).write_all(ready.get(sent..).unwrap_or_default());
            out = self.lock();
            out.sent = ready.len();
            out.ready = ready;
            if let Err(error) = result {
                return self.close(&mut out, Some(self.lost(error)));
            }
        }
    }

    /// Ends the connection. The reading thread tells why: what the server has still said comes before `cause`.
    fn close(&self, out: &mut Outgoing, cause: Option<Error>) {
        out.is_over = true;
        out.cause = out.cause.take().or(cause);
        out.waiting.clear();
        self.rouse.notify_one();
        // one that is closed already needs no closing
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn lost(&self, reason: impl ToString) -> Error {
        Error::Lost {
            server: self.server.clone(),
            reason: reason.to_string(),
        }
    }
}

impl Outgoing {
    /// `hello` is what goes out first.
    fn new(session: Option<ClientConnection>, inbox: &str, hello: Vec<u8>) -> io::Result<Outgoing> {
        let mut out = Outgoing {
            ready: hello,
            sent: 0,
            pong_is_due: false,
            waiting: VecDeque::new(),
            is_full: false,
            is_over: false,
            cause: None,
            session,
            encoder: Encoder::new(inbox),
        };
        out.seal()?;
        Ok(out)
    }

    /// False: the socket takes no more for now.
    fn write_now(&mut self, stream: &TcpStream) -> io::Result<bool> {
        while self.prepare()? {
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
    fn prepare(&mut self) -> io::Result<bool> {
        if self.sent < self.ready.len() {
            return Ok(true);
        }
        self.sent = 0;
        self.ready.clear();
        // one large event must not be remembered for ever
        self.ready.shrink_to(4 * CHUNK_BYTES);
        if std::mem::take(&mut self.pong_is_due) {
            self.ready.extend_from_slice(b"PONG\r\n");
        }
        while self.ready.len() < CHUNK_BYTES
            && let Some(burst) = self.waiting.front_mut()
        {
            match burst.publishes.next() {
                Some(publish) => {
                    (self.encoder).encode(&publish, &burst.position_source, &mut self.ready);
                }
                None => drop(self.waiting.pop_front()),
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

impl Incoming {
    /// Until what was said first is answered; whoever may not sign in, or not subscribe, is told so before.
    fn wait_for_pong(
        &mut self,
        started: Instant,
        deadline: Instant,
        needs_auth: bool,
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        let unusable = |error: io::Error| shared.lost(error).while_connecting();
        let mut acks = Vec::new();
        while !self.take(&mut acks).map_err(Error::while_connecting)? {
            let left = deadline.saturating_duration_since(Instant::now());
            // the standard library refuses a timeout of zero
            let read = if left.is_zero() {
                Err(io::ErrorKind::TimedOut.into())
            } else {
                let stream = &shared.stream;
                stream.set_read_timeout(Some(left)).map_err(unusable)?;
                self.read()
            };
            match read {
                Ok(true) => {}
                Ok(false) => {
                    let hint = match needs_auth {
                        true => " while signing in: check the credentials",
                        false => "",
                    };
                    let reason = format!("the server closed the connection{hint}");
                    return Err(self.ended(&reason).while_connecting());
                }
                Err(error) if is_timeout(&error) => {
                    return Err(Error::Timeout {
                        server: shared.server.clone(),
                        what: "it did not answer to signing in",
                        after: started.elapsed(),
                    });
                }
                Err(error) => return Err(self.failed(&error).while_connecting()),
            }
        }
        shared.stream.set_read_timeout(None).map_err(unusable)
    }

    /// The reading thread. Returns why the connection is over.
    fn run(mut self, give: &Sender<Vec<Ack>>) -> Error {
        loop {
            let mut acks = Vec::new();
            let taken = self.take(&mut acks);
            if !acks.is_empty() && give.send(acks).is_err() {
                return self.ended("it was closed");
            }
            if let Err(error) = taken {
                return error;
            }
            match self.read() {
                Ok(true) => {}
                Ok(false) => return self.ended("the server closed the connection"),
                Err(error) => return self.failed(&error),
            }
        }
    }

    /// Waits for more; false: nothing more comes.
    fn read(&mut self) -> io::Result<bool> {
        let n = loop {
            match (&self.shared.stream).read(&mut self.chunk) {
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        let came = self.chunk.get(..n).unwrap_or_default();
        if n == 0 {
            return Ok(false);
        }
        if self.is_tls
            && let Some(session) = &mut self.shared.lock().session
        {
            return tls::unseal(session, came, &mut self.bytes);
        }
        self.bytes.extend_from_slice(came);
        Ok(true)
    }

    /// Takes all that is there as a whole; true: a PONG was among it.
    fn take(&mut self, acks: &mut Vec<Ack>) -> Result<bool, Error> {
        let (mut pong, mut done) = (false, 0);
        let result = loop {
            let rest = self.bytes.get(done..).unwrap_or_default();
            let (op, len) = match protocol::parse(rest) {
                Ok(Some(found)) => found,
                Ok(None) => break Ok(pong),
                Err(reason) => break Err(self.shared.lost(format!("not NATS: {reason}"))),
            };
            match op {
                ServerOp::Message {
                    subject,
                    status,
                    body,
                } => {
                    if let Some(reply) = self.reply(subject) {
                        let result = parse_ack(body, status);
                        acks.push(Ack { reply, result });
                    }
                }
                ServerOp::Ping => {
                    let mut out = self.shared.lock();
                    out.pong_is_due = true;
                    self.shared.send_now(&mut out);
                }
                ServerOp::Pong => pong = true,
                ServerOp::Error(words) => {
                    break Err(Error::of_server(&self.shared.server, &words));
                }
                ServerOp::Other => {}
            }
            done += len;
        };
        self.bytes.drain(..done);
        self.bytes.shrink_to(CHUNK_BYTES);
        result
    }

    fn reply(&self, subject: &[u8]) -> Option<u64> {
        let number = subject.strip_prefix(self.inbox.as_bytes())?;
        std::str::from_utf8(number).ok()?.parse().ok()
    }

    fn failed(&self, error: &io::Error) -> Error {
        match self.is_tls {
            true => match Error::of_tls(&self.shared.server, error.to_string()) {
                Error::Lost { reason, .. } => self.ended(&reason),
                alert => alert,
            },
            false => self.ended(&error.to_string()),
        }
    }

    /// What was found out by writing comes before what reading says of its own.
    fn ended(&self, reason: &str) -> Error {
        let cause = self.shared.lock().cause.take();
        cause.unwrap_or_else(|| self.shared.lost(reason))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::probe::probe;
    use crate::outbox::batch::{Batch, Event};
    use crate::outbox::position::Position;
    use crate::postgres::Lsn;
    use socket2::SockRef;
    use std::convert::Infallible;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::Weak;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(30);

    /// Event `number`, with a body of that many of its last digit.
    fn publish(number: u64, len: usize) -> Publish {
        let mut batch = Batch::default();
        let position = Position {
            commit_lsn: Lsn(number),
            ordinal: 1,
        };
        let append = |text: String| {
            move |out: &mut Vec<u8>| {
                out.extend_from_slice(text.as_bytes());
                Ok::<(), Infallible>(())
            }
        };
        let Ok(()) = batch.push_event(
            "public.outbox",
            position,
            append("events.a".into()),
            append(number.to_string()),
            append((number % 10).to_string().repeat(len)),
        );
        Publish {
            event: Event::new(&Arc::new(batch), 0).unwrap(),
            token: number,
            reply: number,
            expected_last_sequence: Some(number),
            expected_last: None,
        }
    }

    /// A server, which has a small receive buffer, too.
    fn listen<T: Send + 'static>(
        serve: impl FnOnce(&TcpListener) -> T + Send + 'static,
    ) -> (TcpListener, thread::JoinHandle<T>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
        let accepting = listener.try_clone().unwrap();
        (listener, thread::spawn(move || serve(&accepting)))
    }

    /// Greets a client with INFO and `behind`, and reads up to its PING.
    fn greet(listener: &TcpListener, behind: &[u8]) -> BufReader<TcpStream> {
        let (mut stream, _) = listener.accept().unwrap();
        let info = b"INFO {\"headers\":true,\"max_payload\":1048576}\r\n";
        stream.write_all(&[info, behind].concat()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while line != "PING\r\n" {
            line.clear();
            // it may go away before
            if reader.read_line(&mut line).unwrap_or_default() == 0 {
                break;
            }
        }
        reader
    }

    /// Opens a connection to whom `listener` is, within `timeout`, and hands it on with why it ended.
    fn open(
        listener: &TcpListener,
        options: &Options,
        send_buffer: usize,
        timeout: Duration,
    ) -> Result<(Connection, Receiver<Error>), Error> {
        let server = ServerUrl::parse(&listener.local_addr().unwrap().to_string()).unwrap();
        let greeting = probe(&server, Instant::now() + LONG)?;
        SockRef::from(&greeting.stream)
            .set_send_buffer_size(send_buffer)
            .unwrap();
        let (give, ended) = bounded(1);
        let connection = Connection::open(
            options,
            &server,
            &Identity::None,
            greeting,
            None,
            Instant::now() + timeout,
            move |error| give.send(error).unwrap(),
        )?;
        Ok((connection, ended))
    }

    /// A connection, whose send buffer is small, to a server that answers the first PING, and goes on as `serve`, which
    /// is given what comes behind that.
    fn connect<T: Send + 'static>(
        serve: impl FnOnce(BufReader<TcpStream>) -> T + Send + 'static,
    ) -> (Connection, Receiver<Error>, thread::JoinHandle<T>) {
        let (listener, thread) = listen(|accepting| {
            let mut reader = greet(accepting, b"");
            reader.get_mut().write_all(b"PONG\r\n").unwrap();
            serve(reader)
        });
        let (connection, ended) = open(&listener, &Options::default(), 4096, LONG).unwrap();
        (connection, ended, thread)
    }

    /// One publish: its reply's number and its body.
    fn read_publish(reader: &mut BufReader<TcpStream>) -> Option<(u64, Vec<u8>)> {
        let mut line = String::new();
        while !line.starts_with("HPUB ") {
            line.clear();
            // a connection that is dropped may be reset
            if reader.read_line(&mut line).unwrap_or_default() == 0 {
                return None;
            }
            assert!(line.starts_with("HPUB ") || line == "PONG\r\n", "{line}");
        }
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "events.a", reply, headers, all] = words[..] else {
            panic!("{line}");
        };
        let mut message = vec![0; all.parse::<usize>().unwrap() + 2];
        reader.read_exact(&mut message).unwrap();
        assert!(message.ends_with(b"\r\n"));
        message.truncate(message.len() - 2);
        let number = reply.rsplit('.').next().unwrap().parse().unwrap();
        Some((number, message.split_off(headers.parse().unwrap())))
    }

    /// Now the publisher writes, now the writing thread, and PINGs are answered in between; no byte goes astray.
    #[test]
    fn everything_is_sent_once_and_in_order_whoever_sends_it() {
        const COUNT: u64 = 3000;
        let (connection, ended, server) = connect(|mut reader| {
            for number in 0..COUNT {
                if number % 7 == 0 {
                    reader.get_mut().write_all(b"PING\r\n").unwrap();
                }
                let (found, body) = read_publish(&mut reader).unwrap();
                assert_eq!(found, number);
                let digit = b'0' + (number % 10) as u8;
                assert!(body.iter().all(|&byte| byte == digit));
                if number == COUNT / 2 {
                    // the other side gets far ahead
                    thread::sleep(Duration::from_millis(200));
                }
            }
            reader
        });
        let source: Arc<str> = "slot 1 1".into();
        let mut random = fastrand::Rng::with_seed(7);
        let mut number = 0;
        while number < COUNT {
            let end = (number + random.u64(1..20)).min(COUNT);
            let mut burst = Vec::new();
            for number in number..end {
                let len = [10, 300, 5000, 90_000][random.usize(..4)];
                burst.push(publish(number, random.usize(..len)));
            }
            number = end;
            connection.publish(burst, &source);
            if random.u8(..4) == 0 {
                thread::yield_now();
            }
        }
        let _open = server.join().unwrap();
        assert!(ended.is_empty());
    }

    #[test]
    fn a_publish_never_waits_and_a_drop_ends_the_threads() {
        let (connection, ended, server) = connect(|reader| {
            // reads nothing more
            reader.into_inner()
        });
        let _frozen = server.join().unwrap();
        let publishes: Vec<Publish> = (0..30).map(|number| publish(number, 900_000)).collect();
        let started = Instant::now();
        for publish in publishes {
            connection.publish(vec![publish], &"slot 1 1".into());
        }
        assert!(started.elapsed() < Duration::from_secs(2));
        assert!(ended.is_empty());
        let shared = Arc::downgrade(&connection.shared);
        drop(connection);
        let error = ended.recv_timeout(LONG).unwrap();
        assert!(matches!(error, Error::Lost { .. }), "{error}");
        are_gone(&shared);
    }

    /// The threads, and so the socket.
    fn are_gone(shared: &Weak<Shared>) {
        let deadline = Instant::now() + LONG;
        while shared.strong_count() > 0 {
            assert!(Instant::now() < deadline, "a thread is left");
            thread::yield_now();
        }
    }

    /// Also when it is found out by writing; and what was acknowledged before is handed on.
    #[test]
    fn the_end_is_told_in_the_servers_words_before_the_acks_end() {
        let (connection, ended, server) = connect(|mut reader| {
            let (number, _) = read_publish(&mut reader).unwrap();
            let inbox = reader_inbox(&mut reader);
            let ack = r#"{"stream":"S","seq":9}"#;
            let said = format!(
                "MSG {inbox}{number} 1 {}\r\n{ack}\r\n-ERR 'Stale Connection'\r\n",
                ack.len()
            );
            reader.get_mut().write_all(said.as_bytes()).unwrap();
        });
        let source: Arc<str> = "slot 1 1".into();
        connection.publish(vec![publish(1, 10), publish(2, 10)], &source);
        let acks = connection.acks().recv_timeout(LONG).unwrap();
        let [Ack { reply: 1, result }] = &acks[..] else {
            panic!("{acks:?}")
        };
        assert_eq!(result.as_ref().unwrap().seq, 9);
        server.join().unwrap();
        // until the socket knows that nobody is there
        for number in 3..50 {
            connection.publish(vec![publish(number, 100_000)], &source);
        }
        assert!(connection.acks().recv_timeout(LONG).is_err());
        let error = ended.try_recv().expect("told before");
        assert!(error.to_string().contains("Stale Connection"), "{error}");
    }

    /// The inbox of the next publish.
    fn reader_inbox(reader: &mut BufReader<TcpStream>) -> String {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let reply = line.split(' ').nth(2).unwrap();
        let (inbox, _) = reply.rsplit_once('.').unwrap();
        format!("{inbox}.")
    }

    #[test]
    fn a_drop_ends_a_reading_thread_whose_acks_nobody_takes() {
        let (connection, ended, server) = connect(|mut reader| {
            let inbox = reader_inbox(&mut reader);
            let ack = format!("MSG {inbox}1 1 22\r\n{{\"stream\":\"S\",\"seq\":9}}\r\n");
            // until the other side takes no more, and is gone
            while reader.get_mut().write_all(ack.as_bytes()).is_ok() {}
        });
        connection.publish(vec![publish(1, 10)], &"slot 1 1".into());
        let deadline = Instant::now() + LONG;
        while connection.acks().len() < READS_AHEAD {
            assert!(Instant::now() < deadline, "{}", connection.acks().len());
            thread::yield_now();
        }
        let shared = Arc::downgrade(&connection.shared);
        drop(connection);
        ended.recv_timeout(LONG).unwrap();
        are_gone(&shared);
        server.join().unwrap();
    }

    #[test]
    fn what_stands_behind_the_greeting_is_why_nobody_is_let_in() {
        let (listener, server) = listen(|accepting| {
            greet(accepting, b"-ERR 'maximum connections exceeded'\r\n");
        });
        let refused = open(&listener, &Options::default(), 4096, LONG);
        let error = refused.err().unwrap();
        assert!(
            error.to_string().contains("maximum connections exceeded"),
            "{error}"
        );
        server.join().unwrap();
    }

    /// A long JWT, for instance.
    #[test]
    fn more_than_the_socket_takes_can_be_said_to_sign_in() {
        let (listener, server) = listen(|accepting| {
            let mut reader = greet(accepting, b"");
            reader.get_mut().write_all(b"PONG\r\n").unwrap();
            reader
        });
        let options = Options {
            name: "x".repeat(1_000_000),
            ..Options::default()
        };
        open(&listener, &options, 4096, LONG).unwrap();
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_says_everything_but_pong_is_given_up_in_time() {
        let (listener, server) = listen(|accepting| {
            let mut reader = greet(accepting, b"");
            while reader.get_mut().write_all(b"PING\r\n+OK\r\n").is_ok() {}
        });
        let timeout = Duration::from_millis(200);
        let refused = open(&listener, &Options::default(), 4096, timeout);
        let error = refused.err().unwrap();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn an_event_that_would_forge_protocol_ends_it() {
        let (connection, ended, server) = connect(|mut reader| read_publish(&mut reader));
        let mut batch = Batch::default();
        let append = |text: &'static str| {
            move |out: &mut Vec<u8>| {
                out.extend_from_slice(text.as_bytes());
                Ok::<(), Infallible>(())
            }
        };
        let position = Position {
            commit_lsn: Lsn(1),
            ordinal: 1,
        };
        let Ok(()) = batch.push_event(
            "public.outbox",
            position,
            append("events.a"),
            append("1\r\nNats-Rollup: all"),
            append("{}"),
        );
        let mut forged = publish(1, 1);
        forged.event = Event::new(&Arc::new(batch), 0).unwrap();
        connection.publish(vec![forged], &"slot 1 1".into());
        let error = ended.recv_timeout(LONG).unwrap();
        assert!(matches!(error, Error::Unpublishable { .. }), "{error}");
        assert!(server.join().unwrap().is_none(), "nothing was sent");
    }
}
