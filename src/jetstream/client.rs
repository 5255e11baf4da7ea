//! The link to JetStream: events and their PubAcks, requests of the JetStream API and their answers, all over one
//! [`Connection`].
//!
//! A [`Link`] is never silently replaced: when its connection is over, the link is over, says why once, and a new one is made by
//! whoever retries. It keeps no window, no deadline of an event and no retry.

use super::ack::{AckError, Origin, Origins, PubAck, parse_ack_from};
use super::error::Error;
use super::wire::{self, Publish, Publishes};
use crate::nats;
use crate::nats::connection::{self, Connection};
use crate::nats::info::ServerInfo;
use crate::nats::options::Options;
use crossbeam_channel::Receiver;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests that somebody waits for have numbers from here on; the caller's tokens are below.
const CALLS: u64 = 1 << 63;

/// How long an answer that is on its way to us may take.
const HANDED_ON: Duration = Duration::from_secs(1);

/// Whatever can be asked something of the JetStream API, and waited for.
pub trait Api {
    /// Asks, for instance `STREAM.INFO.orders`, and waits for the answer.
    ///
    /// # Errors
    /// [`Error::ApiTimeout`], or why there can be no answer.
    fn call(&self, api: &str, body: &[u8], timeout: Duration) -> Result<Vec<u8>, Error>;
}

/// Drops what else comes meanwhile, so it is for a link on which nothing is due.
impl Api for Link {
    fn call(&self, api: &str, body: &[u8], timeout: Duration) -> Result<Vec<u8>, Error> {
        let call = self.next_calls(1);
        let subject = format!("{}.{api}", self.api_prefix);
        self.send(call, &subject, None, body, timeout);
        self.wait_for(call, api, timeout)
    }
}

/// The answer to an event.
#[derive(Debug)]
pub struct Ack {
    /// The publish's `reply`.
    pub reply: u64,
    /// Stored, and where; or why not.
    pub result: Result<(PubAck, Arc<Origin>), AckError>,
}

/// What comes over a link.
pub type Answer = connection::Answer<Ack>;

/// The answer to [`Link::request`] or [`Link::put`].
pub type Reply = connection::Reply;

/// The link. Dropping it returns at once, and ends its connection.
pub struct Link {
    connection: Connection<Ack>,
    api_prefix: String,
    request_timeout: Duration,
    calls: AtomicU64,
}

impl Link {
    /// Tries the servers in turn. Spends at most `connect_timeout` on each. What goes wrong is worded for an operator.
    pub fn connect(options: &Options) -> Result<Link, nats::Error> {
        Link::connect_from(options, 0)
    }

    /// The same, beginning with the server of this number; see [`Connection::connect`].
    pub fn connect_from(options: &Options, first: usize) -> Result<Link, nats::Error> {
        let mut origins = Origins::default();
        let read_ack = move |reply: u64, status: Option<&str>, body: &[u8]| Ack {
            reply,
            result: parse_ack_from(body, status, &mut origins),
        };
        Ok(Link {
            connection: Connection::connect(options, first, read_ack)?,
            api_prefix: options.api_prefix.clone(),
            request_timeout: options.request_timeout,
            calls: AtomicU64::new(CALLS),
        })
    }

    /// Sends events, in this order. Never blocks: what the socket does not take waits, and its bound is the caller's window.
    /// `position_source`, `<slot> <system id> <timeline>`, begins their `Outbox-Position`. Sizes are the caller's to check
    /// against [`max_payload`](Self::max_payload). Without effect once the link is over.
    pub fn publish(&self, burst: Vec<Publish>, position_source: &Arc<str>) {
        let mut checked = burst.iter().map(|publish| wire::check(&publish.event));
        if let Some(error) = checked.find_map(Result::err) {
            return self.connection.close(error);
        }
        let burst = Publishes::new(burst, position_source);
        self.connection.publish(Box::new(burst));
    }

    /// What comes, for a `select!`: in the order it came, as much as one read has brought. It ends with the link, and
    /// [`lost`](Self::lost) knows why.
    pub fn answers(&self) -> &Receiver<Vec<Answer>> {
        self.connection.answers()
    }

    /// Asks the JetStream API, for instance `STREAM.INFO.orders`. Never blocks; the answer comes as a [`Reply`], and once the
    /// request timeout is over it is that none came. `token` is below 2⁶³.
    pub fn request(&self, token: u64, api: &str, body: &[u8]) {
        let subject = format!("{}.{api}", self.api_prefix);
        self.send(token, &subject, None, body, self.request_timeout);
    }

    /// Publishes to a subject that must have been stored to last at sequence `last` (0: never), as a key-value
    /// bucket's update is done (ADR-8); the PubAck comes as a [`Reply`].
    pub fn put(&self, token: u64, subject: &str, last: u64, body: &[u8]) {
        self.send(token, subject, Some(last), body, self.request_timeout);
    }

    /// What the subjects of JetStream API requests begin with.
    pub fn api_prefix(&self) -> &str {
        &self.api_prefix
    }

