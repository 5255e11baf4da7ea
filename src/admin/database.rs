//! Plain SQL over the `postgres` crate, on a session that was made as the relay makes its own.

use super::error::Error;
use crate::postgres::connection::Rows;
use crate::postgres::handover::hand_over;
use crate::postgres::{self as relay, ConnInfo, Connection};
use crate::relay::preflight::Query;
use ::postgres::config::SslMode;
use ::postgres::types::ToSql;
use ::postgres::{Client, Config, NoTls, Row, SimpleQueryMessage};
use fallible_iterator::FallibleIterator;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// The other client stands on the same machine and is let in at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// For an answer. Postgres itself ends a statement after 30 s, see [`Database::connect`].
const ANSWER_LIMIT: Duration = Duration::from_secs(40);

/// A session for SQL.
pub struct Database {
    client: Client,
    /// After which the server counts as gone.
    pub answer_limit: Duration,
    /// Version and cipher; `None`: without TLS.
    pub tls: Option<String>,
    /// `host:port`, or a socket's folder and port.
    pub peer: String,
    /// 150018 for 15.18.
    pub version: u32,
    /// As the server prints it.
    pub version_text: String,
}

/// What a session may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Look: every transaction is a read-only one.
    Read,
    /// Create and drop.
    Write,
}

impl Database {
    /// Connects to the same host, with the same rights and checks, as the relay would.
    pub fn connect(db: &ConnInfo, access: Access) -> Result<Database, Error> {
        Database::connect_within(db, access, ANSWER_LIMIT)
    }

    /// The same for somebody who waits no longer than this for an answer.
    pub fn connect_within(
        db: &ConnInfo,
        access: Access,
        answer_limit: Duration,
    ) -> Result<Database, Error> {
        let mut connection = Connection::connect(&db.without_replication())?;
        connection.pin_settings()?;
        let (tls, peer) = (connection.tls_description(), connection.peer().to_string());
        let version = connection.server_version_num();
        let version_text = connection.parameter("server_version").unwrap_or("unknown");
        let version_text = version_text.to_string();
        let offer = hand_over(connection, answer_limit)?;
        let client = Config::new()
            .hostaddr(offer.address.ip())
            .port(offer.address.port())
            .user(&offer.token)
            .ssl_mode(SslMode::Disable)
            .connect_timeout(CONNECT_TIMEOUT)
            .connect(NoTls)
            .map_err(|source| Error::Sql {
                doing: "take the session over".into(),
                source,
            })?;
        let mut database = Database {
            client,
            answer_limit,
            tls,
            peer,
            version,
            version_text,
        };
        database.run(
            "set the session up",
            match access {
                Access::Read => {
                    "SET statement_timeout = '30s'; SET lock_timeout = '10s'; SET default_transaction_read_only = on"
                }
                Access::Write => "SET statement_timeout = '30s'; SET lock_timeout = '10s'",
            },
        )?;
        Ok(database)
    }

    /// The rows of one statement.
    pub fn rows(
        &mut self,
        doing: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        self.ask(doing, |client| client.query(sql, parameters))
    }

    /// The rows of one statement, one after the other and not all at once, until `take` breaks off.
    pub fn each<B>(
        &mut self,
        doing: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
        mut take: impl FnMut(&Row) -> ControlFlow<B>,
    ) -> Result<Option<B>, Error> {
        self.ask(doing, |client| {
            let mut rows = client.query_raw(sql, parameters.iter().copied())?;
            while let Some(row) = rows.next()? {
                if let ControlFlow::Break(found) = take(&row) {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        })
    }

    /// The first row of one statement, if there is one.
    pub fn row(
        &mut self,
        doing: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        Ok(self.rows(doing, sql, parameters)?.into_iter().next())
    }

    /// Runs statements without parameters, in one transaction.
    pub fn run(&mut self, doing: &'static str, sql: &str) -> Result<(), Error> {
        self.ask(doing, |client| client.batch_execute(sql))
    }

    /// The session is ended when the limit has passed, of which the client sees only that it is gone.
    fn ask<T>(
        &mut self,
        doing: &'static str,
        question: impl FnOnce(&mut Client) -> Result<T, ::postgres::Error>,
    ) -> Result<T, Error> {
        let start = Instant::now();
        let after = self.answer_limit;
        question(&mut self.client).map_err(|source| {
            match source.as_db_error().is_none() && start.elapsed() >= after {
                true => Error::Postgres(relay::Error::Timeout { doing, after }),
                false => Error::Sql {
                    doing: doing.into(),
                    source,
                },
            }
        })
    }
}

impl Query for Database {
    type Error = Error;

    fn text_rows(&mut self, doing: &'static str, sql: &str) -> Result<Rows, Error> {
        let messages = self.ask(doing, |client| client.simple_query(sql))?;
        let row = |message| match message {
            SimpleQueryMessage::Row(row) => {
                let cells = (0..row.len()).map(|index| row.get(index).map(str::to_string));
                Some(cells.collect())
            }
            _ => None,
        };
        Ok(messages.into_iter().filter_map(row).collect())
    }

    fn server_version(&self) -> (u32, String) {
        (self.version, self.version_text.clone())
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}
