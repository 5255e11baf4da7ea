//! One connection to NATS, over the `nats` crate: the only place that names it.
//!
//! A [`Link`] is never silently replaced: when the connection is lost, the link is over, says why once, and a
//! new one is made by whoever retries. It keeps no window, no deadline of a publish and no retry.
//!
//! The crate's calls block without deadlines (connect, publish, flush, unsubscribe, close), so none of them is
//! made on the caller's thread:
//!
//! | thread | what it may hang in | how long |
//! | --- | --- | --- |
//! | connect | name lookup, handshake | until the server moves or the connection breaks; `MAX_HANGING` a server |
//! | senders | `publish`, when the kernel's buffers are full; `flush`, which waits for a PONG | the same |
//! | reaper | `close`, or a sender that it waits for | the same; counted with connect |
//!
//! One of the senders at a time has the turn ([`turns`](super::turns)): it writes what there is, and flushes. So the
//! one that was woken brings an event all the way to the socket, and the next event does not wait for the PONG. When all
//! others wait for theirs, the last leaves flushing to the crate, which does it every 5 ms.
//!
//! After a lost connection the crate would connect again by itself. It looks at its shutdown flag just
//! before, and sets it when the last `Connection` is dropped; so the disconnect callback drops ours. Should a thread
//! still hang in the crate and hold one, the reconnect is let happen, as it is what frees that thread once the
//! server is back: nothing is published on it, and it ends at once. The crate's own flusher thread notices the
//! flag after two minutes at the latest.
#![allow(
    deprecated,
    reason = "every item of the crate is marked deprecated in favour of an async one"
)]

use super::ack::{AckError, PubAck, parse_ack};
use super::error::Error;
use super::options::{Options, ServerUrl, UrlAuth};
use super::probe::{ServerInfo, probe};
use super::tunnel;
use super::turns::{Giver, Turns, turns};
use super::wire::{self, Publish};
use crate::outbox::batch::{Event, OutboxEvent};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Connects and closes that may hang at once for one server. More than one, because a connection whose
/// network vanished at the wrong moment hangs for good, and the server must not be lost with it.
const MAX_HANGING: usize = 8;

/// Threads of a link that send. One waits for its PONG as long as the server is away, and what is published meanwhile
/// needs another: with the server 3 ms away and 200 events a second, the median event was stored 3.5 ms after its
/// commit with four flushes at once, 5.0 ms with one.
const SENDERS: usize = 5;

/// How often, and with what pause, the disconnect callback tries to free the threads that wait in the crate.
const RELEASE_TRIES: u32 = 20;
const RELEASE_PAUSE: Duration = Duration::from_millis(10);

/// Between two of the crate's own attempts to connect again; see above for what they are good for.
const RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// What the crate hands out; [`Link::decode`] reads it.
pub type Message = nats::Message;

/// What came back.
#[derive(Debug)]
pub enum Incoming {
    /// The answer to a publish.
    Ack {
        /// The publish's `reply`.
        reply: u64,
        /// Stored, or why not.
        result: Result<PubAck, AckError>,
    },
    /// The answer to [`Link::request`].
    Reply {
        /// The request's token.
        token: u64,
        /// The body (which may hold an API error), or that nobody answers.
        result: Result<Vec<u8>, AckError>,
    },
}

enum Work {
    Burst(Vec<Publish>, Arc<str>),
    Request {
        reply: String,
        subject: String,
        headers: Option<nats::HeaderMap>,
        body: Vec<u8>,
    },
}

/// One NATS connection, with one inbox for all answers.
///
/// Dropping it returns at once; a thread of its own closes what may hang.
pub struct Link {
    life: Arc<Life>,
    info: ServerInfo,
    /// `_INBOX.<unique>.`
    inbox: String,
    api_prefix: String,
    calls: AtomicU64,
    work: Option<Giver<Work>>,
    messages: Receiver<Message>,
    lost: Receiver<Error>,
    /// Kept until the crate's thread is done: it panics when it delivers to a receiver that is gone.
    subscription: Option<nats::Subscription>,
    senders: Vec<thread::JoinHandle<()>>,
}