    /// As [`put`](Self::put), and waits for the PubAck as [`call`](Api::call) waits.
    pub fn put_now(
        &self,
        subject: &str,
        last: u64,
        body: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>, Error> {
        let call = self.next_calls(1);
        self.send(call, subject, Some(last), body, timeout);
        self.wait_for(call, subject, timeout)
    }

    /// As [`call`](Self::call) for `count` requests, `at_once` of them on their way at a time. `take` is given each answer
    /// with the request's number as it comes, in any order, so that no more than those are held; `timeout` is how long each
    /// may take. Hands on what else comes meanwhile.
    pub fn call_each(
        &self,
        count: usize,
        request: impl Fn(usize) -> (String, Vec<u8>),
        at_once: usize,
        timeout: Duration,
        mut take: impl FnMut(usize, &[u8]) -> Result<(), AckError>,
        mut other: impl FnMut(Answer),
    ) -> Result<(), Error> {
        let first = self.next_calls(count as u64);
        // which were asked and not answered, and by when they are to be
        let mut due = BTreeMap::new();
        let mut asked = 0;
        while asked < count || !due.is_empty() {
            while due.len() < at_once && asked < count {
                let (api, body) = request(asked);
                let subject = format!("{}.{api}", self.api_prefix);
                self.send(first + asked as u64, &subject, None, &body, timeout);
                due.insert(asked, Instant::now() + timeout);
                asked += 1;
            }
            let oldest = due.first_key_value().map(|(index, by)| (*index, *by));
            let (oldest, by) = oldest.unwrap_or((0, Instant::now()));
            let Some(answers) = self.next_answers(by + HANDED_ON)? else {
                return Err(Error::ApiTimeout {
                    api: request(oldest).0,
                    after: timeout,
                });
            };
            for answer in answers {
                let (token, result) = match answer {
                    Answer::Reply(Reply { token, result }) if token >= CALLS => (token, result),
                    answer => {
                        other(answer);
                        continue;
                    }
                };
                let index = token.checked_sub(first).map(|index| index as usize);
                let Some(index) = index.filter(|index| due.remove(index).is_some()) else {
                    continue;
                };
                let api = || request(index).0;
                let body = reply(result, api, timeout)?;
                take(index, &body).map_err(|source| Error::Api { api: api(), source })?;
            }
        }
        Ok(())
    }

    /// Asks the server for a sign of life, after what was sent before. Never blocks. [`connection::Answer::Pong`] names this PING by the
    /// number that is returned.
    pub fn ping(&self) -> u64 {
        self.connection.ping()
    }

    /// Yields once, why the link is over; it does so before the [`answers`](Self::answers) end.
    pub fn lost(&self) -> &Receiver<nats::Error> {
        self.connection.lost()
    }

    /// `host:port` of the server.
    pub fn server(&self) -> &str {
        self.connection.server()
    }

    /// What the server said of itself last.
    pub fn server_info(&self) -> Arc<ServerInfo> {
        self.connection.info()
    }

    /// The largest message in bytes that the server takes from this account, headers included. It may change.
    pub fn max_payload(&self) -> usize {
        self.connection.info().max_payload
    }

    fn next_calls(&self, count: u64) -> u64 {
        self.calls.fetch_add(count, Ordering::Relaxed)
    }

    fn send(&self, token: u64, subject: &str, last: Option<u64>, body: &[u8], timeout: Duration) {
        let last = last.map(|last| last.to_string());
        let header = last.as_deref();
        self.connection.request(&connection::Request {
            token,
            subject,
            header: header.map(|last| ("Nats-Expected-Last-Subject-Sequence", last)),
            body,
            deadline: Instant::now() + timeout,
        });
    }

    fn wait_for(&self, call: u64, asked: &str, timeout: Duration) -> Result<Vec<u8>, Error> {
        let mut deadline = Instant::now() + timeout;
        let mut is_late = false;
        loop {
            let Some(answers) = self.next_answers(deadline)? else {
                // one that has come at the last moment is not left to whoever asks next
                if !self.connection.forget(call) && !is_late {
                    is_late = true;
                    deadline = Instant::now() + HANDED_ON;
                    continue;
                }
                return Err(Error::ApiTimeout {
                    api: asked.into(),
                    after: timeout,
                });
            };
            let mut results = answers.into_iter().filter_map(|answer| match answer {
                Answer::Reply(Reply { token, result }) => (token == call).then_some(result),
                _ => None,
            });
            if let Some(result) = results.next() {
                return reply(result, || asked.into(), timeout);
            }
        }
    }

    /// `None`: nothing came before the deadline.
    fn next_answers(&self, deadline: Instant) -> Result<Option<Vec<Answer>>, Error> {
        match self.answers().recv_deadline(deadline) {
            Ok(answers) => Ok(Some(answers)),
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => Ok(None),
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                let why = self.lost().try_recv();
                Err(Error::Nats(why.unwrap_or_else(|_| nats::Error::Lost {
                    by: nats::EndedBy::Other,
                    server: self.server().into(),
                    reason: "the connection ended".into(),
                })))
            }
        }
    }
}

/// What somebody who waits for an answer is told of it.
fn reply(
    result: Result<Vec<u8>, connection::NoReply>,
    api: impl Fn() -> String,
    after: Duration,
) -> Result<Vec<u8>, Error> {
    result.map_err(|reason| match reason.into() {
        AckError::NoAnswer => Error::ApiTimeout { api: api(), after },
        source => Error::Api { api: api(), source },
    })
}
