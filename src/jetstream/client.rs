//! The link to NATS: a [`Connection`] for events and their PubAcks, and one of the `nats` crate for questions to the
//! JetStream API and the checkpoint. The only place that names the crate.
//!
//! A [`Link`] is never silently replaced: when either connection is lost, the link is over, says why once, and a
//! new one is made by whoever retries. It keeps no window, no deadline of a publish and no retry.
//!
//! The crate's calls block without deadlines (connect, publish, flush, unsubscribe, close), so none of them is
//! made on the caller's thread:
//!
//! | thread | what it may hang in | how long |
//! | --- | --- | --- |
//! | connect | name lookup, the crate's handshake | until the server moves or the connection breaks; `MAX_HANGING` a server |
//! | sender | `publish`, when the kernel's buffers are full; `flush`, which waits for a PONG | the same |
//! | reaper | `close`, or the sender that it waits for | the same; counted with connect |
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

use super::ack::AckError;
use super::connection::{Ack, Connection};
use super::error::Error;
use super::options::{Options, ServerUrl, UrlAuth};
use super::probe::{self, ServerInfo};
use super::sign_in::{Identity, sign};
use super::tls;
use super::tunnel;
use super::wire::Publish;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select, unbounded};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Connects and closes that may hang at once for one server. More than one, because a connection whose
/// network vanished at the wrong moment hangs for good, and the server must not be lost with it.
const MAX_HANGING: usize = 8;

/// How often, and with what pause, the disconnect callback tries to free the threads that wait in the crate.
const RELEASE_TRIES: u32 = 20;
const RELEASE_PAUSE: Duration = Duration::from_millis(10);

/// Between two of the crate's own attempts to connect again; see above for what they are good for.
const RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// What the crate hands out; [`Link::decode`] reads it.
pub type Message = nats::Message;

/// The answer to [`Link::request`] or [`Link::put`].
#[derive(Debug)]
pub struct Reply {
    /// The request's token.
    pub token: u64,
    /// The body (which may hold an API error), or that nobody answers.
    pub result: Result<Vec<u8>, AckError>,
}

/// A question, and where the answer is to go.
struct Request {
    reply: String,
    subject: String,
    headers: Option<nats::HeaderMap>,
    body: Vec<u8>,
}

/// Both connections, to one address.
///
/// Dropping it returns at once; a thread of its own closes what may hang.
pub struct Link {
    life: Arc<Life>,
    info: ServerInfo,
    events: Connection,
    /// `_INBOX.<unique>.` of the answers to requests.
    inbox: String,
    api_prefix: String,
    calls: AtomicU64,
    requests: Option<Sender<Request>>,
    replies: Receiver<Message>,
    lost: Receiver<Error>,
    /// Kept until the crate's thread is done: it panics when it delivers to a receiver that is gone.
    subscription: Option<nats::Subscription>,
    sender: Option<thread::JoinHandle<()>>,
}

/// What the link and its threads share.
struct Life {
    server: String,
    /// Holds one message, the first cause.
    lost: Sender<Error>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// None before the connection is made and after it is over.
    connection: Option<nats::Connection>,
    /// How many threads are inside a call of the crate, and since when any is.
    inside: usize,
    inside_since: Option<Instant>,
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

    /// Sends events; see [`Connection::publish`]. Sizes are the caller's to check against
    /// [`max_payload`](Self::max_payload).
    pub fn publish(&self, burst: Vec<Publish>, position_source: &Arc<str>) {
        self.events.publish(burst, position_source);
    }

    /// The answers to publishes, for a `select!`; see [`Connection::acks`].
    pub fn acks(&self) -> &Receiver<Vec<Ack>> {
        self.events.acks()
    }

    /// Asks the JetStream API, for instance `STREAM.INFO.orders`; the answer comes as a [`Reply`]. Never
    /// blocks; deadlines are the caller's.
    pub fn request(&self, token: u64, api: &str, body: Vec<u8>) {
        self.ask(format!("{}r{token}", self.inbox), api, body);
    }

    /// Publishes to a subject that must have been stored to last at sequence `last` (0: never), as a key-value
    /// bucket's update is done (ADR-8); the PubAck comes as a [`Reply`].
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

