//! JetStream, asked one thing after the other. A question that ends the connection, as one that is not permitted does,
//! ends no more than that: the next one finds a new connection.

use super::client::Client;
use crate::config::Config;
use crate::jetstream::Error;
use crate::jetstream::client::{Api, Link};
use crate::jetstream::sources::Aggregate;
use crate::jetstream::streams::{self, Request, StoredMessage, StreamInfo, last_message_request};
use crate::nats;
use crate::nats::info::ServerInfo;
use crate::nats::options::Options;
use crate::relay::checkpoint::record::Record;
use crate::relay::checkpoint::store::key_subject;
use std::time::Duration;

/// A connection that a command can use.
pub trait Connect: Api + Sized {
    /// Connects and signs in.
    fn connect(options: &Options) -> Result<Self, nats::Error>;
    /// What the server said of itself.
    fn info(&self) -> ServerInfo;
    /// `host:port`.
    fn server(&self) -> String;
}

impl Connect for Link {
    fn connect(options: &Options) -> Result<Link, nats::Error> {
        Link::connect(options)
    }

    fn info(&self) -> ServerInfo {
        (*self.server_info()).clone()
    }

    fn server(&self) -> String {
        Link::server(self).into()
    }
}

impl Connect for Client {
    fn connect(options: &Options) -> Result<Client, nats::Error> {
        Client::connect(options)
    }

    fn info(&self) -> ServerInfo {
        self.info.clone()
    }

    fn server(&self) -> String {
        self.server.clone()
    }
}

/// The connection, and how to make another. `check` uses the relay's own, as it must find what the relay would find.
pub struct Bus<'a, C = Client> {
    options: &'a Options,
    connection: Option<C>,
    /// What the server said of itself.
    pub info: ServerInfo,
    /// `host:port`.
    pub server: String,
}

impl<C: Connect> Bus<'_, C> {
    /// Connects and signs in.
    pub fn connect(options: &Options) -> Result<Bus<'_, C>, Error> {
        let connection = C::connect(options)?;
        Ok(Bus {
            options,
            info: connection.info(),
            server: connection.server(),
            connection: Some(connection),
        })
    }

    /// Asks by way of the connection.
    pub fn ask<T>(
        &mut self,
        question: impl FnOnce(&C, Duration) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => C::connect(self.options)?,
        };
        let answer = question(&connection, self.options.request_timeout);
        if !matches!(answer, Err(Error::Nats(_))) {
            self.connection = Some(connection);
        }
        answer
    }

    /// Every stream that captures something of `subject`.
    pub fn streams(&mut self, subject: &str) -> Result<Vec<StreamInfo>, Error> {
        self.ask(|link, timeout| streams::list(link, subject, timeout))
    }

    /// One stream, or `None`.
    pub fn stream(&mut self, name: &str) -> Result<Option<StreamInfo>, Error> {
        self.ask(|link, timeout| streams::info(link, name, timeout))
    }

    /// A stream that copies from others, or `None`.
    pub fn aggregate(&mut self, name: &str) -> Result<Option<Aggregate>, Error> {
        let (api, body) = streams::info_request(name);
        self.ask(|link, timeout| {
            let answer = link.call(&api, &body, timeout)?;
            Aggregate::parse(&answer).map_err(|source| Error::Api { api, source })
        })
    }

    /// A stored message, or `None`.
    pub fn message(&mut self, request: Request) -> Result<Option<StoredMessage>, Error> {
        self.ask(|link, timeout| streams::message(link, request, timeout))
    }

    /// What the slot's key of the checkpoint holds; `None` also where the bucket cannot be read, of which `check` tells.
    pub fn record(&mut self, config: &Config, system_id: u64) -> Result<Option<Record>, Error> {
        let key = key_subject(&config.checkpoint, &config.slot, system_id);
        let bucket = format!("KV_{}", config.checkpoint);
        match self.message(last_message_request(&bucket, &key)) {
            Ok(message) => Ok(message.and_then(|it| serde_json::from_slice(&it.data).ok())),
            Err(crate::jetstream::Error::Api { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates or changes a stream; the request is
    /// [`create_bucket_request`](crate::jetstream::bucket::create_bucket_request) or of its kind.
    pub fn create(&mut self, (api, body): Request) -> Result<(), Error> {
        self.ask(|link, timeout| {
            let answer = link.call(&api, &body, timeout)?;
            match streams::parse_info(&answer) {
                Ok(_) => Ok(()),
                Err(source) => Err(Error::Api { api, source }),
            }
        })
    }
}
