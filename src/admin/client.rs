//! JetStream over the `nats` crate, for the commands that set up and look. The only place that names the crate.
//!
//! The relay's own handshake makes the session, so a command accepts what the relay accepts, in the same time, and the crate is
//! given it by [`handover`]. It is asked one thing after the other.
#![allow(
    deprecated,
    reason = "every item of the crate is marked deprecated in favour of an async one"
)]

use crate::jetstream::Error;
use crate::jetstream::ack::AckError;
use crate::jetstream::client::Api;
use crate::nats;
use crate::nats::handover::{self, Handover};
use crate::nats::handshake;
use crate::nats::info::ServerInfo;
use crate::nats::options::Options;
use crossbeam_channel::{RecvTimeoutError, select};
use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

/// A connection of the crate's.
pub struct Client {
    /// What the server said of itself.
    pub info: ServerInfo,
    /// `host:port`.
    pub server: String,
    api_prefix: String,
    /// Before the session, which ends when it is dropped.
    subscription: ::nats::Subscription,
    connection: ::nats::Connection,
    session: Handover,
    inbox: String,
    calls: Cell<u64>,
}

impl Client {
    /// Connects and signs in as the relay does.
    ///
    /// # Errors
    /// Why no server can be used, in words for an operator.
    pub fn connect(options: &Options) -> Result<Client, nats::Error> {
        let (_, session) = handshake::sign_in_to_any(options, 0, "")?;
        let (info, server) = (session.info.clone(), session.server.clone());
        let session = handover::hand_over(session)?;
        let lost = |error: io::Error| nats::Error::Lost {
            by: nats::EndedBy::Other,
            server: server.clone(),
            reason: error.to_string(),
        };
        let connection = ::nats::Options::with_token(&session.token)
            // the crate loads the system's certificates unless it is given a file, and fails where they are missing
            .add_root_certificate("/dev/null")
            // a session that is over is not made again; the one attempt finds nobody
            .max_reconnects(1)
            .reconnect_buffer_size(0)
            .error_callback(|_| ())
            .connect(session.address.to_string())
            .map_err(lost)?;
        let inbox = format!("{}.", connection.new_inbox());
        let subscription = connection.subscribe(&format!("{inbox}*")).map_err(lost)?;
        Ok(Client {
            info,
            server,
            api_prefix: options.api_prefix.clone(),
            subscription,
            connection,
            session,
            inbox,
            calls: Cell::new(0),
        })
    }
}

impl Api for Client {
    fn call(&self, api: &str, body: &[u8], timeout: Duration) -> Result<Vec<u8>, Error> {
        let deadline = Instant::now() + timeout;
        // an answer that comes after its deadline must not be taken for the next one's
        self.calls.set(self.calls.get() + 1);
        let reply = format!("{}{}", self.inbox, self.calls.get());
        let subject = format!("{}.{api}", self.api_prefix);
        let asked = self.connection.publish_request(&subject, &reply, body);
        let over = || {
            // the session has ended, and says so, before the crate's connection does
            let why = self.session.lost.recv_timeout(timeout);
            why.unwrap_or_else(|_: RecvTimeoutError| nats::Error::Lost {
                by: nats::EndedBy::Other,
                server: self.server.clone(),
                reason: "the connection ended".into(),
            })
        };
        asked.map_err(|_| over())?;
        loop {
            let message = select! {
                recv(self.subscription.receiver()) -> message => message.map_err(|_| over())?,
                recv(self.session.lost) -> why => return Err(why.unwrap_or_else(|_| over()).into()),
                default(deadline.saturating_duration_since(Instant::now())) => {
                    return Err(Error::ApiTimeout { api: api.into(), after: timeout });
                }
            };
            if message.subject != reply {
                continue;
            }
            return match message.is_no_responders() {
                false => Ok(message.data),
                true => Err(Error::Api {
                    api: api.into(),
                    source: AckError::NoResponders,
                }),
            };
        }
    }
}