/// What the link and its threads share.
struct Life {
    server: String,
    /// No publish starts any more.
    over: AtomicBool,
    /// Holds one message, the first cause.
    lost: Sender<Error>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// None before the connection is made and after it is over.
    connection: Option<nats::Connection>,
    /// How many threads are inside a call of the crate.
    inside: usize,
    /// The crate has no writer any more, so that a flush begun now would wait for ever.
    broken: bool,
}

impl Link {
    /// Tries the servers in turn: probe, connect, sign in, subscribe to an inbox. Spends at most
    /// `connect_timeout` on each. What goes wrong is worded for an operator.
    pub fn connect(options: &Options) -> Result<Link, Error> {
        Link::connect_from(options, 0)
    }

    /// The same, beginning with the server of this number, modulo how many there are: one that lets clients in may still be
    /// cut off from its cluster, and whoever finds that out goes on with the next.
    pub fn connect_from(options: &Options, first: usize) -> Result<Link, Error> {
        let mut errors = Vec::new();
        let (before, behind) = options
            .servers
            .split_at(first % options.servers.len().max(1));
        for server in behind.iter().chain(before) {
            match connect_one(options, server) {
                Ok(link) => return Ok(link),
                Err(error) => errors.push(error),
            }
        }
        match errors.pop() {
            Some(only) if errors.is_empty() => Err(only),
            Some(last) => {
                errors.push(last);
                Err(Error::NoServer(errors))
            }
            None => Err(Error::NoServer(errors)),
        }
    }

    /// Hands events to the link's senders, which keep their order. `position_source`, `<slot> <system id>
    /// <timeline>`, begins their `Outbox-Position`. Never blocks: the queue's bound is the
    /// caller's window, as whatever is in it has not been answered. Sizes are the caller's to check
    /// against [`max_payload`](Self::max_payload). Without effect once the link is over.
    pub fn publish(&self, burst: Vec<Publish>, position_source: &Arc<str>) {
        self.send(Work::Burst(burst, position_source.clone()));
    }

    /// Asks the JetStream API, for instance `STREAM.INFO.orders`; the answer comes as [`Incoming::Reply`]. Never
    /// blocks; deadlines are the caller's.
    pub fn request(&self, token: u64, api: &str, body: Vec<u8>) {
        self.ask(format!("{}r{token}", self.inbox), api, body);
    }

    /// Publishes to a subject that must have been stored to last at sequence `last` (0: never), as a key-value
    /// bucket's update is done (ADR-8); the PubAck comes as [`Incoming::Reply`].
    pub fn put(&self, token: u64, subject: String, last: u64, body: Vec<u8>) {
        self.send_put(format!("{}r{token}", self.inbox), subject, last, body);
    }

