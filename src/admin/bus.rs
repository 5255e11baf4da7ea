//! NATS, asked one thing after the other. A question that ends the connection, as one that is not permitted does,
//! ends no more than that: the next one finds a new connection.

use crate::jetstream::Error;
use crate::jetstream::client::Link;
use crate::jetstream::streams::{self, Request, StoredMessage, StreamInfo};
use crate::nats;
use crate::nats::info::ServerInfo;
use crate::nats::options::Options;
use std::time::Duration;

/// The connection, and how to make it anew.
pub struct Bus<'a> {
    options: &'a Options,
    link: Option<Link>,
    /// What the server said of itself.
    pub info: ServerInfo,
    /// `host:port`.
    pub server: String,
}

impl Bus<'_> {
    /// Connects and signs in.
    pub fn connect(options: &Options) -> Result<Bus<'_>, Error> {
        let link = Link::connect(options)?;
        Ok(Bus {
            options,
            info: (*link.server_info()).clone(),
            server: link.server().to_string(),
            link: Some(link),
        })
    }

    /// Asks by way of the connection.
    pub fn ask<T>(
        &mut self,
        question: impl FnOnce(&Link, Duration) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let link = match self.link.take() {
            Some(link) => link,
            None => Link::connect(self.options)?,
        };
        let answer = question(&link, self.options.request_timeout);
        if !matches!(
            answer,
            Err(Error::Nats(
                nats::Error::Lost { .. } | nats::Error::Permission { .. }
            ))
        ) {
            self.link = Some(link);
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

    /// A stored message, or `None`.
    pub fn message(&mut self, request: Request) -> Result<Option<StoredMessage>, Error> {
        self.ask(|link, timeout| streams::message(link, request, timeout))
    }

    /// Creates a stream; the request is [`streams::create_bucket_request`] or of its kind.
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