    /// Asks the JetStream API and waits for the answer. Drops the answers to other requests that come meanwhile,
    /// so it is for a link on which none is due.
    pub fn call(&self, api: &str, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, Error> {
        self.call_among(api, body, timeout, |_| ())
    }

    /// As [`call`](Self::call), and hands on the other answers that come meanwhile.
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
            recv(self.replies) -> message => match message {
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
        self.send(Request {
            reply,
            subject,
            headers: Some(headers),
            body,
        });
    }

    /// Answers to requests as they come, for a `select!`; [`decode`](Self::decode) reads them.
    pub fn replies(&self) -> &Receiver<Message> {
        &self.replies
    }

    /// What a message of [`replies`](Self::replies) is; `None` for the late answer to a [`call`](Self::call).
    pub fn decode(&self, message: Message) -> Option<Reply> {
        let token = message
            .subject
            .strip_prefix(&self.inbox)?
            .strip_prefix('r')?;
        Some(Reply {
            token: token.parse().ok()?,
            result: answer(message),
        })
    }

    /// How long what was asked has not got through to the server: the connection for questions may be dead without a
    /// word, and the crate waits for it.
    pub fn is_stuck_for(&self) -> Duration {
        let since = self.life.hold().inside_since;
        since.map_or(Duration::ZERO, |since| since.elapsed())
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
        self.send(Request {
            reply,
            subject,
            headers: None,
            body,
        });
    }

    fn send(&self, request: Request) {
        if let Some(requests) = &self.requests {
            // a sender that is gone has said so on `lost`
            let _ = requests.send(request);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // ends the sender
        drop(self.requests.take());
        let life = self.life.clone();
        let subscription = self.subscription.take();
        let sender = self.sender.take();
        let presence = Presence::enter(&life.server);
        let reap = move || {
            // it knows first whether there is anything left to close; a panic has been printed
            let _ = sender.map(thread::JoinHandle::join);
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
            held.inside_since.get_or_insert_with(Instant::now);
            connection
        };
        let result = call(connection);
        let mut held = self.hold();
        held.inside -= 1;
        if held.inside == 0 {
            held.inside_since = None;
        }
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
    let events = Arc::new(Mutex::new(None));
    let task = {
        let (options, server, events) = (options.clone(), server.clone(), events.clone());
        move || {
            let presence = Presence::enter(&server.to_string());
            let link = establish(&options, &server, &events);
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
        Err(RecvTimeoutError::Timeout) => {
            // is closed; the other one may hang
            drop(take(&events));
            Err(Error::Timeout {
                server: name,
                what: "it did not finish TLS and signing in",
                after: options.connect_timeout,
            })
        }
        Err(RecvTimeoutError::Disconnected) => Err(Error::Refused {
            server: name,
            reason: "the client library failed".into(),
        }),
    }
}

fn take(events: &Mutex<Option<Connection>>) -> Option<Connection> {
    events.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Makes both connections; the crate's may hang, and this is therefore called on a thread of its own. Meanwhile the
/// other stands in `events`, where it can be taken away.
fn establish(
    options: &Options,
    server: &ServerUrl,
    events: &Mutex<Option<Connection>>,
) -> Result<Link, Error> {
    // most of the time, so that these clearer words come before the caller's deadline
    let started = Instant::now();
    let greeting = probe::probe(server, started + options.connect_timeout * 3 / 4)?;
    let deadline = started + options.connect_timeout * 7 / 8;
    let info = greeting.info.clone();
    let (lost, why) = bounded(1);
    let life = Arc::new(Life {
        server: server.to_string(),
        lost,
        held: Mutex::default(),
    });

    let identity = Identity::load(options, server)?;
    let address = greeting.address;
    let on_end = life.clone();
    let tls = match tls::is_wanted(options, server, &info)? {
        true => Some(tls::config(options, server)?),
        false => None,
    };
    let ended = move |error| on_end.end(error);
    let connection = Connection::open(
        options,
        server,
        &identity,
        greeting,
        tls.as_ref(),
        deadline,
        ended,
    )?;
    *events.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);

    let made = crate_options(identity, &life);
    let (address, name) = if let Some(config) = &tls {
        let left = deadline.saturating_duration_since(Instant::now());
        let greeting = probe::ask(server, address, left)?;
        let on_end = life.clone();
        let ended = move |reason: String| {
            on_end.end(Error::of_tls(&on_end.server, reason));
        };
        let tunnel = tunnel::open(options, config, server, greeting, deadline, ended)?;
        (tunnel.address, tunnel.token)
    } else {
        // the address that has just answered, in place of a name that may have others
        (address, options.name.clone())
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

    let events = take(events).ok_or_else(|| life.lost("it took too long"))?;
    let (requests, asked) = unbounded();
    let mut link = Link {
        info,
        events,
        inbox,
        api_prefix: options.api_prefix.clone(),
        calls: AtomicU64::new(0),
        requests: Some(requests),
        replies: subscription.receiver().clone(),
        lost: why,
        subscription: Some(subscription),
        sender: None,
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

    let timeout = options.request_timeout;
    let sender = thread::Builder::new()
        .name("nats-sender".into())
        .spawn(move || send_all(&life, &asked, timeout))
        .map_err(|error| link.life.lost(format!("start a thread: {error}")))?;
    link.sender = Some(sender);
    Ok(link)
}

fn crate_options(identity: Identity, life: &Arc<Life>) -> nats::Options {
    let made = match identity {
        Identity::Url(UrlAuth::UserPassword(user, password)) => {
            nats::Options::with_user_pass(&user, &password)
        }
        Identity::Url(UrlAuth::Token(token)) => nats::Options::with_token(&token),
        Identity::Credentials { jwt, key } => {
            nats::Options::with_jwt(move || Ok(jwt.clone()), move |nonce| sign(&key, nonce))
        }
        Identity::Nkey(key) => {
            let public = key.public_key();
            nats::Options::with_nkey(&public, move |nonce| sign(&key, nonce))
        }
        Identity::None => nats::Options::new(),
    };
    let on_error = life.clone();
    let on_disconnect = life.clone();
    let on_thread = life.clone();
    made
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
            on_error.end(Error::of_server(&on_error.server, &error.to_string()));
        })
        .disconnect_callback(move || on_disconnect.disconnected())
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
        Some(said) => Error::of_server(&server, &said).while_connecting(),
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

/// The sending thread: writes all that is asked by now, and flushes.
fn send_all(life: &Life, asked: &Receiver<Request>, timeout: Duration) {
    while let Ok(first) = asked.recv() {
        let sent = life.with(|connection| {
            for request in std::iter::once(first).chain(asked.try_iter()) {
                connection.publish_with_reply_or_headers(
                    &request.subject,
                    Some(&request.reply),
                    request.headers.as_ref(),
                    request.body,
                )?;
            }
            connection.flush_timeout(timeout)
        });
        match sent {
            Some(Ok(())) => {}
            Some(Err(error)) => return life.broke(life.lost(error.to_string())),
            None => return,
        }
    }
}