    /// As [`put`](Self::put), and waits for the PubAck as [`call`](Self::call) waits.
    pub fn put_now(
        &self,
        subject: &str,
        last: u64,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, Error> {
        let reply = self.call_inbox();
        self.send_put(reply.clone(), subject.into(), last, body);
        self.wait_for(&reply, subject, timeout, |_| ())
    }

    /// Asks the JetStream API and waits for the answer. Drops other messages that come meanwhile, so it is for a
    /// link on which no other answer is due.
    pub fn call(&self, api: &str, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, Error> {
        self.call_among(api, body, timeout, |_| ())
    }

    /// As [`call`](Self::call), and hands on the other messages that come meanwhile.
    pub fn call_among(
        &self,
        api: &str,
        body: Vec<u8>,
        timeout: Duration,
        other: impl FnMut(Message),
    ) -> Result<Vec<u8>, Error> {
        let reply = self.call_inbox();
        self.ask(reply.clone(), api, body);
        self.wait_for(&reply, api, timeout, other)
    }

    /// An answer that comes after its deadline must not be taken for the next call's.
    fn call_inbox(&self) -> String {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        format!("{}c{call}", self.inbox)
    }

    /// As [`call`](Self::call) for `count` requests, `at_once` of them on their way at a time. `take` is given each answer
    /// as it comes, in any order, so that no more than those are held; `timeout` is how long each may take.
    pub fn call_each(
        &self,
        count: usize,
        request: impl Fn(usize) -> (String, Vec<u8>),
        at_once: usize,
        timeout: Duration,
        mut take: impl FnMut(&[u8]) -> Result<(), AckError>,
    ) -> Result<(), Error> {
        let first = self.calls.fetch_add(count as u64, Ordering::Relaxed);
        let inbox = format!("{}c", self.inbox);
        // which were asked and not answered
        let mut due = BTreeSet::new();
        let mut asked = 0;
        while asked < count || !due.is_empty() {
            while due.len() < at_once && asked < count {
                let (api, body) = request(asked);
                self.ask(format!("{inbox}{}", first + asked as u64), &api, body);
                due.insert(asked);
                asked += 1;
            }
            let Some(message) = self.next_message(Instant::now() + timeout)? else {
                let (api, _) = request(due.first().copied().unwrap_or_default());
                return Err(Error::ApiTimeout {
                    api,
                    after: timeout,
                });
            };
            let nth = message.subject.strip_prefix(&inbox);
            let nth: Option<u64> = nth.and_then(|nth| nth.parse().ok());
            let index = nth.and_then(|nth| nth.checked_sub(first));
            let Some(index) = index
                .map(|index| index as usize)
                .filter(|index| due.remove(index))
            else {
                continue;
            };
            answer(message)
                .and_then(|body| take(&body))
                .map_err(|source| Error::Api {
                    api: request(index).0,
                    source,
                })?;
        }
        Ok(())
    }

    fn wait_for(
        &self,
        reply: &str,
        asked: &str,
        timeout: Duration,
        mut other: impl FnMut(Message),
    ) -> Result<Vec<u8>, Error> {
        let api = || asked.to_string();
        let deadline = Instant::now() + timeout;
        while let Some(message) = self.next_message(deadline)? {
            if message.subject == reply {
                return answer(message).map_err(|source| Error::Api { api: api(), source });
            }
            other(message);
        }
        Err(Error::ApiTimeout {
            api: api(),
            after: timeout,
        })
    }

    /// `None`: nothing came before the deadline.
    fn next_message(&self, deadline: Instant) -> Result<Option<Message>, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        select! {
            recv(self.messages) -> message => match message {
                Ok(message) => Ok(Some(message)),
                Err(_) => Err(self.life.lost("the subscription ended")),
            },
            recv(self.lost) -> error => {
                Err(error.unwrap_or_else(|_| self.life.lost("the connection ended")))
            }
            default(left) => Ok(None),
        }
    }

    fn send_put(&self, reply: String, subject: String, last: u64, body: Vec<u8>) {
        let mut headers = nats::HeaderMap::new();
        headers.insert("Nats-Expected-Last-Subject-Sequence", last.to_string());
        self.send(Work::Request {
            reply,
            subject,
            headers: Some(headers),
            body,
        });
    }

    /// Answers as they come, for a `select!`; [`decode`](Self::decode) reads them.
    pub fn messages(&self) -> &Receiver<Message> {
        &self.messages
    }

    /// What a message of [`messages`](Self::messages) is; `None` if it is neither an ack nor a reply, such as
    /// the late answer to a [`call`](Self::call).
    pub fn decode(&self, message: Message) -> Option<Incoming> {
        let tail = message.subject.strip_prefix(&self.inbox)?;
        if let Some(token) = tail.strip_prefix('r') {
            let token = token.parse().ok()?;
            let result = answer(message);
            return Some(Incoming::Reply { token, result });
        }
        let reply = tail.parse().ok()?;
        let result = parse_ack(&message.data, status(&message));
        Some(Incoming::Ack { reply, result })
    }

    /// Yields once, why the link is over.
    pub fn lost(&self) -> &Receiver<Error> {
        &self.lost
    }

    /// `host:port` of the server.
    pub fn server(&self) -> &str {
        &self.life.server
    }

    /// What the server said of itself.
    pub fn server_info(&self) -> &ServerInfo {
        &self.info
    }

    /// The largest message in bytes the server takes, headers included.
    pub fn max_payload(&self) -> usize {
        self.info.max_payload
    }

    fn ask(&self, reply: String, api: &str, body: Vec<u8>) {
        let subject = format!("{}.{api}", self.api_prefix);
        self.send(Work::Request {
            reply,
            subject,
            headers: None,
            body,
        });
    }

    fn send(&self, work: Work) {
        if let Some(giver) = &self.work {
            // a sender that is gone has said so on `lost`
            giver.give(work);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.life.over.store(true, Ordering::SeqCst);
        // ends the senders
        drop(self.work.take());
        let life = self.life.clone();
        let subscription = self.subscription.take();
        let senders = std::mem::take(&mut self.senders);
        let presence = Presence::enter(&life.server);
        let reap = move || {
            // they know first whether there is anything left to close
            for sender in senders {
                // a panic has been printed
                let _ = sender.join();
            }
            // close() also wakes the crate's threads, which a mere drop does not
            life.with(nats::Connection::close);
            life.hold().connection = None;
            drop(subscription);
            drop(presence);
        };
        // without a thread to spare the closure is dropped here, which may take as long as the server likes
        if let Err(error) = thread::Builder::new()
            .name("nats-reaper".into())
            .spawn(reap)
        {
            log::error!("close the connection to NATS: {error}");
        }
    }
}

impl Life {
    fn hold(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self, reason: impl Into<String>) -> Error {
        Error::Lost {
            server: self.server.clone(),
            reason: reason.into(),
        }
    }

    /// Ends the link; only the first cause is kept.
    fn end(&self, error: Error) {
        self.over.store(true, Ordering::SeqCst);
        let _ = self.lost.try_send(error);
    }

    /// Ends the link because the crate's connection is of no use any more.
    fn broke(&self, error: Error) {
        self.hold().broken = true;
        self.end(error);
    }

    /// Runs a call of the crate, unless the connection is broken.
    fn with<T>(&self, call: impl FnOnce(nats::Connection) -> T) -> Option<T> {
        let connection = {
            let mut held = self.hold();
            if held.broken {
                return None;
            }
            let connection = held.connection.clone()?;
            held.inside += 1;
            connection
        };
        let result = call(connection);
        self.hold().inside -= 1;
        Some(result)
    }

    /// The crate's disconnect callback, on its thread, just before it would connect again.
    fn disconnected(&self) {
        self.broke(self.lost("the server closed the connection, or it broke"));
        for _ in 0..RELEASE_TRIES {
            let Some(connection) = self.hold().connection.clone() else {
                return;
            };
            // A flush waits for its PONG even now. The crate lets it go when writing to the dead socket fails, and
            // it writes soon after something was published. This also wakes its own flusher thread, which
            // would otherwise look at the shutdown flag only two minutes later.
            let _ = connection.publish("_INBOX.over", "");
            drop(connection);
            let mut held = self.hold();
            if held.inside == 0 {
                held.connection = None;
                return;
            }
            drop(held);
            thread::sleep(RELEASE_PAUSE);
        }
        self.hold().connection = None;
    }
}

thread_local! {
    /// On the crate's client thread: the life that ends with it.
    static CLIENT_THREAD: RefCell<Option<ClientThread>> = const { RefCell::new(None) };
}

/// Notices that the crate's client thread is gone, also when it panicked, which calls no callback: a later INFO of
/// more than 4096 bytes does that to it.
struct ClientThread(Arc<Life>);

impl Drop for ClientThread {
    fn drop(&mut self) {
        self.0
            .broke(self.0.lost("the client library's thread ended"));
    }
}

/// What the text after `-ERR` means.
fn server_error(server: &str, text: &str) -> Error {
    let (server, reason) = (server.to_string(), text.to_string());
    let has = |words: &str| text.to_ascii_lowercase().contains(words);
    if has("permissions violation") {
        Error::Permission { reason }
    } else if has("authorization") || has("authentication") {
        Error::Authorization { server, reason }
    } else {
        Error::Lost { server, reason }
    }
}

fn status(message: &Message) -> Option<&str> {
    let headers = message.headers.as_ref()?;
    headers.get("Status").map(String::as_str)
}

fn answer(message: Message) -> Result<Vec<u8>, AckError> {
    match status(&message) {
        None => Ok(message.data),
        Some("503") => Err(AckError::NoResponders),
        Some(_) => Err(AckError::Malformed),
    }
}

/// Counts the threads that may hang on a server.
struct Presence(String);

static PRESENT: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Presence {
    fn enter(server: &str) -> Presence {
        let mut present = PRESENT.lock().unwrap_or_else(PoisonError::into_inner);
        present.push(server.to_string());
        Presence(server.to_string())
    }

    fn count(server: &str) -> usize {
        let present = PRESENT.lock().unwrap_or_else(PoisonError::into_inner);
        present.iter().filter(|name| *name == server).count()
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut present = PRESENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = present.iter().position(|name| *name == self.0) {
            present.swap_remove(index);
        }
    }
}

fn connect_one(options: &Options, server: &ServerUrl) -> Result<Link, Error> {
    let name = server.to_string();
    if Presence::count(&name) >= MAX_HANGING {
        return Err(Error::Hanging { server: name });
    }
    let (done, result) = bounded(1);
    let task = {
        let (options, server) = (options.clone(), server.clone());
        move || {
            let presence = Presence::enter(&server.to_string());
            let link = establish(&options, &server);
            drop(presence);
            // nobody waits any more: the link closes itself
            let _ = done.send(link);
        }
    };
    let spawned = thread::Builder::new()
        .name("nats-connect".into())
        .spawn(task);
    if let Err(source) = spawned {
        return Err(Error::Unreachable {
            server: name,
            source,
        });
    }
    match result.recv_timeout(options.connect_timeout) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(Error::Timeout {
            server: name,
            what: "it did not finish TLS and signing in",
            after: options.connect_timeout,
        }),
        Err(RecvTimeoutError::Disconnected) => Err(Error::Refused {
            server: name,
            reason: "the client library failed".into(),
        }),
    }
}

/// Makes the connection; may hang, and is therefore called on a thread of its own.
fn establish(options: &Options, server: &ServerUrl) -> Result<Link, Error> {
    // most of the time, so that the probe's clearer words come before the caller's deadline
    let started = Instant::now();
    let greeting = probe(server, started + options.connect_timeout * 3 / 4)?;
    let info = greeting.info.clone();
    let (lost, why) = bounded(1);
    let life = Arc::new(Life {
        server: server.to_string(),
        over: AtomicBool::new(false),
        lost,
        held: Mutex::default(),
    });

    let made = crate_options(options, server, &life)?;
    let (address, name) = if server.tls || options.tls_required || info.tls_required {
        if !info.tls_required && !info.tls_available {
            return Err(Error::Tls {
                server: life.server.clone(),
                reason: "the server does not offer TLS".into(),
            });
        }
        let deadline = started + options.connect_timeout;
        let on_end = life.clone();
        let ended = move |reason: String| {
            let server = on_end.server.clone();
            // an alert is how a server refuses a client certificate, and it comes after the handshake
            on_end.end(if reason.contains("alert") {
                Error::Tls { server, reason }
            } else {
                Error::Lost { server, reason }
            });
        };
        let tunnel = tunnel::open(options, server, greeting, deadline, ended)?;
        (tunnel.address, tunnel.token)
    } else {
        // the address that has just answered, in place of a name that may have others
        (greeting.address, options.name.clone())
    };
    let connection = match made.with_name(&name).connect(format!("nats://{address}")) {
        Ok(connection) => connection,
        Err(error) => {
            let error = connect_error(&life.server, &info, error);
            return Err(match why.try_recv() {
                Ok(cause @ Error::Tls { .. }) => cause,
                _ => error,
            });
        }
    };
    let inbox = format!("{}.", connection.new_inbox());
    {
        let mut held = life.hold();
        if held.broken {
            return Err(why
                .try_recv()
                .unwrap_or_else(|_| life.lost("the server closed the connection")));
        }
        held.connection = Some(connection.clone());
    }
    let subscription = connection
        .subscribe(&format!("{inbox}*"))
        .map_err(|error| life.lost(error.to_string()))?;
    drop(connection);

    let (work, turns) = turns();
    let mut link = Link {
        info,
        inbox: inbox.clone(),
        api_prefix: options.api_prefix.clone(),
        calls: AtomicU64::new(0),
        work: Some(work),
        messages: subscription.receiver().clone(),
        lost: why,
        subscription: Some(subscription),
        senders: Vec::new(),
        life: life.clone(),
    };
    // a refused subscription is answered before the flush is
    let flushed = life.with(|connection| connection.flush_timeout(options.connect_timeout));
    if let Ok(error) = link.lost.try_recv() {
        return Err(error);
    }
    match flushed {
        Some(Ok(())) => {}
        Some(Err(error)) => return Err(life.lost(error.to_string())),
        None => return Err(life.lost("the server closed the connection")),
    }

    let flushing = Arc::new(AtomicUsize::new(0));
    for _ in 0..SENDERS {
        let sender = LinkSender {
            life: link.life.clone(),
            turns: turns.clone(),
            flushing: flushing.clone(),
            reply: Reply::new(inbox.clone()),
        };
        let timeout = options.request_timeout;
        let started = thread::Builder::new()
            .name("nats-sender".into())
            .spawn(move || sender.run(timeout))
            .map_err(|error| link.life.lost(format!("start a thread: {error}")))?;
        link.senders.push(started);
    }
    Ok(link)
}

fn crate_options(
    options: &Options,
    server: &ServerUrl,
    life: &Arc<Life>,
) -> Result<nats::Options, Error> {
    let made = match (&server.auth, &options.creds, &options.nkey) {
        (Some(UrlAuth::UserPassword(user, password)), ..) => {
            nats::Options::with_user_pass(user, password)
        }
        (Some(UrlAuth::Token(token)), ..) => nats::Options::with_token(token),
        (None, Some(path), _) => {
            let what = "credentials file";
            let text = read(what, path)?;
            nats::Options::with_static_credentials(&text).map_err(|_| {
                malformed(what, path, "expected a user JWT and an nkey seed between lines of dashes, as `nsc generate creds` writes them")
            })?
        }
        (None, None, Some(path)) => {
            let what = "nkey seed file";
            let text = read(what, path)?;
            let pair = nkeys::KeyPair::from_seed(text.trim())
                .map_err(|_| malformed(what, path, "expected a seed that begins with SU"))?;
            let public = pair.public_key();
            // the key comes from a seed, so it can sign; an empty signature would merely be refused
            nats::Options::with_nkey(&public, move |nonce| pair.sign(nonce).unwrap_or_default())
        }
        (None, None, None) => nats::Options::new(),
    };
    let on_error = life.clone();
    let on_disconnect = life.clone();
    let on_thread = life.clone();
    Ok(made
        // the crate loads the system's certificates unless it is given a file, and fails where they are missing
        .add_root_certificate("/dev/null")
        .reconnect_buffer_size(0)
        .max_reconnects(None)
        // the first callback on the client thread
        .reconnect_delay_callback(move |attempts| {
            let of_thread = || ClientThread(on_thread.clone());
            CLIENT_THREAD.with_borrow_mut(|slot| {
                slot.get_or_insert_with(of_thread);
            });
            RECONNECT_DELAY * u32::from(attempts > 0)
        })
        .error_callback(move |error| {
            on_error.end(server_error(&on_error.server, &error.to_string()));
        })
        .disconnect_callback(move || on_disconnect.disconnected()))
}

fn read(what: &'static str, path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::File {
        what,
        path: path.into(),
        source,
    })
}

fn malformed(what: &'static str, path: &Path, reason: &str) -> Error {
    Error::File {
        what,
        path: path.into(),
        source: io::Error::new(io::ErrorKind::InvalidData, reason),
    }
}

/// What the crate's error on connecting means.
fn connect_error(server: &str, info: &ServerInfo, error: io::Error) -> Error {
    let text = error.to_string();
    let server = server.to_string();
    // the crate shows an -ERR as: unexpected line while connecting: Err("Authorization Violation")
    let said = text
        .split_once("Err(\"")
        .map(|(_, rest)| rest.trim_end_matches("\")").to_string());
    match said {
        Some(said) => match server_error(&server, &said) {
            Error::Lost { server, reason } => Error::Refused { server, reason },
            other => other,
        },
        None if info.auth_required => Error::Refused {
            server,
            reason: format!("{text} (while signing in: check the credentials)"),
        },
        None => Error::Unreachable {
            server,
            source: error,
        },
    }
}

/// One of the threads that send.
struct LinkSender {
    life: Arc<Life>,
    turns: Turns<Work>,
    /// How many of them flush.
    flushing: Arc<AtomicUsize>,
    reply: Reply,
}

impl LinkSender {
    /// Writes when it has the turn, and flushes when the next can have it.
    fn run(mut self, timeout: Duration) {
        while self.turns.wait() {
            while let Some(work) = self.turns.next() {
                match self.write(work) {
                    Some(Ok(())) => {}
                    // the turn is kept: nobody is to write behind what is lost
                    Some(Err(error)) => return self.life.broke(error),
                    None => return,
                }
            }
            // the last one stays for what comes next; the crate flushes within 5 ms
            if self.flushing.fetch_add(1, Ordering::SeqCst) + 1 < SENDERS {
                let life = &self.life;
                match life.with(|connection| connection.flush_timeout(timeout)) {
                    Some(Ok(())) => {}
                    Some(Err(error)) => return life.broke(life.lost(format!("flush: {error}"))),
                    None => return,
                }
            }
            self.flushing.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// None when the link is over.
    fn write(&mut self, work: Work) -> Option<Result<(), Error>> {
        let (life, reply) = (&self.life, &mut self.reply);
        life.with(|connection| match work {
            Work::Burst(burst, source) => burst
                .iter()
                .take_while(|_| !life.over.load(Ordering::Relaxed))
                .try_for_each(|publish| send(life, &connection, reply, publish, &source)),
            Work::Request {
                reply,
                subject,
                headers,
                body,
            } => connection
                .publish_with_reply_or_headers(&subject, Some(&reply), headers.as_ref(), body)
                .map_err(|error| life.lost(error.to_string())),
        })
    }
}

/// `<inbox>.<number>`, in one buffer.
struct Reply {
    text: String,
    inbox_len: usize,
}

impl Reply {
    fn new(inbox: String) -> Reply {
        Reply {
            inbox_len: inbox.len(),
            text: inbox,
        }
    }

    fn to(&mut self, number: u64) -> &str {
        self.text.truncate(self.inbox_len);
        // writing to a String cannot fail
        let _ = write!(self.text, "{number}");
        &self.text
    }
}

fn send(
    life: &Life,
    connection: &nats::Connection,
    reply: &mut Reply,
    publish: &Publish,
    position_source: &str,
) -> Result<(), Error> {
    let event = publish.event.view();
    let headers = headers(&event, publish, position_source)?;
    connection
        .publish_with_reply_or_headers(
            event.subject,
            Some(reply.to(publish.reply)),
            Some(&headers),
            event.body,
        )
        .map_err(|error| life.lost(error.to_string()))
}

/// The headers, as one entry of the crate's map whose value holds the lines of the others: the map costs three
/// allocations an entry and gives them back in random order.
fn headers(
    event: &OutboxEvent<'_>,
    publish: &Publish,
    position_source: &str,
) -> Result<nats::HeaderMap, Error> {
    // subject and id come from the mapper, which lets no such byte through; here they would forge protocol
    let legal = |text: &str| !text.bytes().any(|byte| byte.is_ascii_control());
    if !legal(event.id) || !legal(event.subject) || event.subject.contains(' ') {
        return Err(Error::Unpublishable {
            reason: format!(
                "the event at {} has a control character or a space in its subject or id",
                event.position
            ),
        });
    }
    let last = publish.expected_last.as_ref().map(Event::id);
    let sequence = publish.expected_last_sequence;
    let (first, lines) = wire::lines(event, sequence, last, position_source);
    let mut headers = nats::HeaderMap::new();
    headers.insert(first, lines);
    Ok(headers)
}
